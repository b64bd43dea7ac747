/** Control messages: JSON with known keys, all of them checked (specification, section 6). */

import { need } from "./bytes.mjs";

const MAX_CONTROL_BYTES = 64 * 1024;

const integer = (least, most) => (value) => Number.isInteger(value) && value >= least && value <= most;
const U32 = integer(0, 2 ** 32 - 1);
const positive = (value) => typeof value === "number" && Number.isFinite(value) && value > 0;
const text = (most) => (value) => typeof value === "string" && value.length <= most;
const hex = (digits) => (value) => typeof value === "string" && new RegExp(`^[0-9a-f]{${digits}}$`).test(value);
const one = (...known) => (value) => known.includes(value);
const identifier = (value) => typeof value === "string" && /^[A-Za-z0-9_-]{1,64}$/.test(value);
const optional = (check) => Object.assign((value) => check(value), { optional: true });

const RUN = {
  protocol: one(1),
  federation: identifier,
  run: hex(32),
  engine: one("transformers", "toy"),
  model: text(MAX_CONTROL_BYTES),
  task: optional((value) => typeof value === "object"), // the toy engine has no use for it
  dtype: one("float32", "bfloat16", "float16"),
  fingerprint: hex(64),
  tokenizer: hex(64),
  mask: hex(32),
  mask_bytes: U32,
  mask_chunks: integer(1, 65536),
  weights: integer(1, 2 ** 26),
  stream: one("mk1", "rademacher"),
  rounds: integer(1, 2 ** 32 - 1),
  local_steps: integer(1, 1000),
  directions: integer(1, 4096),
  lr: positive,
  eps: positive,
  perturbations: optional(integer(1, 1000)),
  batch_size: integer(1, 65536),
  digest_every: integer(1, Number.MAX_SAFE_INTEGER),
  mode: optional(one("synchronous", "buffered")),
  max_staleness: optional(integer(0, 1000)),
  values: optional(one(true, false)),
  mask_blob: optional(hex(32)),
  completion: optional(hex(64)),
  max_step: optional((value) => positive(value) && value <= 2 ** 64),
};

const SERVER = {
  status: one("online", "finished", "stopped", "lost"),
  run: hex(32),
  term: U32,
  server_id: hex(16),
  link: U32,
  host: text(255),
  round: U32,
  nodes: optional(U32),
};

const NODE = {
  status: one("starting", "online", "asleep", "stopped", "lost"),
  boot: U32,
  link: U32,
  host: text(255),
  run: optional(hex(32)),
  rows: optional(U32),
  version: optional(U32),
  digest: optional(hex(32)),
  wakes_in_s: optional(integer(1, 604800)),
  refuses: optional((value) => text(300)(value) && value.length > 0),
  signal: optional((value) => typeof value === "number" && value >= 0 && value <= 1e6),
};

/** Decode an untrusted payload; unknown, missing and mistyped keys are refused. */
function decode(payload, kind, checks) {
  need(payload.length <= MAX_CONTROL_BYTES, `${kind} of ${payload.length} bytes`, "TooLarge");
  let found;
  try {
    found = JSON.parse(payload.toString());
  } catch {
    need(false, `${kind} is not JSON`);
  }
  need(found !== null && typeof found === "object" && !Array.isArray(found), `${kind} is no object`);
  for (const key of Object.keys(found)) need(Object.hasOwn(checks, key), `${kind}.${key} is unknown`);
  for (const [key, check] of Object.entries(checks)) {
    const holds = Object.hasOwn(found, key) ? check(found[key]) : check.optional;
    need(holds, `${kind}.${key} is missing or out of range`);
  }
  return found;
}

/** The run's descriptor, with what is absent filled in. */
export function decodeRun(payload, federation) {
  const found = decode(payload, "RunDescriptor", RUN);
  const run = { perturbations: 1, mode: "synchronous", max_staleness: 0, values: false, ...found };
  const scalars = run.local_steps * run.perturbations;
  const terms = scalars * run.directions * (run.max_staleness + 1);
  const most = run.max_staleness > 0 ? 9600 : 12000;
  need(scalars <= 1000 && terms <= most, "RunDescriptor: more scalars or terms than the limit");
  need(run.mode === "buffered" || run.max_staleness === 0, "RunDescriptor.max_staleness in a synchronous run");
  need(run.federation === federation, `RunDescriptor.federation is not ${federation}`);
  need(run.mask_bytes <= 16 * run.weights + 2 ** 20, "RunDescriptor.mask_bytes is out of range");
  return run;
}

export const decodeServerState = (payload) => decode(payload, "ServerState", SERVER);

export function decodeNodeStatus(payload) {
  const status = decode(payload, "NodeStatus", NODE);
  need((status.status === "asleep") === "wakes_in_s" in status, "NodeStatus.wakes_in_s belongs to asleep");
  need(status.status === "starting" || !("refuses" in status), "NodeStatus.refuses belongs to starting");
  return status;
}
