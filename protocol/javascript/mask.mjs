/** The mask file, and the blobs of masks and snapshots (specification, sections 3 and 5). */

import { readArray } from "./arrays.mjs";
import { Reader, Refused, floatBytes, floats, need, pack, shortHash, wordBytes } from "./bytes.mjs";
import { digestOf } from "./path.mjs";

const MASK_MAGIC = "4d4b4d41534b010a";
const SNAPSHOT_MAGIC = "4d4b534e4150010a";
const MAX_BLOB_WEIGHTS = 2 ** 26;

/** Header and records of a mask file: its matrices without their numbers. */
function readHeader(reader) {
  need(reader.hex(8) === MASK_MAGIC, "is not a mask file of this version");
  const mask = { fingerprint: reader.hex(32), tokenizer_fingerprint: reader.hex(32), matrices: [] };
  const count = reader.u32();
  need(count >= 1 && count <= 65536, `${count} matrices`);
  for (let i = 0; i < count; i++) {
    const [nameBytes, dimensions, weights] = [reader.u16(), reader.u8(), reader.u32()];
    need(nameBytes >= 1 && nameBytes <= 1024 && dimensions >= 1 && dimensions <= 8 && weights >= 1, "a bad record");
    const shape = reader.list(dimensions, "u32");
    mask.matrices.push({ rawName: reader.take(nameBytes), shape, weights });
  }
  return mask;
}

/** A mask file's meaning: its matrices with name, shape, indices, theta_0, g_p. */
export function decodeMask(data) {
  try {
    const reader = new Reader(data);
    const mask = readHeader(reader);
    const total = mask.matrices.reduce((sum, matrix) => sum + matrix.weights, 0);
    need(reader.left === 12 * total, "has another length");
    for (const matrix of mask.matrices) matrix.indices = reader.list(matrix.weights, "u32");
    for (const matrix of mask.matrices) matrix.theta_0 = floats(reader.take(4 * matrix.weights));
    for (const matrix of mask.matrices) matrix.g_p = floats(reader.take(4 * matrix.weights));
    mask.matrices.forEach((matrix, i) => checkMatrix(matrix, mask.matrices[i - 1]));
    return mask;
  } catch (error) {
    throw error instanceof TypeError || error instanceof Refused ? new Refused("MaskError", error.message) : error;
  }
}

function checkMatrix(matrix, before) {
  matrix.name = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(matrix.rawName);
  const size = matrix.shape.reduce((product, dimension) => product * dimension, 1);
  const { indices, rawName } = matrix;
  need(size >= 1 && size < 2 ** 32 && indices.at(-1) < size, `${matrix.name}: an index or the shape is out of range`);
  need(indices.every((index, i) => i === 0 || indices[i - 1] < index), `${matrix.name}: indices do not ascend`);
  need([...matrix.theta_0, ...matrix.g_p].every(Number.isFinite), `${matrix.name}: a value is not finite`);
  need(!before || Buffer.compare(before.rawName, rawName) < 0, `${matrix.name}: names do not ascend`);
}

/** The mask file, as a Buffer. */
export function encodeMask({ fingerprint, tokenizer_fingerprint: tokenizer, matrices }) {
  const head = [pack.hex(MASK_MAGIC, fingerprint, tokenizer), pack.u32(matrices.length)];
  const records = matrices.flatMap(({ name, shape, indices }) => {
    const bytes = Buffer.from(name);
    return [pack.u16(bytes.length), pack.u8(shape.length), pack.u32(indices.length, ...shape), bytes];
  });
  const numbers = [
    ...matrices.map((matrix) => wordBytes(matrix.indices)),
    ...matrices.map((matrix) => floatBytes(matrix.theta_0)),
    ...matrices.map((matrix) => floatBytes(matrix.g_p)),
  ];
  return Buffer.concat([...head, ...records, ...numbers]);
}

/** theta_0 of all matrices, in mask order. */
export function thetaOf(mask) {
  return Float32Array.from(mask.matrices.flatMap((matrix) => [...matrix.theta_0]));
}

/** The mask file in a mask blob; `expected` is the mask hash, hex, and `weights` its n. */
export function openMaskBlob(blob, expected, weights) {
  const reader = new Reader(blob);
  const [headBytes, size] = [reader.u32(), reader.u32()];
  need(size === weights && size <= MAX_BLOB_WEIGHTS, `has ${size} weights, expected ${weights}`);
  const head = reader.take(headBytes);
  const gaps = readArray(reader, "uint32", size);
  const numbers = [readArray(reader, "float32", size), readArray(reader, "float32", size)];
  reader.end();
  const { matrices } = readHeader(new Reader(head));
  need(matrices.reduce((sum, matrix) => sum + matrix.weights, 0) === size, "the matrices' weights do not add up");
  const file = Buffer.concat([head, indicesOf(gaps, matrices), ...numbers]);
  need(shortHash(file).toString("hex") === expected, "has another hash than the run says");
  return file;
}

/** A gap is counted from the index before it in the same matrix. */
function indicesOf(gaps, matrices) {
  const indices = Buffer.alloc(gaps.length);
  let at = 0;
  for (const { weights } of matrices) {
    for (let i = 0, index = 0; i < weights; i++, at += 4) {
      index += gaps.readUInt32LE(at);
      need(index < 2 ** 32, "an index is above 2^32");
      indices.writeUInt32LE(index, at);
    }
  }
  return indices;
}

/** A snapshot blob's meaning; `expected` is its hash, hex, and `weights` the run's n. */
export function openSnapshot(blob, expected, weights) {
  need(shortHash(blob).toString("hex") === expected, "has another hash than was offered");
  const reader = new Reader(blob);
  need(reader.hex(8) === SNAPSHOT_MAGIC, "is not a snapshot of this version", "BadMagic");
  const found = { run: reader.hex(16), version: reader.u32(), head: reader.hex(16), digest: reader.hex(16) };
  need(reader.u32() === weights, `has not ${weights} weights`);
  found.theta = floats(readArray(reader, "float32", weights));
  reader.end();
  need(digestOf(found.theta) === found.digest, "its theta has another digest");
  return found;
}
