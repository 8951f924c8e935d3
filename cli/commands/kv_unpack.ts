import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { unpackKvFile } from "../../src/kv/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import { defined, type GlobalOptions } from "../options.ts";
import { formatSeconds, print, printJson, withProgress } from "../output.ts";

/** Restores the `.safetensors` file from a `.phkv` file. */
export async function kvUnpack(
  options: GlobalOptions & { output: string; recover?: true | undefined },
  input: string,
): Promise<void> {
  const { backend, output, recover } = options;
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  const report = await withProgress(
    "unpacking",
    (onProgress) =>
      unpackKvFile(device, { input, output, ...defined({ recover }), onProgress, signal }),
  ).catch((error) => {
    throw recover ? error : adviseRecovery(error);
  });
  if (options.json) return printJson({ backend: device.backend, ...report });
  for (const flaw of report.damage) print(`damaged: ${flaw}`);
  for (const lost of report.lost) print(`lost: ${lost}`);
  const layers = report.layers.length === 1 ? "1 layer" : `${report.layers.length} layers`;
  print(`${output} written with ${layers} in ${formatSeconds(report.seconds)}`);
}

/** The error, with the way out where the input is damaged. */
function adviseRecovery(error: unknown): unknown {
  if (!(error instanceof PackhorseError) || !["corrupt", "truncated"].includes(error.code)) {
    return error;
  }
  const message = `${error.message}; --recover restores what is intact`;
  return new PackhorseError(error.code, message, { cause: error });
}
