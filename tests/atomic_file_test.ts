import { assertEquals, assertRejects } from "@std/assert";
import { AtomicFile } from "../src/io/mod.ts";
import { rejectsWith } from "./rejects_with.ts";
import { TemporaryFolder } from "./temporary_folder.ts";

const bytes = (text: string) => new TextEncoder().encode(text);

Deno.test("an atomic file appears at the commit, with all its writes", async () => {
  using folder = new TemporaryFolder();
  const path = await folder.write("out", "the old content");
  {
    using file = await AtomicFile.create(path);
    await Promise.all([file.write(bytes("def"), 3), file.write(bytes("abc"), 0)]);
    assertEquals(await Deno.readTextFile(path), "the old content");
    await file.commit();
    assertEquals(await Deno.readTextFile(path), "abcdef");
  }
  assertEquals(folder.list(), ["out"]);
});

Deno.test("an atomic file that is not committed leaves nothing", async () => {
  using folder = new TemporaryFolder();
  {
    using file = await AtomicFile.create(folder.file("out"));
    await file.write(bytes("abc"), 0);
    assertEquals(folder.list().length, 1);
  }
  assertEquals(folder.list(), []);
});

Deno.test("an abort removes the temporary file of an atomic file", async () => {
  using folder = new TemporaryFolder();
  const controller = new AbortController();
  const { signal } = controller;
  using file = await AtomicFile.create(folder.file("out"), { signal });
  await file.write(bytes("abc"), 0);
  controller.abort(new Error("interrupted"));
  assertEquals(folder.list(), []);
  await assertRejects(() => file.write(bytes("def"), 3), Error, "interrupted");
  await assertRejects(() => file.commit(), Error, "interrupted");
  await assertRejects(
    () => AtomicFile.create(folder.file("other"), { signal }),
    Error,
    "interrupted",
  );
  assertEquals(folder.list(), []);
});

Deno.test("an abort during the commit of an atomic file leaves nothing", async () => {
  using folder = new TemporaryFolder();
  const controller = new AbortController();
  using file = await AtomicFile.create(folder.file("out"), { signal: controller.signal });
  await file.write(bytes("abc"), 0);
  const commit = file.commit();
  controller.abort(new Error("interrupted"));
  await assertRejects(() => commit, Error, "interrupted");
  assertEquals(folder.list(), []);
});

Deno.test("a failed write of an atomic file fails its commit", async () => {
  using folder = new TemporaryFolder();
  using file = await AtomicFile.create(folder.file("out"));
  const data = bytes("abc");
  const write = file.write(data, 0);
  structuredClone(data, { transfer: [data.buffer] }); // the write finds its bytes gone
  await rejectsWith(() => write, "io", folder.file("out"));
  await rejectsWith(() => file.commit(), "io", folder.file("out"));
  file[Symbol.dispose]();
  assertEquals(folder.list(), []);
});

Deno.test("an atomic file refuses an offset that is no count", async () => {
  using folder = new TemporaryFolder();
  using file = await AtomicFile.create(folder.file("out"));
  for (const offset of [-1, 0.5, NaN, 2 ** 53]) {
    await rejectsWith(() => file.write(bytes("abc"), offset), "invalid-argument", `${offset}`);
  }
});

Deno.test("a closed atomic file refuses writes", async () => {
  using folder = new TemporaryFolder();
  using file = await AtomicFile.create(folder.file("out"));
  await file.commit();
  await rejectsWith(() => file.write(new Uint8Array(), 0), "disposed", "out");
  await rejectsWith(() => file.commit(), "disposed", "out");
  file[Symbol.dispose]();
  assertEquals(folder.list(), ["out"]);
});

Deno.test("an atomic file keeps a symbolic link and replaces what it leads to", async () => {
  using folder = new TemporaryFolder();
  await folder.write("real", "old");
  await Deno.symlink(folder.file("real"), folder.file("link"));
  using file = await AtomicFile.create(folder.file("link"));
  await file.write(bytes("new"), 0);
  await file.commit();
  assertEquals(await Deno.readTextFile(folder.file("real")), "new");
  assertEquals((await Deno.lstat(folder.file("link"))).isSymlink, true);
});

Deno.test("an atomic file refuses targets that are no files", async () => {
  using folder = new TemporaryFolder();
  for (const path of [folder.path, folder.file("new/")]) {
    await rejectsWith(() => AtomicFile.create(path), "io", path, "it is a folder");
  }
  await rejectsWith(
    () => AtomicFile.create("/dev/null"),
    "io",
    "/dev/null",
    "not a regular file",
  );
  const missing = folder.file("missing/out");
  await rejectsWith(() => AtomicFile.create(missing), "not-found", missing, "no such folder");
  assertEquals(folder.list(), []);
});
