/** Little-endian bytes, read forward and written; a refusal carries the error's name (specification, section 4). */

import { createHash } from "node:crypto";

/** Bytes that are not of this protocol. */
export class Refused extends Error {
  constructor(name, problem) {
    super(problem);
    this.name = name;
  }
}

/** Refuse where it does not hold. */
export function need(holds, problem, name = "BadValue") {
  if (!holds) throw new Refused(name, problem);
}

/** First 16 bytes of SHA-256. */
export function shortHash(...parts) {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  return hash.digest().subarray(0, 16);
}

/** Reads forward; nothing is taken that is not there. */
export class Reader {
  constructor(data) {
    this.data = Buffer.from(data.buffer, data.byteOffset, data.length);
    this.at = 0;
  }

  take(count) {
    need(count <= this.left, `${count} bytes are more than the ${this.left} left`, "Truncated");
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  get left() {
    return this.data.length - this.at;
  }

  end() {
    need(this.left === 0, `${this.left} bytes too many`, "Truncated");
  }

  u8() {
    return this.take(1).readUInt8();
  }

  u16() {
    return this.take(2).readUInt16LE();
  }

  u32() {
    return this.take(4).readUInt32LE();
  }

  u64() {
    return this.take(8).readBigUInt64LE();
  }

  f32() {
    return this.take(4).readFloatLE();
  }

  hex(count) {
    return this.take(count).toString("hex");
  }

  /** `count` values of one kind: list(3, "u16"). */
  list(count, kind) {
    return Array.from({ length: count }, () => this[kind]());
  }
}

/** Bytes of numbers of one kind. */
export const pack = {
  u8: (...values) => Buffer.from(values),
  u16: (...values) => packed(values, 2, "writeUInt16LE"),
  u32: (...values) => packed(values, 4, "writeUInt32LE"),
  u64: (...values) => packed(values, 8, "writeBigUInt64LE"),
  f32: (...values) => packed(values, 4, "writeFloatLE"),
  hex: (...values) => Buffer.from(values.join(""), "hex"),
};

function packed(values, width, write) {
  const data = Buffer.alloc(width * values.length);
  values.forEach((value, i) => data[write](value, width * i));
  return data;
}

/** The bytes of a long list of u32. */
export const wordBytes = (values) => packed(values, 4, "writeUInt32LE");

/** The bytes of a long list of f32. */
export const floatBytes = (values) => packed(values, 4, "writeFloatLE");

/** The f32 of little-endian bytes. */
export function floats(data) {
  return Float32Array.from({ length: data.length / 4 }, (_, i) => data.readFloatLE(4 * i));
}
