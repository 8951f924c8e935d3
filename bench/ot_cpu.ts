/**
 * 4,096 ragged problems of transport on the CPU, points to dense plans, beside the same solver in numpy on padded size
 * buckets, in turns in the same run:
 *
 *     deno run -A bench/ot_cpu.ts [--epsilon 0.05] [--rounds 5] [--python python3]
 *
 * @module
 */
import { parseArgs } from "node:util";
import { Device } from "../src/device/mod.ts";
import { sinkhorn } from "../src/ot/mod.ts";

const { values } = parseArgs({
  args: Deno.args,
  options: {
    epsilon: { type: "string", default: "0.05" },
    rounds: { type: "string", default: "5" },
    python: { type: "string", default: "python3" },
  },
});
const epsilon = Number(values.epsilon);
const rounds = Number(values.rounds);
const [problems, dimension, tolerance] = [4096, 64, 1e-5];

// A generator of numbers that needs no package: xorshift128+ would do as well.
let state = 1n;
function random(): number {
  state = (state * 6364136223846793005n + 1442695040888963407n) & 0xffffffffffffffffn;
  return Number(state >> 11n) / 2 ** 53;
}
function* gaussians(count: number): Generator<number> {
  // From a table, for arithmetic on big integers is slow.
  const table = Float32Array.from(
    { length: 65521 },
    () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()),
  );
  let place = 0;
  for (let i = 0; i < count; i++) {
    place = (place + 1 + (i % 61)) % table.length;
    yield table[place]!;
  }
}
const sizes = () => Array.from({ length: problems }, () => 10 + Math.floor(random() * 91));
const rows = sizes();
const columns = sizes();
const sum = (list: number[]) => list.reduce((total, value) => total + value, 0);
const xs = Float32Array.from(gaussians(sum(rows) * dimension));
const ys = Float32Array.from(gaussians(sum(columns) * dimension));

using device = Device.open({ backend: "cpu" });
using x = device.createBuffer("f32", xs.length);
using y = device.createBuffer("f32", ys.length);
x.upload(xs);
y.upload(ys);

const folder = await Deno.makeTempDir();
try {
  await Deno.writeFile(`${folder}/x`, new Uint8Array(xs.buffer));
  await Deno.writeFile(`${folder}/y`, new Uint8Array(ys.buffer));
  const sizesFile = Int32Array.from([...rows, ...columns]);
  await Deno.writeFile(`${folder}/sizes`, new Uint8Array(sizesFile.buffer));
  const numpy = new Deno.Command(values.python, {
    args: [
      new URL("ot_numpy.py", import.meta.url).pathname,
      folder,
      String(dimension),
      String(epsilon),
      String(tolerance),
    ],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const writer = numpy.stdin.getWriter();
  const lines = numpy.stdout.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  const theirs = async () => {
    await writer.write(new TextEncoder().encode("go\n"));
    while (!rest.includes("\n")) {
      const { value, done } = await lines.read();
      if (done) throw new Error("The numpy solver ended");
      rest += value;
    }
    const [line] = rest.split("\n", 1);
    rest = rest.slice(line!.length + 1);
    return JSON.parse(line!) as { ms: number; error: number; iterations: number; cost: number };
  };
  const options = { epsilon, relativeEpsilon: true, tolerance };
  const times: { ours: number; backward: number; numpy: number }[] = [];
  for (let round = 0; round <= rounds; round++) {
    const peer = await theirs();
    // Threads of its library go on spinning for a while.
    await new Promise((resolve) => setTimeout(resolve, 500));
    const start = performance.now();
    using solution = sinkhorn(device, { x, y, dimension, rows, columns }, options);
    const ours = performance.now() - start;
    const plan = solution.plan;
    const begin = performance.now();
    using _gradients = solution.backward({ plan }, { to: ["x", "y"] });
    const backward = performance.now() - begin;
    if (round > 0) times.push({ ours, backward, numpy: peer.ms });
    if (round < rounds) continue;
    const { reports } = solution;
    const iterations = reports.map((report) => report.iterations).sort((a, b) => a - b);
    console.log(JSON.stringify({
      epsilon,
      iterations: {
        mean: sum(iterations) / problems,
        median: iterations[problems / 2],
        p99: iterations[Math.floor(problems * 0.99)],
        most: iterations.at(-1),
      },
      marginalError: Math.max(...reports.map(({ marginalError }) => marginalError)),
      cost: sum(reports.map(({ cost }) => cost)),
      numpy: peer,
    }));
  }
  await writer.close();
  await numpy.status;
  const median = (list: number[]) => list.sort((a, b) => a - b)[Math.floor(list.length / 2)]!;
  console.log(JSON.stringify({
    forwardMs: median(times.map(({ ours }) => ours)),
    backwardMs: median(times.map(({ backward }) => backward)),
    numpyMs: median(times.map(({ numpy }) => numpy)),
    speedUp: median(times.map(({ ours, numpy }) => numpy / ours)),
  }));
} finally {
  await Deno.remove(folder, { recursive: true });
}
