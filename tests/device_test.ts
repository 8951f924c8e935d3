import { assert, assertEquals, assertLess, assertThrows } from "@std/assert";
import type { DType } from "../src/dtype.ts";
import { Device, measureCopyBandwidth, probeBackends } from "../src/device/mod.ts";
import { type ErrorCode, PackhorseError } from "../src/error.ts";
import { rejectsWith } from "./rejects_with.ts";
import { ABI_VERSION } from "../ffi/library.ts";

const ROOT = new URL("../", import.meta.url);

/** Asserts that `work` throws a PackhorseError of this code whose message contains each fragment. */
function throwsWith(work: () => unknown, code: ErrorCode, ...fragments: string[]): void {
  const error = assertThrows(work, PackhorseError);
  assertEquals(error.code, code, error.message);
  for (const fragment of fragments) assert(error.message.includes(fragment), error.message);
}

/** The backends to test: the one that PACKHORSE_BACKEND names, or all that work. */
function backends() {
  const named = Deno.env.get("PACKHORSE_BACKEND") ?? "auto";
  const reports = probeBackends().filter(({ available }) => available);
  return reports.map(({ backend }) => backend)
    .filter((backend) => named === "auto" || named === backend);
}

/** A test on every backend. */
function test(name: string, work: (device: Device) => void | Promise<void>): void {
  for (const backend of backends()) {
    Deno.test(`device: ${backend}: ${name}`, async () => {
      using device = Device.open({ backend });
      await work(device);
    });
  }
}

/** One array per dtype, with bits that a conversion would change. */
const samples = {
  f16: Uint16Array.of(0x7e34, 0xfc00, 1, 0x3c00),
  bf16: Uint16Array.of(0x7fc3, 0xff80, 1, 0x3f80),
  f32: new Float32Array(Uint32Array.of(0x7fc45678, 1, 0x80000000, 0x3f800000).buffer),
  i32: Int32Array.of(-1, 2 ** 31 - 1, -(2 ** 31), 0),
  u8: Uint8Array.of(0, 255, 1, 128),
  f64: new Float64Array(
    BigUint64Array.of(0x7ff4_5678_0000_0001n, 1n, 1n << 63n, 0x3ff0_0000_0000_0000n).buffer,
  ),
};
const dtypes = Object.keys(samples) as DType[];

function bits(array: ArrayBufferView): number[] {
  return [...new Uint8Array(array.buffer, array.byteOffset, array.byteLength)];
}

test("it says what it is", (device) => {
  const { info, library } = device;
  assert(info.name.length > 0 && info.instructionSet.length > 0);
  assert(info.processors > 0 && info.totalBytes >= info.freeBytes && info.freeBytes > 0);
  assertEquals(info.driverVersion > 0, device.backend === "cuda");
  assert(library.path.endsWith(`libpackhorse_${device.backend}.so`));
  assertEquals(library.abiVersion, ABI_VERSION);
});

test("buffers keep every bit of every type", async (device) => {
  for (const dtype of dtypes) {
    using buffer = device.createBuffer(dtype, 4);
    const sample = samples[dtype];
    assertEquals(buffer.byteLength, sample.byteLength);
    buffer.upload(sample);
    const downloaded = buffer.download();
    assertEquals(downloaded.constructor, sample.constructor);
    assertEquals(bits(downloaded), bits(sample));
    buffer.fill();
    await buffer.uploadAsync(sample);
    assertEquals(bits(await buffer.downloadAsync()), bits(sample));
    // As raw bytes, from the middle of a larger array.
    const larger = new Uint8Array(sample.byteLength + 3);
    larger.set(bits(sample), 1);
    buffer.fill(7);
    buffer.upload(larger.subarray(1, 1 + sample.byteLength));
    const target = new Uint8Array(sample.byteLength + 2);
    assertEquals(
      buffer.download(target.subarray(1, 1 + sample.byteLength)).byteLength,
      sample.byteLength,
    );
    assertEquals([...target], [0, ...bits(sample), 0]);
  }
});

test("f16 also goes through Float16Array", (device) => {
  using buffer = device.createBuffer("f16", 3);
  buffer.upload(Float16Array.of(1, -2, Infinity));
  assertEquals(buffer.download(new Float16Array(3)), Float16Array.of(1, -2, Infinity));
  assertEquals(buffer.download(), Uint16Array.of(0x3c00, 0xc000, 0x7c00));
});

test("views share memory", async (device) => {
  using buffer = device.createBuffer("i32", 8);
  buffer.fill();
  const middle = buffer.view(2, 4);
  middle.upload(Int32Array.of(1, 2, 3, 4));
  middle.view(1, 2).fill(0xff);
  assertEquals(await buffer.downloadAsync(), Int32Array.of(0, 0, 1, -1, -1, 4, 0, 0));
  assertEquals(buffer.view(5).download(), Int32Array.of(4, 0, 0));
  assertEquals([middle.byteOffset, middle.view(1).byteOffset], [8, 12]);
  buffer.view(6, 2).copyFrom(buffer.view(2, 2));
  assertEquals(buffer.download(), Int32Array.of(0, 0, 1, -1, -1, 4, 1, -1));
  middle[Symbol.dispose]();
  assertEquals(buffer.isDisposed, false);
  buffer[Symbol.dispose]();
  assert(middle.isDisposed);
  throwsWith(() => middle.download(), "disposed");
});

test("large copies, enqueued together, arrive whole and in order", async (device) => {
  const length = 3 * 2 ** 20 + 1;
  const data = Int32Array.from({ length }, (_, i) => Math.imul(i, 0x9e3779b1));
  using first = device.createBuffer("i32", length);
  using second = device.createBuffer("i32", length);
  const upload = first.uploadAsync(data);
  await upload;
  second.copyFrom(first);
  first.fill();
  const [copied, cleared] = await Promise.all([second.downloadAsync(), first.downloadAsync()]);
  assert(copied.every((value, i) => value === data[i]));
  assert(cleared.every((value) => value === 0));
});

test("what does not fit is refused", async (device) => {
  const refuse = (work: () => unknown, ...fragments: string[]) =>
    throwsWith(work, "invalid-argument", ...fragments);
  using buffer = device.createBuffer("f32", 4);
  refuse(() => buffer.upload(new Float32Array(3)), "4 elements of f32", "12");
  refuse(() => buffer.upload(new Int32Array(4) as never), "Float32Array", "Int32Array");
  refuse(() => buffer.upload(new Float16Array(8)), "Float16Array");
  refuse(() => buffer.download(new Float32Array(5)), "20");
  refuse(() => buffer.upload(undefined as never), "undefined");
  await rejectsWith(() => buffer.uploadAsync(new Float32Array(3)), "invalid-argument", "12");
  const resizable = new Float32Array(new ArrayBuffer(16, { maxByteLength: 32 }));
  refuse(() => buffer.upload(resizable), "resizable");
  await rejectsWith(() => buffer.downloadAsync(resizable), "invalid-argument", "resizable");
  const detached = new Float32Array(4);
  structuredClone(detached, { transfer: [detached.buffer] });
  refuse(() => buffer.upload(detached), "detached");
  const shared = new Float32Array(new SharedArrayBuffer(16));
  refuse(() => buffer.upload(shared as never), "shared");
  for (const byte of [-1, 256, 0.5]) refuse(() => buffer.fill(byte), String(byte));
  for (const [offset, length] of [[0, 5], [4, 1], [-1, 2], [0.5, 1], [1, 0]] as const) {
    refuse(() => buffer.view(offset, length), String(offset), String(length));
  }
  for (const length of [0, -1, 1.5, 2 ** 53, NaN]) {
    refuse(() => device.createBuffer("u8", length), String(length));
  }
  refuse(() => device.createBuffer("i64" as "f32", 1), "i64");
  using bytes = device.createBuffer("u8", 16);
  refuse(() => buffer.copyFrom(bytes as never), "u8", "f32");
  refuse(() => buffer.view(0, 2).copyFrom(buffer.view(1, 2)), "overlap");
  using other = Device.open({ backend: device.backend });
  using foreign = other.createBuffer("f32", 4);
  refuse(() => buffer.copyFrom(foreign), "another device");
});

test("memory that is not there is an error", (device) => {
  throwsWith(() => device.createBuffer("u8", 2 ** 52), "out-of-memory", String(2 ** 52));
});

test("after disposal everything throws, and disposing again does nothing", async (device) => {
  const buffer = device.createBuffer("u8", 4);
  using other = device.createBuffer("u8", 4);
  buffer[Symbol.dispose]();
  buffer[Symbol.dispose]();
  assert(buffer.isDisposed);
  const data = new Uint8Array(4);
  for (
    const work of [
      () => buffer.upload(data),
      () => buffer.download(),
      () => buffer.fill(),
      () => buffer.view(0),
      () => buffer.copyFrom(other),
      () => other.copyFrom(buffer),
    ]
  ) throwsWith(work, "disposed");
  await rejectsWith(() => buffer.uploadAsync(data), "disposed");
  await rejectsWith(() => buffer.downloadAsync(), "disposed");

  const closed = Device.open({ backend: device.backend });
  const orphan = closed.createBuffer("u8", 4);
  closed[Symbol.dispose]();
  closed[Symbol.dispose]();
  assert(closed.isDisposed && orphan.isDisposed);
  for (
    const work of [
      () => closed.info,
      () => closed.createBuffer("u8", 1),
      () => closed.synchronizeNow(),
      () => closed.time(() => {}),
      () => orphan.download(),
    ]
  ) throwsWith(work, "disposed");
  await rejectsWith(() => closed.synchronize(), "disposed");
  orphan[Symbol.dispose]();
});

test("disposing while a copy is in flight lets it finish", async (device) => {
  const data = new Uint8Array(2 ** 25).fill(5);
  const buffer = device.createBuffer("u8", data.length);
  buffer.upload(data);
  const download = buffer.downloadAsync();
  buffer[Symbol.dispose]();
  throwsWith(() => buffer.fill(), "disposed");
  assert((await download).every((value) => value === 5));

  const closing = Device.open({ backend: device.backend });
  const [first, second] = [0, 1].map(() => closing.createBuffer("u8", data.length));
  const copies = [first!.uploadAsync(data), second!.uploadAsync(data), closing.synchronize()];
  closing[Symbol.dispose]();
  throwsWith(() => first!.fill(), "disposed");
  await Promise.all(copies);
});

test("a timer gives the time of the work, and survives an error in it", (device) => {
  using buffer = device.createBuffer("u8", 2 ** 24);
  assert(device.time(() => buffer.fill(1)) > 0);
  assertThrows(
    () =>
      device.time(() => {
        throw new Error("no work");
      }),
    Error,
    "no work",
  );
  const once = device.time(() => buffer.fill(1));
  assert(once > 0 && once < 10_000, String(once));
});

test("copy bandwidth is that of memory", async (device) => {
  const bytesPerSecond = await measureCopyBandwidth(device);
  assert(bytesPerSecond > 1e8 && bytesPerSecond < 1e14, String(bytesPerSecond));
});

test("opening and closing devices leaks nothing", (device) => {
  const { backend } = device;
  const cycle = () => {
    using device = Device.open({ backend });
    device.createBuffer("u8", 2 ** 16).fill(1);
  };
  assertLess(growth(cycle, backend === "cpu" ? 10_000 : 200), 2 ** 26);
});

test("creating and disposing buffers leaks nothing", (device) => {
  const cycle = () => {
    using buffer = device.createBuffer("u8", 2 ** 16);
    buffer.fill(1);
  };
  assertLess(growth(cycle, 10_000), 2 ** 26);
});

/** Bytes by which the process grows over cycles, each of which takes 64 KiB: leaking all would be 640 MiB. */
function growth(cycle: () => void, cycles: number): number {
  for (let i = 0; i < 100; i++) cycle();
  const before = Deno.memoryUsage().rss;
  for (let i = 0; i < cycles; i++) cycle();
  return Deno.memoryUsage().rss - before;
}

// ---- choosing a backend ----------------------------------------------------------------------------

Deno.test("device: options outside their range are named", () => {
  const refuse = (options: unknown, ...fragments: string[]) =>
    throwsWith(() => Device.open(options as never), "invalid-argument", ...fragments);
  refuse({ backend: "tpu" }, "tpu");
  refuse({ backend: "cpu", ordinal: 1 }, "1");
  refuse({ backend: "cpu", ordinal: -1 }, "-1");
  refuse({ backend: "cpu", ordinal: 0.5 }, "0.5");
});

Deno.test("device: PACKHORSE_BACKEND decides where no backend is given", () => {
  const before = Deno.env.get("PACKHORSE_BACKEND");
  try {
    Deno.env.set("PACKHORSE_BACKEND", "cpu");
    using device = Device.open();
    assertEquals(device.backend, "cpu");
    Deno.env.set("PACKHORSE_BACKEND", "tpu");
    throwsWith(() => Device.open(), "invalid-argument", "PACKHORSE_BACKEND", "tpu");
    using named = Device.open({ backend: "cpu" });
    assertEquals(named.backend, "cpu");
  } finally {
    if (before === undefined) Deno.env.delete("PACKHORSE_BACKEND");
    else Deno.env.set("PACKHORSE_BACKEND", before);
  }
});

Deno.test("device: every backend is reported, with a remedy where it does not work", () => {
  const reports = probeBackends();
  assertEquals(reports.map(({ backend }) => backend), ["cpu", "cuda"]);
  assertEquals(reports[0]!.available, true);
  for (const { backend, available, path, reason, remedy } of reports) {
    if (available) {
      assert(path?.endsWith(`libpackhorse_${backend}.so`));
      assertEquals([reason, remedy], [undefined, undefined]);
    } else {
      assert(reason && remedy);
      assert(!reason.startsWith("Could not open library"), reason);
      throwsWith(() => Device.open({ backend }), path === undefined ? "library-missing" : "no-gpu");
    }
  }
});

// ---- in a process of its own -----------------------------------------------------------------------

/** Runs a module with these permissions, and gives what it prints. */
async function run(permissions: string[], module: string | URL): Promise<string> {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "--quiet",
      "--no-prompt",
      "--cached-only",
      `--config=${new URL("deno.json", ROOT).pathname}`,
      ...permissions,
      module instanceof URL
        ? module.pathname
        : `data:application/typescript,${encodeURIComponent(module)}`,
    ],
    cwd: ROOT.pathname,
  }).output();
  assertEquals([code, new TextDecoder().decode(stderr)], [0, ""]);
  return new TextDecoder().decode(stdout).trim();
}

const librariesFolder = Deno.env.get("PACKHORSE_LIB_DIR") ?? "./build";

Deno.test("device: importing the module loads no library, opening a device does", async () => {
  const count = `Deno.readTextFileSync("/proc/self/maps").split("libpackhorse").length - 1`;
  const printed = await run(
    ["-A"],
    `const { Device } = await import("${new URL("mod.ts", ROOT).href}");
     const before = ${count};
     using device = Device.open({ backend: "cpu" });
     console.log(before, ${count} > 0);`,
  );
  assertEquals(printed, "0 true");
});

Deno.test("device: access to the folder of the libraries is all that is needed", async () => {
  const module = `const { Device } = await import("${new URL("mod.ts", ROOT).href}");
    using device = Device.open();
    using buffer = device.createBuffer("u8", 4);
    await buffer.uploadAsync(Uint8Array.of(1, 2, 3, 4));
    console.log(buffer.download().join());`;
  const env = librariesFolder === "./build" ? [] : ["--allow-env=PACKHORSE_LIB_DIR"];
  const printed = await run([`--allow-ffi=${librariesFolder}`, "--allow-read", ...env], module);
  assertEquals(printed, "1,2,3,4");
});

Deno.test("device: without permission the error says what to allow", async () => {
  const printed = await run(
    ["--allow-read"],
    `const { Device, probeBackends } = await import("${new URL("mod.ts", ROOT).href}");
     try { Device.open({ backend: "cpu" }); } catch ({ code, message }) { console.log(code, message); }
     console.log(probeBackends()[0].remedy);`,
  );
  assert(printed.startsWith("library-missing"), printed);
  assertEquals(printed.split("--allow-ffi=").length, 1 + 2, printed);
});

Deno.test("device: a process that ran parallel work on the CPU exits with 0", async () => {
  // OpenMP's threads outlive the work, and Deno closes libraries as it exits: their code must stay. Threads
  // that wait actively run it all the time, so that a library which was unloaded crashes every time.
  const printed = await run(
    ["-A"],
    `const { Device, packKv } = await import("${new URL("mod.ts", ROOT).href}");
     Deno.env.set("OMP_WAIT_POLICY", "active");
     using device = Device.open({ backend: "cpu" });
     const shape = [8, 4096, 128];
     const tensor = { dtype: "f16", shape, data: new Uint8Array(2 * 8 * 4096 * 128) };
     const { offsets } = await packKv(device, { keys: tensor, values: tensor });
     console.log(offsets.length);`,
  );
  assertEquals(printed, "65");
});

Deno.test("device: what is dropped without being disposed is freed", async () => {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-A",
      "--quiet",
      "--v8-flags=--expose-gc",
      `--config=${new URL("deno.json", ROOT).pathname}`,
      new URL("tests/gc/dropped.ts", ROOT).pathname,
    ],
  }).output();
  assertEquals([code, new TextDecoder().decode(stderr)], [0, ""]);
  // Of 200 buffers and as many caches.
  assertLess(Number(new TextDecoder().decode(stdout)), 100);
});
