import { Device } from "../../src/device/mod.ts";
import { packKvFile } from "../../src/kv/mod.ts";
import { listenForInterrupt } from "../interrupt.ts";
import {
  checkCodec,
  type CodecOptions,
  defined,
  type GlobalOptions,
  type PatternOptions,
} from "../options.ts";
import { formatSeconds, print, printJson, withProgress } from "../output.ts";
import { packReport, printLayers, printTotal } from "../report.ts";

/** Packs the cache in a `.safetensors` file. */
export async function kvPack(
  options: GlobalOptions & CodecOptions & PatternOptions & { output: string },
  input: string,
): Promise<void> {
  checkCodec(options);
  const { backend, output, keyPattern, valuePattern } = options;
  const codec = defined({
    quantizer: options.quantizer,
    keyRel: options.kRel,
    valueRel: options.vRel,
    grouping: options.grouping,
    keyBits: options.kBits,
    valueBits: options.vBits,
    repack: options.repack,
    pack: options.pack,
    residual: options.residual,
    keepNonFinite: options.keepNonFinite,
  });
  using device = Device.open(defined({ backend }));
  using interrupt = listenForInterrupt();
  const { signal } = interrupt;
  const report = await withProgress("packing", (onProgress) =>
    packKvFile(device, {
      input,
      output,
      codec,
      ...defined({ keyPattern, valuePattern }),
      onProgress,
      signal,
    }));
  if (options.json) return printJson({ backend: device.backend, ...packReport(report) });
  printLayers(report, { errors: true });
  printTotal(report);
  print(`${output} written in ${formatSeconds(report.seconds)} on ${device.info.name}`);
}
