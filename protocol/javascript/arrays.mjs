/** Arrays: byte-shuffled, in one zstd frame (specification, section 5). */

import { decompress } from "fzstd";
import { need } from "./bytes.mjs";

const DTYPES = { float32: [1, 4], uint32: [2, 4], uint16: [3, 2] };
const MAX_RATIO = 2 ** 15;

/** The little-endian bytes of an array that must have this dtype and count. */
export function readArray(reader, dtype, count) {
  const [code, width] = DTYPES[dtype];
  const found = { code: reader.u8(), count: reader.u32(), packed: reader.u32() };
  need(found.code >= 1 && found.code <= 3, `dtype code ${found.code} is unknown`, "UnknownType");
  need(found.code === code && found.count === count, `is not ${count} × ${dtype}`);
  return unshuffled(unpacked(reader.take(found.packed), count * width), count);
}

/** Elements of whose bytes all first come first, then all second, and so on. */
export function unshuffled(planes, count) {
  const width = planes.length / count;
  const values = Buffer.alloc(planes.length);
  for (let i = 0; i < planes.length; i++) values[(i % count) * width + Math.floor(i / count)] = planes[i];
  return values;
}

/** Decompress what must be one zstd frame of exactly `size` bytes. */
export function unpacked(packed, size) {
  need(size <= MAX_RATIO * packed.length, `${size} bytes cannot come of ${packed.length}`, "TooLarge");
  try {
    need(frameSize(packed, size) === packed.length, "there are bytes behind the zstd frame");
    const content = filled(packed, size, 0);
    need(content.at(-1) !== 0 || filled(packed, size, 1).at(-1) === 0, "decompresses to fewer bytes");
    return content;
  } catch (error) {
    need(false, `does not decompress (${error.message})`);
  }
}

/** fzstd does not say how many bytes it wrote: the last one stays as it was here where that were fewer. */
function filled(packed, size, last) {
  const content = new Uint8Array(size);
  content[size - 1] = last;
  return decompress(packed, content);
}

/** The length of the zstd frame at the start, whose declared content size must be `size` (RFC 8878, 3.1.1). */
function frameSize(data, size) {
  need(data.readUInt32LE(0) === 0xfd2fb528, "is not a zstd frame");
  const descriptor = data.readUInt8(4);
  const single = (descriptor >> 5) & 1;
  const dictionary = [0, 1, 2, 4][descriptor & 3];
  const width = [single, 2, 4, 8][descriptor >> 6];
  need(width > 0 && !(descriptor & 8), "does not declare its size");
  let at = 5 + (1 - single) + dictionary;
  const bytes = Buffer.concat([data.subarray(at, at + width), Buffer.alloc(8 - width)]);
  need(Number(bytes.readBigUInt64LE()) + (width === 2 ? 256 : 0) === size, "declares another size");
  at += width;
  for (let last = false; !last; ) {
    const header = data.readUIntLE(at, 3);
    const [kind, length] = [(header >> 1) & 3, header >> 3];
    last = (header & 1) === 1;
    at += 3 + (kind === 1 ? 1 : length); // kind 1 repeats one byte
  }
  return at + (descriptor & 4);
}
