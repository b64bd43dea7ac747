/** CRC-32 as zlib and ISO 3309 have it; Node's own came with version 22. */

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let remainder = byte;
  for (let bit = 0; bit < 8; bit++) remainder = (remainder >>> 1) ^ (remainder & 1 ? 0xedb88320 : 0);
  return remainder;
});

/** Of a Buffer, as u32. */
export function crc32(data) {
  let remainder = 0xffffffff;
  for (const byte of data) remainder = (remainder >>> 8) ^ TABLE[(remainder ^ byte) & 0xff];
  return ~remainder >>> 0;
}
