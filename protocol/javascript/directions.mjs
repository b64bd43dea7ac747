/** Direction streams (specification, section 1). */

import { createHash } from "node:crypto";
import { floatBytes } from "./bytes.mjs";

const BITS = { mk1: 16, rademacher: 1 };
const QUANTILES_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f";
const SCALE = 0.9999898592748738; // 0x1.fffeabbbd59e9p-1
const TWO_32 = 2 ** 32;

/** The lower 32 bits of a product of two u32. */
const lower = (a, b) => Math.imul(a, b) >>> 0;

/** Its upper 32 bits: the doubles here are off by less than 2^12, which is far from half of 2^32. */
const upper = (a, b) => Math.round((a * b - lower(a, b)) / TWO_32);

const product = new Uint32Array(4);

/** The 128 bits of (a1, a0) · (b1, b0), halves of u64, into `product`, lowest first. */
function multiply64(a1, a0, b1, b0) {
  const second = upper(a0, b0) + lower(a0, b1) + lower(a1, b0);
  const third = Math.floor(second / TWO_32) + upper(a0, b1) + upper(a1, b0) + lower(a1, b1);
  product[0] = lower(a0, b0);
  product[1] = second;
  product[2] = third;
  product[3] = Math.floor(third / TWO_32) + upper(a1, b1);
}

/**
 * A block of Philox4x64-10 with key (seed, 0) and counter (block + 1, 0, 0, 0): four words as eight u32, lowest first.
 * A word is two u32; `>>> 0` keeps 32 bits.
 */
export function philox(seed, block) {
  const c = new Uint32Array([(block + 1) % TWO_32, Math.floor((block + 1) / TWO_32), 0, 0, 0, 0, 0, 0]);
  return rounds(c, [Number(seed & 0xffffffffn), Number(seed >> 32n), 0, 0]);
}

/** Ten rounds over counter `c` with key `k`, both as u32, lowest first. */
export function rounds(c, k) {
  let [a0, a1, b0, b1] = k;
  for (let round = 0; round < 10; round++) {
    const [x0, x1, y0, y1] = [c[2] ^ a0, c[3] ^ a1, c[6] ^ b0, c[7] ^ b1];
    const [z0, z1] = [c[4], c[5]];
    multiply64(0xd2e7470e, 0xe14c6c93, c[1], c[0]);
    c[4] = product[2] ^ y0;
    c[5] = product[3] ^ y1;
    c[6] = product[0];
    c[7] = product[1];
    multiply64(0xca5a8263, 0x95121157, z1, z0);
    c[0] = product[2] ^ x0;
    c[1] = product[3] ^ x1;
    c[2] = product[0];
    c[3] = product[1];
    const a = a0 + 0x7f4a7c15;
    a1 = (a1 + 0x9e3779b9 + Math.floor(a / TWO_32)) >>> 0;
    a0 = a >>> 0;
    const b = b0 + 0x84caa73b;
    b1 = (b1 + 0xbb67ae85 + Math.floor(b / TWO_32)) >>> 0;
    b0 = b >>> 0;
  }
  return c;
}

/** Values start … stop − 1 of a stream; `seed` is a BigInt below 2^64. */
export function direction(stream, seed, start, stop) {
  const bits = BITS[stream];
  const perBlock = 256 / bits;
  const values = new Float32Array(stop - start);
  for (let j = start, block = null, at = -1; j < stop; j++) {
    if (Math.floor(j / perBlock) !== at) {
      at = Math.floor(j / perBlock);
      block = philox(seed, at);
    }
    const bit = bits * (j % perBlock);
    const part = block[bit >>> 5] >>> (bit & 31);
    values[j - start] = stream === "mk1" ? QUANTILES[part & 0xffff] : 2 * (part & 1) - 1;
  }
  return values;
}

/** Wichura's AS 241 as far as the table needs it: 2^-17 ≤ p ≤ 1 − 2^-17. Coefficients: highest power first. */
const CENTRAL = [
  [2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
    13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608],
  [5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
    5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1],
];
const TAIL = [
  [7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
    3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734],
  [1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
    0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1],
];

const polynomial = (coefficients, r) => coefficients.reduce((sum, coefficient) => sum * r + coefficient);

function normalQuantile(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return (polynomial(CENTRAL[0], r) * q) / polynomial(CENTRAL[1], r);
  }
  const r = Math.sqrt(-Math.log(q < 0 ? p : 1 - p)) - 1.6;
  const x = polynomial(TAIL[0], r) / polynomial(TAIL[1], r);
  return q < 0 ? -x : x;
}

/** The 65,536 quantiles, checked: what is not this table gives another model. */
function quantileTable() {
  const table = Float32Array.from({ length: 65536 }, (_, i) => normalQuantile((i + 0.5) / 65536) / SCALE);
  if (createHash("sha256").update(floatBytes(table)).digest("hex") !== QUANTILES_SHA256) {
    throw new Error("this machine computes another quantile table");
  }
  return table;
}

const QUANTILES = quantileTable();
