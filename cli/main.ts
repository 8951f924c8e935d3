import { ValidationError } from "@cliffy/command";
import { createApp } from "./app.ts";

/**
 * Runs the command line and returns its exit code: 0, 1 for a failure, 2 for bad usage.
 *
 * @param args What follows the program's name.
 */
export async function main(args: string[]): Promise<number> {
  try {
    await createApp().parse(args);
    return 0;
  } catch (error) {
    const { printError } = await import("./output.ts");
    printError(error);
    return error instanceof ValidationError ? error.exitCode : 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));
