/**
 * Bundles the browser code of reports, cli/report_page/, into build/report_page/main.js and main.css by esbuild.
 *
 * tools/bootstrap.sh runs it with npm packages in a node_modules folder, where esbuild looks for them.
 *
 * @module
 */
import { build, stop } from "esbuild";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));

try {
  const { outputFiles } = await build({
    absWorkingDir: root,
    entryPoints: ["cli/report_page/main.ts"],
    outdir: "build/report_page",
    bundle: true,
    minify: true,
    format: "iife",
    target: "es2022",
    write: false,
    logLevel: "warning",
  });
  await Deno.mkdir(`${root}/build/report_page`, { recursive: true });
  for (const { path, text } of outputFiles) {
    // The page has it between tags. esbuild escapes "</script>" and "</style>", but not this.
    if (text.includes("<!--")) throw new Error(`"<!--" in ${path} would hide what follows it`);
    await Deno.writeTextFile(path, text);
  }
} finally {
  await stop();
}
