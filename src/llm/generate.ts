import { PackhorseError } from "../error.ts";
import { BLOCK_TOKENS } from "../kv/codec.ts";
import { DecodePipeline, type DecodeRow } from "./decode_pipeline.ts";
import type { ModelParts } from "./language_model.ts";
import { countTogether, prefill, type WaitingPrompt } from "./prefill.ts";
import type { PromptMemory } from "./prompt_memory.ts";
import { Sampler, type SamplingOptions } from "./sampler.ts";
import { StopStrings } from "./stop_strings.ts";
import type { Tokenizer, TokenStream } from "./tokenizer.ts";

/** What is to be continued: a text, or its tokens. */
export type Prompt = string | readonly number[];

/** Why a continuation is over: a token that ends texts, a stop string, or enough tokens. */
export type FinishReason = "end" | "stop" | "length";

/** Options of {@linkcode LanguageModel.generate}. */
export interface GenerationOptions extends SamplingOptions {
  /** Most tokens of a continuation. Default: 256, or what is left of the model's `tokens`. */
  readonly maxTokens?: number | undefined;
  /** Texts that end a continuation, and are not part of it. They may span tokens. */
  readonly stop?: string | readonly string[] | undefined;
  /** Tokens that end a continuation. Default: those of the model's configuration. */
  readonly endTokens?: readonly number[] | undefined;
  /** Whether texts get the tokens that the model's texts begin with. Default: true; false for the text of a chat template. */
  readonly specialTokens?: boolean | undefined;
  /** What of the prompts need not be computed again. */
  readonly memory?: PromptMemory | undefined;
  /** Stops the work. */
  readonly signal?: AbortSignal | undefined;
}

/** A piece of a continuation. */
export interface GeneratedPiece {
  /** Which of the prompts it continues, from 0. */
  readonly prompt: number;
  /** Text that is complete; empty without a tokenizer, and while a character or a stop string may be unfinished. */
  readonly text: string;
  /** Tokens that were chosen since the piece before; none in the last piece if only held back text is left. */
  readonly tokens: readonly number[];
  /** Why it is the last piece of its prompt, if it is. */
  readonly finish: FinishReason | undefined;
}

/** A whole continuation. */
export interface Completion {
  /** Its text; empty without a tokenizer. */
  readonly text: string;
  /** Its tokens, a token that ended it included. */
  readonly tokens: readonly number[];
  /** Why it ended. */
  readonly finish: FinishReason;
}

const DEFAULT_TOKENS = 256;

/** A prompt that is being continued. */
interface Continuation extends DecodeRow {
  /** Of the prompt and the continuation. */
  readonly tokens: number[];
  readonly text: TokenStream | undefined;
  readonly stop: StopStrings;
  readonly most: number;
  chosen: number;
  finish: FinishReason | undefined;
}

/** {@linkcode LanguageModel.generate} on prompts in a list. */
export async function* generateTokens(
  parts: ModelParts,
  prompts: readonly Prompt[],
  options: GenerationOptions,
): AsyncGenerator<GeneratedPiece, void> {
  const { signal, memory } = options;
  const stops = typeof options.stop === "string" ? [options.stop] : options.stop ?? [];
  if (prompts.length === 0) refuse("there is no prompt");
  if (stops.length > 0) requireTokenizer(parts.tokenizer, "stop strings");
  const encoded = prompts.map((prompt, index) => {
    const tokens = encodePrompt(parts, prompt, options.specialTokens ?? true);
    checkLength(parts, tokens, index);
    return tokens;
  });
  const { maxTokens = DEFAULT_TOKENS } = options;
  if (!(Number.isSafeInteger(maxTokens) && maxTokens >= 1)) {
    refuse(`maxTokens must be an integer of 1 or more, got ${maxTokens}`);
  }
  const endTokens = new Set(options.endTokens ?? parts.config.endTokens);
  using sampler = new Sampler(parts, options);
  const pipeline = new DecodePipeline(parts, sampler);
  signal?.throwIfAborted();

  let waiting = encoded.map((tokens, prompt): WaitingPrompt => ({ prompt, tokens }));
  const active = new Set<Continuation>();
  // Several would not know which of them is to be remembered.
  const remembering = prompts.length === 1 ? memory : undefined;
  try {
    while (waiting.length > 0 || active.size > 0) {
      const room = waiting.length > 0 ? roomFor(parts, active) : 0;
      if (room > 0 && !pipeline.isAhead) {
        const next = waiting.slice(0, countTogether(parts, waiting, { room, memory }));
        const started = await prefill(parts, next, sampler, options);
        waiting = waiting.slice(started.length);
        const begun = started.map(({ prompt, sequence, tokens }): Continuation => ({
          prompt,
          sequence,
          tokens: [...tokens],
          text: parts.tokenizer?.stream(tokens),
          stop: new StopStrings(stops),
          most: Math.min(maxTokens, parts.cache.config.tokens - tokens.length),
          chosen: 0,
          finish: undefined,
        }));
        for (const continuation of begun) active.add(continuation);
        const pieces = begun.map((each, i) => take(each, started[i]!.token, endTokens));
        endFinished(parts, active, remembering);
        yield* pieces;
        continue;
      }
      signal?.throwIfAborted();
      const batch = [...active]; // none, if a step ahead was one too many for all
      const ahead = parts.decodesAhead && room === 0 &&
        batch.every((continuation) => goesOn(parts, continuation, remembering));
      const chosen = await pipeline.next(batch, { ahead });
      const pieces = batch.map((continuation, i) => take(continuation, chosen[i]!, endTokens));
      endFinished(parts, active, remembering);
      yield* pieces;
    }
  } finally {
    for (const continuation of active) {
      try {
        end(parts, continuation, remembering);
      } catch {
        // The cache was disposed, or a step of it failed: what was thrown first says so.
      }
    }
  }
}

/** The tokens of a prompt. Throws `unsupported` for a text without a tokenizer, `invalid-argument` for what are none. */
export function encodePrompt(
  { tokenizer, config }: ModelParts,
  prompt: Prompt,
  specialTokens: boolean,
): readonly number[] {
  if (typeof prompt === "string") {
    return requireTokenizer(tokenizer, "texts").encode(prompt, { specialTokens });
  }
  const bad = prompt.find((token) =>
    !(Number.isInteger(token) && token >= 0 && token < config.vocabulary)
  );
  if (bad === undefined) return prompt;
  return refuse(`tokens must be integers from 0 to ${config.vocabulary - 1}, got ${bad}`);
}

function requireTokenizer(tokenizer: Tokenizer | undefined, what: string): Tokenizer {
  if (tokenizer !== undefined) return tokenizer;
  const message = `Cannot use ${what}: the model was loaded without a tokenizer; give tokens`;
  throw new PackhorseError("unsupported", message);
}

function checkLength({ cache }: ModelParts, tokens: readonly number[], prompt: number): void {
  if (tokens.length === 0) refuse(`prompt ${prompt} has no tokens`);
  const most = cache.config.tokens;
  if (tokens.length < most) return;
  refuse(
    `prompt ${prompt} has ${tokens.length} tokens, and the model was loaded for sequences of ` +
      `${most}, of which one must be left`,
  );
}

/** How many more sequences can begin: at least one prompt has to go on, or its error tells what is full. */
function roomFor({ cache }: ModelParts, active: ReadonlySet<Continuation>): number {
  return Math.max(cache.config.sequences - cache.sequenceCount, active.size === 0 ? 1 : 0);
}

/**
 * Whether a step after the next may be enqueued before it is known if that ends the continuation: not after the last token
 * there may be, and not if it packs tokens of a sequence that is to be remembered as if it had not been.
 */
function goesOn(
  { cache }: ModelParts,
  { chosen, most, tokens }: Continuation,
  remembering: PromptMemory | undefined,
): boolean {
  if (chosen + 1 === most) return false;
  const { sinks, residual } = cache.config;
  return remembering === undefined || (tokens.length + 1 - sinks - residual) % BLOCK_TOKENS !== 0;
}

/** Adds a token to a continuation, and says what of its text is new. */
function take(
  continuation: Continuation,
  token: number,
  endTokens: ReadonlySet<number>,
): GeneratedPiece {
  const { prompt, text, stop, most } = continuation;
  continuation.tokens.push(token);
  continuation.chosen++;
  if (endTokens.has(token)) {
    continuation.finish = "end";
    return finishText(continuation, "", [token]);
  }
  const { text: shown, stopped } = stop.push(text?.push(token) ?? "");
  if (!stopped && continuation.chosen === most) {
    continuation.finish = "length";
    return finishText(continuation, shown, [token]);
  }
  if (stopped) continuation.finish = "stop";
  return { prompt, text: shown, tokens: [token], finish: continuation.finish };
}

/** The last piece: with text that was held back. */
function finishText(
  continuation: Continuation,
  shown: string,
  tokens: readonly number[],
): GeneratedPiece {
  const { prompt, text, stop } = continuation;
  const rest = stop.push(text?.flush() ?? "");
  if (rest.stopped && continuation.finish === "length") continuation.finish = "stop";
  const held = rest.stopped ? "" : stop.flush();
  return { prompt, text: shown + rest.text + held, tokens, finish: continuation.finish };
}

/** Ends the sequences that are finished. Throws `non-finite` if keys or values were beyond what their type holds. */
function endFinished(
  parts: ModelParts,
  active: Set<Continuation>,
  memory: PromptMemory | undefined,
): void {
  for (const continuation of [...active]) {
    if (continuation.finish === undefined) continue;
    active.delete(continuation);
    end(parts, continuation, memory);
    parts.cache.check();
  }
}

/** Gives a sequence to the memory, if there is one, or removes it. */
function end(
  { cache }: ModelParts,
  { sequence, tokens }: Continuation,
  memory: PromptMemory | undefined,
): void {
  if (memory === undefined) return cache.remove(sequence);
  // The last token was chosen, but not computed, unless a step ahead did.
  const computed = tokens.length - 1;
  if (cache.length(sequence) > computed) cache.truncate(sequence, computed);
  memory.hold(sequence, tokens.slice(0, cache.length(sequence)));
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot generate: ${reason}`);
}
