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
    .option(
      "--context <tokens:count>",
      "Most tokens of prompt and continuation. 4096, or the model's limit, unless given.",
    )
    .option(
      "--temperature <number:temperature>",
      "What logits are divided by; 0 for the likeliest.",
      {
        default: 0,
      },
    )
    .option("--top-k <tokens:tokens>", "Draw only so many of the likeliest tokens; 0 for all.", {
      default: 0,
    })
    .option("--top-p <share:share>", "Draw only the likeliest tokens that reach it together.", {
      default: 1,
    })
    .option(
      "--min-p <share:share>",
      "Draw only tokens with this share of the likeliest's probability.",
      {
        default: 0,
      },
    )
    .option(
      "--repetition-penalty <number:penalty>",
      "What logits of known tokens are divided by.",
      {
        default: 1,
      },
    )
    .option("--seed <number:tokens>", "What random choices follow from.", { default: 0 })
    .option(
      "--stop <text:string>",
      "Text that ends the continuation. May be given several times.",
      {
        collect: true,
      },
    )
    .option("--kv <codec:codec>", `${LLM_KV_HELP}packkv:k=0.1,v=0.2 unless given.`)
    .option("--residual <tokens:count>", "Latest tokens to leave in 16 bits.", { default: 128 })
    .example(
      "Draw a continuation",
      'packhorse llm generate --model tests/fixtures/tiny --prompt "And the king said" \\\n' +
        "  --temperature 0.8 --top-p 0.95 --seed 1 --max-tokens 64",
    )
    .action(async (options) => (await import("./commands/llm_generate.ts")).llmGenerate(options))
    .reset();
}

function createOt() {
  return new Command<GlobalOptions>()
    .description("Optimal transport between sets of points.")
    .globalType("count", positiveCount)
    .globalType("positive", positiveNumber)
    .globalType("tolerance", numberFrom(0, Number.MAX_VALUE))
    .globalType("relaxation", numberFrom(1, 1.999))
    .globalType("factor", numberFrom(0.001, 0.999))
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
    .reset();
}
