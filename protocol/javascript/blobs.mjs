/** Getting a blob from the server by `want`, some chunks at a time (specification, section 5). */

import { need } from "./bytes.mjs";
import { MAX_CHUNK_BYTES } from "./frames.mjs";

const CHUNKS_A_WANT = 16;
const PATIENCE_S = 3;
const MAX_BLOB_BYTES = 2 ** 28;

/** Collects the chunks of one blob; `ask` is called with the indices to ask for. Times are in seconds. */
export class Fetch {
  constructor(name, size, ask) {
    need(size >= 1 && size <= MAX_BLOB_BYTES, `a blob of ${size} bytes`, "TooLarge");
    this.name = name;
    this.size = size;
    this.ask = ask;
    this.startOver();
  }

  /** Forget all chunks: together they were not the blob. */
  startOver() {
    this.parts = new Array(Math.ceil(this.size / MAX_CHUNK_BYTES)).fill(null);
    this.asked = [];
    this.askAgainAt = 0;
    this.silences = 0; // in a row, each of PATIENCE_S without a new chunk
  }

  /** Chunks come unasked: ask only after a silence, which begins now, or with the newest chunk. */
  listen(now) {
    this.asked = this.missing;
    this.askAgainAt = now + PATIENCE_S;
  }

  get missing() {
    return this.parts.flatMap((part, i) => (part ? [] : [i]));
  }

  /** Ask for the next chunks where all that were asked for are there, or again after a silence. */
  advance(now) {
    const missing = this.missing;
    if (missing.length === 0) return;
    const silent = this.asked.length > 0 && now >= this.askAgainAt;
    if (silent) this.silences += 1;
    if (silent || !missing.some((index) => this.asked.includes(index))) {
      this.asked = missing.slice(0, CHUNKS_A_WANT);
      this.askAgainAt = now + PATIENCE_S;
      this.ask(this.asked);
    }
  }

  /** Take a chunk; one of another blob is no concern of ours. The next ones are asked for by `advance`. */
  add(chunk, now) {
    if (chunk.blob !== this.name) return;
    const expected = Math.min(MAX_CHUNK_BYTES, this.size - chunk.index * MAX_CHUNK_BYTES);
    const fits = chunk.size === this.size && chunk.count === this.parts.length && chunk.data.length === expected;
    need(fits, `chunk ${chunk.index} does not fit its blob`);
    if (!this.parts[chunk.index]) {
      this.parts[chunk.index] = Buffer.from(chunk.data);
      this.silences = 0;
      this.askAgainAt = now + PATIENCE_S;
    }
  }

  /** The blob, or null while chunks lack. */
  get blob() {
    return this.missing.length === 0 ? Buffer.concat(this.parts) : null;
  }
}
