/** Conversations of the tiny model, with a chat template of the test's own, on every backend that opens here. */
import { assert, assertEquals, assertGreater } from "@std/assert";
import { Device } from "../src/device/mod.ts";
import { type Conversation, LanguageModel, Tokenizer } from "../src/llm/mod.ts";
import { backends } from "./backends.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const TINY = new URL("fixtures/tiny", import.meta.url).pathname;
const TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n" +
  "{% endfor %}<assistant>";
const OPTIONS = { maxTokens: 8, endTokens: [] };

function test(name: string, work: (model: LanguageModel) => Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`llm conversation: ${backend}: ${name}`, async () => {
      using folder = new TemporaryFolder();
      await Deno.copyFile(`${TINY}/tokenizer.json`, folder.file("tokenizer.json"));
      await folder.write("chat_template.jinja", TEMPLATE);
      using device = Device.open({ backend });
      using model = await LanguageModel.load(device, TINY, {
        tokenizer: await Tokenizer.load(folder.path), // another than the model's own
        tokens: 192,
        sequences: 2,
        residual: 16,
      });
      await work(model);
      assertEquals(model.cacheStatistics().sequences, 0);
    });
  }
}

async function answerTo(conversation: Conversation, text: string): Promise<string> {
  let answer = "";
  for await (const piece of conversation.reply(text, OPTIONS)) answer += piece.text;
  return answer;
}

test("what was said stays, and is not computed again", async (model) => {
  using conversation = model.createConversation({ system: "Be brief." });
  assertEquals([conversation.messages.length, conversation.prompt], [1, undefined]);
  const first = await answerTo(conversation, "Who went up to Jerusalem?");
  const { tokens } = conversation.prompt!;
  assertEquals(conversation.prompt!.remembered, 0);
  const second = await answerTo(conversation, "And then?");
  assertEquals(conversation.messages, [
    { role: "system", content: "Be brief." },
    { role: "user", content: "Who went up to Jerusalem?" },
    { role: "assistant", content: first },
    { role: "user", content: "And then?" },
    { role: "assistant", content: second },
  ]);
  assertGreater(conversation.prompt!.remembered, tokens - 4);

  conversation.reset();
  assertEquals([conversation.messages.length, conversation.prompt], [1, undefined]);
  assertEquals(model.cacheStatistics().sequences, 0);
  assertEquals(await answerTo(conversation, "Who went up to Jerusalem?"), first);
});

test("an answer that ends early stays as far as it came", async (model) => {
  using conversation = model.createConversation();
  let begun = "";
  for await (const piece of conversation.reply("In the beginning", OPTIONS)) {
    begun += piece.text;
    if (begun.length > 4) break;
  }
  const said = [
    { role: "user", content: "In the beginning" },
    { role: "assistant", content: begun },
  ];
  assertEquals(conversation.messages, said);

  // Stopped before it began: the question is not part of it either.
  const aborted = AbortSignal.abort(new Error("stopped"));
  const reply = conversation.reply("And then?", { ...OPTIONS, signal: aborted });
  let message = "";
  await reply.next().catch((error) => message = error.message);
  assertEquals([message, conversation.messages], ["stopped", said]);

  // Nor is one that is too long, and the conversation goes on.
  await rejectsWith(
    () => conversation.reply("word ".repeat(200), OPTIONS).next(),
    "invalid-argument",
    "Cannot chat: with this message the conversation has",
  );
  assertEquals(conversation.messages, said);
  await answerTo(conversation, "And then?");
  assertEquals(conversation.messages.length, 4);
  assert(conversation.prompt!.remembered > 0);
});

Deno.test("llm conversation: a model without a template, or a tokenizer, cannot chat", async () => {
  using device = Device.open();
  for (
    const [tokenizer, reason] of [[true, "no chat template"], [
      false,
      "without a tokenizer",
    ]] as const
  ) {
    using model = await LanguageModel.load(device, TINY, { tokens: 64, tokenizer });
    const begin = () => Promise.resolve().then(() => model.createConversation());
    await rejectsWith(begin, "unsupported", reason);
  }
});
