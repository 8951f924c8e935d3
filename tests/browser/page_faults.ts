/** Whether pages are drawn: opens them in Chromium. */
import { fileURLToPath } from "node:url";

/** Where Debian's package has it. */
const CHROMIUM = "/usr/bin/chromium";

/** A page, and for how many seconds its charts may be on their way. */
export interface PageToOpen {
  path: string;
  patience: number;
}

/** What is wrong with each of the pages: what they log, throw and request, charts that are missing or empty. */
export async function pageFaults(
  pages: readonly PageToOpen[],
  { chromium = CHROMIUM }: { chromium?: string } = {},
): Promise<string[][]> {
  try {
    await Deno.stat(chromium);
  } catch (cause) {
    throw new Error(
      `Cannot open a page: there is no ${chromium}; install it with: sudo apt-get install chromium`,
      { cause },
    );
  }
  const driver = fileURLToPath(new URL("open_pages.ts", import.meta.url));
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "--quiet", "--cached-only", "-A", driver, chromium, JSON.stringify(pages)],
  }).output();
  const decoder = new TextDecoder();
  if (code !== 0) throw new Error(`Cannot open pages: ${decoder.decode(stderr)}`);
  return JSON.parse(decoder.decode(stdout));
}
