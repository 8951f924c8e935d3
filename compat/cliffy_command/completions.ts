import { type AnyCommand, Command, type OptionDescription } from "./command.ts";

/** `completions bash|fish|zsh`: prints a script that completes the program's commands and options. */
export class CompletionsCommand extends Command {
  constructor() {
    super();
    this.description("Generate shell completions.")
      .action(() => this.showHelp())
      .command("bash", shell("bash", "source <(NAME completions bash)", bashScript))
      .command("fish", shell("fish", "NAME completions fish | source", fishScript))
      .command("zsh", shell("zsh", "source <(NAME completions zsh)", zshScript))
      .reset();
  }
}

function shell(name: string, usage: string, script: (program: Program) => string) {
  const command: AnyCommand = new Command()
    .description(
      `Generate shell completions for ${name}.\n\nAdd this line to the shell's start-up file:\n\n    ${usage}`,
    )
    .option("-n, --name <name:string>", "The name of the program.")
    .action(({ name }) => {
      const main = command.getMainCommand();
      console.log(script(program(main, name ?? main.getName())).trimEnd());
    });
  return command;
}

/** The program's tree, flattened: one entry per command, named by its path. */
interface Program {
  name: string;
  /** Name of the shell function. */
  id: string;
  commands: CommandEntry[];
}

interface CommandEntry {
  path: string;
  children: { name: string; description: string }[];
  options: OptionDescription[];
  takesFiles: boolean;
}

function program(main: AnyCommand, name: string): Program {
  const commands: CommandEntry[] = [];
  const add = (command: AnyCommand, path: string) => {
    const children = command.getCommands().map((child) => ({
      name: child.getName(),
      description: firstLine(child.getDescription()),
    }));
    commands.push({
      path,
      children,
      options: command.describeOptions(),
      takesFiles: command.hasArguments(),
    });
    for (const child of command.getCommands()) add(child, `${path} ${child.getName()}`);
  };
  add(main, name);
  return { name, id: `_${name.replaceAll(/\W/g, "_")}`, commands };
}

function firstLine(text: string): string {
  return text.split("\n", 1)[0]!;
}

/** `'it'\''s'`: text that bash and zsh take as it stands. */
function quote(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Patterns of a `case` over command paths other than the program itself. */
function paths({ commands }: Program): string {
  return commands.slice(1).map(({ path }) => quote(path)).join(" | ");
}

/** Patterns `path:flag` under which an option's value is completed. */
function valuePatterns({ path }: CommandEntry, { flags }: OptionDescription): string {
  return flags.map((flag) => quote(`${path}:${flag}`)).join(" | ");
}

/** One `case` arm for each option that takes a value. */
function valueArms(
  { commands }: Program,
  arm: { words: (values: readonly string[]) => string; files: string; nothing: string },
): string {
  const arms = commands.flatMap((command) =>
    command.options.filter(({ type }) => type !== undefined).map((option) => {
      const body = option.values.length > 0
        ? arm.words(option.values)
        : option.type === "file"
        ? arm.files
        : arm.nothing;
      return `    ${valuePatterns(command, option)}) ${body}; return ;;`;
    })
  );
  return arms.join("\n");
}

function bashScript(program: Program): string {
  const { name, id, commands } = program;
  const words = (list: readonly string[]) =>
    `COMPREPLY=($(compgen -W ${quote(list.join(" "))} -- "$current"))`;
  const files = `compopt -o filenames; COMPREPLY=($(compgen -f -- "$current"))`;
  const arms = commands.map(({ path, children, options, takesFiles }) => {
    const flags = options.flatMap(({ flags }) => flags);
    const rest = takesFiles ? files : words(children.map(({ name }) => name));
    return `    ${quote(path)})
      if [[ $current == -* ]]; then ${words(flags)}; else ${rest}; fi ;;`;
  });
  return `# bash completion for ${name}
${id}() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD-1]} at=${name} word
  for word in "\${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$at $word" in
      ${paths(program)}) at="$at $word" ;;
    esac
  done
  case "$at:$previous" in
${valueArms(program, { words, files, nothing: "COMPREPLY=()" })}
  esac
  case "$at" in
${arms.join("\n")}
  esac
}
complete -F ${id} ${name}
`;
}

function zshScript(program: Program): string {
  const { name, id, commands } = program;
  const described = (word: string, description: string) =>
    quote(`${word.replaceAll(":", "\\:")}:${description}`);
  const arms = commands.map(({ path, children, options, takesFiles }) => {
    const flags = options.flatMap(({ flags, description }) =>
      flags.map((flag) => described(flag, description))
    );
    const rest = takesFiles
      ? "_files"
      : `found=(${
        children.map(({ name, description }) => described(name, description)).join(" ")
      }); _describe command found`;
    return `    ${quote(path)})
      if [[ $words[CURRENT] == -* ]]; then found=(${flags.join(" ")}); _describe option found
      else ${rest}; fi ;;`;
  });
  return `#compdef ${name}
# zsh completion for ${name}
${id}() {
  local at=${name} word
  local -a found
  for word in "\${(@)words[2,CURRENT-1]}"; do
    case "$at $word" in
      ${paths(program)}) at="$at $word" ;;
    esac
  done
  case "$at:$words[CURRENT-1]" in
${
    valueArms(program, {
      words: (values) => `compadd -- ${values.map(quote).join(" ")}`,
      files: "_files",
      nothing: "_message value",
    })
  }
  esac
  case "$at" in
${arms.join("\n")}
  esac
}
compdef ${id} ${name}
`;
}

function fishScript(program: Program): string {
  const { name, id, commands } = program;
  const literal = (text: string) => `'${text.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'`;
  const lines = commands.flatMap(({ path, children, options, takesFiles }) => {
    const line = (rest: string) =>
      `complete -c ${name} -n ${literal(`${id}_at ${literal(path)}`)} ${rest}`;
    return [
      takesFiles ? "" : line("-f"),
      ...children.map(({ name, description }) =>
        line(`-f -a ${literal(name)} -d ${literal(description)}`)
      ),
      ...options.map(({ flags, description, type, values }) => {
        const names = flags.map((flag) =>
          flag.startsWith("--") ? `-l ${flag.slice(2)}` : `-s ${flag.slice(1)}`
        );
        const value = values.length > 0
          ? `-x -a ${literal(values.join(" "))}`
          : type === "file"
          ? "-r -F"
          : type === undefined
          ? ""
          : "-x";
        return line([...names, value, `-d ${literal(description)}`].filter(Boolean).join(" "));
      }),
    ].filter((line) => line !== "");
  });
  return `# fish completion for ${name}
function ${id}_at
  set -l at ${name}
  for word in (commandline -opc)[2..]
    switch "$at $word"
      case ${commands.slice(1).map(({ path }) => literal(path)).join(" ")}
        set at "$at $word"
    end
  end
  test "$at" = "$argv[1]"
end
${lines.join("\n")}
`;
}
