/** Getting a blob from the server by `want`, some chunks at a time (specification, section 5). */

import { need } from "./bytes.mjs";
import { MAX_CHUNK_BYTES } from "./frames.mjs";

const CHUNKS_A_WANT = 16;
const PATIENCE_S = 3; // at first; on slow links, chunks are waited for twice as long as the newest took
const LONGEST_PATIENCE_S = 60;
const MAX_BLOB_BYTES = 2 ** 28;

/**
 * Collects the chunks of one blob; `ask` is called with the indices to ask for. It is given up after `most` silences
 * in a row. Times are in seconds.
 */
export class Fetch {
  constructor(name, size, ask, most = Infinity) {
    need(size >= 1 && size <= MAX_BLOB_BYTES, `a blob of ${size} bytes`, "TooLarge");
    Object.assign(this, { name, size, ask, most });
    this.hasAsked = false;
    this.newsAt = this.askedAt = 0;
    this.chunkTook = 0;
    this.patience = PATIENCE_S;
    this.silences = 0; // since the newest chunk
    this.startOver();
  }

  /** Forget all chunks: together they were not the blob. */
  startOver() {
    this.parts = new Array(Math.ceil(this.size / MAX_CHUNK_BYTES)).fill(null);
    this.asked = []; // null: what lacks comes without being asked for again
  }

  /** Chunks come unasked: ask only after a silence, which begins now, or with the newest chunk. */
  listen(now) {
    this.asked = null;
    this.newsAt = now;
  }

  /** What was asked, or its answer, went with a connection; does nothing before the first question. */
  askAgain() {
    if (!this.hasAsked) return;
    this.asked = [];
    this.patience = this.usualPatience;
  }

  get usualPatience() {
    return Math.min(Math.max(PATIENCE_S, 2 * this.chunkTook), LONGEST_PATIENCE_S);
  }

  get missing() {
    return this.parts.flatMap((part, i) => (part ? [] : [i]));
  }

  get isGivenUp() {
    return this.silences >= this.most;
  }

  /**
   * Ask for the next chunks where all that were asked for are there. After a silence, ask for one alone, the last, and
   * wait twice as long: another one that comes before it says that those asked for are still on their way.
   */
  advance(now) {
    const missing = this.missing;
    if (missing.length === 0 || this.isGivenUp) return;
    if (this.asked !== null && !missing.some((index) => this.asked.includes(index))) {
      this.question(missing.slice(0, CHUNKS_A_WANT), now);
    } else if (now >= Math.max(this.newsAt, this.askedAt) + this.patience) {
      this.silences += 1;
      if (this.isGivenUp) return;
      this.patience = Math.min(2 * this.patience, LONGEST_PATIENCE_S);
      this.question(missing.slice(-1), now);
    }
  }

  question(chunks, now) {
    this.newsAt ||= now;
    this.asked = chunks;
    this.hasAsked = true;
    this.askedAt = now;
    this.ask(chunks);
  }

  /** Take a chunk; one of another blob is no concern of ours. The next ones are asked for by `advance`. */
  add(chunk, now) {
    if (chunk.blob !== this.name) return;
    const expected = Math.min(MAX_CHUNK_BYTES, this.size - chunk.index * MAX_CHUNK_BYTES);
    const fits = chunk.size === this.size && chunk.count === this.parts.length && chunk.data.length === expected;
    need(fits, `chunk ${chunk.index} does not fit its blob`);
    if (this.parts[chunk.index]) return;
    this.parts[chunk.index] = Buffer.from(chunk.data);
    this.chunkTook = now - this.newsAt;
    this.newsAt = now;
    this.silences = 0;
    this.patience = this.usualPatience;
    if (this.asked !== null && !this.asked.includes(chunk.index)) this.asked = null;
  }

  /** The blob, or null while chunks lack. */
  get blob() {
    return this.missing.length === 0 ? Buffer.concat(this.parts) : null;
  }
}
