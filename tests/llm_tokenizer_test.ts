/** Tokenizers, chat templates, texts that come a token at a time, and stop strings. */
import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import fc from "fast-check";
import { PackhorseError } from "../src/error.ts";
import { Tokenizer } from "../src/llm/mod.ts";
import { StopStrings } from "../src/llm/stop_strings.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const TINY = new URL("fixtures/tiny", import.meta.url).pathname;
const TEXTS = [
  'And the king said, "Who is this?" — and behold, it was naïve.',
  "def main():\n    return {'é': '日本語', 'emoji': '👩‍👩‍👧 🎉🏳️‍🌈'}\n",
  "  two spaces ,and punctuation .\t\ttabs\n\n\n",
];

Deno.test("llm tokenizer: tokens are Hugging Face's, and texts come back", async () => {
  const tokenizer = await Tokenizer.load(TINY);
  const oracle = JSON.parse(Deno.readTextFileSync(`${TINY}/oracle.json`));
  const text = Deno.readTextFileSync(`${TINY}/heldout.txt`);
  assertEquals(tokenizer.vocabulary, 2048);
  const tokens = tokenizer.encode(text, { specialTokens: false });
  assertEquals(tokens.length, oracle.tokens_total);
  assert(tokenizer.decode(tokens) === text);
  for (const each of TEXTS) assertEquals(tokenizer.decode(tokenizer.encode(each)), each);
  assertEquals(tokenizer.decode(oracle.greedy.new_ids), oracle.greedy.text);
  assertEquals([tokenizer.encode(""), tokenizer.decode([])], [[], ""]);
  assertEquals(tokenizer.decode([0]), "");
  assertEquals(tokenizer.decode([0], { skipSpecialTokens: false }), "<|endoftext|>");
});

Deno.test("llm tokenizer: pieces of a text are whole characters, and all of it", async () => {
  const tokenizer = await Tokenizer.load(TINY);
  for (const text of TEXTS) {
    const tokens = tokenizer.encode(text);
    for (let before = 0; before < tokens.length; before += 7) {
      const first = tokens.slice(0, before);
      // Where a character would be cut, a text cannot go on.
      if (tokenizer.decode(first).endsWith("\ufffd")) continue;
      const stream = tokenizer.stream(first);
      const pieces = tokens.slice(before).map((token) => stream.push(token));
      assert(pieces.every((piece) => !piece.includes("\ufffd")), text);
      assertEquals(pieces.join("") + stream.flush(), text.slice(tokenizer.decode(first).length));
    }
  }
  // A text that ends within a character says so, but only at its end.
  const tokens = tokenizer.encode("a🎉");
  const stream = tokenizer.stream();
  const pieces = tokens.slice(0, -1).map((token) => stream.push(token));
  assertEquals([pieces.join(""), stream.flush().slice(-1)], ["a", "\ufffd"]);
});

/** A tokenizer whose words begin with "▁", as Llama 2 has it: the first space of a text goes. */
const METASPACE = {
  version: "1.0",
  added_tokens: [{
    id: 0,
    content: "<s>",
    special: true,
    normalized: false,
    single_word: false,
    lstrip: false,
    rstrip: false,
  }],
  normalizer: {
    type: "Sequence",
    normalizers: [
      { type: "Prepend", prepend: "▁" },
      { type: "Replace", pattern: { String: " " }, content: "▁" },
    ],
  },
  pre_tokenizer: null,
  post_processor: {
    type: "TemplateProcessing",
    single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
    pair: [],
    special_tokens: { "<s>": { id: "<s>", ids: [0], tokens: ["<s>"] } },
  },
  decoder: {
    type: "Sequence",
    decoders: [
      { type: "Replace", pattern: { String: "▁" }, content: " " },
      { type: "ByteFallback" },
      { type: "Fuse" },
      { type: "Strip", content: " ", start: 1, stop: 0 },
    ],
  },
  model: {
    type: "BPE",
    byte_fallback: true,
    unk_token: "<s>",
    vocab: Object.fromEntries(
      ["<s>", "▁", "a", "b", "▁a", "▁b", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>"]
        .map((token, id) => [token, id]),
    ),
    merges: ["▁ a", "▁ b"],
  },
};

Deno.test("llm tokenizer: a space between a prompt and its continuation stays", async () => {
  using folder = new TemporaryFolder();
  await folder.write("tokenizer.json", JSON.stringify(METASPACE));
  const tokenizer = await Tokenizer.load(folder.path);
  assertEquals(tokenizer.encode("a b"), [0, 4, 5]);
  assertEquals(tokenizer.encode("a b", { specialTokens: false }), [4, 5]);
  assertEquals(tokenizer.decode([0, 4, 5]), "a b");
  const stream = tokenizer.stream([0, 4]);
  assertEquals([5, 6, 7, 8, 9, 4].map((token) => stream.push(token)), [
    " b",
    "",
    "",
    "",
    "🎉",
    " a",
  ]);
  // At the beginning of a text, it goes.
  assertEquals(tokenizer.stream().push(4), "a");
});

Deno.test("llm tokenizer: chats follow the template", async () => {
  using folder = new TemporaryFolder();
  await folder.write("tokenizer.json", JSON.stringify(METASPACE));
  const chat = [{ role: "user", content: "a" }, { role: "assistant", content: "b" }];
  const plain = await Tokenizer.load(folder.path);
  assertEquals(plain.hasChatTemplate, false);
  const error = assertThrows(() => plain.chat(chat), PackhorseError);
  assertEquals(error.code, "unsupported");

  const template =
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}" +
    "{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}" +
    "{% if add_generation_prompt %}[assistant]{% endif %}";
  const config = { bos_token: { content: "<s>" }, chat_template: template };
  await folder.write("tokenizer_config.json", JSON.stringify(config));
  const tokenizer = await Tokenizer.load(folder.path);
  assertEquals(tokenizer.chat(chat), "<s>[user] a[assistant] b[assistant]");
  assertEquals(tokenizer.chat(chat, { addGenerationPrompt: false }), "<s>[user] a[assistant] b");
  const refused = assertThrows(
    () => tokenizer.chat([{ role: "system", content: "" }]),
    PackhorseError,
  );
  assertEquals(refused.code, "invalid-argument");
  assertStringIncludes(refused.message, "no system");

  // Several templates, and one in a file of its own, which comes first.
  const named = [{ name: "tool", template: "tool" }, { name: "default", template: "default" }];
  await folder.write("tokenizer_config.json", JSON.stringify({ chat_template: named }));
  assertEquals((await Tokenizer.load(folder.path)).chat(chat), "default");
  await folder.write("chat_template.jinja", "file");
  assertEquals((await Tokenizer.load(folder.path)).chat(chat), "file");
});

Deno.test("llm tokenizer: what is none is refused", async () => {
  using folder = new TemporaryFolder();
  await rejectsWith(() => Tokenizer.load(folder.path), "not-found", "tokenizer.json");
  await folder.write("tokenizer.json", "{");
  await rejectsWith(() => Tokenizer.load(folder.path), "corrupt", "tokenizer.json");
  await folder.write("tokenizer.json", JSON.stringify({ ...METASPACE, model: { type: "Oracle" } }));
  await rejectsWith(() => Tokenizer.load(folder.path), "corrupt", "tokenizer.json");
});

Deno.test("llm stop strings: texts end where one comes, however they are cut", () => {
  const letter = fc.constantFrom("a", "b", "c");
  const word = fc.string({ unit: letter, minLength: 1, maxLength: 4 });
  fc.assert(fc.property(
    fc.array(fc.string({ unit: letter, maxLength: 5 })),
    fc.array(word, { minLength: 1, maxLength: 3 }),
    (pieces, strings) => {
      const stop = new StopStrings(strings);
      let shown = "";
      let so_far = "";
      let stopped = false;
      for (const piece of pieces) {
        so_far += piece;
        const found = stop.push(piece);
        shown += found.text;
        stopped = found.stopped;
        // What is shown does not change, and is no part of a string that is complete later.
        assert(so_far.startsWith(shown));
        if (stopped) break;
      }
      if (!stopped) shown += stop.flush();
      const first = Math.min(
        ...strings.map((each) => so_far.indexOf(each)).filter((at) => at >= 0),
      );
      assertEquals(stopped, Number.isFinite(first));
      assertEquals(shown, stopped ? so_far.slice(0, first) : so_far);
    },
  ));
  const none = new StopStrings([""]);
  assertEquals(none.push("text"), { text: "text", stopped: false });
});
