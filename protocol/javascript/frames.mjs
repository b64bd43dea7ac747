/**
 * Frames (specification, section 4). A frame is an object with `type`, `header` and the fields of golden/frames.json;
 * hashes are hex, a chunk's data is a Buffer, seeds are BigInt.
 */

import { crc32 } from "./crc32.mjs";
import { Reader, need, pack, shortHash } from "./bytes.mjs";

export const MAX_FRAME_BYTES = 96 * 1024;
export const MAX_CHUNK_BYTES = 64 * 1024;
const MAX_STEPS = 1000;
const MAX_LANES = 4096;
const MAX_TERMS = 12000;
const MAX_AGED_TERMS = 9600; // they are longer
const MAX_STALENESS = 1000;
const MAX_BITMAP_BYTES = 8192;

const NAN = "0000c07f";
const AGED = 1 << 15; // flags of an entry, above its number of terms
const DISPLACED = 1 << 14;

/** Decode a frame from an untrusted payload. */
export function decode(payload) {
  need(payload.length <= MAX_FRAME_BYTES, `${payload.length} bytes`, "TooLarge");
  need(payload.length >= 28, `${payload.length} bytes`, "Truncated");
  const reader = new Reader(payload.subarray(0, -4));
  need(reader.hex(2) === "4d4b", "has another magic", "BadMagic");
  need(reader.u8() === 1, "has another version", "UnknownVersion");
  const type = TYPES[reader.u8()];
  need(type, "has an unknown type", "UnknownType");
  const header = { run: reader.u32(), term: reader.u32(), version: reader.u32(), mask: reader.hex(8) };
  need(crc32(payload.subarray(0, -4)) === payload.readUInt32LE(payload.length - 4), "fails the CRC", "BadChecksum");
  const frame = { type, header, ...BODIES[type].decode(reader) };
  reader.end();
  return frame;
}

/** Encode a frame. */
export function encode(frame) {
  const { run, term, version, mask } = frame.header;
  const head = [pack.hex("4d4b"), pack.u8(1, TYPES.indexOf(frame.type)), pack.u32(run, term, version), pack.hex(mask)];
  const data = Buffer.concat([...head, BODIES[frame.type].encode(frame)]);
  return Buffer.concat([data, pack.u32(crc32(data))]);
}

function flagsOf(value, known) {
  need((value & ~known) === 0, `flags ${value} are unknown`, "UnknownFlags");
  return value;
}

const finite = (value) => (need(Number.isFinite(value), "a value is not finite"), value);

// --- update ---

/** A projected gradient or a loss: may be infinite or NaN, which has one encoding. */
function readScalar(reader) {
  const bytes = reader.take(4);
  const value = bytes.readFloatLE();
  need(!Number.isNaN(value) || bytes.toString("hex") === NAN, "has another NaN");
  return value;
}

const packScalar = (value) => (Number.isNaN(value) ? pack.hex(NAN) : pack.f32(value));

function decodeUpdate(reader) {
  const [boot, base, count] = [reader.u32(), reader.hex(8), reader.u16()];
  const flags = flagsOf(reader.u16(), 3);
  const loss = readScalar(reader);
  need(count >= 1 && count <= MAX_STEPS, `${count} scalars`);
  if (flags & 2) {
    need(flags === 2, "values go without seeds");
    return { boot, base, loss, scalars: [], seeds: null, values: { ...readBlob(reader), steps: count } };
  }
  const seeds = flags & 1 ? reader.list(count, "u64") : null;
  const scalars = Array.from({ length: count }, () => readScalar(reader));
  return { boot, base, loss, scalars, seeds, values: null };
}

function encodeUpdate({ boot, base, loss, scalars, seeds, values }) {
  const counts = pack.u16(values ? values.steps : scalars.length, values ? 2 : seeds ? 1 : 0);
  const head = [pack.u32(boot), pack.hex(base), counts, packScalar(loss)];
  if (values) return Buffer.concat([...head, packBlob(values)]);
  return Buffer.concat([...head, pack.u64(...(seeds ?? [])), ...scalars.map(packScalar)]);
}

/** Hash and size of a displacement. */
function readBlob(reader) {
  const found = { blob: reader.hex(16), size: reader.u32() };
  need(found.size > 0, "a displacement of no bytes");
  return found;
}

const packBlob = ({ blob, size }) => Buffer.concat([pack.hex(blob), pack.u32(size)]);

// --- round ---

function slotsOf(bitmap) {
  const slots = [];
  bitmap.forEach((byte, i) => {
    for (let bit = 0; bit < 8; bit++) if ((byte >> bit) & 1) slots.push(8 * i + bit);
  });
  return slots;
}

function bitmapOf(slots, length) {
  const bitmap = Buffer.alloc(length);
  for (const slot of slots) bitmap[slot >> 3] |= 1 << (slot & 7);
  return bitmap;
}

/** Pairs of u16 whose first numbers, slots, ascend strictly. */
function readPairs(reader, count) {
  const pairs = Array.from({ length: count }, () => reader.list(2, "u16"));
  need(pairs.every(([slot], i) => i === 0 || pairs[i - 1][0] < slot), "slots do not ascend");
  return pairs;
}

function decodeRound(reader) {
  const [steps, lanes, eps] = [reader.u16(), reader.u16(), finite(reader.f32())];
  const [deadline, attempt] = [reader.u32(), reader.u16()];
  const flags = flagsOf(reader.u16(), 3);
  const [length, shorts, count] = reader.list(3, "u16");
  need(steps >= 1 && steps <= MAX_STEPS && lanes >= 1 && lanes <= MAX_LANES && eps > 0, "steps, lanes or eps");
  need(length <= MAX_BITMAP_BYTES, `a bitmap of ${length} bytes`);
  const [askedBits, heardBits] = [reader.take(length), reader.take(length)];
  need(length === 0 || askedBits[length - 1] | heardBits[length - 1], "a bitmap is longer than its last slot");
  const [asked, heard] = [slotsOf(askedBits), slotsOf(heardBits)];
  const short = readPairs(reader, shorts);
  need(short.every(([, fewer]) => fewer >= 1 && fewer < steps), "short steps");
  const before = flags & 2 ? readHeardBefore(reader, heard) : [];
  const entries = Array.from({ length: count }, () => decodeEntry(reader));
  return {
    is_open: (flags & 1) === 1, steps, lanes, eps, deadline_ms: deadline, attempt, asked, heard, short, entries,
    heard_before: before,
  };
}

function readHeardBefore(reader, heard) {
  const count = reader.u16();
  need(count >= 1, "an empty list of slots heard before");
  const pairs = readPairs(reader, count);
  need(pairs.every(([slot]) => !heard.includes(slot)), "a slot is heard and was heard before");
  need(pairs.every(([, age]) => age >= 1 && age <= MAX_STALENESS), "an age is out of range");
  return pairs;
}

function encodeRound(round) {
  const { asked, heard, short, entries, heard_before: before } = round;
  const length = Math.floor(Math.max(-1, ...asked, ...heard) / 8) + 1;
  const flags = (round.is_open ? 1 : 0) + (before.length > 0 ? 2 : 0);
  return Buffer.concat([
    pack.u16(round.steps, round.lanes), pack.f32(round.eps), pack.u32(round.deadline_ms),
    pack.u16(round.attempt, flags, length, short.length, entries.length),
    bitmapOf(asked, length), bitmapOf(heard, length), pack.u16(...short.flat()),
    ...(before.length > 0 ? [pack.u16(before.length, ...before.flat())] : []), ...entries.map(encodeEntry),
  ]);
}

// --- entries ---

function decodeEntry(reader) {
  const [version, head] = [reader.u32(), reader.u16()];
  const [aged, displaced, count] = [(head & AGED) !== 0, (head & DISPLACED) !== 0, head & ~(AGED | DISPLACED)];
  need(count <= (aged ? MAX_AGED_TERMS : MAX_TERMS), `${count} terms`);
  const terms = Array.from({ length: count }, () => readTerm(reader, aged));
  need(terms.some(({ age }) => age > 0) === aged, "ages are written down although all are 0");
  need(terms.every(({ age }) => age <= Math.min(MAX_STALENESS, version)), "an age is out of range");
  const displacement = displaced ? readBlob(reader) : null;
  return { version, terms, previous: reader.hex(16), digest: reader.hex(16), displacement };
}

function readTerm(reader, aged) {
  const age = aged ? reader.u16() : 0;
  return { lane: reader.u16(), step: reader.u16(), coefficient: finite(reader.f32()), age };
}

/** Whether an entry's terms are written down with their ages, and their bytes. */
function packTerms(terms) {
  const aged = terms.some(({ age }) => age > 0);
  const packed = terms.flatMap(({ age, lane, step, coefficient }) => [
    aged ? pack.u16(age, lane, step) : pack.u16(lane, step), pack.f32(coefficient),
  ]);
  return { aged, packed: Buffer.concat(packed) };
}

function encodeEntry({ version, terms, previous, digest, displacement }) {
  const { aged, packed } = packTerms(terms);
  const head = terms.length | (aged ? AGED : 0) | (displacement ? DISPLACED : 0);
  const displaced = displacement ? packBlob(displacement) : pack.hex();
  return Buffer.concat([pack.u32(version), pack.u16(head), packed, displaced, pack.hex(previous, digest)]);
}

/** Hash of an entry, hex (section 2); `runId` is a Buffer of 16 bytes. */
export function entryHash(runId, { version, terms, previous, digest, displacement }) {
  const { aged, packed } = packTerms(terms);
  const head = terms.length + (aged ? 2 ** 31 : 0) + (displacement ? 2 ** 30 : 0);
  const displaced = displacement ? packBlob(displacement) : pack.hex();
  return shortHash(runId, pack.u32(version, head), packed, displaced, pack.hex(previous, digest)).toString("hex");
}

function decodeEntries(reader) {
  const count = reader.u16();
  return { entries: Array.from({ length: count }, () => decodeEntry(reader)) };
}

const encodeEntries = ({ entries }) => Buffer.concat([pack.u16(entries.length), ...entries.map(encodeEntry)]);

// --- want, and what answers it ---

function decodeWant(reader) {
  const boot = reader.u32();
  const flags = flagsOf(reader.u8(), 7);
  const first = flags & 2 ? reader.u32() : null;
  const blob = flags & 4 ? reader.hex(16) : null;
  const count = blob ? reader.u16() : 0;
  need(!blob || count >= 1, "asks for no chunk");
  return { boot, welcome: (flags & 1) === 1, entries_from: first, blob, chunks: reader.list(count, "u16") };
}

function encodeWant({ boot, welcome, entries_from: first, blob, chunks }) {
  const flags = (welcome ? 1 : 0) + (first === null ? 0 : 2) + (blob ? 4 : 0);
  const wanted = blob ? [pack.hex(blob), pack.u16(chunks.length, ...chunks)] : [];
  return Buffer.concat([pack.u32(boot), pack.u8(flags), first === null ? pack.hex() : pack.u32(first), ...wanted]);
}

const decodeWelcome = (reader) => ({ boot: reader.u32(), slot: reader.u16() });

const encodeWelcome = ({ boot, slot }) => Buffer.concat([pack.u32(boot), pack.u16(slot)]);

function decodeChunk(reader) {
  const [blob, index, count, size, length] = [reader.hex(16), reader.u16(), reader.u16(), reader.u32(), reader.u32()];
  need(index < count && length >= 1 && length <= MAX_CHUNK_BYTES && length <= size, "index or length of a chunk");
  return { blob, index, count, size, data: reader.take(length) };
}

function encodeChunk({ blob, index, count, size, data }) {
  return Buffer.concat([pack.hex(blob), pack.u16(index, count), pack.u32(size, data.length), data]);
}

function decodeRefusal(reader) {
  const [boot, reason] = [reader.u32(), reader.u8()];
  need(reason >= 1 && reason <= 5, `reason ${reason} is unknown`, "UnknownType");
  return { boot, reason };
}

const encodeRefusal = ({ boot, reason }) => Buffer.concat([pack.u32(boot), pack.u8(reason)]);

function decodeOffer(reader) {
  const [version, blob, size] = [reader.u32(), reader.hex(16), reader.u32()];
  need(size >= 1, "offers no bytes");
  return { version, blob, size };
}

const encodeOffer = ({ version, blob, size }) => Buffer.concat([pack.u32(version), pack.hex(blob), pack.u32(size)]);

const BODIES = {
  update: { decode: decodeUpdate, encode: encodeUpdate },
  round: { decode: decodeRound, encode: encodeRound },
  want: { decode: decodeWant, encode: encodeWant },
  welcome: { decode: decodeWelcome, encode: encodeWelcome },
  entries: { decode: decodeEntries, encode: encodeEntries },
  chunk: { decode: decodeChunk, encode: encodeChunk },
  refusal: { decode: decodeRefusal, encode: encodeRefusal },
  offer: { decode: decodeOffer, encode: encodeOffer },
};

const TYPES = [undefined, ...Object.keys(BODIES)]; // by number
