/**
 * Fuzzes the file readers, and loading a sequence into a kv cache: `deno run -P=test tests/fuzz/run.ts --seconds 60 --seed 1`.
 *
 * Feeds them mutants of valid files and random bytes. A read must succeed with
 * results that agree, or throw a PackhorseError, in little time and without asking
 * for more memory at once than the file is large.
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../../src/device/mod.ts";
import { PackhorseError } from "../../src/error.ts";
import { TemporaryFolder } from "../temporary_folder.ts";
import { AllocationWatch } from "./allocations.ts";
import { mutateBytes } from "./mutate.ts";
import { Random } from "./random.ts";
import { makeTargets, type Target } from "./targets.ts";

const MOST_EXTRA_BYTES = 1024;
const MOST_MILLISECONDS = 5000;

/** What became of the inputs of a target. */
export interface FuzzCounts {
  read: number;
  refused: number;
}

/**
 * Fuzzes for about `seconds`; input `i` depends on `seed + i` alone. Returns the
 * counts by file name. Throws on the first failure, with the seed that repeats it
 * and the path of the input.
 */
export async function fuzz(
  { seconds, seed }: { readonly seconds: number; readonly seed: number },
): Promise<Map<string, FuzzCounts>> {
  using folder = new TemporaryFolder();
  using device = Device.open();
  const targets = await makeTargets(folder, device);
  const counts = new Map(targets.map(({ fileName }) => [fileName, { read: 0, refused: 0 }]));
  using watch = new AllocationWatch();
  const end = performance.now() + 1000 * seconds;
  for (let i = seed; performance.now() < end; i++) {
    const random = new Random(i);
    const target = random.pick(targets);
    const input = makeInput(random, target);
    const path = await folder.write(target.fileName, input);
    try {
      counts.get(target.fileName)![await checkRead(target, path, input.byteLength, watch)]++;
    } catch (cause) {
      const kept = `${Deno.makeTempDirSync({ prefix: "packhorse-fuzz-" })}/${target.fileName}`;
      await Deno.copyFile(path, kept);
      throw new Error(`Fuzzing failed; repeat with --seed ${i}; the input is ${kept}`, { cause });
    }
  }
  return counts;
}

function makeInput(random: Random, target: Target): Uint8Array {
  const seed = random.pick(target.seeds);
  switch (random.below(8)) {
    case 0:
      return random.bytes(random.below(random.pick([16, 200])));
    case 1:
      return seed;
    case 2:
    case 3:
      return mutateBytes(random, seed, random.pick(target.seeds));
    case 4:
      return mutateBytes(random, target.mutate(random, seed), random.pick(target.seeds));
    default:
      return target.mutate(random, seed);
  }
}

async function checkRead(
  target: Target,
  path: string,
  inputBytes: number,
  watch: AllocationWatch,
): Promise<keyof FuzzCounts> {
  watch.largest = 0;
  const start = performance.now();
  let outcome: keyof FuzzCounts = "read";
  try {
    await target.read(path);
  } catch (error) {
    if (!(error instanceof PackhorseError)) throw error;
    outcome = "refused";
  }
  const milliseconds = performance.now() - start;
  if (milliseconds > MOST_MILLISECONDS) throw new Error(`The read took ${milliseconds} ms`);
  if (watch.largest > inputBytes + MOST_EXTRA_BYTES) {
    throw new Error(`The read of ${inputBytes} bytes asked for ${watch.largest} bytes at once`);
  }
  return outcome;
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: { seconds: { type: "string", default: "60" }, seed: { type: "string" } },
  });
  const seed = Number(values.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]);
  console.log(`Fuzzing the file readers for ${values.seconds} s from --seed ${seed}`);
  for (const [name, { read, refused }] of await fuzz({ seconds: Number(values.seconds), seed })) {
    console.log(`${name}: ${read} read, ${refused} refused`);
  }
}
