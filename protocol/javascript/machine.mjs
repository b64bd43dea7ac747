/**
 * What a node knows and does in one run (specification, section 8). It follows the head of the ledger, and steps when
 * it is asked. No sockets, no timers: it is told what came and what time it is, in seconds, and speaks through `out`.
 */

import { Fetch } from "./blobs.mjs";
import { entryHash } from "./frames.mjs";
import { openSnapshot } from "./mask.mjs";
import { NO_DIGEST, applyEntry, digestOf } from "./path.mjs";
import { Refused, need, pack } from "./bytes.mjs";
import { openValues } from "./values.mjs";

const RETRY_S = 2;
const MOST_PUSHED = 32; // displacements, however small they are
const IN_VAIN = 5; // wants without an answer, after which nobody stands where the newest round says
const SILENCES = 4;
const RESYNCHRONISATIONS = 3;
const LONGEST_PAUSE_S = 600;
const REASONS = [undefined, "resynchronise", "wrong seeds", "wrong steps", "out of range", "no values"];
const RESYNCHRONISE = 1;

export class Machine {
  /**
   * `theta0`: Float32Array of the mask. `engine.localSteps(theta, task)`: what a node measures.
   * `out.send(topic, frame)`, `out.status()` and `out.log(event, fields)`: carry out what the machine wants;
   * `out.later(action)`: acts once all that has come is handled.
   */
  constructor({ run, theta0, engine, boot, out, now }) {
    Object.assign(this, { run, theta0, engine, boot, out });
    this.runId = pack.hex(run.run);
    this.theta0Digest = digestOf(theta0);
    this.term = 0;
    this.serverId = ""; // of the server that we follow; "" while only its term is known
    this.serverLink = null;
    this.trustedTerm = 0; // under which the head was last found to be the server's
    this.round = null;
    this.slot = null;
    this.uninformed = true; // no round came on this connection
    this.twoServers = false; // in the present term
    this.greetAt = now + RETRY_S;
    this.askAt = -Infinity;
    this.digestsRefused = 0;
    this.refuses = null; // why this node takes no part for now
    this.restUntil = -Infinity;
    this.pauseS = RETRY_S; // the next one
    this.stepsLater = false;
    this.inVain = 0; // wants for entries since one was answered
    this.standAtTheta0();
  }

  standAtTheta0() {
    this.theta = this.theta0.slice();
    this.version = 0;
    this.head = this.run.mask;
    this.base = this.theta0Digest;
    this.queue = []; // entries that extend the head, to be applied
    this.fetch = null; // { blobs: Fetch, offer } or { blobs: Fetch, entry }
    this.pushed = new Map(); // by name: Fetch of each of the newest displacements, which come unasked
    this.done = null; // the newest local steps, until they are heard
  }

  get behind() {
    return this.round !== null && this.round.header.version > this.version;
  }

  /** Whether, on this connection, server and node may not know of each other. */
  get unknown() {
    return this.slot === null || this.uninformed;
  }

  header(version = this.version, term = this.term) {
    return { run: this.runId.readUInt32LE(), term, version, mask: this.run.mask.slice(0, 16) };
  }

  want(fields, term = this.term) {
    const nothing = { welcome: false, entries_from: null, blob: null, chunks: [] };
    const header = this.header(this.version, term);
    this.out.send("want", { type: "want", header, boot: this.boot, ...nothing, ...fields });
  }

  count(event, fields = {}) {
    this.out.log(event, { version: this.version, ...fields });
  }

  // --- servers and connections ---

  onConnected(now) {
    this.uninformed = true;
    this.askAt = -Infinity; // nobody may have heard what was asked before
    this.introduce(now);
    this.advance(now);
  }

  introduce(now) {
    this.greetAt = now + RETRY_S;
    this.out.status();
  }

  onServer(state, now) {
    const there = state.status === "online" || state.status === "finished";
    if (state.run !== this.run.run) return this.count("of another run");
    if (state.term === this.term && !["", state.server_id].includes(this.serverId)) return this.onTwoServers(now);
    if (state.term < this.term) return this.count("stale server");
    if (state.term > this.term) this.followServer(state.term, now);
    else if (there && this.serverLink !== null && this.serverLink !== state.link) this.introduce(now);
    this.serverId = state.server_id;
    if (there) this.serverLink = state.link;
    this.advance(now);
  }

  /** Under one term we could not tell that server's past and slots from those that we know: ask until one is above it. */
  onTwoServers(now) {
    this.count("two servers in a term");
    if (!this.twoServers) {
      const known = this.serverId;
      this.followServer(this.term, now);
      this.serverId = known;
      this.twoServers = true;
      this.askAt = -Infinity;
    }
    this.advance(now);
  }

  /** Forget what another server said: its slots and its round. */
  followServer(term, now) {
    this.term = term;
    this.serverId = "";
    this.serverLink = this.round = this.slot = null;
    this.uninformed = true;
    this.twoServers = false;
    this.introduce(now);
  }

  // --- frames ---

  onFrame(frame, now) {
    const { run, mask, term } = frame.header;
    if (run !== this.header().run || mask !== this.header().mask) return this.count("of another run");
    if (frame.type === "chunk") return this.onChunk(frame, now);
    if (term < this.term) return this.count("stale term");
    if (term > this.term) this.followServer(term, now);
    if (frame.type === "round") this.onRound(frame, now);
    else if (this.refuses !== null) return this.advance(now);
    else if (frame.type === "entries" && this.fetch === null) this.follow(frame.entries, term, now);
    else if (frame.type === "welcome" && frame.boot === this.boot) this.slot = frame.slot;
    else if (frame.type === "offer") this.onOffer(frame);
    else if (frame.type === "refusal" && frame.boot === this.boot) this.onRefusal(frame);
    this.advance(now);
  }

  onRound(frame, now) {
    const known = this.round === null ? -1 : this.round.header.version;
    if (frame.header.version < known && this.inVain < IN_VAIN) return this.count("old round");
    if (frame.header.version !== known) this.inVain = 0;
    if (frame.header.version > known) {
      this.askAt = -Infinity;
      const newest = frame.entries.at(-1)?.displacement;
      if (newest && !this.uninformed) this.coming(newest.blob, newest.size, now); // behind a retained round none comes
    }
    this.round = frame;
    this.uninformed = false;
    if (this.done !== null) this.done.answered = false; // each announcement is answered again until we are heard
    if (this.done !== null && this.heardVersion() >= this.done.task.version) {
      this.done.heard = true;
      this.digestsRefused = 0;
      this.pauseS = RETRY_S;
    }
  }

  /** The version of theta of our newest update that the round's server holds; −1 where it tells of none. */
  heardVersion() {
    const { header, heard, heard_before: before } = this.round;
    if (heard.includes(this.slot)) return header.version;
    const found = before.find(([slot]) => slot === this.slot);
    return found ? header.version - found[1] : -1;
  }

  onRefusal({ header, reason }) {
    if (this.done === null || this.done.task.version !== header.version) return;
    this.count(`refused: ${REASONS[reason]}`);
    if (header.version < this.version) this.done = null;
    else if (reason === RESYNCHRONISE) this.onDigestRefused("the server refused this node's digest");
  }

  // --- following the ledger ---

  /** Apply those entries that extend the head; refuse those that contradict it. */
  follow(entries, term, now) {
    const news = entries.filter(({ version }) => version >= this.version);
    if (news.length === 0 || news[0].version !== this.version) return;
    let head = this.head;
    for (const [i, entry] of news.entries()) {
      if (entry.version !== this.version + i || entry.previous !== head) return this.onContradiction(term);
      head = entryHash(this.runId, entry);
    }
    this.trustedTerm = term;
    this.queue = news;
    this.applyQueue(now);
  }

  /** Apply what is queued, up to an entry whose displacement has to come first. */
  applyQueue(now) {
    while (this.queue.length > 0) {
      const [entry] = this.queue;
      if (entry.displacement !== null) {
        if (entry.displacement.size > 5 * this.run.weights + 2 ** 16) return this.miss("too many bytes", now);
        this.begin(entry.displacement, { entry });
        return;
      }
      this.applyEntry(entry, null);
    }
  }

  applyEntry(entry, displacement) {
    applyEntry(this.theta, entry, displacement, this.runId, this.run.stream);
    const due = (entry.version + 1) % this.run.digest_every === 0;
    const digest = due ? digestOf(this.theta) : NO_DIGEST;
    if (entry.digest !== digest) return this.onDigestRefused(`the digest after entry ${entry.version} differs`);
    this.queue.shift();
    this.version += 1;
    this.head = entryHash(this.runId, entry);
    if (due) this.base = digest;
    this.askAt = -Infinity;
    this.inVain = 0;
  }

  /** Another past than ours: under a higher term, begin again; else it is refused. */
  onContradiction(term) {
    if (term > this.trustedTerm) {
      this.trustedTerm = term;
      this.startOver();
    } else {
      this.count("entry refused");
      if (this.round !== null) this.round = { ...this.round, entries: [] }; // refused once, not at every event
    }
  }

  startOver() {
    this.count("resynchronised");
    this.standAtTheta0();
    this.askAt = -Infinity;
  }

  onDigestRefused(why) {
    this.count("digest differs", { why });
    this.digestsRefused += 1;
    if (this.digestsRefused > RESYNCHRONISATIONS) {
      this.refuses = `version ${this.version}: this node does not arrive at the server's theta (${why})`;
    }
    this.startOver();
  }

  /** Whether this node takes no part for now; who is asked again and again for what it cannot do waits ever longer. */
  rests(now) {
    if (this.refuses === null) return false;
    if (this.restUntil === -Infinity) {
      this.count("cannot take part, trying again later", { problem: this.refuses, again_in_s: this.pauseS });
      this.restUntil = now + this.pauseS;
      this.pauseS = Math.min(2 * this.pauseS, LONGEST_PAUSE_S);
      this.out.status();
    } else if (now >= this.restUntil) {
      this.refuses = null;
      this.restUntil = -Infinity;
      this.digestsRefused = 0;
      this.introduce(now);
    }
    return this.refuses !== null;
  }

  // --- blobs ---

  begin({ blob, size }, purpose) {
    const pushed = this.pushed.get(blob);
    this.fetch = { blobs: pushed?.size === size ? pushed : this.newFetch(blob, size), ...purpose };
    this.pushed.delete(blob);
  }

  newFetch(blob, size) {
    return new Fetch(blob, size, (chunks) => this.want({ blob, chunks }), SILENCES);
  }

  onOffer(offer) {
    if (this.fetch !== null || offer.version <= this.version) return;
    need(offer.size <= 5 * this.run.weights + 2 ** 16, "an offer of too many bytes");
    this.begin(offer, { offer });
  }

  onChunk(chunk, now) {
    if (this.fetch?.blobs.name === chunk.blob) {
      this.fetch.blobs.add(chunk, now);
    } else {
      this.coming(chunk.blob, chunk.size, now)?.add(chunk, now);
    }
    this.advance(now);
  }

  /** What collects a displacement that comes unasked; the oldest make room for a new one. */
  coming(name, size, now) {
    const largest = 5 * this.run.weights + 2 ** 16;
    const { pushed } = this;
    if (pushed.has(name) || size > largest || this.fetch?.blobs.name === name) return pushed.get(name);
    pushed.set(name, this.newFetch(name, size));
    pushed.get(name).listen(now);
    const bytes = () => [...pushed.values()].reduce((sum, its) => sum + its.size, 0);
    while (pushed.size > MOST_PUSHED || bytes() > 2 * largest) pushed.delete(pushed.keys().next().value);
    return pushed.get(name);
  }

  /** Use the blob if it is there; give up after too many silences. */
  advanceFetch(now) {
    const { blobs, entry, offer } = this.fetch;
    blobs.advance(now);
    const blob = blobs.blob;
    if (blob === null && !blobs.isGivenUp) return;
    this.fetch = null;
    try {
      need(blob !== null, "chunks did not come");
      if (offer) this.stand(openSnapshot(blob, offer.blob, this.run.weights), offer);
      else this.applyEntry(entry, openValues(blob, entry.displacement.blob, this.run.weights));
      this.applyQueue(now);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.miss(error.message, now);
    }
    this.fetch?.blobs.advance(now); // an entry behind this one has a displacement too
  }

  /** A blob did not come, or is none: in a while, the server is asked, and not this round frame again. */
  miss(problem, now) {
    this.count("blob missed", { problem });
    this.queue = [];
    this.askAt = now + RETRY_S;
    if (this.round !== null) this.round = { ...this.round, entries: [] };
  }

  stand(snapshot, offer) {
    need(snapshot.run === this.run.run && snapshot.version === offer.version, "a snapshot of another run or version");
    Object.assign(this, { theta: snapshot.theta, version: snapshot.version, head: snapshot.head });
    this.base = snapshot.digest;
    this.trustedTerm = offer.header.term;
    this.askAt = -Infinity;
    this.count("snapshot loaded");
  }

  // --- what next ---

  /** Greet, catch up, ask for what lacks, step: after whatever came, and every now and then. */
  advance(now) {
    if (this.rests(now)) return;
    if (this.unknown && now >= this.greetAt) {
      this.introduce(now);
      this.want({ welcome: true });
    }
    if (this.fetch === null && this.round !== null) this.catchUp(now);
    if (this.fetch !== null) this.advanceFetch(now);
    if (this.rests(now)) return;
    const lacksEntries = this.fetch === null && this.behind;
    if (now >= this.askAt && (lacksEntries || this.twoServers)) this.askFor(lacksEntries, now);
    if (this.fetch === null && !this.behind) this.answer();
  }

  /** Ask for the entries that lack, and for a term above that of two servers. */
  askFor(entries, now) {
    if (entries && this.askAt !== -Infinity) this.inVain += 1;
    this.askAt = now + RETRY_S;
    const term = this.twoServers ? Math.min(this.term + 1, 2 ** 32 - 1) : this.term;
    this.want({ welcome: this.twoServers, entries_from: entries ? this.version : null }, term);
  }

  /** Follow what the round says of the ledger; see whether a server of another term tells another past. */
  catchUp(now) {
    const { header, entries } = this.round;
    const newest = entries.at(-1);
    if (header.version > this.version) this.follow(entries, header.term, now);
    else if (header.version < this.version) {
      if (header.term > this.trustedTerm) this.onContradiction(header.term);
    } else if (newest && newest.version + 1 === header.version) {
      if (entryHash(this.runId, newest) !== this.head) this.onContradiction(header.term);
      else this.trustedTerm = header.term;
    }
  }

  /** Do the local steps that the round asks of this node; send them at each announcement until they are heard. */
  answer() {
    this.sendUpdate();
    if (this.stepsLater || this.newTask() === null) return;
    this.stepsLater = true; // behind what came meanwhile: who is slow must not work at what is past
    this.out.later(() => {
      this.stepsLater = false;
      const idle = this.fetch === null && !this.behind && this.refuses === null;
      const task = idle ? this.newTask() : null;
      if (task !== null) this.step(task);
    });
  }

  step(task) {
    const found = this.engine.localSteps(this.theta, task);
    if (![found.loss, ...found.scalars].every(Number.isFinite)) {
      this.count("a loss is not finite"); // reported as NaN, which the server refuses: the weights may be put right
      found.loss = NaN;
    }
    this.done = { task, ...found, base: this.base.slice(0, 16), answered: false, heard: false };
    this.sendUpdate();
  }

  /** What the round asks of this node and is not done, or null. */
  newTask() {
    const task = this.task();
    return JSON.stringify(task) === JSON.stringify(this.done?.task) ? null : task;
  }

  /** What the round asks of this node, or null. */
  task() {
    const { round, slot } = this;
    if (round === null || !round.is_open || round.header.version !== this.version || slot === null) return null;
    if (!round.asked.includes(slot) || round.heard.includes(slot)) return null;
    const steps = round.short.find(([its]) => its === slot)?.[1] ?? round.steps;
    return { version: this.version, lane: slot % round.lanes, steps, eps: round.eps };
  }

  /** Send the newest local steps, unless they are heard, or too old, or this announcement is answered. */
  sendUpdate() {
    const { done, round } = this;
    if (done === null || done.answered || done.heard || round === null || !round.is_open) return;
    const age = round.header.version - done.task.version;
    if (!round.asked.includes(this.slot) || age < 0 || age > this.run.max_staleness) return;
    done.answered = true;
    const { base, loss, scalars } = done;
    const content = { boot: this.boot, base, loss, scalars, seeds: null, values: null };
    this.out.send("update", { type: "update", header: this.header(done.task.version), ...content });
  }
}
