/** The path of theta: seeds, apply, digests (specification, section 2). */

import { createHash } from "node:crypto";
import { floatBytes, pack, shortHash } from "./bytes.mjs";
import { direction } from "./directions.mjs";

export const NO_DIGEST = "0".repeat(32);

/** The seed of direction `step` of a lane, a BigInt; `runId` is a Buffer of 16 bytes. */
export function seedFor(runId, version, lane, step) {
  return createHash("sha256").update(runId).update(pack.u32(version, lane, step)).digest().readBigUInt64LE();
}

/** theta − c·z in place. `Math.fround` rounds the product; a Float32Array rounds the difference. */
export function apply(theta, z, c) {
  for (let j = 0; j < theta.length; j++) theta[j] -= Math.fround(c * z[j]);
}

/** The factor of one direction in a node's own walk: f32(lr / K · g), a zero is +0. */
export function ownCoefficient(lr, perturbations, g) {
  return Math.fround((lr / perturbations) * g) + 0;
}

/** Digest of theta, hex. */
export function digestOf(theta) {
  return shortHash(floatBytes(theta)).toString("hex");
}

/**
 * Apply an entry to theta, in place: its terms, each drawn from the seed of the theta that it was measured from, then
 * what its displacement decodes to, or null.
 */
export function applyEntry(theta, entry, displacement, runId, stream) {
  for (const { lane, step, coefficient, age } of entry.terms) {
    apply(theta, direction(stream, seedFor(runId, entry.version - age, lane, step), 0, theta.length), coefficient);
  }
  if (displacement) for (let j = 0; j < theta.length; j++) theta[j] += displacement[j];
}
