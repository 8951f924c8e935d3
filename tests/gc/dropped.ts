// Run with --v8-flags=--expose-gc: drops devices and buffers without disposing them, and prints how much the
// memory of the process grew.
import { Device } from "../../src/device/mod.ts";

declare const gc: () => void;

const BYTES = 2 ** 22;

function dropOne(): void {
  const device = Device.open({ backend: "cpu" });
  // Written to, so that the memory is really taken.
  device.createBuffer("u8", BYTES).fill(1);
}

async function collect(): Promise<void> {
  gc();
  // Finalizers run in a task of their own.
  await new Promise((resolve) => setTimeout(resolve, 0));
}

dropOne();
await collect();
const before = Deno.memoryUsage().rss;
for (let i = 0; i < 200; i++) {
  dropOne();
  if (i % 10 === 0) await collect();
}
await collect();
console.log((Deno.memoryUsage().rss - before) / BYTES);
