// deno-lint-ignore-file
import type { DeviceBuffer } from "../device/device_buffer.ts";
function logProbs(l: Float32Array) {
  let m = -Infinity;
  for (const x of l) m = Math.max(m, x);
  let s = 0;
  for (const x of l) s += Math.exp(x - m);
  const z = m + Math.log(s);
  return z;
}
export function crossEntropy(logits: any, targets: any, out: any, { rows, vocabulary }: any) {
  const l = logits.download(), t = targets.download();
  const o = new Float32Array(rows);
  for (let r = 0; r < rows; r++) {
    const row = l.subarray(r * vocabulary, (r + 1) * vocabulary);
    o[r] = logProbs(row) - row[t[r]];
  }
  out.upload(o);
}
export function divergence(
  ref: any,
  logits: any,
  { rows, vocabulary, divergences, agreements }: any,
) {
  const a = ref.download(), b = logits.download();
  const o = new Float32Array(rows), g = new Int32Array(rows);
  for (let r = 0; r < rows; r++) {
    const x = a.subarray(r * vocabulary, (r + 1) * vocabulary),
      y = b.subarray(r * vocabulary, (r + 1) * vocabulary);
    const zx = logProbs(x), zy = logProbs(y);
    let k = 0, ix = 0, iy = 0;
    for (let i = 0; i < vocabulary; i++) {
      k += Math.exp(x[i] - zx) * ((x[i] - zx) - (y[i] - zy));
      if (x[i] > x[ix]) ix = i;
      if (y[i] > y[iy]) iy = i;
    }
    o[r] = k;
    g[r] = +(ix === iy);
  }
  divergences.upload(o);
  agreements.upload(g);
}
