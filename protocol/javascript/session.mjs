/** The broker: one connection after another, a will for each, an orderly end. */

import { once } from "node:events";
import { randomBytes } from "node:crypto";
import { setTimeout as pause } from "node:timers/promises";
import mqtt from "mqtt";
import { Ended } from "./errors.mjs";

// TLS 1.2 or newer, with a fresh key for each connection and encryption that authenticates: no CBC.
const TLS = {
  minVersion: "TLSv1.2",
  ciphers: "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:ECDHE+AESGCM:ECDHE+CHACHA20",
};
const CONNECT_MS = 5000;
const FLUSH_MS = 2000;
const LONGEST_PAUSE_MS = 4000;
const STABLE_MS = 5000;

/**
 * `statusOf(status, link)` makes the payload of our own status. Each connection has a fresh client object: nothing is
 * kept over from the last, since the protocol says everything again.
 */
export class Session {
  constructor({ url, clientId, own, filters, statusOf, onMessage, onConnected, onDisconnected, log }) {
    Object.assign(this, { url, clientId, own, filters, statusOf, onMessage, onConnected, onDisconnected, log });
    this.client = null;
    this.link = null;
    this.leaving = false;
  }

  /** Keep a connection until `leave`. */
  async run() {
    for (let step = 1000; !this.leaving; step = Math.min(2 * step, LONGEST_PAUSE_MS)) {
      const began = performance.now();
      const problem = await this.connect();
      if (this.leaving) return;
      if (performance.now() - began >= STABLE_MS) step = 1000;
      this.log("connection lost", { problem });
      await pause(step * (0.1 + 0.9 * Math.random()));
    }
  }

  /** One connection, from CONNECT to its end; resolves to what ended it. */
  async connect() {
    const link = randomBytes(4).readUInt32LE();
    const will = { topic: this.own, payload: this.statusOf("lost", link), qos: 1, retain: true };
    const client = mqtt.connect(this.url, {
      protocolVersion: 4, clean: true, clientId: this.clientId, keepalive: 30,
      connectTimeout: CONNECT_MS, reconnectPeriod: 0, resubscribe: false, will, ...TLS,
    });
    this.client = client;
    let problem = "closed";
    client.on("error", (error) => {
      problem = error.message;
    });
    client.on("message", (topic, payload, packet) => {
      if (!this.leaving) this.onMessage(topic, payload, packet.retain); // the farewell needs no correction
    });
    const closed = once(client, "close");
    try {
      await Promise.race([once(client, "connect"), closed.then(() => Promise.reject(new Error(problem)))]);
      client.stream.setNoDelay?.(true);
      await Promise.race([this.arrive(client, link), closed]);
      await closed;
    } catch (error) {
      if ([4, 5, 128].includes(error.code)) throw new Ended(5, `${this.url}: ${error.message}`);
      problem = error.message;
    }
    client.end(true);
    this.link = null;
    this.onDisconnected();
    return problem;
  }

  /** Subscribe, our own status first, so that what is retained there is known before we publish anything. */
  async arrive(client, link) {
    await client.subscribeAsync(this.own, { qos: 1 });
    await client.subscribeAsync(this.filters, { qos: 1 });
    await client.unsubscribeAsync(`${this.own}/fence`); // answered behind all that was retained
    this.link = link;
    this.log("connected", { link });
    this.onConnected(link);
  }

  /** Publish at QoS 1; what is lost with the connection is lost. */
  publish(topic, payload, retain = false) {
    if (this.link !== null) this.client.publish(topic, payload, { qos: 1, retain }, () => {});
  }

  /** End in order: the farewell instead of the will. `farewell` is false where another process owns our topic. */
  async leave(farewell = true) {
    this.leaving = true;
    const { client, link } = this;
    if (link === null) return void client?.end(true);
    if (farewell) {
      const said = client.publishAsync(this.own, this.statusOf("stopped", link), { qos: 1, retain: true });
      await Promise.race([said.catch(() => {}), pause(FLUSH_MS)]);
    }
    await Promise.race([client.endAsync(), pause(FLUSH_MS)]);
  }
}
