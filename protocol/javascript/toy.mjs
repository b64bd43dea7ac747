/** The toy engine, its data and its local steps (specification, section 7). */

import { readFileSync } from "node:fs";
import { createHash } from "node:crypto";
import { direction, philox } from "./directions.mjs";
import { pack } from "./bytes.mjs";
import { Ended } from "./errors.mjs";
import { apply, ownCoefficient, seedFor } from "./path.mjs";

const REMEDY = 'give JSON lines such as {"seed": 7}';

/** Rows of JSON lines such as {"seed": 7}, as BigInt seeds; an end in words names the line that is none. */
export function readRows(path) {
  const lines = textOf(path).split("\n").map((line, i) => [line, `data: ${path}:${i + 1}`]);
  const rows = lines.filter(([line]) => line.trim()).map(([line, where]) => readRow(line, where));
  if (rows.length === 0) throw new Ended(3, `data: ${path}: holds no rows; ${REMEDY}`);
  return rows;
}

function textOf(path) {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new Ended(3, `data: ${path}: cannot be read (${error.code}); ${REMEDY}`);
  }
}

/** Numbers above 2^53 are rounded by JSON.parse, so they are refused. */
function readRow(line, where) {
  let row;
  try {
    row = JSON.parse(line);
  } catch {
    throw new Ended(3, `${where}: is not JSON; ${REMEDY}`);
  }
  if (!Number.isSafeInteger(row?.seed) || row.seed < 0) {
    throw new Ended(3, `${where}: has no integer seed from 0 to 2^53 - 1; ${REMEDY}`);
  }
  return BigInt(row.seed);
}

/** Row numbers of local step `step`, counted over the node's whole run: each epoch is a permutation of its own. */
export function batchRows(runId, node, rows, batchSize, step) {
  const numbers = [];
  for (let at = step * batchSize, order = null; numbers.length < batchSize; at++) {
    if (order === null || at % rows === 0) order = permutation(runId, node, rows, Math.floor(at / rows));
    numbers.push(order[at % rows]);
  }
  return numbers;
}

/** 0 … rows − 1, sorted by the raw Philox words with key SHA-256(run id ‖ node ‖ u32 epoch)[:8]. */
function permutation(runId, node, rows, epoch) {
  const key = createHash("sha256").update(runId).update(node).update(pack.u32(epoch)).digest().readBigUInt64LE();
  const words = [];
  for (let block = 0; words.length < rows; block++) {
    const found = philox(key, block);
    for (let i = 0; i < 8; i += 2) words.push((BigInt(found[i + 1]) << 32n) | BigInt(found[i]));
  }
  const order = Array.from({ length: rows }, (_, row) => row);
  return order.sort((a, b) => (words[a] < words[b] ? -1 : words[a] > words[b] ? 1 : a - b));
}

/** f32(½ · mean_j((theta_j − target_j)²)): the difference is rounded to f32, the rest is f64. */
export function loss(theta, target) {
  let sum = 0;
  for (let j = 0; j < theta.length; j++) {
    const difference = Math.fround(theta[j] - target[j]);
    sum += difference * difference;
  }
  return Math.fround(0.5 * (sum / theta.length));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** The projected gradient and the mean loss at theta along z. */
export function projectedGradient(theta, z, eps, targets) {
  const shift = z.map((value) => value * eps);
  const at = (sign) => mean(targets.map((target) => loss(theta.map((value, j) => value + sign * shift[j]), target)));
  const [plus, minus] = [at(1), at(-1)];
  return { g: Math.fround((plus - minus) / (2 * eps)), loss: (plus + minus) / 2 };
}

/** A node with the toy engine: its rows and its place in them. */
export class Toy {
  constructor(node, rows, run) {
    this.node = node;
    this.rows = rows;
    this.run = run;
    this.runId = pack.hex(run.run);
    this.steps = 0; // since this process began; where it starts is the node's own affair
    this.targets = new Map();
  }

  /** A row pulls to a point of its own, which is drawn once. */
  target(row) {
    const seed = this.rows[row];
    if (!this.targets.has(seed)) this.targets.set(seed, direction("mk1", seed, 0, this.run.weights));
    return this.targets.get(seed);
  }

  /** The local steps of a round from theta, which stays as it is: scalars and mean loss. */
  localSteps(theta, { version, lane, steps, eps }) {
    const { perturbations, batch_size: size, stream, lr } = this.run;
    const [scalars, losses] = [[], []];
    let walker = theta;
    for (let step = 0; step < steps; step++, this.steps++) {
      const rows = batchRows(this.runId, this.node, this.rows.length, size, this.steps);
      const targets = rows.map((row) => this.target(row));
      const ahead = walker.slice();
      for (let i = 0; i < perturbations; i++) {
        const seed = seedFor(this.runId, version, lane, step * perturbations + i);
        const z = direction(stream, seed, 0, theta.length);
        const found = projectedGradient(walker, z, eps, targets);
        scalars.push(found.g);
        losses.push(found.loss);
        apply(ahead, z, ownCoefficient(lr, perturbations, found.g));
      }
      walker = ahead;
    }
    return { scalars, loss: mean(losses) };
  }
}
