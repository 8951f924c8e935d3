import { PackhorseError } from "../error.ts";
import { BLOCK_TOKENS } from "./codec.ts";
import { type KvLayout, tensorByteLength, withTokens } from "./tensor.ts";

const CHUNK_BYTES = 2 ** 28;

/** Consecutive blocks of a layer that are worked on at once. */
export interface Chunk {
  readonly firstBlock: number;
  readonly blocks: number;
}

/** Divides the blocks of a layer so that keys and values of a chunk take at most `chunkBytes`. */
export function chunksOf(layout: KvLayout, blocks: number, chunkBytes = CHUNK_BYTES): Chunk[] {
  if (!(chunkBytes > 0)) {
    const message = `Cannot work in chunks of ${chunkBytes} bytes: chunkBytes must be above 0`;
    throw new PackhorseError("invalid-argument", message);
  }
  const blockBytes = 2 * tensorByteLength(withTokens(layout, BLOCK_TOKENS));
  const most = Math.max(1, Math.floor(chunkBytes / blockBytes));
  return Array.from({ length: Math.ceil(blocks / most) }, (_, i) => {
    const firstBlock = i * most;
    return { firstBlock, blocks: Math.min(most, blocks - firstBlock) };
  });
}
