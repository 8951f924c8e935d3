import { crc32 } from "node:zlib";
import { MOST_BYTES_PER_CALL } from "./limits.ts";

/** CRC-32 (the one of zip and PNG) of `bytes`, continuing from that of the bytes before. */
export function checksum(bytes: Uint8Array, previous = 0): number {
  let value = previous;
  for (let start = 0; start < bytes.byteLength; start += MOST_BYTES_PER_CALL) {
    value = crc32(bytes.subarray(start, start + MOST_BYTES_PER_CALL), value);
  }
  return value;
}
