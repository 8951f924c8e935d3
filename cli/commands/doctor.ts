import config from "../../deno.json" with { type: "json" };
import {
  type BackendReport,
  Device,
  measureCopyBandwidth,
  probeBackends,
} from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { prepareLinear } from "../../src/llm/operations.ts";
import type { GlobalOptions } from "../options.ts";
import { formatBytes, print, printJson, printTable } from "../output.ts";

/** Shows what works on this machine; throws if no backend that was asked for does. */
export async function doctor({ backend, json }: GlobalOptions): Promise<void> {
  const wanted = backend === undefined || backend === "auto" ? ["cpu", "cuda"] : [backend];
  const backends = probeBackends().filter((report) => wanted.includes(report.backend));
  const devices = [];
  for (const { backend } of backends.filter(({ available }) => available)) {
    using device = Device.open({ backend });
    devices.push({
      backend,
      ...device.info,
      library: device.library,
      copyBytesPerSecond: await measureCopyBandwidth(device),
      matrixProducts: matrixProducts(device),
    });
  }
  const versions = {
    packhorse: config.version,
    deno: Deno.version.deno,
    platform: `${Deno.build.os} ${Deno.build.arch}`,
  };
  if (json) {
    printJson({ ok: devices.length > 0, versions, backends, devices });
  } else {
    print(`Packhorse ${versions.packhorse}, Deno ${versions.deno}, ${versions.platform}\n`);
    printTable(["backend", "works", "library", ">ABI"], backends.map(backendRow));
    for (const device of devices) printDevice(device);
    for (const report of backends) {
      if (report.available) continue;
      print(`\n${report.backend}: ${report.reason ?? "does not work"}`);
      if (report.remedy !== undefined) print(`  ${report.remedy}`);
    }
  }
  if (devices.length === 0) {
    throw new PackhorseError("library-missing", `No backend works of: ${wanted.join(", ")}`);
  }
}

/** What multiplies matrices on a device, or why nothing does. */
function matrixProducts(device: Device): { available: boolean; library?: string; reason?: string } {
  try {
    return { available: true, library: prepareLinear(device) };
  } catch (error) {
    if (!(error instanceof PackhorseError && error.code === "unsupported")) throw error;
    return { available: false, reason: error.message };
  }
}

function backendRow({ backend, available, path, abiVersion }: BackendReport): string[] {
  return [backend, available ? "yes" : "no", path ?? "", String(abiVersion ?? "")];
}

function printDevice(
  device: Device["info"] & {
    backend: string;
    copyBytesPerSecond: number;
    matrixProducts: ReturnType<typeof matrixProducts>;
  },
): void {
  print(`\n${device.backend}: ${device.name}`);
  const cuda = (version: number) => `${Math.floor(version / 1000)}.${(version % 1000) / 10}`;
  const facts: [string, string][] = [
    ["instruction set", device.instructionSet],
    [device.backend === "cuda" ? "multiprocessors" : "threads", String(device.processors)],
    ["memory", `${formatBytes(device.totalBytes)}, ${formatBytes(device.freeBytes)} free`],
    ["copy bandwidth", `${formatBytes(device.copyBytesPerSecond)}/s`],
    ["matrix products", device.matrixProducts.library ?? device.matrixProducts.reason ?? ""],
  ];
  if (device.backend === "cuda") {
    facts.push(["CUDA driver", cuda(device.driverVersion)]);
    facts.push(["CUDA runtime", cuda(device.runtimeVersion)]);
  }
  for (const [name, value] of facts) print(`  ${name.padEnd(16)} ${value}`);
}
