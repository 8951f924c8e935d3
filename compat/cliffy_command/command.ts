import {
  Argument,
  Command as CommanderCommand,
  CommanderError,
  type Help,
  Option as CommanderOption,
} from "commander";
import { ValidationError } from "./error.ts";
import {
  type ArgumentValue,
  type ArgumentValues,
  BUILTIN_TYPES,
  type BuiltinTypes,
  type OptionKey,
  type OptionValue,
  type ValueType,
} from "./value.ts";

/** What an option may be given beside its flags and its description. */
export interface OptionOptions<T = unknown> {
  /** The value when the user gives none. */
  default?: T extends (infer Item)[] ? readonly Item[] : T;
  /** Whether the user must give the option. */
  required?: boolean;
  /** Whether the option may be given more than once; its value is then an array. */
  collect?: boolean;
  /** Long names of options that cannot be given together with this one. */
  conflicts?: readonly string[];
  /** Long names of options without which this one cannot be given. */
  depends?: readonly string[];
}

const OPTION_OPTIONS = new Set(["default", "required", "collect", "conflicts", "depends"]);

/** What runs when a command is called. */
export type ActionHandler<Options, Arguments extends unknown[]> = (
  this: AnyCommand,
  options: Options,
  ...args: Arguments
) => unknown;

/** What {@linkcode Command.parse} found. */
export interface CommandResult {
  options: Record<string, unknown>;
  args: unknown[];
  cmd: AnyCommand;
}

/** An option as completions see it. */
export interface OptionDescription {
  /** Short and long flag, as far as there are such. */
  flags: string[];
  description: string;
  /** Name of the value's type, none for a flag without a value. */
  type?: string;
  /** The only values there are, where they can be listed. */
  values: readonly string[];
}

// deno-lint-ignore no-explicit-any -- a command of whatever options and arguments
export type AnyCommand = Command<any, any, any, any, any>;

type Merge<Options, Flags extends string, Value, Given> = Given extends
  { default: unknown } | { required: true } ? Options & { [Key in OptionKey<Flags>]: Value }
  : Options & { [Key in OptionKey<Flags>]?: Value };

type Collected<Value, Given> = Given extends { collect: true } ? Value[] : Value;

/** A command or a group of commands, built by chained calls. */
export class Command<
  ParentGlobals = unknown,
  Options = unknown,
  Arguments extends unknown[] = [],
  Types = BuiltinTypes,
  Globals = unknown,
> {
  readonly #program = new Program();
  readonly #types = new Map<string, ValueType<unknown>>(Object.entries(BUILTIN_TYPES));
  readonly #globalTypes = new Map<string, ValueType<unknown>>();
  readonly #globals: TypedOption[] = [];
  readonly #children: AnyCommand[] = [];
  readonly #examples: { name: string; example: string }[] = [];
  #parent: AnyCommand | undefined;
  /** Where chained calls go: the command added last, until `reset`. */
  #selected: AnyCommand = this;
  #action: ActionHandler<Record<string, unknown>, unknown[]> | undefined;
  #throwErrors = false;
  #exit = true;
  #result: Omit<CommandResult, "cmd"> = { options: {}, args: [] };

  constructor() {
    this.#program
      .helpOption("-h, --help", "Show this help.")
      .helpCommand(false)
      .exitOverride()
      .configureOutput({ writeErr: () => {}, outputError: () => {} })
      .configureHelp(HELP_STYLE)
      .addHelpText("after", () => this.#exampleText());
  }

  /** Names the command. */
  name(name: string): this {
    this.#selected.#program.name(name);
    return this;
  }

  /** Sets what `--version` prints after the command's name, which must be known by then. */
  version(version: string): this {
    this.#selected.#program.version(
      `${this.#selected.getName()} ${version}`,
      "-V, --version",
      "Show the version number for this program.",
    );
    return this;
  }

  /** Says what the command does; lists of commands show the first line. */
  description(description: string): this {
    this.#selected.#describe(description);
    return this;
  }

  #describe(description: string): void {
    this.#program.description(description).summary(description.split("\n", 1)[0]!);
  }

  /** Adds a type of values that options and arguments can name. */
  type<Name extends string, T>(
    name: Name,
    type: ValueType<T>,
  ): Command<ParentGlobals, Options, Arguments, Types & { [Key in Name]: T }, Globals> {
    this.#selected.#types.set(name, type);
    return this as never;
  }

  /** Adds a type of values that this command and all below it can name. */
  globalType<Name extends string, T>(
    name: Name,
    type: ValueType<T>,
  ): Command<ParentGlobals, Options, Arguments, Types & { [Key in Name]: T }, Globals> {
    this.#selected.#addGlobalType(name, type);
    return this as never;
  }

  #addGlobalType(name: string, type: ValueType<unknown>): void {
    this.#globalTypes.set(name, type);
    this.#types.set(name, type);
    for (const child of this.#children) child.#addGlobalType(name, type);
  }

  /** Adds an option, such as `-s, --scale <scale:number>`. */
  option<
    const Flags extends string,
    const Given extends OptionOptions<NoInfer<OptionValue<Flags, Types>>>,
  >(
    flags: Flags,
    description: string,
    // deno-lint-ignore ban-types -- no option given is no property
    options: Given = {} as Given & {},
  ): Command<
    ParentGlobals,
    Merge<Options, Flags, Collected<OptionValue<Flags, Types>, Given>, Given>,
    Arguments,
    Types,
    Globals
  > {
    const command = this.#selected;
    command.#program.addOption(new TypedOption(flags, description, options, command.#types));
    return this as never;
  }

  /** Adds an option that this command and all below it take. */
  globalOption<
    const Flags extends string,
    const Given extends OptionOptions<NoInfer<OptionValue<Flags, Types>>>,
  >(
    flags: Flags,
    description: string,
    // deno-lint-ignore ban-types -- no option given is no property
    options: Given = {} as Given & {},
  ): Command<
    ParentGlobals,
    Options,
    Arguments,
    Types,
    Merge<Globals, Flags, Collected<OptionValue<Flags, Types>, Given>, Given>
  > {
    const command = this.#selected;
    command.#addGlobal(new TypedOption(flags, description, options, command.#types));
    return this as never;
  }

  #addGlobal(option: TypedOption): void {
    this.#globals.push(option);
    this.#program.addOption(option);
    for (const child of this.#children) child.#addGlobal(option);
  }

  /** Says which arguments the command takes, such as `<input:file> [output:file]`. */
  arguments<const Text extends string>(
    text: Text,
  ): Command<ParentGlobals, Options, ArgumentValues<Text, Types>, Types, Globals> {
    this.#selected.#addArguments(text);
    return this as never;
  }

  #addArguments(text: string): void {
    for (const each of text.split(" ").filter((each) => each !== "")) {
      const match = /^(?:<(\w+)(\.{3})?:([\w-]+)>|\[(\w+):([\w-]+)\])$/.exec(each);
      if (match === null) throw new Error(`Cannot take the argument "${each}": not implemented`);
      const [, required, several = "", requiredType, optional, optionalType] = match;
      const name = (required ?? optional)!;
      const type = (requiredType ?? optionalType)!;
      const parse = parser(this.#types, { label: "Argument", name, type });
      this.#program.addArgument(
        new Argument(required === undefined ? `[${name}]` : `<${name}${several}>`)
          .argParser<unknown>((value, previous) =>
            several === ""
              ? parse(value)
              : [...(previous as unknown[] | undefined) ?? [], parse(value)]
          ),
      );
    }
  }

  /** Says what runs when the command is called. */
  action(handler: ActionHandler<ParentGlobals & Globals & Options, Arguments>): this {
    const command = this.#selected;
    command.#action = handler as ActionHandler<Record<string, unknown>, unknown[]>;
    return this;
  }

  /** Adds an example to the help. */
  example(name: string, example: string): this {
    this.#selected.#examples.push({ name, example });
    return this;
  }

  /** Adds `command` under a name and moves to it: later calls in the chain apply to it. */
  command<Child extends AnyCommand>(name: string, command: Child): Child;
  /** Adds a new command, such as `pack <input:file>`, and moves to it. */
  command<const Text extends string>(
    nameAndArguments: Text,
    description: string,
  ): Command<
    ParentGlobals & Globals,
    unknown,
    Text extends `${string} ${infer Rest}` ? ArgumentValues<Rest, Types> : [],
    Types
  >;
  command(nameAndArguments: string, commandOrDescription: AnyCommand | string): unknown {
    const [name, ...rest] = nameAndArguments.split(" ");
    const given = typeof commandOrDescription !== "string";
    const child: AnyCommand = given ? commandOrDescription : new Command();
    child.#program.name(name!);
    if (!given) child.#describe(commandOrDescription);
    for (const [name, type] of this.#globalTypes) child.#addGlobalType(name, type);
    child.#addArguments(rest.join(" "));
    child.#parent = this;
    for (const option of this.#globals) child.#addGlobal(option);
    this.#children.push(child);
    this.#program.addCommand(child.#program);
    this.#selected = child;
    return this;
  }

  /** Moves back to this command after `command`. */
  reset(): this {
    this.#selected = this;
    return this;
  }

  /** Makes `parse` throw what goes wrong instead of printing it and ending the process. */
  throwErrors(): this {
    this.#throwErrors = true;
    return this;
  }

  /** Makes `parse` return after `--help` and `--version` instead of ending the process. */
  noExit(): this {
    this.#exit = false;
    return this.throwErrors();
  }

  /** The command's name. */
  getName(): string {
    return this.#program.name();
  }

  /** The command's description. */
  getDescription(): string {
    return this.#program.description();
  }

  /** The command above this one. */
  getParent(): AnyCommand | undefined {
    return this.#parent;
  }

  /** The command above all others. */
  getMainCommand(): AnyCommand {
    return this.#parent?.getMainCommand() ?? this;
  }

  /** The commands of a group. */
  getCommands(): AnyCommand[] {
    return [...this.#children];
  }

  /** What completions offer as options. */
  describeOptions(): OptionDescription[] {
    return this.#program.createHelp().visibleOptions(this.#program).map((option) => ({
      flags: [option.short, option.long].filter((flag) => flag !== undefined),
      description: option.description,
      values: [],
      ...(option instanceof TypedOption && option.describeValue()),
    }));
  }

  /** Whether the command takes arguments. */
  hasArguments(): boolean {
    return this.#program.registeredArguments.length > 0;
  }

  /** Prints the help text. */
  showHelp(): void {
    this.#program.outputHelp();
  }

  /** Runs the command that `args` call. */
  async parse(args: readonly string[] = Deno.args): Promise<CommandResult> {
    this.#connect();
    try {
      await this.#program.parseAsync(args, { from: "user" });
    } catch (error) {
      const failure = await this.#settle(error);
      if (failure !== undefined) this.#fail(failure);
    }
    const called = this.#called();
    return { ...called.#result, cmd: called };
  }

  /** Gives Commander the actions of this command and those below it. */
  #connect(): void {
    this.#result = { options: {}, args: [] };
    this.#program.called = false;
    // Commander reports an unknown command only for a group without an action of its own.
    if (this.#children.length === 0) {
      this.#program.action(() => this.#run());
    }
    for (const child of this.#children) child.#connect();
  }

  /** What remains of an error once groups have run and help has been shown. */
  async #settle(error: unknown): Promise<unknown> {
    if (error instanceof BareGroup) {
      try {
        await this.#called().#run();
        return undefined;
      } catch (inner) {
        return inner;
      }
    }
    if (!(error instanceof CommanderError)) return error;
    if (error.exitCode !== 0) return new ValidationError(sentence(error.message), { cause: error });
    if (this.#exit) Deno.exit(0);
    return undefined;
  }

  #fail(error: unknown): never {
    if (this.#throwErrors || !(error instanceof ValidationError)) throw error;
    this.showHelp();
    console.error(`  error: ${error.message}\n`);
    Deno.exit(error.exitCode);
  }

  #called(): AnyCommand {
    return this.#children.map((child) => child.#called()).find((child) => child.#program.called) ??
      this;
  }

  async #run(): Promise<void> {
    this.#program.called = true;
    const options = this.#optionValues();
    // Of arguments that may come several times, there is one list, at the end.
    const args = (this.#program.processedArgs ?? []).flat();
    this.#result = { options, args };
    await this.#action?.call(this, options, ...args);
  }

  /** Values of this command's options, those given to commands above it included. */
  #optionValues(): Record<string, unknown> {
    const options = this.#program.options.filter((option) => option instanceof TypedOption);
    const given = this.#program.optsWithGlobals();
    const flag = (name: string) => {
      const found = options.find((option) => option.name() === name);
      if (found === undefined) throw new Error(`Cannot find the option "--${name}"`);
      return found;
    };
    const isGiven = (option: TypedOption) => given[option.attributeName()] !== undefined;
    for (const option of options.filter(isGiven)) {
      for (const other of option.settings.conflicts ?? []) {
        if (isGiven(flag(other))) {
          throw new ValidationError(`Option "${option.long}" conflicts with option "--${other}".`);
        }
      }
      for (const other of option.settings.depends ?? []) {
        if (!isGiven(flag(other)) && flag(other).settings.default === undefined) {
          throw new ValidationError(`Option "${option.long}" depends on option "--${other}".`);
        }
      }
    }
    const values: Record<string, unknown> = {};
    for (const option of options) {
      const value = given[option.attributeName()] ?? option.settings.default;
      if (value !== undefined) values[option.attributeName()] = value;
      else if (option.settings.required) {
        throw new ValidationError(`Missing required option "${option.long}".`);
      }
    }
    return values;
  }

  #exampleText(): string {
    if (this.#examples.length === 0) return "";
    const examples = this.#examples.map(({ name, example }) =>
      `  ${name}:\n${example.replaceAll(/^/gm, "    ")}`
    );
    return `\n${bold("Examples:")}\n${examples.join("\n\n")}\n`;
  }
}

/** Thrown when a group is called without one of its commands. */
class BareGroup extends Error {}

class Program extends CommanderCommand {
  called = false;

  /** Commander asks a group that is called without a command for its help. */
  override help(): never {
    this.called = true;
    throw new BareGroup();
  }
}

/** An option that knows its type. Defaults stay out of Commander, so that a value there was given. */
class TypedOption extends CommanderOption {
  readonly settings: OptionOptions;
  readonly #type: string | undefined;
  readonly #values: readonly string[];

  constructor(
    flags: string,
    description: string,
    settings: OptionOptions,
    types: ReadonlyMap<string, ValueType<unknown>>,
  ) {
    const match = /^((?:-\w, )?--(?!no-)[a-z][\w-]*)(?: <(\w+):([\w-]+(?:\[\])?)>)?$/.exec(flags);
    const unknown = Object.keys(settings).find((key) => !OPTION_OPTIONS.has(key));
    if (match === null || unknown !== undefined) {
      throw new Error(`Cannot add the option "${flags}": ${unknown ?? "its form"} not implemented`);
    }
    const [, names, placeholder, type] = match;
    super(placeholder === undefined ? names! : `${names} <${placeholder}>`, description);
    this.settings = settings;
    this.#type = type;
    this.#values = type === undefined ? [] : listedValues(types, type);
    if (type !== undefined) this.#parseAs(type, types);
  }

  #parseAs(type: string, types: ReadonlyMap<string, ValueType<unknown>>): void {
    const parse = parser(types, { label: "Option", name: this.long!, type });
    this.argParser((value, previous: unknown) => {
      if (this.settings.collect) {
        return [...(previous as unknown[] | undefined) ?? [], parse(value)];
      }
      if (previous !== undefined) {
        throw new ValidationError(
          `Option "${this.long}" can only occur once, but was found several times.`,
        );
      }
      return parse(value);
    });
  }

  /** The value as completions see it. */
  describeValue(): { type?: string; values: readonly string[] } {
    return this.#type === undefined
      ? { values: this.#values }
      : { type: this.#type, values: this.#values };
  }

  /** What the help shows in parentheses after the description. */
  hints(): string[] {
    const { settings } = this;
    const flags = (names: readonly string[]) => names.map((name) => `--${name}`).join(", ");
    return [
      settings.required ? "required" : "",
      settings.default === undefined ? "" : `Default: ${settings.default}`,
      settings.depends === undefined ? "" : `Depends: ${flags(settings.depends)}`,
      settings.conflicts === undefined ? "" : `Conflicts: ${flags(settings.conflicts)}`,
      this.#values.length === 0 ? "" : `Values: ${this.#values.join(", ")}`,
    ].filter((hint) => hint !== "");
  }
}

function typeNamed(types: ReadonlyMap<string, ValueType<unknown>>, name: string) {
  const type = types.get(name.replace(/\[\]$/, ""));
  if (type === undefined) throw new Error(`Cannot find the type "${name}": add it with type()`);
  return type;
}

function listedValues(types: ReadonlyMap<string, ValueType<unknown>>, name: string) {
  const type = typeNamed(types, name);
  return typeof type === "function" ? [] : type.values().map(String);
}

function parser(
  types: ReadonlyMap<string, ValueType<unknown>>,
  argument: Omit<ArgumentValue, "value">,
): (value: string) => unknown {
  const type = typeNamed(types, argument.type);
  const parse = (value: string) => {
    const typed = { ...argument, type: argument.type.replace(/\[\]$/, ""), value };
    return typeof type === "function" ? type(typed) : type.parse(typed);
  };
  return argument.type.endsWith("[]") ? (list) => list.split(",").map(parse) : parse;
}

/** "error: unknown option '--a'\n(Did you mean --b?)" as a sentence in Cliffy's manner. */
function sentence(message: string): string {
  const [first, hint] = message.replace(/^error: /, "").split("\n");
  const text = first![0]!.toUpperCase() +
    first!.slice(1).replaceAll(/(^|\s)'|'(?=\s|[.,]|$)/g, '$1"');
  const full = text.endsWith(".") ? text : `${text}.`;
  return hint === undefined ? full : `${full} ${hint.replace(/^\(|\)$/g, "")}`;
}

function bold(text: string): string {
  return `\x1b[1m${text}\x1b[22m`;
}

const HELP_STYLE: Partial<Help> = {
  showGlobalOptions: false,
  styleTitle: bold,
  optionDescription(option) {
    const hints = option instanceof TypedOption ? option.hints() : [];
    return hints.length === 0 ? option.description : `${option.description} (${hints.join("; ")})`;
  },
};
