import { Command, EnumType } from "@cliffy/command";
import { CompletionsCommand } from "@cliffy/command/completions";
import { HelpCommand } from "@cliffy/command/help";
import { DEFAULT_CACHE_CODECS } from "../src/kv/cache_codec.ts";
import config from "../deno.json" with { type: "json" };
import {
  byteSize,
  bytesPerSecond,
  cacheCodec,
  type GlobalOptions,
  numberFrom,
  positiveCount,
  positiveNumber,
  relativeScale,
  tensorPattern,
  tokenCount,
  transportPenalty,
  wholeNumber,
} from "./options.ts";

// What the commands do is loaded when they run, so that help and completions answer at once.

// What pack and sweep, which read a cache, take alike.
const KEY_PATTERN: ["--key-pattern <name:pattern>", string, { depends: string[] }] = [
  "--key-pattern <name:pattern>",
  'Name of the key tensors, "layers.<n>.key" unless given.',
  { depends: ["value-pattern"] },
];
const VALUE_PATTERN: ["--value-pattern <name:pattern>", string, { depends: string[] }] = [
  "--value-pattern <name:pattern>",
  'Name of the value tensors, "layers.<n>.value" unless given.',
  { depends: ["key-pattern"] },
];

const KV_FORMS = "How tokens are packed: raw16, packkv:k=0.1,v=0.2, fixed:k=4,v=4 or kivi:4. " +
  "May be given several times. ";
const LLM_KV_HELP =
  "How the cache packs tokens: raw16, packkv:k=0.1,v=0.2, fixed:k=4,v=4 or kivi:4. ";
// What generate and chat, which let a model write, take alike.
const CONTEXT: ["--context <tokens:count>", string] = [
  "--context <tokens:count>",
  "Most tokens of a sequence, prompt and answers. 4096, or the model's limit, unless given.",
];
const TEMPERATURE: ["--temperature <number:temperature>", string, { default: number }] = [
  "--temperature <number:temperature>",
  "What logits are divided by; 0 for the likeliest.",
  { default: 0 },
];
const TOP_K: ["--top-k <tokens:tokens>", string, { default: number }] = [
  "--top-k <tokens:tokens>",
  "Draw only so many of the likeliest tokens; 0 for all.",
  { default: 0 },
];
const TOP_P: ["--top-p <share:share>", string, { default: number }] = [
  "--top-p <share:share>",
  "Draw only the likeliest tokens that reach it together.",
  { default: 1 },
];
const MIN_P: ["--min-p <share:share>", string, { default: number }] = [
  "--min-p <share:share>",
  "Draw only tokens with this share of the likeliest's probability.",
  { default: 0 },
];
const REPETITION_PENALTY: [
  "--repetition-penalty <number:penalty>",
  string,
  { default: number },
] = [
  "--repetition-penalty <number:penalty>",
  "What logits of known tokens are divided by.",
  { default: 1 },
];
const SEED: ["--seed <number:tokens>", string, { default: number }] = [
  "--seed <number:tokens>",
  "What random choices follow from.",
  { default: 0 },
];
const GENERATION_KV: ["--kv <codec:codec>", string] = [
  "--kv <codec:codec>",
  `${LLM_KV_HELP}packkv:k=0.1,v=0.2 unless given.`,
];
const GENERATION_RESIDUAL: ["--residual <tokens:count>", string, { default: number }] = [
  "--residual <tokens:count>",
  "Latest tokens to leave in 16 bits.",
  { default: 128 },
];
const LLM_RESIDUAL_HELP =
  "Latest tokens to leave in 16 bits, from 8 on; 0 to pack every token before it is read.";
const KV_HELP = `${KV_FORMS}packkv unless given.`;
const KV_BENCH_HELP = `${KV_FORMS}All of ${DEFAULT_CACHE_CODECS.join(", ")} unless given.`;

/** The command tree: every command, option and help text. */
export function createApp() {
  return new Command()
    .name("packhorse")
    .version(config.version)
    .description(
      "Packs the key/value caches of language models into a few bits per value,\n" +
        "within an error bound that you set, on the CPU or the GPU.",
    )
    .throwErrors()
    .globalType("backend", new EnumType(["auto", "cpu", "cuda"]))
    .globalOption(
      "--backend <name:backend>",
      "Where to run. Without it PACKHORSE_BACKEND decides, else auto.",
    )
    .globalOption("--json", "Print one JSON document and nothing else.")
    .action(function () {
      this.showHelp();
    })
    .example("See what packing gains", "packhorse demo")
    .example(
      "Pack a cache and restore it",
      "packhorse kv pack cache.safetensors -o cache.phkv --k-rel 0.1 --v-rel 0.2\n" +
        "packhorse kv unpack cache.phkv -o restored.safetensors",
    )
    .command("kv", createKv())
    .command("llm", createLlm())
    .command("ot", createOt())
    .command("graph", createGraph())
    .command("doctor", "Show what Packhorse finds on this machine, and what is missing.")
    .example("Check the GPU", "packhorse doctor --backend cuda")
    .action(async (options) => (await import("./commands/doctor.ts")).doctor(options))
    .command("demo", "Pack a real cache, check the bound, and run its model over such a cache.")
    .option("-o, --output <folder:file>", "Folder for the files it writes.", { default: "demo" })
    .action(async (options) => (await import("./commands/demo.ts")).demo(options))
    .command("completions", new CompletionsCommand())
    .command("help", new HelpCommand())
    .reset();
}

function createKv() {
  return new Command<GlobalOptions>()
    .description("Pack, unpack and examine key/value caches (PackKV, arXiv 2512.24449).")
    .globalType("scale", relativeScale)
    .globalType("tokens", tokenCount)
    .globalType("pattern", tensorPattern)
    .globalType("count", positiveCount)
    .globalType("size", byteSize)
    .globalType("speed", bytesPerSecond)
    .globalType("codec", cacheCodec)
    .globalType("channels", new EnumType([64, 96, 128, 256]))
    .globalType("half", new EnumType(["f16", "bf16"]))
    .globalType("quantizer", new EnumType(["packkv", "kivi"]))
    .globalType("grouping", new EnumType(["token", "head"]))
    .globalType("bits", new EnumType([2, 3, 4, 8]))
    .globalType("divergence", numberFrom(0, 100))
    .globalType("repack", new EnumType(["none", "median", "greedy", "auto"]))
    .globalType("pack", new EnumType([4, 8, 16, 32]))
    .action(function () {
      this.showHelp();
    })
    .command("pack <input:file>", "Pack the cache in a .safetensors file into a .phkv file.")
    .option("-o, --output <file:file>", "The .phkv file to write.", { required: true })
    .option(
      "--k-rel <scale:scale>",
      "Scale of the keys as a share of a token's range; errors stay within half of it. " +
        "0.1 unless given.",
      { conflicts: ["k-bits", "v-bits"] },
    )
    .option("--v-rel <scale:scale>", "The same for the values. 0.2 unless given.", {
      conflicts: ["k-bits", "v-bits"],
    })
    .option("--repack <order:repack>", "How tokens are reordered within a block.", {
      default: "auto",
    })
    .option("--pack <tokens:pack>", "Tokens that share a bit width.", { default: 16 })
    .option("--quantizer <name:quantizer>", "How values become codes.", { default: "packkv" })
    .option("--k-bits <bits:bits>", "Bits of a key's code with kivi. 4 unless given.")
    .option("--v-bits <bits:bits>", "Bits of a value's code with kivi. 4 unless given.")
    .option(
      "--grouping <group:grouping>",
      "Whether a scale serves a token or one head of it, with packkv. token unless given.",
    )
    .option("--residual <tokens:tokens>", "Latest tokens to leave unpacked.", { default: 0 })
    .option("--keep-non-finite", "Store blocks with a NaN or an infinity as they are.")
    .option(...KEY_PATTERN)
    .option(...VALUE_PATTERN)
    .example(
      "Keep errors within 5 % of a token's range",
      "packhorse kv pack cache.safetensors -o cache.phkv --k-rel 0.1 --v-rel 0.1",
    )
    .example(
      "Spend more time for fewer bits",
      "packhorse kv pack cache.safetensors -o cache.phkv --repack greedy",
    )
    .example(
      "Compare with KIVI at 2 bits",
      "packhorse kv pack cache.safetensors -o cache.phkv --quantizer kivi --k-bits 2 --v-bits 2",
    )
    .action(async (options, input) =>
      (await import("./commands/kv_pack.ts")).kvPack(options, input)
    )
    .command("unpack <input:file>", "Restore the .safetensors file from a .phkv file.")
    .option("-o, --output <file:file>", "The .safetensors file to write.", { required: true })
    .option("--recover", "Restore every intact block of a damaged file and list the lost ones.")
    .example("Restore a cache", "packhorse kv unpack cache.phkv -o restored.safetensors")
    .example(
      "Save what is left of a damaged file",
      "packhorse kv unpack cache.phkv -o restored.safetensors --recover",
    )
    .action(async (options, input) =>
      (await import("./commands/kv_unpack.ts")).kvUnpack(options, input)
    )
    .command("inspect <input:file>", "Show what a .phkv file holds and where its bits go.")
    .example("See which widths the packs take", "packhorse kv inspect cache.phkv")
    .action(async (options, input) =>
      (await import("./commands/kv_inspect.ts")).kvInspect(options, input)
    )
    .command("sweep <input:file>", "Measure bits and errors over a grid of settings.")
    .option("--k-rel <scales:scale[]>", "Scales of the keys.", { default: [0.05, 0.1, 0.2] })
    .option("--v-rel <scales:scale[]>", "Scales of the values.", { default: [0.1, 0.2, 0.4] })
    .option("--repack <orders:repack[]>", "Token orders.", {
      default: ["none", "median", "greedy"],
    })
    .option("--pack <tokens:pack[]>", "Tokens that share a bit width.", { default: [16] })
    .option("--svg <file:file>", "Also write a chart of bits against error.")
    .option(...KEY_PATTERN)
    .option(...VALUE_PATTERN)
    .example(
      "Compare pack sizes, with a chart",
      "packhorse kv sweep cache.safetensors --pack 8,16,32 --svg sweep.svg",
    )
    .action(async (options, input) =>
      (await import("./commands/kv_sweep.ts")).kvSweep(options, input)
    )
    .command("plan", "Say how long a context fits into a memory, and where its bytes go.")
    .option("--config <file:file>", "The model's config.json, as on Hugging Face.", {
      required: true,
    })
    .option("--memory <size:size>", "Memory for weights and cache, such as 24GiB.", {
      required: true,
    })
    .option("--weights <size:size>", "Bytes of the weights. Counted from the config unless given.")
    .option("--kv <codec:codec>", KV_HELP, { collect: true })
    .option("--batch <sequences:count>", "Sequences at once.", { default: 1 })
    .option("--context <tokens:count>", "Plan for so many tokens of each, not for the most.")
    .option("--residual <tokens:tokens>", "Latest tokens to leave in 16 bits. 128 unless given.")
    .option("--sinks <tokens:tokens>", "First tokens to leave in 16 bits. 4 unless given.")
    .option("--step-tokens <tokens:count>", "Most tokens of a step. 2048 unless given.")
    .option(
      "--bandwidth <speed:speed>",
      "Memory bandwidth in GB/s, or such as 4.8TB/s. Unless given, that of the GPU, " +
        "or 4 TB/s without one.",
    )
    .option(
      "--bits-per-value <bits:number>",
      "Bits that packkv takes, instead of measuring them.",
      {
        conflicts: ["dump"],
      },
    )
    .option(
      "--dump <file:file>",
      "Cache in a .safetensors file to measure packkv on. One of a small model unless given.",
    )
    .option(...KEY_PATTERN)
    .option(...VALUE_PATTERN)
    .option("--svg <file:file>", "Also write a chart of context against memory.")
    .example(
      "Compare codecs on a GPU of 24 GiB",
      "packhorse kv plan --config config.json --memory 24GiB --kv raw16 --kv packkv --kv fixed:4",
    )
    .example(
      "See what 8 sequences of 32,768 tokens take",
      "packhorse kv plan --config config.json --memory 80GB --batch 8 --context 32768",
    )
    .action(async (options) => (await import("./commands/kv_plan.ts")).kvPlan(options))
    .command("bench", "Measure growing caches on this machine: append, and decode attention.")
    .option("--kv <codec:codec>", KV_BENCH_HELP, { collect: true })
    .option("--tokens <tokens:count>", "Tokens of a sequence.", { default: 8192 })
    .option("--batch <sequences:count>", "Sequences at once.", { default: 1 })
    .option("--heads <heads:count>", "Heads of the keys and values.", { default: 8 })
    .option("--group <heads:count>", "Query heads of each of them.", { default: 4 })
    .option("--head-dim <channels:channels>", "Channels of a head.", { default: 128 })
    .option("--dtype <type:half>", "Type of the tokens.", { default: "f16" })
    .option("--layers <layers:count>", "Layers. As many as exceed processor caches unless given.")
    .option("--repeat <times:count>", "How often attention is measured.", { default: 20 })
    .option(
      "--dump <file:file>",
      "Cache in a .safetensors file to draw tokens from. One of a small model unless given.",
    )
    .option(...KEY_PATTERN)
    .option(...VALUE_PATTERN)
    .option("--svg <file:file>", "Also write a chart.")
    .example(
      "Compare three codecs at 32,768 tokens",
      "packhorse kv bench --tokens 32768 --kv packkv:k=0.1,v=0.2 --kv fixed:4 --kv fixed:2",
    )
    .action(async (options) => (await import("./commands/kv_bench.ts")).kvBench(options))
    .command(
      "tune",
      "Find the codec with the fewest bits that leaves a model's predictions as they are.",
    )
    .option("--model <folder:file>", "Folder of the model.", { required: true })
    .option("--text <file:file>", "Text to predict, like what the model will see.", {
      required: true,
    })
    .option("--max-kld <nats:divergence>", "Mean divergence from a 16-bit cache to allow.", {
      required: true,
    })
    .option("--windows <windows:count>", "Windows of the text to score.", { default: 1 })
    .option("--tokens <tokens:count>", "Predictions of a window.", { default: 1024 })
    .option("--residual <tokens:tokens>", LLM_RESIDUAL_HELP, { default: 0 })
    .option("--budget <codecs:count>", "Most codecs to measure.", { default: 40 })
    .option("--svg <file:file>", "Also write a chart of bits per value against divergence.")
    .example(
      "Find what a divergence of 0.05 takes",
      "packhorse kv tune --model tests/fixtures/tiny --text tests/fixtures/tiny/heldout.txt \\\n" +
        "  --max-kld 0.05 --windows 2 --svg tune.svg",
    )
    .action(async (options) => (await import("./commands/kv_tune.ts")).kvTune(options))
    .reset();
}

function createLlm() {
  return new Command<GlobalOptions>()
    .description("Run language models of Hugging Face folders over a packed cache.")
    .globalType("tokens", tokenCount)
    .globalType("count", positiveCount)
    .globalType("codec", cacheCodec)
    .globalType("temperature", numberFrom(0, 1000))
    .globalType("share", numberFrom(0, 1))
    .globalType("penalty", numberFrom(0.01, 100))
    .globalType("bits", numberFrom(0.1, 16))
    .globalType("pattern", tensorPattern)
    .action(function () {
      this.showHelp();
    })
    .command("perplexity", "Measure how well a model predicts a text, and what packing costs.")
    .option("--model <folder:file>", "Folder of the model.", { required: true })
    .option("--text <file:file>", "Text to predict.", { required: true })
    .option("--windows <windows:count>", "Windows of the text to score.", { default: 1 })
    .option("--tokens <tokens:count>", "Predictions of a window.", { default: 1024 })
    .option("--kv <codec:codec>", `${LLM_KV_HELP}raw16 unless given.`)
    .option("--residual <tokens:tokens>", LLM_RESIDUAL_HELP, { default: 0 })
    .example(
      "See what 4 windows of 1,024 tokens cost",
      "packhorse llm perplexity --model tests/fixtures/tiny --text tests/fixtures/tiny/heldout.txt \\\n" +
        "  --windows 4 --kv packkv:k=0.1,v=0.2",
    )
    .action(async (options) =>
      (await import("./commands/llm_perplexity.ts")).llmPerplexity(options)
    )
    .command("frontier", "Compare what codecs cost a model: bits per value and divergence.")
    .option("--model <folder:file>", "Folder of the model.", { required: true })
    .option("--text <file:file>", "Text to predict.", { required: true })
    .option("--windows <windows:count>", "Windows of the text to score.", { default: 1 })
    .option("--tokens <tokens:count>", "Predictions of a window.", { default: 1024 })
    .option(
      "--kv <codec:codec>",
      `${LLM_KV_HELP}May be given several times. Settings of packkv, fixed and kivi unless given.`,
      { collect: true },
    )
    .option("--residual <tokens:tokens>", LLM_RESIDUAL_HELP, { default: 0 })
    .option("--svg <file:file>", "Also write a chart of bits per value against divergence.")
    .option("--report <file:file>", "Also write a page with chart and table, for a browser.")
    .example(
      "Compare settings of packkv with KIVI",
      "packhorse llm frontier --model tests/fixtures/tiny --text tests/fixtures/tiny/heldout.txt \\\n" +
        "  --kv packkv:k=0.05,v=0.1 --kv packkv:k=0.1,v=0.2 --kv kivi:4 --svg frontier.svg",
    )
    .action(async (options) => (await import("./commands/llm_frontier.ts")).llmFrontier(options))
    .command("generate", "Continue a prompt.")
    .option("--model <folder:file>", "Folder of the model.", { required: true })
    .option("--prompt <text:string>", "Text to continue.", { conflicts: ["file"] })
    .option("--file <file:file>", "File with the text to continue.")
    .option("--max-tokens <tokens:count>", "Most tokens of the continuation.", { default: 256 })
    .option(...CONTEXT)
    .option(...TEMPERATURE)
    .option(...TOP_K)
    .option(...TOP_P)
    .option(...MIN_P)
    .option(...REPETITION_PENALTY)
    .option(...SEED)
    .option(
      "--stop <text:string>",
      "Text that ends the continuation. May be given several times.",
      {
        collect: true,
      },
    )
    .option(...GENERATION_KV)
    .option(...GENERATION_RESIDUAL)
    .example(
      "Draw a continuation",
      'packhorse llm generate --model tests/fixtures/tiny --prompt "And the king said" \\\n' +
        "  --temperature 0.8 --top-p 0.95 --seed 1 --max-tokens 64",
    )
    .action(async (options) => (await import("./commands/llm_generate.ts")).llmGenerate(options))
    .command(
      "chat",
      "Talk with a model: a line of input is what you say.\n\n" +
        "/reset starts anew, /exit or the end of input leaves, Ctrl-C stops an answer.",
    )
    .option("--model <folder:file>", "Folder of the model, which must have a chat template.", {
      required: true,
    })
    .option("--system <text:string>", "What the model is told first.")
    .option("--max-tokens <tokens:count>", "Most tokens of an answer.", { default: 1024 })
    .option(...CONTEXT)
    .option(...TEMPERATURE)
    .option(...TOP_K)
    .option(...TOP_P)
    .option(...MIN_P)
    .option(...REPETITION_PENALTY)
    .option(...SEED)
    .option(...GENERATION_KV)
    .option(...GENERATION_RESIDUAL)
    .example(
      "Talk over a cache of about 4 bits per value",
      "packhorse llm chat --model DIR --kv packkv:k=0.1,v=0.2 --temperature 0.7",
    )
    .example(
      "Ask from a script, a question a line",
      "printf 'What is a packhorse?\\nAnd a mule?\\n' | packhorse llm chat --model DIR",
    )
    .action(async (options) => (await import("./commands/llm_chat.ts")).llmChat(options))
    .command("bench", "Measure how fast a model runs over caches: prompts, and decode steps.")
    .option("--model <folder:file>", "Folder of the model.", { conflicts: ["config"] })
    .option("--config <file:file>", "A config.json alone, for a model of random weights.")
    .option("--kv <codec:codec>", KV_BENCH_HELP, { collect: true })
    .option("--context <tokens:count>", "Tokens of a sequence after the last step.", {
      default: 4096,
    })
    .option("--batch <sequences:count>", "Sequences at once.", { default: 1 })
    .option("--tokens <steps:count>", "Decode steps to time.", { default: 64 })
    .option(
      "--synthetic",
      "Fill the cache with keys and values that look like a real cache's, instead of computing prompts.",
    )
    .option(
      "--dump <file:file>",
      "That cache, a .safetensors file. One of a small model unless given.",
      {
        depends: ["synthetic"],
      },
    )
    .option(
      "--bits-per-value <bits:bits>",
      "Bits that packkv takes, to size the pool. Unless given, what --synthetic tokens take, or the most.",
    )
    .option("--residual <tokens:count>", "Latest tokens to leave in 16 bits. 128 unless given.")
    .option("--sinks <tokens:tokens>", "First tokens to leave in 16 bits. 4 unless given.")
    .option("--step-tokens <tokens:count>", "Tokens of a prompt at once. 2048 unless given.")
    .option(...KEY_PATTERN)
    .option(...VALUE_PATTERN)
    .example(
      "Compare codecs at a long context of an 8B model, whose weights need not be there",
      "packhorse llm bench --config tests/fixtures/configs/llama-3.1-8b.json --synthetic \\\n" +
        "  --context 131072 --batch 4 --kv raw16 --kv packkv:k=0.1,v=0.2",
    )
    .action(async (options) => (await import("./commands/llm_bench.ts")).llmBench(options))
    .command(
      "dump",
      "Write the cache that a text leaves to a .safetensors file, for kv pack and others.",
    )
    .option("--model <folder:file>", "Folder of the model.", { required: true })
    .option("--text <file:file>", "Text to compute.", { required: true })
    .option("-o, --out <file:file>", "The .safetensors file to write.", { required: true })
    .option("--tokens <tokens:count>", "How many tokens, from the beginning of the text.", {
      default: 1024,
    })
    .option("--layers <layers:tokens[]>", "Layers to write, such as 0,2. All unless given.")
    .example(
      "See how a model's own cache packs",
      "packhorse llm dump --model DIR --text text.txt --tokens 4096 --out kv.safetensors\n" +
        "packhorse kv sweep kv.safetensors",
    )
    .action(async (options) => (await import("./commands/llm_dump.ts")).llmDump(options))
    .reset();
}

function createOt() {
  return new Command<GlobalOptions>()
    .description("Optimal transport between sets of points, and between graphs.")
    .globalType("count", positiveCount)
    .globalType("positive", positiveNumber)
    .globalType("tolerance", numberFrom(0, Number.MAX_VALUE))
    .globalType("relaxation", numberFrom(1, 1.999))
    .globalType("factor", numberFrom(0.001, 0.999))
    .globalType("share", numberFrom(0, 1))
    .globalType("cost", new EnumType(["sqeuclidean", "euclidean", "cosine", "dot"]))
    .action(function () {
      this.showHelp();
    })
    .command("solve <x:file> <y:file>", "Transport points x to points y, .npy files of [n, d].")
    .option("--cost <name:cost>", "Cost of a pair; sqeuclidean is not halved.", {
      default: "sqeuclidean",
    })
    .option(
      "--epsilon <number:positive>",
      "Weight of the entropy. 0.05, relative, unless given.",
      { conflicts: ["exact"] },
    )
    .option("--relative-epsilon", "Multiply it by the largest cost.", { depends: ["epsilon"] })
    .option(
      "--tolerance <number:tolerance>",
      "L1 error of the marginals to stop at. 1e-5 unless given.",
      { conflicts: ["exact"] },
    )
    .option("--iterations <times:count>", "Most iterations. 10000 unless given.", {
      conflicts: ["exact"],
    })
    .option("--relaxation <number:relaxation>", "Over-relaxation, from 1 to below 2.", {
      conflicts: ["exact"],
    })
    .option("--scaling <factor:factor>", "Factor by which epsilon falls to its value.", {
      conflicts: ["exact"],
    })
    .option("--exact", "Without entropy, by shortest augmenting paths.")
    .option("--a <file:file>", "Masses of the points x, .npy of [n]. 1/n unless given.")
    .option("--b <file:file>", "Masses of the points y, .npy of [m]. 1/m unless given.")
    .option("--plan <file:file>", "Write the plan as .npy of [n, m].")
    .option("--heatmap <file:file>", "Draw the plan as .svg.")
    .example(
      "Write and draw a plan",
      "packhorse ot solve x.npy y.npy --epsilon 0.01 --relative-epsilon --plan plan.npy \\\n" +
        "  --heatmap plan.svg",
    )
    .action(async (options, x, y) =>
      (await import("./commands/ot_solve.ts")).otSolve(options, x, y)
    )
    .command(
      "gromov <x:file> <y:file>",
      "Match graphs by the distances within each (Gromov-Wasserstein): .npy files of [n, n] and [m, m].",
    )
    .option("--cost <file:file>", "Costs between them, as of features, .npy of [n, m].")
    .option(
      "--alpha <share:share>",
      "Weight of the distances; the cost has the rest. 0.5 unless given.",
      { depends: ["cost"] },
    )
    .option(
      "--tolerance <number:tolerance>",
      "Relative gap to stop at. 1e-7 unless given.",
    )
    .option("--iterations <times:count>", "Most iterations from a start. 1000 unless given.")
    .option("--a <file:file>", "Masses of the points x, .npy of [n]. 1/n unless given.")
    .option("--b <file:file>", "Masses of the points y, .npy of [m]. 1/m unless given.")
    .option("--plan <file:file>", "Write the plan as .npy of [n, m].")
    .option("--heatmap <file:file>", "Draw the plan as .svg.")
    .example("Match two graphs", "packhorse ot gromov x.npy y.npy --plan plan.npy")
    .action(async (options, x, y) =>
      (await import("./commands/ot_gromov.ts")).otGromov(options, x, y)
    )
    .reset();
}

const VIEWS = "<views...:file>";
const ALLOW_MISSING: ["--allow-missing", string] = [
  "--allow-missing",
  "Let objects lack some of the views: graphs without nodes.",
];

function createGraph() {
  return new Command<GlobalOptions>()
    .description(
      "Classify objects that are seen as graphs, in one view or several.\n" +
        "A view is a folder of a TUDataset or of .npy files, or a .npz file; or all are one .json file.",
    )
    .globalType("count", positiveCount)
    .globalType("whole", wholeNumber)
    .globalType("share", numberFrom(0, 0.999))
    .globalType("rate", numberFrom(1e-9, 1e3))
    .globalType("fusion", new EnumType(["single", "early", "late", "amosl"]))
    .globalType("positive", positiveNumber)
    .globalType("penalty", transportPenalty)
    .globalType("gradient", new EnumType(["implicit", "envelope", "unrolled", "detached", "exact"]))
    .globalType("pairs", new EnumType(["all", "star"]))
    .globalType("cost", new EnumType(["sqeuclidean", "cosine"]))
    .globalType("layer", new EnumType(["gcn", "sage", "gin", "gat"]))
    .globalType("readout", new EnumType(["sum", "mean", "max", "attention"]))
    .globalType("normalisation", new EnumType(["batch", "layer", "none"]))
    .globalType("schedule", new EnumType(["constant", "cosine", "step"]))
    .action(function () {
      this.showHelp();
    })
    .command(`info ${VIEWS}`, "Check a data set, and show what it is made of.")
    .option(...ALLOW_MISSING)
    .example(
      "Look at two views of the same digits",
      "packhorse graph info tests/fixtures/digits/DIGITS_L tests/fixtures/digits/DIGITS_R",
    )
    .action(async (options, ...views) =>
      (await import("./commands/graph_info.ts")).graphInfo(options, views)
    )
    .command(`train ${VIEWS}`, "Train a classifier, or measure one by cross-validation.")
    .option("-o, --output <file:file>", "The .safetensors file to write the model to.", {
      conflicts: ["folds"],
    })
    .option(
      "--folds <folds:count>",
      "Train as often, and measure each time on what was left out.",
      {
        conflicts: ["resume"],
      },
    )
    .option(
      "--fusion <kind:fusion>",
      "How views come together. late, or single of one view, unless given.",
    )
    .option(
      "--epsilon <epsilon:positive>",
      "Of amosl: how spread out plans are; 1 is what nodes cost that are matched at random. Default: 0.05.",
    )
    .option(
      "--gradient <mode:gradient>",
      "Of amosl: how the loss reaches embeddings through plans. Default: implicit.",
    )
    .option(
      "--penalty <penalty:penalty>",
      "Of amosl: weight of the transport cost in the loss: learned, margin, or a number. Default: learned.",
    )
    .option(
      "--pairs <pairs:pairs>",
      "Of amosl: compare all views with each other, or the first with each (star). Default: all.",
    )
    .option("--cost <cost:cost>", "Of amosl: what it costs to match nodes. Default: sqeuclidean.")
    .option("--view <number:whole>", "Which view single uses, counted from 0.", { default: 0 })
    .option("--layer <kind:layer>", "Kind of the layers.", { default: "gin" })
    .option("--layers <layers:count>", "Layers of an encoder.", { default: 3 })
    .option("--width <columns:count>", "Columns of a node's embedding.", { default: 64 })
    .option("--heads <heads:count>", "Heads of gat.", { default: 4 })
    .option("--readout <kind:readout>", "How nodes become one row for each object.", {
      default: "sum",
    })
    .option("--normalisation <kind:normalisation>", "What is normalised after layers.", {
      default: "batch",
    })
    .option("--dropout <share:share>", "Share left out after each layer while training.", {
      default: 0,
    })
    .option("--head-dropout <share:share>", "The same, before the last linear layer.", {
      default: 0.2,
    })
    .option("--epochs <epochs:count>", "Times that every object is seen.", { default: 60 })
    .option("--batch-size <objects:count>", "Objects of a step.", { default: 64 })
    .option("--learning-rate <rate:rate>", "Step length of AdamW.", { default: 0.005 })
    .option("--schedule <kind:schedule>", "How the learning rate changes.", { default: "cosine" })
    .option("--warmup <epochs:whole>", "Epochs over which the learning rate grows first.", {
      default: 0,
    })
    .option("--weight-decay <share:share>", "Decay of weights.", { default: 0.0001 })
    .option("--clip-norm <norm:rate>", "Largest norm of the gradient.", { default: 5 })
    .option(
      "--validation <share:share>",
      "Share of the objects to watch instead of training on them.",
    )
    .option(
      "--patience <epochs:count>",
      "Stop after so many epochs that do not improve on the watched objects, and take the best.",
    )
    .option("--seed <number:whole>", "What random choices follow from.", { default: 0 })
    .option(
      "--resume <file:file>",
      "Go on from a file that an interrupted run wrote, by its settings.",
    )
    .option(
      "--report <file:file>",
      "Also write a page: curves, confusion, and of amosl which nodes of a view correspond.",
    )
    .option("--log <file:file>", "Also write what every epoch came to, as JSON.")
    .option(...ALLOW_MISSING)
    .example(
      "Measure late fusion over five folds",
      "packhorse graph train tests/fixtures/digits/DIGITS_L tests/fixtures/digits/DIGITS_R --folds 5",
    )
    .example(
      "Let optimal transport find which nodes correspond",
      "packhorse graph train DIGITS_L DIGITS_R -o digits.safetensors --fusion amosl --report digits.html",
    )
    .example(
      "Train a model on all objects",
      "packhorse graph train DIGITS_L DIGITS_R -o digits.safetensors --patience 10",
    )
    .action(async (options, ...views) =>
      (await import("./commands/graph_train.ts")).graphTrain(options, views)
    )
    .command(`evaluate <model:file> ${VIEWS}`, "Measure a model on a data set.")
    .option(...ALLOW_MISSING)
    .example(
      "Measure on other objects of the same kind",
      "packhorse graph evaluate digits.safetensors DIGITS_L DIGITS_R",
    )
    .action(async (options, model, ...views) =>
      (await import("./commands/graph_evaluate.ts")).graphEvaluate(options, model, views)
    )
    .command(`predict <model:file> ${VIEWS}`, "Show the likeliest class of every object.")
    .option(...ALLOW_MISSING)
    .example(
      "Classify objects",
      "packhorse graph predict digits.safetensors DIGITS_L DIGITS_R --json",
    )
    .action(async (options, model, ...views) =>
      (await import("./commands/graph_predict.ts")).graphPredict(options, model, views)
    )
    .command(
      `align <model:file> ${VIEWS}`,
      "Show which nodes of an object's views correspond, by a model of amosl.",
    )
    .option("--object <number:whole>", "Of which object, counted from 0. Of all, unless given.")
    .option("--top <pairs:count>", "How many correspondences, the strongest first.", { default: 5 })
    .option("--svg <file:file>", "Draw both graphs and the plan, of the first object shown.")
    .option(...ALLOW_MISSING)
    .example(
      "Draw what corresponds",
      "packhorse graph align digits.safetensors DIGITS_L DIGITS_R --object 7 --svg digit.svg",
    )
    .action(async (options, model, ...views) =>
      (await import("./commands/graph_align.ts")).graphAlign(options, model, views)
    )
    .reset();
}
