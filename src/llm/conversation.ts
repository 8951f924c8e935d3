import { PackhorseError } from "../error.ts";
import type { GeneratedPiece, GenerationOptions } from "./generate.ts";
import type { LanguageModel } from "./language_model.ts";
import type { PromptMemory } from "./prompt_memory.ts";
import type { ChatMessage, Tokenizer } from "./tokenizer.ts";

/** Options of {@linkcode LanguageModel.createConversation}. */
export interface ConversationOptions {
  /** What the model is told before the first message. Default: nothing but what its template says. */
  readonly system?: string | undefined;
}

/** Options of {@linkcode Conversation.reply}. */
export type ReplyOptions = Omit<GenerationOptions, "memory" | "specialTokens">;

/** The tokens that a reply follows. */
export interface ConversationPrompt {
  /** Tokens of the whole conversation, as the template writes it. */
  readonly tokens: number;
  /** How many of them were in the cache already, and not computed again. */
  readonly remembered: number;
}

/**
 * A conversation with a model through its chat template, whose cache stays from one reply to the next. Made by
 * {@linkcode LanguageModel.createConversation}. It takes two of the model's `sequences` while it replies, and one between.
 *
 * @example
 * ```ts
 * import { Device, LanguageModel } from "@packhorse/packhorse";
 * import { assert, assertEquals } from "@std/assert";
 *
 * // The tiny model has no chat template of its own.
 * const folder = await Deno.makeTempDir();
 * for (const name of ["config.json", "model.safetensors", "tokenizer.json"]) {
 *   await Deno.copyFile(`tests/fixtures/tiny/${name}`, `${folder}/${name}`);
 * }
 * const template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
 * await Deno.writeTextFile(`${folder}/chat_template.jinja`, template);
 *
 * using device = Device.open();
 * using model = await LanguageModel.load(device, folder, { tokens: 512, sequences: 2 });
 * using conversation = model.createConversation();
 * for (const message of ["Who went up to Jerusalem?", "And then?"]) {
 *   let answer = "";
 *   for await (const piece of conversation.reply(message, { maxTokens: 8 })) answer += piece.text;
 *   assertEquals(conversation.messages.at(-1), { role: "assistant", content: answer });
 * }
 * assertEquals(conversation.messages.length, 4);
 * assert(conversation.prompt!.remembered > 0);
 * ```
 */
export class Conversation implements Disposable {
  readonly #model: LanguageModel;
  readonly #tokenizer: Tokenizer;
  readonly #system: readonly ChatMessage[];
  readonly #memory: PromptMemory;
  #messages: readonly ChatMessage[];
  #prompt: ConversationPrompt | undefined;

  /** Throws `unsupported` for a model without a chat template, or loaded without a tokenizer. */
  constructor(model: LanguageModel, { system }: ConversationOptions = {}) {
    const { tokenizer } = model;
    if (tokenizer === undefined || !tokenizer.hasChatTemplate) {
      const message = tokenizer === undefined
        ? "Cannot chat: the model was loaded without a tokenizer"
        : "Cannot chat: the model has no chat template; it only continues texts";
      throw new PackhorseError("unsupported", message);
    }
    this.#model = model;
    this.#tokenizer = tokenizer;
    this.#system = system === undefined ? [] : [{ role: "system", content: system }];
    this.#messages = this.#system;
    this.#memory = model.createMemory();
  }

  /** All that was said. */
  get messages(): readonly ChatMessage[] {
    return this.#messages;
  }

  /** What the latest reply follows; undefined before the first. */
  get prompt(): ConversationPrompt | undefined {
    return this.#prompt;
  }

  /**
   * Says something, and gives the model's answer in pieces as it comes; then both are part of the conversation. If the
   * answer ends early, by the signal or because the loop is left, what had come of it is; if none had, what was said is
   * not part of it either.
   *
   * Throws as {@linkcode LanguageModel.generate}, and `invalid-argument` if the template refuses the message, or the
   * conversation has become too long for the model's `tokens`; then it is as it was.
   */
  async *reply(text: string, options: ReplyOptions = {}): AsyncGenerator<GeneratedPiece, void> {
    const asked: readonly ChatMessage[] = [...this.#messages, { role: "user", content: text }];
    const written = this.#tokenizer.chat(asked);
    const tokens = this.#tokenizer.encode(written, { specialTokens: false });
    const most = this.#model.cacheConfig.tokens;
    if (tokens.length >= most) {
      throw new PackhorseError(
        "invalid-argument",
        `Cannot chat: with this message the conversation has ${tokens.length} tokens, and the model ` +
          `was loaded for ${most}, of which one must be left; start anew, or load it for more`,
      );
    }
    const memory = this.#memory;
    this.#prompt = { tokens: tokens.length, remembered: memory.overlap(tokens) };
    let answer = "";
    let hasBegun = false;
    try {
      for await (const piece of this.#model.generate(tokens, { ...options, memory })) {
        hasBegun = true;
        answer += piece.text;
        yield piece;
      }
    } finally {
      if (hasBegun) this.#messages = [...asked, { role: "assistant", content: answer }];
    }
  }

  /** Forgets all but the system's message, and gives back the memory. */
  reset(): void {
    this.#messages = this.#system;
    this.#prompt = undefined;
    this.#memory.clear();
  }

  /** Gives back the memory. */
  [Symbol.dispose](): void {
    this.#memory.clear();
  }
}
