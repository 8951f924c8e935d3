import { ValidationError } from "./error.ts";

/** A value as the user typed it, with where it stands. */
export interface ArgumentValue {
  /** "Option" or "Argument". */
  label: string;
  /** The option's long flag or the argument's name. */
  name: string;
  /** Name of the type that the value shall have. */
  type: string;
  /** What the user typed. */
  value: string;
}

/** Turns what the user typed into a value, or throws a {@linkcode ValidationError}. */
export type TypeHandler<T> = (argument: ArgumentValue) => T;

/** A function that reads a value, or an object that does. */
export type ValueType<T> = TypeHandler<T> | EnumType<T & (string | number)>;

/** One of a few given words or numbers. */
export class EnumType<const T extends string | number> {
  readonly #values: readonly T[];

  constructor(values: readonly T[]) {
    this.#values = values;
  }

  /** The value itself; throws unless it is one of those given. */
  parse(argument: ArgumentValue): T {
    const found = this.#values.find((value) => String(value) === argument.value);
    if (found === undefined) throw invalid(argument, this.#values);
    return found;
  }

  /** The values given. */
  values(): readonly T[] {
    return this.#values;
  }
}

/** The types that every command knows. */
export interface BuiltinTypes {
  file: string;
  integer: number;
  number: number;
  string: string;
}

/** How the values of {@linkcode BuiltinTypes} are read. */
export const BUILTIN_TYPES: { [Name in keyof BuiltinTypes]: TypeHandler<BuiltinTypes[Name]> } = {
  file: ({ value }) => value,
  integer: (argument) => number(argument, Number.isSafeInteger),
  number: (argument) => number(argument, Number.isFinite),
  string: ({ value }) => value,
};

function number(argument: ArgumentValue, accepts: (value: number) => boolean): number {
  const value = argument.value.trim() === "" ? NaN : Number(argument.value);
  if (!accepts(value)) throw invalid(argument);
  return value;
}

function invalid(
  { label, name, type, value }: ArgumentValue,
  expected: readonly (string | number)[] = [],
) {
  const hint = expected.length === 0
    ? ""
    : ` Expected values: ${expected.map((each) => `"${each}"`).join(", ")}`;
  return new ValidationError(
    `${label} "${name}" must be of type "${type}", but got "${value}".${hint}`,
  );
}

/** `value` type of `name` out of `Types`: `number`, or `number[]` for values split at commas. */
export type ValueNamed<Name extends string, Types> = Name extends `${infer Item}[]`
  ? ValueNamed<Item, Types>[]
  : Name extends keyof Types ? Types[Name]
  : never;

/** Types of the arguments in `<input:file> [output:file]`, or in `<inputs...:file>`, of which there is one or more. */
export type ArgumentValues<Text extends string, Types> = Text extends `${infer Head} ${infer Tail}`
  ? [...ArgumentValues<Head, Types>, ...ArgumentValues<Tail, Types>]
  : Text extends `<${string}...:${infer Name}>`
    ? [ValueNamed<Name, Types>, ...ValueNamed<Name, Types>[]]
  : Text extends `<${string}:${infer Name}>` ? [ValueNamed<Name, Types>]
  : Text extends `[${string}:${infer Name}]` ? [ValueNamed<Name, Types>?]
  : [];

/** Type of the value in `-s, --scale <scale:number>`; `true` without one. */
export type OptionValue<Flags extends string, Types> = Flags extends
  `${string}<${string}:${infer Name}>` ? ValueNamed<Name, Types> : true;

/** `keyRel` for `-k, --key-rel <rel:number>`. */
export type OptionKey<Flags extends string> = Flags extends `${string}--${infer Long}`
  ? CamelCase<Long extends `${infer Name} ${string}` ? Name : Long>
  : never;

type CamelCase<Name extends string> = Name extends `${infer Head}-${infer Tail}`
  ? `${Head}${Capitalize<CamelCase<Tail>>}`
  : Name;
