/** `node check.mjs [GOLDEN]`: decode and re-encode every golden vector that concerns a node; exit 0 where all hold. */

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { isDeepStrictEqual } from "node:util";
import { readArray } from "./arrays.mjs";
import { Reader, floatBytes, floats, shortHash } from "./bytes.mjs";
import { decodeNodeStatus, decodeRun, decodeServerState } from "./control.mjs";
import { direction, rounds } from "./directions.mjs";
import { decode, encode, entryHash } from "./frames.mjs";
import { decodeMask, encodeMask, openMaskBlob, openSnapshot, thetaOf } from "./mask.mjs";
import { NO_DIGEST, apply, applyEntry, digestOf, seedFor } from "./path.mjs";
import { batchRows, projectedGradient } from "./toy.mjs";
import { openValues } from "./values.mjs";

const golden = process.argv[2] ?? fileURLToPath(new URL("../golden", import.meta.url));
const bytes = (name) => readFileSync(`${golden}/${name}`);
const read = (name) => JSON.parse(bytes(name));
const hexOf = (text) => (text.startsWith("00*") ? Buffer.alloc(Number(text.slice(3))) : Buffer.from(text, "hex"));
const sha256 = (data) => createHash("sha256").update(data).digest("hex");
const same = isDeepStrictEqual; // tells −0 from 0

/** The name of the error that refuses, or "". */
function refusal(action) {
  try {
    action();
  } catch (error) {
    return error.name;
  }
  return "";
}

/** A frame as golden/frames.json writes it: bytes as hex, seeds as text, NaN and infinities as words. */
function meaning(value) {
  if (Buffer.isBuffer(value)) return value.toString("hex");
  if (typeof value === "bigint") return `0x${value.toString(16).padStart(16, "0")}`;
  if (typeof value === "number" && !Number.isFinite(value)) return String(value);
  if (Array.isArray(value)) return value.map(meaning);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, meaning(item)]));
}

function* manifest() {
  for (const { file, bytes: size, sha256: hash } of read("manifest.json").files) {
    yield [`manifest: ${file}`, bytes(file).length === size && sha256(bytes(file)) === hash];
  }
}

function* directions() {
  const zero = rounds(new Uint32Array(8), [0, 0, 0, 0]);
  const known = [0xca36314c, 0x16554d9e, 0x672d0fdc, 0xdb20fe9d, 0xe186176b, 0xd7e772ce, 0xec7ba23b, 0x7e68b68a];
  yield ["Philox4x64-10, Random123's known answer", same([...zero], known)];
  const { slices, hashed } = read("directions.json");
  for (const { stream, seed, start, stop, float32, sha256: hash } of [...slices, ...hashed]) {
    const found = floatBytes(direction(stream, BigInt(seed), start, stop));
    const holds = hash === undefined ? found.toString("hex") === float32 : sha256(found) === hash;
    yield [`${stream} ${seed} ${start}…${stop}`, holds];
  }
}

function* path() {
  const file = read("path.json");
  for (const { run_id: run, version, lane, step, seed } of file.seeds) {
    const found = seedFor(Buffer.from(run, "hex"), version, lane, step);
    yield [`seed ${version} ${lane} ${step}`, found === BigInt(seed)];
  }
  for (const [i, { theta, z, c, result }] of file.apply.entries()) {
    const moved = floats(hexOf(theta));
    apply(moved, floats(hexOf(z)), c);
    yield [`apply ${i}`, floatBytes(moved).toString("hex") === result];
  }
  for (const [i, { theta, digest }] of file.digests.entries()) {
    yield [`digest ${i}`, digestOf(floats(hexOf(theta))) === digest];
  }
  for (const run of file.runs) yield [`run: ${run.name}`, replayed(run)];
}

/** theta from the mask and the entries alone, every hash and digest held against the chain. */
function replayed(run) {
  const theta = thetaOf(decodeMask(bytes("mask.bin")));
  const runId = Buffer.from(run.run_id, "hex");
  let previous = shortHash(bytes("mask.bin")).toString("hex");
  for (const entry of run.entries) {
    const { displacement: named } = entry;
    const blob = named && hexOf(run.blobs[named.blob]);
    applyEntry(theta, entry, named && openValues(blob, named.blob, theta.length), runId, run.stream);
    const digest = (entry.version + 1) % run.digest_every === 0 ? digestOf(theta) : NO_DIGEST;
    if (entry.previous !== previous || entry.digest !== digest || (blob && blob.length !== named.size)) return false;
    previous = entryHash(runId, entry);
    if (entry.hash !== previous) return false;
  }
  return floatBytes(theta).toString("hex") === run.theta;
}

function* mask() {
  const [file, said] = [bytes("mask.bin"), read("mask.json")];
  const found = decodeMask(file);
  for (const [i, { name, shape, indices, theta_0: theta0, g_p: gp }] of said.matrices.entries()) {
    const matrix = found.matrices[i];
    const numbers = [matrix.theta_0, matrix.g_p].map((values) => floatBytes(values).toString("hex"));
    const holds = same([matrix.name, matrix.shape, matrix.indices, ...numbers], [name, shape, indices, theta0, gp]);
    yield [`mask: ${name}`, holds];
  }
  yield ["mask file, encoded again", encodeMask(found).equals(file) && found.fingerprint === said.fingerprint];
  yield ["mask hash", shortHash(file).toString("hex") === said.hash];
  yield ["mask blob", openMaskBlob(bytes("mask.blob"), said.hash, thetaOf(found).length).equals(file)];
  for (const { name, hex } of said.refused) {
    yield [`mask refused: ${name}`, refusal(() => decodeMask(hexOf(hex))) === "MaskError"];
  }
}

function* frames() {
  const file = read("frames.json");
  for (const { name, hex, type, meaning: said } of file.frames) {
    const frame = decode(hexOf(hex));
    const { type: found, ...rest } = meaning(frame);
    yield [`frame: ${name}`, found === type && same(rest, said) && encode(frame).toString("hex") === hex];
  }
  for (const { name, hex, error } of file.refused) {
    yield [`frame refused: ${name}`, refusal(() => decode(hexOf(hex))) === error];
  }
}

function* blobs() {
  const { arrays, refused } = read("arrays.json");
  for (const { name, dtype, count, values, encoded } of arrays) {
    yield [`array: ${name}`, readArray(new Reader(hexOf(encoded)), dtype, count).toString("hex") === values];
  }
  for (const { name, hex, error } of refused) {
    yield [`array refused: ${name}`, refusal(() => readArray(new Reader(hexOf(hex)), "uint32", 6)) === error];
  }
  const said = read("snapshot.json");
  const weights = said.theta.length / 8;
  const { theta, ...place } = openSnapshot(bytes("snapshot.blob"), said.hash, weights);
  const expected = { run: said.run_id, version: said.version, head: said.head, digest: said.digest };
  yield ["snapshot", same(place, expected) && floatBytes(theta).toString("hex") === said.theta];
  yield* refusals("snapshot", said.refused, (blob, name) => openSnapshot(blob, name, weights));
  const values = read("values.json");
  for (const { name, count, hash, encoded, decoded } of values.blobs) {
    yield [`values: ${name}`, floatBytes(openValues(hexOf(encoded), hash, count)).toString("hex") === decoded];
  }
  yield* refusals("values", values.refused, (blob, name) => openValues(blob, name, values.refused_of));
}

function* refusals(kind, refused, open) {
  for (const { name, hex, error } of refused) {
    const blob = hexOf(hex);
    yield [`${kind} refused: ${name}`, refusal(() => open(blob, shortHash(blob).toString("hex"))) === error];
  }
}

function* control() {
  const file = read("control.json");
  const decoders = {
    RunDescriptor: (payload) => decodeRun(payload, "plant-7"),
    ServerState: decodeServerState,
    NodeStatus: decodeNodeStatus,
  };
  for (const [i, { kind, json }] of file.messages.entries()) {
    const found = decoders[kind](Buffer.from(json));
    yield [`control: ${kind} ${i}`, same(found, JSON.parse(json))];
  }
  for (const json of file.refused_as_node_status) {
    yield [`control refused: ${json}`, refusal(() => decodeNodeStatus(Buffer.from(json))) === "BadValue"];
  }
}

/** A node's g is its own, so that the last bits may differ. */
function* toy() {
  const file = read("toy.json");
  for (const { run_id: run, node, rows, batch_size: size, step, numbers } of file.batches) {
    yield [`batch ${step} of ${rows} rows`, same(batchRows(Buffer.from(run, "hex"), node, rows, size, step), numbers)];
  }
  for (const { theta, z, eps, rows, g, loss, tolerance } of file.gradients) {
    const targets = rows.map((seed) => direction("mk1", BigInt(seed), 0, theta.length / 8));
    const found = projectedGradient(floats(hexOf(theta)), floats(hexOf(z)), eps, targets);
    const near = Math.abs(found.g - g) <= tolerance && Math.abs(found.loss - loss) <= 1e-6 * Math.abs(loss);
    yield [`projected gradient of ${rows.length} rows`, near];
  }
}

const found = [manifest, directions, path, mask, frames, blobs, control, toy].flatMap((part) => [...part()]);
const wrong = found.filter(([, holds]) => !holds);
for (const [name] of wrong) console.log(`WRONG  ${name}`);
console.log(`${found.length - wrong.length} of ${found.length} golden vectors hold.`);
process.exit(wrong.length > 0 ? 1 : 0);
