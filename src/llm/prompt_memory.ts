import type { KvCache, KvSequence } from "../kv/cache.ts";

/**
 * The keys and values of tokens that prompts begin with, so that they are computed once. Made by
 * {@linkcode LanguageModel.createMemory}; given to {@linkcode LanguageModel.generate} with every prompt, which reuses as
 * many tokens as the prompt and the memory both begin with.
 *
 * After the continuation of a single prompt, the memory holds the prompt and the continuation, so that the next turn of
 * a chat computes only what is new. After several prompts at once it is as it was. If a prompt leaves what is
 * remembered, tokens of blocks that are cut keep the values that they were packed to, so that results may differ a
 * little from those without a memory.
 *
 * @example
 * ```ts
 * import { Device, LanguageModel } from "@packhorse/packhorse";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open();
 * using model = await LanguageModel.load(device, "tests/fixtures/tiny", { tokens: 512 });
 * using memory = model.createMemory();
 * const beginning = "In the beginning God created the heaven and the earth.";
 * await model.complete(beginning, { maxTokens: 1, memory });
 * // Computes the tokens after the beginning only.
 * const again = await model.complete(`${beginning} And the earth was`, { maxTokens: 4, memory });
 * // All but the last token, which was chosen but not computed yet.
 * assertEquals(memory.tokens.slice(-3), again.tokens.slice(0, 3));
 * ```
 */
export class PromptMemory implements Disposable {
  readonly #cache: KvCache;
  #sequence: KvSequence | undefined;
  #tokens: readonly number[] = [];

  constructor(cache: KvCache) {
    this.#cache = cache;
  }

  /** The tokens that it holds. */
  get tokens(): readonly number[] {
    return this.#tokens;
  }

  /** How many tokens a prompt need not compute: those that both begin with, but for the prompt's last. */
  overlap(prompt: readonly number[]): number {
    let shared = 0;
    const most = Math.min(prompt.length - 1, this.#tokens.length);
    while (shared < most && prompt[shared] === this.#tokens[shared]) shared++;
    return shared;
  }

  /** A sequence with the tokens of {@linkcode overlap}; undefined if there are none. */
  fork(prompt: readonly number[]): { sequence: KvSequence; tokens: number } | undefined {
    const shared = this.overlap(prompt);
    if (this.#sequence === undefined || shared === 0) return undefined;
    const sequence = this.#cache.fork(this.#sequence);
    try {
      if (shared < this.#cache.length(sequence)) this.#cache.truncate(sequence, shared);
    } catch (error) {
      this.#cache.remove(sequence);
      throw error;
    }
    return { sequence, tokens: shared };
  }

  /** Holds a sequence, which is its own from then on, in place of what it held. */
  hold(sequence: KvSequence, tokens: readonly number[]): void {
    this.clear();
    this.#sequence = sequence;
    this.#tokens = tokens;
  }

  /** Forgets, and gives back the memory. */
  clear(): void {
    if (this.#sequence !== undefined && !this.#cache.isDisposed) this.#cache.remove(this.#sequence);
    this.#sequence = undefined;
    this.#tokens = [];
  }

  /** As {@linkcode clear}. */
  [Symbol.dispose](): void {
    this.clear();
  }
}
