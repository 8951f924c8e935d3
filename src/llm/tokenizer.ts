import { Template } from "@huggingface/jinja";
import { Tokenizer as HuggingFaceTokenizer } from "@huggingface/tokenizers";
import { PackhorseError } from "../error.ts";
import { InputFile } from "../io/input_file.ts";
import { isObject, parseJsonObject } from "../io/untrusted_json.ts";
import { parseConfig } from "../io/json_fields.ts";
import { readIfThere } from "./model_config.ts";

/** A message of a chat. */
export interface ChatMessage {
  /** Who says it: "system", "user", "assistant", or what else the model's template knows. */
  readonly role: string;
  /** What is said. */
  readonly content: string;
}

/** Options of {@linkcode Tokenizer.encode}. */
export interface EncodeOptions {
  /** Whether to add the tokens that texts of the model begin and end with, where there are any. Default: true. */
  readonly specialTokens?: boolean | undefined;
}

/** Options of {@linkcode Tokenizer.decode}. */
export interface DecodeOptions {
  /** Whether special tokens are left out of the text. Default: true. */
  readonly skipSpecialTokens?: boolean | undefined;
}

/** Options of {@linkcode Tokenizer.chat}. */
export interface ChatOptions {
  /** Whether the text ends where the model's answer begins. Default: true. */
  readonly addGenerationPrompt?: boolean | undefined;
}

/** Several times what the largest vocabularies take. */
const MOST_BYTES = 2 ** 28;

/**
 * Texts to tokens and back, as the `tokenizer.json` of a Hugging Face model says.
 *
 * @example
 * ```ts
 * import { Tokenizer } from "@packhorse/packhorse/llm";
 * import { assertEquals } from "@std/assert";
 *
 * const tokenizer = await Tokenizer.load("tests/fixtures/tiny");
 * const tokens = tokenizer.encode("In the beginning");
 * assertEquals(tokenizer.decode(tokens), "In the beginning");
 * ```
 */
export class Tokenizer {
  readonly #tokenizer: HuggingFaceTokenizer;
  readonly #template: { readonly source: string; readonly path: string } | undefined;
  #parsedTemplate: Template | undefined;
  /** Tokens that templates use by name. */
  readonly #named: Readonly<Record<string, string>>;

  private constructor(
    tokenizer: HuggingFaceTokenizer,
    template: { source: string; path: string } | undefined,
    named: Record<string, string>,
  ) {
    this.#tokenizer = tokenizer;
    this.#template = template;
    this.#named = named;
  }

  /**
   * Reads `tokenizer.json` and, where they are there, `tokenizer_config.json` and `chat_template.jinja` of a folder.
   *
   * Throws `not-found` without a `tokenizer.json`, `corrupt` if it makes no tokenizer; `io`.
   */
  static async load(folder: string): Promise<Tokenizer> {
    const path = `${folder}/tokenizer.json`;
    const configPath = `${folder}/tokenizer_config.json`;
    const configBytes = await readIfThere(configPath);
    const config = configBytes === undefined ? {} : parseConfig(configBytes, configPath);
    const json = await readTokenizer(path);
    let tokenizer;
    try {
      tokenizer = new HuggingFaceTokenizer(json, config);
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      const message = `Cannot use ${path} as a tokenizer: ${reason}`;
      throw new PackhorseError("corrupt", message, { cause });
    }
    const templatePath = `${folder}/chat_template.jinja`;
    const templateBytes = await readIfThere(templatePath);
    const own = templateOf(config.chat_template);
    const template = templateBytes !== undefined
      ? { source: new TextDecoder().decode(templateBytes), path: templatePath }
      : own === undefined
      ? undefined
      : { source: own, path: configPath };
    return new Tokenizer(tokenizer, template, namedTokens(config));
  }

  /** One more than the largest token. */
  get vocabulary(): number {
    let largest = -1;
    for (const token of this.#tokenizer.get_vocab(true).values()) {
      largest = Math.max(largest, token);
    }
    return largest + 1;
  }

  /** The tokens of a text. */
  encode(text: string, options: EncodeOptions = {}): number[] {
    const { specialTokens = true } = options;
    if (text === "") return specialTokens ? this.#encode("", true) : [];
    return this.#encode(text, specialTokens);
  }

  /** The text of tokens. Bytes that are no UTF-8 become U+FFFD. */
  decode(tokens: Iterable<number>, options: DecodeOptions = {}): string {
    const list = [...tokens];
    if (list.length === 0) return "";
    return this.#tokenizer.decode(list, {
      skip_special_tokens: options.skipSpecialTokens ?? true,
      // It would change text that has spaces before punctuation, and cannot be done while streaming.
      clean_up_tokenization_spaces: false,
    });
  }

  /** Decodes tokens one at a time; `before` are those that a text to be continued has. */
  stream(before: readonly number[] = []): TokenStream {
    return new TokenStream(this, before);
  }

  /** Whether the folder has a chat template. */
  get hasChatTemplate(): boolean {
    return this.#template !== undefined;
  }

  /**
   * The text that a chat becomes by the model's template. It has the special tokens already: encode it without
   * adding any.
   *
   * Throws `unsupported` for a model without a template, `invalid-argument` if the template refuses the messages.
   */
  chat(messages: readonly ChatMessage[], options: ChatOptions = {}): string {
    if (this.#template === undefined) {
      const message = "Cannot chat: the model has no chat template; it only continues texts";
      throw new PackhorseError("unsupported", message);
    }
    const { source, path } = this.#template;
    const { addGenerationPrompt = true } = options;
    try {
      this.#parsedTemplate ??= new Template(source);
      return this.#parsedTemplate.render({
        messages: messages.map(({ role, content }) => ({ role, content })),
        add_generation_prompt: addGenerationPrompt,
        ...this.#named,
      });
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      const message = `Cannot apply the chat template of ${path}: ${reason}`;
      throw new PackhorseError("invalid-argument", message, { cause });
    }
  }

  #encode(text: string, specialTokens: boolean): number[] {
    return this.#tokenizer.encode(text, { add_special_tokens: specialTokens }).ids;
  }
}

/** How many tokens before a piece of text can change how it reads: decoders look at their neighbours, and drop a first space. */
const CONTEXT_TOKENS = 6;

/**
 * The text of tokens that come one at a time: pieces that, one after another, are what all tokens decode to, with no
 * character cut. Made by {@linkcode Tokenizer.stream}.
 */
export class TokenStream {
  readonly #tokenizer: Tokenizer;
  /** The latest tokens whose text is out. */
  #shown: readonly number[];
  /** Tokens whose text is not: they end within a character. */
  #pending: number[] = [];

  constructor(tokenizer: Tokenizer, before: readonly number[]) {
    this.#tokenizer = tokenizer;
    this.#shown = before.slice(-CONTEXT_TOKENS);
  }

  /** The text that is complete with this token; empty while a character lacks bytes. */
  push(token: number): string {
    this.#pending.push(token);
    const text = this.#text();
    // A character that lacks bytes reads as U+FFFD.
    return text.endsWith("\ufffd") ? "" : this.#show(text);
  }

  /** The text that is left once all tokens are there, U+FFFD for a character that lacks bytes. */
  flush(): string {
    return this.#show(this.#text());
  }

  /** What the pending tokens add to the text. */
  #text(): string {
    const before = this.#tokenizer.decode(this.#shown);
    return this.#tokenizer.decode([...this.#shown, ...this.#pending]).slice(before.length);
  }

  #show(text: string): string {
    this.#shown = [...this.#shown, ...this.#pending].slice(-CONTEXT_TOKENS);
    this.#pending = [];
    return text;
  }
}

async function readTokenizer(path: string): Promise<Record<string, unknown>> {
  using file = await InputFile.open(path);
  if (file.size > MOST_BYTES) {
    const message = `Cannot read ${path}: ${file.size} bytes are too many for a tokenizer`;
    throw new PackhorseError("corrupt", message);
  }
  return parseJsonObject(await file.read(0, file.size), `Cannot read ${path}: it`);
}

/** The template of a `tokenizer_config.json`: a text, or the one called "default" of a list. */
function templateOf(value: unknown): string | undefined {
  if (typeof value === "string") return value;
  if (!Array.isArray(value)) return undefined;
  const entries = value.filter(isObject);
  const found = entries.find(({ name }) => name === "default") ?? entries[0];
  return typeof found?.template === "string" ? found.template : undefined;
}

/** "bos_token" and the like: texts, or objects with the text as their content. */
function namedTokens(config: Record<string, unknown>): Record<string, string> {
  const named: Record<string, string> = {};
  for (const [name, value] of Object.entries(config)) {
    if (!name.endsWith("_token")) continue;
    const text = isObject(value) ? value.content : value;
    if (typeof text === "string") named[name] = text;
  }
  return named;
}
