/**
 * An independent implementation, on npm's `commander`, of the part of Cliffy's command API that
 * `cli/` uses, for machines that cannot reach JSR. Removing the `links` entry from deno.json gives
 * Cliffy itself. Whatever is not implemented throws.
 *
 * @module
 */
export { type ActionHandler, Command, type OptionOptions } from "./command.ts";
export { ValidationError, type ValidationErrorOptions } from "./error.ts";
export { type ArgumentValue, EnumType, type TypeHandler } from "./value.ts";
