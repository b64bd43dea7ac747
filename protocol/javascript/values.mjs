/** The values blob: an encoded displacement (specification, section 5.4). */

import { unpacked, unshuffled } from "./arrays.mjs";
import { Reader, floats, need, shortHash } from "./bytes.mjs";

const MAGIC = "4d4b56414c53010a";
const BLOCK = 128; // values that share a scale
const LARGEST_CODE = 127;
const SMALLEST_SCALE = 2 ** -126;
const LARGEST_SCALE = 2.6793883890187504e36; // the largest f32 whose product with 127 is finite

const CODECS = [undefined, decodeFloat32, decodeBfloat16, decodeInt8];

/** What a values blob of this hash (hex) and run stands for: Float32Array of n, all finite. */
export function openValues(blob, name, weights) {
  need(blob.length <= 5 * weights + 2 ** 16, "values of too many bytes", "TooLarge");
  need(shortHash(blob).toString("hex") === name, "values have another hash");
  const reader = new Reader(blob);
  need(reader.hex(8) === MAGIC, "are no values of this version", "BadMagic");
  const decode = CODECS[reader.u8()];
  need(decode, "values have an unknown codec", "UnknownType");
  need(reader.u32() === weights, `values are not ${weights}`);
  const values = decode(reader.take(reader.left), weights);
  need(values.every(Number.isFinite), "values are not all finite");
  return values;
}

function decodeFloat32(packed, count) {
  return floats(unshuffled(unpacked(packed, 4 * count), count));
}

/** The upper halves of f32. */
function decodeBfloat16(packed, count) {
  const halves = unshuffled(unpacked(packed, 2 * count), count);
  const whole = Buffer.alloc(4 * count);
  for (let i = 0; i < count; i++) halves.copy(whole, 4 * i + 2, 2 * i, 2 * i + 2);
  return floats(whole);
}

/** Codes −127 … 127, then a scale a block; the product is rounded to f32. */
function decodeInt8(packed, count) {
  const blocks = Math.ceil(count / BLOCK);
  const raw = Buffer.from(unpacked(packed, count + 4 * blocks));
  const scales = floats(unshuffled(raw.subarray(count), blocks));
  const fits = (scale) => scale === 0 || (scale >= SMALLEST_SCALE && scale <= LARGEST_SCALE);
  need(scales.every(fits), "a scale is out of range");
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const code = raw.readInt8(i);
    need(code >= -LARGEST_CODE, "a code is out of range");
    values[i] = code * scales[Math.floor(i / BLOCK)];
  }
  return values;
}
