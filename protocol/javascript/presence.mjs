/** Who owns a topic that carries a will (specification, section 6.4). */

/**
 * Judges what stands on the topic that this process owns: "ours"; "overwritten", publish the state again; "replaced",
 * a newer process took our id, so end.
 */
export class Presence {
  constructor(boot) {
    this.boot = boot;
    this.link = null;
    this.first = true; // until the first connection ended
    this.predecessors = new Set();
  }

  connected(link) {
    this.link = link;
  }

  disconnected() {
    this.first = this.first && this.link === null;
    this.link = null;
  }

  /** `status` is null where the topic was cleared or does not decode. */
  judge(status, retained) {
    const online = status !== null && ["starting", "online"].includes(status.status);
    if (status?.boot === this.boot) return online && status.link === this.link ? "ours" : "overwritten";
    if (this.first && retained) this.predecessors.add(status?.boot ?? null);
    if (status === null || this.predecessors.has(status.boot)) return "overwritten";
    return online || retained ? "replaced" : "overwritten"; // a stranger's late will is no successor
  }
}
