/**
 * A Meerkat-MQ node with the toy engine:
 *
 *     node node.mjs --broker mqtt://127.0.0.1:1883 --federation demo --id js-1 --data rows.jsonl --exit-when-finished
 */

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import { hostname } from "node:os";
import { inspect, parseArgs } from "node:util";
import { Fetch } from "./blobs.mjs";
import { Refused, need } from "./bytes.mjs";
import { decodeNodeStatus, decodeRun, decodeServerState } from "./control.mjs";
import { Ended, jsonLine, printable, withoutCredentials } from "./errors.mjs";
import { decode, encode } from "./frames.mjs";
import { Machine } from "./machine.mjs";
import { decodeMask, openMaskBlob, thetaOf } from "./mask.mjs";
import { Presence } from "./presence.mjs";
import { Session } from "./session.mjs";
import { Toy, readRows } from "./toy.mjs";

const TICK_MS = 100;
const MAX_WEIGHTS = 2 ** 22; // of a mask: the limits of the Python node's [policy]
const MAX_MASK_BYTES = 2 ** 26; // on the wire, and decoded: 12 a weight

const now = () => performance.now() / 1000;

const discreet = (key, value) => (typeof value === "string" ? withoutCredentials(value) : value);

const log = (event, fields = {}) => console.log(jsonLine({ event, ...fields }, discreet));

class Node {
  constructor({ broker, federation, id, data, exitWhenFinished }) {
    const root = `meerkat/v1/${federation}`;
    Object.assign(this, { federation, id, root, exitWhenFinished });
    this.rows = readRows(data);
    this.boot = randomBytes(4).readUInt32LE();
    this.presence = new Presence(this.boot);
    this.run = this.maskFetch = this.machine = this.server = this.round = this.refuses = null;
    this.finished = false;
    this.over = new Promise((resolve, reject) => Object.assign(this, { end: resolve, fail: reject }));
    this.session = new Session({
      url: broker, clientId: `meerkat-${federation}-${id}`, own: `${root}/up/${id}/status`, log,
      filters: [`${root}/server`, `${root}/run`, `${root}/round`, `${root}/values`, `${root}/down/${id}/reply`],
      statusOf: (status, link) => this.status(status, link),
      onMessage: (topic, payload, retained) => this.guarded(() => this.onMessage(topic, payload, retained), topic),
      onConnected: (link) => this.guarded(() => this.onConnected(link)),
      onDisconnected: () => this.presence.disconnected(),
    });
  }

  /** Until the run is finished, or for ever. */
  async takePart() {
    const ticking = setInterval(() => this.guarded(() => this.onTick()), TICK_MS);
    this.session.run().catch(this.fail);
    try {
      await this.over;
      await this.session.leave();
    } catch (error) {
      await this.session.leave(!error.replaced);
      throw error;
    } finally {
      clearInterval(ticking);
    }
  }

  /** Untrusted bytes are dropped and counted; anything else ends the node. */
  guarded(action, topic) {
    try {
      action();
    } catch (error) {
      if (error instanceof Refused) log("message dropped", { topic, error: error.name, problem: error.message });
      else this.fail(error);
    }
  }

  // --- what we say ---

  status(status, link) {
    const machine = this.machine;
    const refuses = this.refuses ?? machine?.refuses;
    return JSON.stringify({
      status, boot: this.boot, link, host: hostname(), ...(this.run && { run: this.run.run }), rows: this.rows.length,
      version: machine?.version ?? 0, ...(machine && { digest: machine.base }),
      ...(status === "starting" && refuses && { refuses }),
    });
  }

  publishStatus() {
    const { session, machine } = this;
    const status = machine && machine.refuses === null ? "online" : "starting";
    session.publish(session.own, this.status(status, session.link), true);
    this.said = { version: machine?.version ?? 0, at: now() };
  }

  /** For people who watch: say again where theta stands, after ten rounds or 5 minutes, at most every 5 s. */
  sayStanding() {
    const { machine, said } = this;
    if (!machine || !said || this.session.link === null) return;
    const moved = Math.abs(machine.version - said.version);
    const waited = now() - said.at;
    if (waited >= 5 && (moved >= 10 || (moved > 0 && waited >= 300))) this.publishStatus();
  }

  send(topic, frame) {
    this.session.publish(`${this.root}/up/${this.id}/${topic}`, encode(frame));
  }

  // --- what comes ---

  onConnected(link) {
    this.presence.connected(link);
    this.askAgain();
    if (this.machine) this.machine.onConnected(now());
    else this.publishStatus();
    this.finishIfDue();
  }

  onMessage(topic, payload, retained) {
    if (topic === this.session.own) this.onOwnStatus(payload, retained);
    else if (payload.length === 0) return;
    else if (topic === `${this.root}/server`) this.onServer(decodeServerState(payload));
    else if (topic === `${this.root}/run`) this.onRun(decodeRun(payload, this.federation));
    else this.onFrame(topic, decode(payload));
    this.finishIfDue();
  }

  onOwnStatus(payload, retained) {
    let status = null;
    try {
      status = decodeNodeStatus(payload);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
    }
    const verdict = this.presence.judge(status, retained);
    if (verdict === "overwritten") this.publishStatus();
    if (verdict === "replaced") {
      const where = `${this.session.own}: another process with this id runs on host ${status.host}`;
      throw Object.assign(new Ended(6, `${where}; give each node an id of its own`), { replaced: true });
    }
  }

  /** A connection is new, ours or the server's; the chunks asked for on another may be lost. */
  askAgain() {
    (this.machine ? this.machine.fetch?.blobs : this.maskFetch)?.askAgain();
  }

  onServer(state) {
    const there = ["online", "finished"].includes(state.status);
    if (there && this.server?.link !== state.link) this.askAgain();
    this.server = state;
    this.machine?.onServer(state, now());
  }

  /** Take part in the run that the server describes; what came before of another is forgotten. */
  onRun(run) {
    const same = run.run === this.run?.run;
    if (same && (this.machine || JSON.stringify(run) === JSON.stringify(this.run))) return;
    need(run.engine === "toy", "this node has the toy engine alone");
    Object.assign(this, { run, machine: null, maskFetch: null, round: same ? this.round : null, finished: false });
    this.refuses = whyRefused(run);
    if (this.refuses) {
      log("the run is refused", { problem: this.refuses });
      if (this.session.link !== null) this.publishStatus();
      return;
    }
    const runNumber = Buffer.from(run.run, "hex").readUInt32LE();
    const header = { run: runNumber, term: 0, version: 0, mask: run.mask.slice(0, 16) };
    const nothing = { welcome: false, entries_from: null };
    const blob = run.mask_blob ?? run.mask; // the name of the mask's chunks
    this.maskFetch = new Fetch(blob, run.mask_bytes, (chunks) => {
      this.send("want", { type: "want", header, boot: this.boot, ...nothing, blob, chunks });
    });
  }

  onFrame(topic, frame) {
    const places = { round: "round", values: "chunk" }; // what comes elsewhere than on our reply topic
    const place = topic.slice(this.root.length + 1);
    const placed = place in places ? frame.type === places[place] : !["round", "update", "want"].includes(frame.type);
    need(placed, `a ${frame.type} on ${topic}`);
    if (frame.type === "round") this.round = frame;
    if (this.machine) this.machine.onFrame(frame, now());
    else if (this.maskFetch && frame.type === "chunk") {
      this.maskFetch.add(frame, now());
      this.maskFetch.advance(now());
    }
    this.openMask();
  }

  onTick() {
    if (this.machine) this.machine.advance(now());
    else if (this.session.link !== null) this.maskFetch?.advance(now());
    this.finishIfDue();
    this.sayStanding();
  }

  /** Once all chunks of the mask are there, begin. */
  openMask() {
    const blob = this.machine ? null : this.maskFetch?.blob;
    if (!blob) return;
    const { run } = this;
    try {
      const mask = decodeMask(openMaskBlob(blob, run.mask, run.weights));
      this.begin(thetaOf(mask));
    } catch (error) {
      this.maskFetch.startOver();
      throw error;
    }
  }

  begin(theta0) {
    const { run, boot } = this;
    const out = { send: (topic, frame) => this.send(topic, frame), status: () => this.publishStatus(), log };
    out.later = (action) => setImmediate(() => this.machine?.out === out && this.guarded(action));
    const engine = new Toy(this.id, this.rows, run);
    this.maskFetch = null;
    this.machine = new Machine({ run, theta0, engine, boot, out, now: now() });
    log("ready", { run: run.run, weights: run.weights });
    if (this.server) this.machine.onServer(this.server, now());
    if (this.session.link !== null) this.machine.onConnected(now());
    if (this.round) this.machine.onFrame(this.round, now());
  }

  finishIfDue() {
    const { machine, run } = this;
    if (this.finished || !machine || machine.version !== run.rounds) return;
    this.finished = true;
    this.publishStatus();
    log("finished", { version: machine.version, digest: machine.base });
    if (this.exitWhenFinished) this.end();
  }
}

/** Why a run's mask is more than a node takes, judged before it is fetched; null: it is not. */
function whyRefused({ weights, mask_bytes: sent }) {
  if (weights > MAX_WEIGHTS) return `${weights} weights in the run's mask are more than ${MAX_WEIGHTS}`;
  const bytes = Math.max(sent, 12 * weights);
  return bytes > MAX_MASK_BYTES ? `${bytes} bytes of the run's mask are more than ${MAX_MASK_BYTES}` : null;
}

/** The flags, checked. */
function readFlags(args) {
  const text = { type: "string" };
  const flags = {
    broker: text, federation: text, id: text, data: text, "exit-when-finished": { type: "boolean", default: false },
  };
  let values;
  try {
    ({ values } = parseArgs({ args, options: flags }));
  } catch (error) {
    throw new Ended(2, error.message);
  }
  for (const name of ["broker", "federation", "id", "data"]) {
    if (!values[name]) throw new Ended(2, `--${name}: is missing; see README.md`);
  }
  for (const name of ["federation", "id"]) {
    if (!/^[A-Za-z0-9_-]{1,64}$/.test(values[name])) throw new Ended(2, `--${name}: has other signs than A-Za-z0-9_-`);
  }
  if (!/^mqtts?:\/\/[^/]/.test(values.broker) || !URL.canParse(values.broker)) {
    throw new Ended(2, "--broker: is no mqtt:// or mqtts:// address");
  }
  return { ...values, exitWhenFinished: values["exit-when-finished"] };
}

/** A password without TLS, over more than the loopback interface. */
function warnOfPassword(broker) {
  const { protocol, hostname: host, password } = new URL(broker);
  if (protocol === "mqtts:" || !password || /^(localhost|127(\.\d+){3}|\[::1\])$/.test(host)) return;
  log("password sent without encryption", { means: "everybody between this machine and the broker can read it" });
}

async function main() {
  const flags = readFlags(process.argv.slice(2));
  warnOfPassword(flags.broker);
  const node = new Node(flags);
  for (const signal of ["SIGTERM", "SIGINT"]) process.once(signal, () => node.end());
  await node.takePart();
}

main().then(
  () => process.exit(0),
  (error) => {
    const lines = error instanceof Ended ? [`meerkat-js: ${error.message}`] : withoutCredentials(inspect(error)).split("\n");
    for (const line of lines) console.error(printable(line));
    process.exit(error instanceof Ended ? error.code : 1);
  },
);
