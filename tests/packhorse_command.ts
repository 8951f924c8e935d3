/** The command line as a process of its own, as the launcher runs it. */
import { assertEquals, assertMatch } from "@std/assert";

export const ROOT = new URL("../", import.meta.url).pathname;
export const TINY = `${ROOT}tests/fixtures/tiny/kv.safetensors`;

const LIBRARIES = Deno.env.get("PACKHORSE_LIB_DIR");
/** The permissions that the launcher gives. */
const PERMISSIONS = ["-P=cli", ...(LIBRARIES === undefined ? [] : [`--allow-ffi=${LIBRARIES}`])];

/** Arguments of Deno that run the command line. */
export function denoArguments(args: string[], permissions: string[] = PERMISSIONS): string[] {
  const flags = ["--quiet", "--no-prompt", "--cached-only", `--config=${ROOT}deno.json`];
  return ["run", ...flags, ...permissions, `${ROOT}cli/main.ts`, ...args];
}

/** Runs the command line as the launcher does. */
export async function packhorse(
  args: string[],
  { env = {}, permissions, input }: {
    env?: Record<string, string>;
    permissions?: string[];
    /** What it reads from standard input. */
    input?: string;
  } = {},
) {
  const process = new Deno.Command(Deno.execPath(), {
    args: denoArguments(args, permissions),
    env: { NO_COLOR: "1", ...env },
    stdin: input === undefined ? "null" : "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  if (input !== undefined) {
    const writer = process.stdin.getWriter();
    // One that ends before it has read all closes the pipe.
    await writer.write(new TextEncoder().encode(input)).then(() => writer.close()).catch(() => {});
  }
  const { code, stdout, stderr } = await process.output();
  const decoder = new TextDecoder();
  return { code, stdout: decoder.decode(stdout), stderr: decoder.decode(stderr) };
}

/** Standard output of a call that must succeed without a word on standard error. */
export async function succeed(...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await packhorse(args);
  assertEquals(stderr, "");
  assertEquals(code, 0);
  return stdout;
}

/** The message of a call that must fail with one line on standard error and nothing else. */
export async function fail(exitCode: number, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await packhorse(args);
  assertEquals({ code, stdout, stderr }, { code: exitCode, stdout: "", stderr });
  assertMatch(stderr, /^packhorse: [^\n]+\n$/);
  return stderr;
}
