import type { KvSequence } from "../kv/cache.ts";
import type { KvCacheStep } from "../kv/cache_step.ts";
import type { ModelParts } from "./language_model.ts";
import type { Choice, Sampler, SamplerRow } from "./sampler.ts";
import { unlessFull } from "./unless_full.ts";

/** A sequence whose latest token is to be computed, and the next chosen. */
export interface DecodeRow extends SamplerRow {
  readonly sequence: KvSequence;
}

/** A step that was enqueued, and the tokens that it chooses. */
interface EnqueuedStep {
  readonly rows: readonly DecodeRow[];
  readonly choice: Choice;
}

/**
 * The decode steps of a batch. A step needs the tokens of the one before on the device only, so it may be enqueued ahead:
 * before the host knows them. The device then never waits for the host, which reads the tokens while it works.
 *
 * A step ahead is for all rows of the one before. For a row that turns out to have ended it was one too many: its sequence
 * then has a token more than without, the latest one. The others' results do not depend on it.
 */
export class DecodePipeline {
  readonly #parts: ModelParts;
  readonly #sampler: Sampler;
  #ahead: EnqueuedStep | undefined;

  constructor(parts: ModelParts, sampler: Sampler) {
    this.#parts = parts;
    this.#sampler = sampler;
  }

  /** Whether a step was enqueued ahead, which the next call of {@linkcode next} takes. */
  get isAhead(): boolean {
    return this.#ahead !== undefined;
  }

  /**
   * Gives every sequence its latest token, and chooses the next ones. After a step ahead, the rows are those of the call
   * before, in their order, without any that have ended.
   *
   * With `ahead`, and no row having ended, the step after this one is enqueued ahead, unless the cache's pool is full: it
   * may have room when it is due. Throws `out-of-memory` if the pool is full for this step.
   */
  next(
    rows: readonly DecodeRow[],
    { ahead }: { readonly ahead: boolean },
  ): Promise<readonly number[]> {
    return this.#parts.turns.take(() => {
      const step = this.#ahead ?? this.#enqueue(rows);
      this.#ahead = ahead && step.rows.length === rows.length
        ? this.#enqueueAfter(step)
        : undefined;
      return step.choice.read(rows);
    });
  }

  #begin(rows: readonly DecodeRow[]): KvCacheStep {
    return this.#parts.cache.begin(rows.map(({ sequence }) => ({ sequence })));
  }

  #enqueue(rows: readonly DecodeRow[]): EnqueuedStep {
    const step = this.#begin(rows);
    const latest = Int32Array.from(rows, ({ tokens }) => tokens.at(-1)!);
    this.#parts.runner.tokens(rows.length).upload(latest);
    return this.#compute(step, rows);
  }

  #enqueueAfter({ rows, choice }: EnqueuedStep): EnqueuedStep | undefined {
    const step = unlessFull(() => this.#begin(rows));
    if (step === undefined) return undefined;
    this.#parts.runner.tokens(rows.length).copyFrom(choice.tokens);
    return this.#compute(step, rows);
  }

  /** Enqueues a step whose tokens are there. */
  #compute(step: KvCacheStep, rows: readonly DecodeRow[]): EnqueuedStep {
    const { cache, runner, graphs, device } = this.#parts;
    const count = rows.length;
    const positions = Int32Array.from(rows, ({ sequence }) => cache.length(sequence) - 1);
    runner.positions(count).upload(positions);
    const enqueue = () => {
      runner.forward(step, { attention: "attend" });
      runner.logits(0, count);
    };
    if (device.backend === "cpu") enqueue();
    else graphs.run(step, enqueue);
    return { rows, choice: this.#sampler.choose(runner.logitsOut(count), rows) };
  }
}
