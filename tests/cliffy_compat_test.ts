import process from "node:process";
import { type ArgumentValue, Command, EnumType, ValidationError } from "@cliffy/command";
import { CompletionsCommand } from "@cliffy/command/completions";
import { HelpCommand } from "@cliffy/command/help";
import {
  assert,
  assertEquals,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";

// Everything here holds for Cliffy 1.2.1 too, except where a test says otherwise.

function scale() {
  return new Command()
    .throwErrors()
    .name("scale")
    .type("mode", new EnumType(["fast", "exact"]))
    .option("-s, --scale-by <scale:number>", "Factor.", { default: 2 })
    .option("-m, --mode <mode:mode>", "How.")
    .option("-o, --output <file:file>", "Where to.", { required: true })
    .option("--tag <tag:string>", "Labels.", { collect: true })
    .option("--steps <steps:number[]>", "Steps.")
    .option("--count <count:integer>", "Count.", { conflicts: ["steps"] })
    .option("--verbose", "More.", { depends: ["mode"] })
    .arguments("<input:file> [limit:number]");
}

async function usageError(args: string[]): Promise<string> {
  const error = await assertRejects(() => scale().parse(args), ValidationError);
  assertEquals(error.exitCode, 2);
  return error.message;
}

Deno.test("cliffy: options get camelCase keys, typed values and defaults", async () => {
  const { options, args } = await scale().parse(
    ["in", "7", "-o", "out", "--mode", "exact", "--steps", "1,2.5", "--verbose"],
  );
  assertEquals<unknown>(
    options,
    { scaleBy: 2, output: "out", mode: "exact", steps: [1, 2.5], verbose: true },
  );
  assertEquals<unknown>(args, ["in", 7]);
});

Deno.test("cliffy: actions see the types of options and arguments", async () => {
  let seen: [number, "fast" | "exact" | undefined, string, number | undefined] | undefined;
  await scale().action(({ scaleBy, mode }, input, limit) => {
    seen = [scaleBy, mode, input, limit];
  }).parse(["in", "--scale-by=-0.5", "-o", "out"]);
  assertEquals(seen, [-0.5, undefined, "in", undefined]);
});

Deno.test("cliffy: the last argument may be there several times", async () => {
  let seen: [number, string[]] | undefined;
  const command = () =>
    new Command().noExit().arguments("<limit:number> <inputs...:file>")
      .action((_, limit, first, ...others) => {
        seen = [limit, [first, ...others]];
      });
  await command().parse(["7", "a", "b", "c"]);
  assertEquals(seen, [7, ["a", "b", "c"]]);
  await command().parse(["7", "a"]);
  assertEquals(seen, [7, ["a"]]);
  await assertRejects(() => command().parse(["7"]), ValidationError);
});

Deno.test("cliffy: collect gathers repeated options, others occur once", async () => {
  const { options } = await scale().parse(["in", "-o", "x", "--tag", "a", "--tag", "b"]);
  assertEquals<unknown>(options, { scaleBy: 2, output: "x", tag: ["a", "b"] });
  assertEquals(
    await usageError(["in", "-o", "x", "--output", "y"]),
    'Option "--output" can only occur once, but was found several times.',
  );
});

Deno.test("cliffy: bad usage is a ValidationError that says what was wrong", async () => {
  assertEquals(await usageError(["in"]), 'Missing required option "--output".');
  assertEquals(
    await usageError(["in", "-o", "x", "--count", "1", "--steps", "2"]),
    'Option "--count" conflicts with option "--steps".',
  );
  assertEquals(
    await usageError(["in", "-o", "x", "--verbose"]),
    'Option "--verbose" depends on option "--mode".',
  );
  assertEquals(
    await usageError(["in", "-o", "x", "-s", "big"]),
    'Option "--scale-by" must be of type "number", but got "big".',
  );
  assertStringIncludes(
    await usageError(["in", "-o", "x", "--count", "1.5"]),
    'Option "--count" must be of type "integer", but got "1.5".',
  );
  assertStringIncludes(
    await usageError(["in", "many", "-o", "x"]),
    'Argument "limit" must be of type "number", but got "many".',
  );
  const mode = await usageError(["in", "-o", "x", "--mode", "slow"]);
  assertStringIncludes(mode, 'Option "--mode" must be of type "mode", but got "slow".');
  assertStringIncludes(mode, 'Expected values: "fast", "exact"');
  for (const args of [["-o", "x"], ["in", "1", "2", "-o", "x"], ["in", "-o"]]) {
    await usageError(args);
  }
});

Deno.test("cliffy: unknown options and commands come with a suggestion", async () => {
  const option = await assertRejects(() => group().parse(["--bakend", "cpu"]), ValidationError);
  assertStringIncludes(option.message, 'Unknown option "--bakend".');
  assertStringIncludes(option.message, "Did you mean");
  assertStringIncludes(option.message, "--backend");
  const { message } = await assertRejects(() => group().parse(["kv", "pakc"]), ValidationError);
  assertStringIncludes(message, 'Unknown command "pakc".');
  assertStringIncludes(message, "Did you mean");
  assertStringIncludes(message, "pack");
});

function group(run: (options: unknown, ...args: unknown[]) => void = () => {}) {
  return new Command()
    .noExit()
    .name("tool")
    .version("1.2.3")
    .description("A tool.")
    .globalOption("--backend <name:string>", "Backend.", { default: "auto" })
    .globalOption("--json", "Print JSON.")
    .action(function (options) {
      run(options, "bare");
    })
    .command(
      "kv",
      new Command<{ backend: string; json?: true }>()
        .description("Caches.")
        .action(function () {
          this.showHelp();
        })
        .command("pack <input:file>", "Pack it.")
        .option("-b, --bits <bits:integer>", "Bits.", { default: 4 })
        .example("Pack", "tool kv pack in")
        .action((options, input) => run(options, input))
        .reset(),
    )
    .command("help", new HelpCommand())
    .command("completions", new CompletionsCommand())
    .reset();
}

Deno.test("cliffy: global options may stand before and after a command", async () => {
  const seen: unknown[][] = [];
  const run = (...values: unknown[]) => void seen.push(values);
  await group(run).parse(["kv", "pack", "x", "--json", "--backend", "cpu"]);
  await group(run).parse(["--backend", "cuda", "kv", "pack", "x"]);
  await group(run).parse([]);
  assertEquals(seen, [
    [{ backend: "cpu", json: true, bits: 4 }, "x"],
    [{ backend: "cuda", bits: 4 }, "x"],
    [{ backend: "auto" }, "bare"],
  ]);
});

Deno.test("cliffy: types may be functions, numbers to choose from, and global", async () => {
  const even = ({ label, name, value }: ArgumentValue) => {
    if (Number(value) % 2 === 0) return Number(value);
    throw new ValidationError(`${label} "${name}" must be even, but got "${value}".`);
  };
  let seen: [number | undefined, 4 | 8 | undefined, (4 | 8)[] | undefined] | undefined;
  const command = () =>
    new Command()
      .throwErrors()
      .name("tool")
      .globalType("even", even)
      .globalType("width", new EnumType([4, 8]))
      .command("go", "Go.")
      .option("--size <size:even>", "Size.")
      .option("--width <width:width>", "Width.")
      .option("--widths <widths:width[]>", "Widths.")
      .action(({ size, width, widths }) => {
        seen = [size, width, widths];
      });
  await command().parse(["go", "--size", "6", "--width", "8", "--widths", "4,8"]);
  assertEquals(seen, [6, 8, [4, 8]]);
  await assertRejects(
    () => command().parse(["go", "--size", "7"]),
    ValidationError,
    'Option "--size" must be even, but got "7".',
  );
  await assertRejects(
    () => command().parse(["go", "--widths", "4,5"]),
    ValidationError,
    'Option "--widths" must be of type "width", but got "5". Expected values: "4", "8"',
  );
});

Deno.test("cliffy: what an action throws comes out of parse", async () => {
  await assertRejects(
    () => group(() => void JSON.parse("{")).parse(["kv", "pack", "x"]),
    SyntaxError,
  );
  await assertRejects(() => group(() => void JSON.parse("{")).parse([]), SyntaxError);
});

/** Standard output of `call`, which must not end the process. */
async function printed(call: () => Promise<unknown>): Promise<string> {
  const { log } = console;
  const { write } = process.stdout;
  let text = "";
  console.log = (...values: unknown[]) => text += values.join(" ") + "\n";
  process.stdout.write = ((chunk: string) => (text += chunk, true)) as typeof write;
  try {
    await call();
  } finally {
    console.log = log;
    process.stdout.write = write;
  }
  // deno-lint-ignore no-control-regex -- escape sequences of a terminal start so
  return text.replaceAll(/\x1b\[\d+m/g, "");
}

Deno.test("cliffy: help shows usage, options with their defaults, and examples", async () => {
  const help = await printed(() => group().parse(["kv", "pack", "--help"]));
  for (
    const text of ["kv pack", "<input>", "--bits", "Default: 4", "--backend", "tool kv pack in"]
  ) {
    assertStringIncludes(help, text);
  }
  assertEquals(await printed(() => group().parse(["--version"])), "tool 1.2.3\n");
  assertStringIncludes(await printed(() => group().parse(["kv"])), "Pack it.");
  assertStringIncludes(await printed(() => group().parse(["help", "kv"])), "Pack it.");
  await assertRejects(() => group().parse(["help", "vk"]), ValidationError, "Unknown command");
});

Deno.test("cliffy: what is not implemented throws when a command is built (this package only)", () => {
  // deno-lint-ignore no-explicit-any -- what the types forbid
  const command = new Command() as any;
  assertThrows(() => command.option("--a", "A.", { standalone: true }), Error, "standalone");
  assertThrows(() => command.option("--a [b:string]", "A."), Error, "not implemented");
  assertThrows(() => command.option("--no-a", "A."), Error, "not implemented");
  assertThrows(() => command.option("--a <b:color>", "A."), Error, 'the type "color"');
  assertThrows(() => command.arguments("[a...:string]"), Error, "not implemented");
  assertEquals(command.env, undefined);
});

for (const shell of ["bash", "zsh", "fish"]) {
  Deno.test(`cliffy: ${shell} completions know commands and options`, async () => {
    const script = await printed(() => group().parse(["completions", shell]));
    for (const word of ["tool", "kv", "pack", shell === "fish" ? "-l bits" : "--bits"]) {
      assertStringIncludes(script, word);
    }
  });
}

/** What bash offers for the words typed so far, the last of them being completed. */
async function complete(script: string, words: string[]): Promise<string[]> {
  const { code, stdout, stderr } = await new Deno.Command("bash", {
    args: [
      "-c",
      `${script}
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
compopt() { :; }
_tool; printf '%s\\n' "\${COMPREPLY[@]}"`,
      "bash",
      ...words,
    ],
  }).output();
  assertEquals(new TextDecoder().decode(stderr), "");
  assert(code === 0);
  return new TextDecoder().decode(stdout).split("\n").filter((line) => line !== "");
}

Deno.test("cliffy: bash completes commands, options and values (this package only)", async () => {
  const command = group().type("mode", new EnumType(["fast", "exact"]))
    .option("--mode <mode:mode>", "How.");
  const script = await printed(() => command.parse(["completions", "bash"]));
  assertEquals(await complete(script, ["tool", "k"]), ["kv"]);
  assertEquals(await complete(script, ["tool", "kv", "p"]), ["pack"]);
  assertEquals(await complete(script, ["tool", "kv", "pack", "--b"]), ["--bits", "--backend"]);
  assertEquals(await complete(script, ["tool", "--mode", "e"]), ["exact"]);
  assertEquals(await complete(script, ["tool", "kv", "pack", "--bits", ""]), []);
  assertEquals(await complete(script, ["tool", "kv", "pack", "deno.js"]), ["deno.json"]);
});
