import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { type Conversation, LanguageModel, Tokenizer } from "../../src/llm/mod.ts";
import { cacheReport } from "../cache_report.ts";
import { inputLines } from "../input_lines.ts";
import { listenForInterrupt, onInterrupt } from "../interrupt.ts";
import { DEFAULT_CODEC, type GenerationCommandOptions, samplingOf } from "../model_generation.ts";
import { defined, type GlobalOptions } from "../options.ts";
import {
  formatBits,
  formatBytes,
  formatSeconds,
  printAside,
  printError,
  printJson,
  printPiece,
  withProgress,
} from "../output.ts";

/** Options of `llm chat`. */
export interface LlmChatOptions extends GenerationCommandOptions {
  system?: string | undefined;
}

/** A question and its answer, as `--json` shows them. */
interface Turn {
  user: string;
  assistant: string;
  promptTokens: number;
  /** Tokens of the prompt that were in the cache from the turns before. */
  rememberedTokens: number;
  tokenCount: number;
  finish: string;
  seconds: number;
  tokensPerSecond: number;
  cacheBytes: number;
  raw16CacheBytes: number;
  bitsPerValue: number;
}

const HELP = "/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer";
const PROMPT = "> ";

/** Talks with a model: a line of input is what the user says, and the answer is printed as it comes. */
export async function llmChat(options: GlobalOptions & LlmChatOptions): Promise<void> {
  const { backend, json, context, residual, system } = options;
  const { kv, codec } = options.kv ?? DEFAULT_CODEC;
  // Before the weights, which take long.
  const tokenizer = await Tokenizer.load(options.model);
  if (!tokenizer.hasChatTemplate) {
    const message = `Cannot chat with ${options.model}: it has no chat template ` +
      "(in tokenizer_config.json or chat_template.jinja); llm generate continues texts";
    throw new PackhorseError("unsupported", message);
  }
  using device = Device.open(defined({ backend }));
  using model = await loadModel(device, options, {
    codec,
    tokenizer,
    sequences: 2, // that which is remembered, and its fork that goes on
    residual,
    ...defined({ tokens: context }),
  });
  using conversation = model.createConversation(defined({ system }));
  const isInteractive = json !== true && Deno.stdin.isTerminal() && Deno.stdout.isTerminal();
  const turns: Turn[] = [];
  using talk = new Talk(isInteractive);
  if (isInteractive) printAside(`${options.model} on ${device.info.name}, ${kv}. ${HELP}.`);
  for await (const line of talk.lines()) {
    const user = line.trim();
    if (user === "") continue;
    if (user === "/exit") break;
    if (user === "/reset") {
      conversation.reset();
      continue;
    }
    try {
      const seed = options.seed + turns.length; // so that a question asked again may get another answer
      const turn = await talk.answer(model, conversation, user, { ...options, seed });
      if (turn === undefined) continue;
      turns.push(turn);
      if (isInteractive) printAside(summary(turn));
    } catch (error) {
      if (!isInteractive || !isOfThisTurn(error)) throw error;
      printError(error);
    }
  }
  if (!json) return;
  printJson({
    model: options.model,
    backend: device.backend,
    device: device.info.name,
    ...{ kv, residual, system, turns },
  });
}

async function loadModel(
  device: Device,
  { model }: LlmChatOptions,
  options: Parameters<typeof LanguageModel.load>[2],
): Promise<LanguageModel> {
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  return await withProgress(
    "loading",
    (onProgress) => LanguageModel.load(device, model, { ...options, onProgress, signal }),
  );
}

/** Whether the conversation can go on: the message was too long, or the template refused it. */
function isOfThisTurn(error: unknown): boolean {
  return error instanceof PackhorseError &&
    (error.code === "invalid-argument" || error.code === "out-of-memory");
}

/** Reads lines and prints answers, one at a time; Ctrl-C stops an answer. */
class Talk implements Disposable {
  readonly #isInteractive: boolean;
  readonly #interrupts: Disposable;
  readonly #interrupted = Promise.withResolvers<never>();
  #answering: AbortController | undefined;

  constructor(isInteractive: boolean) {
    this.#isInteractive = isInteractive;
    this.#interrupted.promise.catch(() => {}); // where nobody waits for a line any more
    this.#interrupts = onInterrupt(() => this.#interrupt());
  }

  /** Lines of input. Ctrl-C while one is waited for is an error, unless there is a user to be told how to leave. */
  async *lines(): AsyncGenerator<string, void> {
    const lines = inputLines();
    while (true) {
      if (this.#isInteractive) printPiece(PROMPT);
      const { done, value } = await Promise.race([lines.next(), this.#interrupted.promise]);
      if (done) break;
      yield value;
    }
    if (this.#isInteractive) printPiece("\n");
  }

  /** Prints the answer; undefined if it was stopped before it began. */
  async answer(
    model: LanguageModel,
    conversation: Conversation,
    user: string,
    options: GlobalOptions & LlmChatOptions,
  ): Promise<Turn | undefined> {
    const { json, maxTokens } = options;
    const controller = this.#answering = new AbortController();
    const { signal } = controller;
    let [assistant, tokenCount, finish] = ["", 0, "interrupted"];
    const start = performance.now();
    try {
      const generation = { ...samplingOf(options), maxTokens, signal };
      for await (const piece of conversation.reply(user, generation)) {
        assistant += piece.text;
        tokenCount += piece.tokens.length;
        finish = piece.finish ?? finish;
        if (!json) printPiece(piece.text);
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    } finally {
      this.#answering = undefined;
      if (!json && (tokenCount > 0 || signal.aborted)) printPiece("\n");
    }
    if (tokenCount === 0) return undefined;
    const seconds = (performance.now() - start) / 1000;
    const { bytes, raw16Bytes, bitsPerValue } = cacheReport(model);
    const { tokens, remembered } = conversation.prompt!;
    return {
      ...{ user, assistant, promptTokens: tokens, rememberedTokens: remembered },
      ...{ tokenCount, finish, seconds, tokensPerSecond: tokenCount / seconds },
      ...{ cacheBytes: bytes, raw16CacheBytes: raw16Bytes, bitsPerValue },
    };
  }

  [Symbol.dispose](): void {
    this.#interrupts[Symbol.dispose]();
  }

  #interrupt(): void {
    if (this.#answering !== undefined) this.#answering.abort(new Error("interrupted"));
    else if (this.#isInteractive) printPiece(`\n${HELP}\n${PROMPT}`);
    else this.#interrupted.reject(new Error("interrupted"));
  }
}

function summary({ tokenCount, seconds, cacheBytes, bitsPerValue }: Turn): string {
  return `${tokenCount} tokens in ${formatSeconds(seconds)}; cache in ${
    formatBytes(cacheBytes)
  }, ` +
    `${formatBits(bitsPerValue)} bits per value`;
}
