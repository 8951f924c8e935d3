import type { KvSequence } from "../kv/cache.ts";
import type { KvCacheStep } from "../kv/cache_step.ts";
import type { ModelParts } from "./language_model.ts";
import type { PromptMemory } from "./prompt_memory.ts";
import type { Sampler, SamplerRow } from "./sampler.ts";
import { unlessFull } from "./unless_full.ts";

/** A prompt whose computation has not begun. */
export interface WaitingPrompt {
  /** Which of the prompts it is, from 0. */
  readonly prompt: number;
  readonly tokens: readonly number[];
}

/** A prompt that was computed, and the token after it. */
export interface StartedPrompt extends WaitingPrompt {
  readonly sequence: KvSequence;
  readonly token: number;
}

/** Options of {@linkcode prefill}. */
export interface PrefillOptions {
  /** What of the prompts need not be computed. */
  readonly memory?: PromptMemory | undefined;
  /** Stops the work. */
  readonly signal?: AbortSignal | undefined;
}

/** A prompt that is being computed. */
interface PrefillRow extends SamplerRow {
  readonly sequence: KvSequence;
  /** Tokens that its sequence has. */
  computed: number;
}

/**
 * How many of the prompts, from the first on, {@linkcode prefill} computes together: as many as there is room for, and as
 * end in one step. Only the first may take more than a step, so that it does not wait for others that do.
 */
export function countTogether(
  { cache }: ModelParts,
  prompts: readonly WaitingPrompt[],
  { room, memory }: { readonly room: number; readonly memory?: PromptMemory | undefined },
): number {
  const { stepTokens } = cache.config;
  let sum = 0;
  let count = 0;
  for (const { tokens } of prompts.slice(0, room)) {
    const rows = tokens.length - (memory?.overlap(tokens) ?? 0);
    sum += count === 0 ? (rows - 1) % stepTokens + 1 : rows;
    if (sum > stepTokens) break;
    count++;
  }
  return count;
}

/**
 * Starts a sequence with each of the prompts, and chooses the tokens after them. What a prompt takes beyond whole steps is
 * computed in one step with all others', which {@linkcode countTogether} finds. How a prompt is cut into steps does not
 * depend on the others.
 *
 * Starts fewer of them, from the first on, if the cache has no room for all at once. Throws `out-of-memory` if it has none
 * for the first.
 */
export async function prefill(
  parts: ModelParts,
  prompts: readonly WaitingPrompt[],
  sampler: Sampler,
  { memory, signal }: PrefillOptions = {},
): Promise<readonly StartedPrompt[]> {
  const { cache, device, runner, turns } = parts;
  const { stepTokens } = cache.config;
  const rows: PrefillRow[] = [];
  try {
    for (const { prompt, tokens } of prompts) {
      const start = () => memory?.fork(tokens) ?? { sequence: cache.add(), tokens: 0 };
      const started = rows.length === 0 ? start() : unlessFull(start);
      if (started === undefined) break;
      const { sequence, tokens: computed } = started;
      rows.push({ prompt, tokens, chosen: 0, sequence, computed });
    }
    for (const row of rows) {
      while (row.tokens.length - row.computed > stepTokens) {
        signal?.throwIfAborted();
        await turns.take(async () => {
          compute(parts, begin(parts, [row]), [row]);
          await device.synchronize(); // so that an abort is heard, and not too much is enqueued
        });
      }
    }
    signal?.throwIfAborted();
    const chosen = await turns.take(() => {
      let step: KvCacheStep | undefined;
      while (rows.length > 1 && !(step = unlessFull(() => begin(parts, rows)))) {
        cache.remove(rows.pop()!.sequence);
      }
      const last = compute(parts, step ?? begin(parts, rows), rows);
      return sampler.choose(runner.logitsOf(last), rows).read(rows);
    });
    return rows.map(({ prompt, tokens, sequence }, i) => {
      return { prompt, tokens, sequence, token: chosen[i]! };
    });
  } catch (error) {
    for (const { sequence } of rows) {
      try {
        cache.remove(sequence);
      } catch {
        // The cache was disposed, or a step of it failed: what was thrown first says so.
      }
    }
    throw error;
  }
}

/** How many tokens of a row the next step computes. */
function stepOf({ cache }: ModelParts, { tokens, computed }: PrefillRow): number {
  return Math.min(cache.config.stepTokens, tokens.length - computed);
}

function begin(parts: ModelParts, rows: readonly PrefillRow[]): KvCacheStep {
  return parts.cache.begin(
    rows.map((row) => ({ sequence: row.sequence, tokens: stepOf(parts, row) })),
  );
}

/** Enqueues a step; returns which of its tokens are the last of each row. */
function compute(parts: ModelParts, step: KvCacheStep, rows: readonly PrefillRow[]): number[] {
  const { runner } = parts;
  const tokens = new Int32Array(step.tokens);
  const positions = new Int32Array(step.tokens);
  let end = 0;
  const last = rows.map((row) => {
    const { computed } = row;
    row.computed += stepOf(parts, row);
    for (let position = computed; position < row.computed; position++, end++) {
      tokens[end] = row.tokens[position]!;
      positions[end] = position;
    }
    return end - 1;
  });
  runner.tokens(step.tokens).upload(tokens);
  runner.positions(step.tokens).upload(positions);
  runner.forward(step, { attention: "prefill" });
  return last;
}
