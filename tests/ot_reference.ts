/** Optimal transport in plain loops and doubles: what tests compare with. Nothing here is stabilised by scalings or shared with the module. */
import type { PointCost } from "../src/ot/mod.ts";

export interface ReferenceProblem {
  readonly n: number;
  readonly m: number;
  readonly cost: Float64Array;
  readonly a: Float64Array;
  readonly b: Float64Array;
}

export interface ReferenceSolution {
  readonly f: Float64Array;
  readonly g: Float64Array;
  readonly plan: Float64Array;
  readonly iterations: number;
  readonly marginalError: number;
  readonly cost: number;
  readonly value: number;
}

export function pointCosts(
  x: ArrayLike<number>,
  y: ArrayLike<number>,
  dimension: number,
  kind: PointCost,
): Float64Array {
  const n = x.length / dimension;
  const m = y.length / dimension;
  const cost = new Float64Array(n * m);
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < m; j++) {
      let [squares, product, xx, yy] = [0, 0, 0, 0];
      for (let k = 0; k < dimension; k++) {
        const [p, q] = [x[i * dimension + k]!, y[j * dimension + k]!];
        squares += (p - q) ** 2;
        product += p * q;
        xx += p * p;
        yy += q * q;
      }
      cost[i * m + j] = {
        sqeuclidean: squares,
        euclidean: Math.sqrt(squares),
        cosine: xx === 0 || yy === 0 ? 1 : 1 - product / Math.sqrt(xx) / Math.sqrt(yy),
        dot: -product,
      }[kind];
    }
  }
  return cost;
}

function logSumExp(count: number, at: (k: number) => number): number {
  let largest = -Infinity;
  for (let k = 0; k < count; k++) largest = Math.max(largest, at(k));
  if (largest === -Infinity) return -Infinity;
  let sum = 0;
  for (let k = 0; k < count; k++) sum += Math.exp(at(k) - largest);
  return largest + Math.log(sum);
}

/** KL(p | q) */
function divergence(p: Float64Array, q: Float64Array): number {
  let total = 0;
  p.forEach((value, i) => {
    total += q[i]! - value + (value > 0 ? value * Math.log(value / q[i]!) : 0);
  });
  return total;
}

/** Sinkhorn's iterations, all in logarithms: f from g, then g from f. */
export function referenceSinkhorn(
  { n, m, cost, a, b }: ReferenceProblem,
  { epsilon, tolerance, iterations: limit, penalty = Infinity }: {
    epsilon: number;
    tolerance: number;
    iterations: number;
    penalty?: number;
  },
): ReferenceSolution {
  const f = new Float64Array(n).fill(-Infinity);
  const g = new Float64Array(m);
  b.forEach((mass, j) => g[j] = mass > 0 ? 0 : -Infinity);
  const damping = penalty === Infinity ? 1 : penalty / (penalty + epsilon);
  const plan = new Float64Array(n * m);
  let [iterations, marginalError] = [0, Infinity];
  const rows = new Float64Array(n);
  const columns = new Float64Array(m);
  const target = (mass: number, potential: number) =>
    penalty === Infinity ? mass : mass * Math.exp(-potential / penalty);
  while (marginalError > tolerance && iterations < limit) {
    for (let i = 0; i < n; i++) {
      if (a[i] === 0) continue;
      const sum = logSumExp(m, (j) => (g[j]! - cost[i * m + j]!) / epsilon);
      f[i] = damping * epsilon * (Math.log(a[i]!) - sum);
    }
    for (let j = 0; j < m; j++) {
      if (b[j] === 0) continue;
      const sum = logSumExp(n, (i) => (f[i]! - cost[i * m + j]!) / epsilon);
      g[j] = damping * epsilon * (Math.log(b[j]!) - sum);
    }
    iterations++;
    rows.fill(0);
    columns.fill(0);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < m; j++) {
        const entry = a[i] === 0 || b[j] === 0
          ? 0
          : Math.exp((f[i]! + g[j]! - cost[i * m + j]!) / epsilon);
        plan[i * m + j] = entry;
        rows[i]! += entry;
        columns[j]! += entry;
      }
    }
    marginalError = 0;
    a.forEach((mass, i) => mass > 0 && (marginalError += Math.abs(rows[i]! - target(mass, f[i]!))));
    b.forEach((mass, j) =>
      mass > 0 && (marginalError += Math.abs(columns[j]! - target(mass, g[j]!)))
    );
  }
  let [total, entropy] = [0, 0];
  plan.forEach((entry, k) => {
    if (entry === 0) return;
    total += entry * cost[k]!;
    entropy -= entry * (Math.log(entry) - 1);
  });
  let value = total - epsilon * entropy;
  if (penalty !== Infinity) value += penalty * (divergence(rows, a) + divergence(columns, b));
  return { f, g, plan, iterations, marginalError, cost: total, value };
}

/**
 * The least cost of a plan with whole masses, and a plan: successive shortest paths with Bellman and Ford's search, which
 * knows nothing of potentials, bases or auctions.
 */
export function referenceLeastCost(
  n: number,
  m: number,
  cost: ArrayLike<number>,
  a: readonly number[],
  b: readonly number[],
): number {
  const flow = new Float64Array(n * m);
  const supply = [...a];
  const demand = [...b];
  let total = 0;
  while (supply.some((mass) => mass > 0)) {
    const distance = new Float64Array(n + m).fill(Infinity);
    const before = new Int32Array(n + m).fill(-1);
    supply.forEach((mass, i) => mass > 0 && (distance[i] = 0));
    for (let changed = true; changed;) {
      changed = false;
      for (let i = 0; i < n; i++) {
        for (let j = 0; j < m; j++) {
          const price = cost[i * m + j]!;
          if (distance[i]! + price < distance[n + j]! - 1e-12) {
            distance[n + j] = distance[i]! + price;
            before[n + j] = i;
            changed = true;
          }
          if (flow[i * m + j]! > 0 && distance[n + j]! - price < distance[i]! - 1e-12) {
            distance[i] = distance[n + j]! - price;
            before[i] = n + j;
            changed = true;
          }
        }
      }
    }
    let end = -1;
    demand.forEach((mass, j) => {
      if (mass > 0 && (end < 0 || distance[n + j]! < distance[n + end]!)) end = j;
    });
    let amount = demand[end]!;
    let node = n + end;
    for (; before[node]! >= 0; node = before[node]!) {
      if (node < n) amount = Math.min(amount, flow[node * m + before[node]! - n]!);
    }
    amount = Math.min(amount, supply[node]!);
    supply[node]! -= amount;
    demand[end]! -= amount;
    for (node = n + end; before[node]! >= 0; node = before[node]!) {
      const from = before[node]!;
      if (node >= n) flow[from * m + node - n]! += amount;
      else flow[node * m + from - n]! -= amount;
    }
  }
  flow.forEach((amount, k) => amount > 0 && (total += amount * cost[k]!));
  return total;
}
