"""The solver of bench/ot_cpu.ts in numpy: the same iterations, by scalings of a kernel in float64 that begins at the
potentials of the first update, on buckets of sizes padded to multiples of 16 rows and columns, of which what has converged
leaves. A line of input, a solution, a line of output.

    python3 ot_numpy.py FOLDER DIMENSION EPSILON TOLERANCE
"""

import json
import sys
import time

import numpy as np

folder, dimension, epsilon, tolerance = sys.argv[1], *map(float, sys.argv[2:])
dimension = int(dimension)
sizes = np.fromfile(f"{folder}/sizes", np.int32).reshape(2, -1)
x = np.fromfile(f"{folder}/x", np.float32).reshape(-1, dimension)
y = np.fromfile(f"{folder}/y", np.float32).reshape(-1, dimension)
row_offsets, column_offsets = (np.concatenate([[0], np.cumsum(s)]) for s in sizes)
padded = (sizes + 15) // 16 * 16
# Square buckets: of the pairs of padded sizes there are too many.
bucket_of = padded.max(axis=0)
plan_offsets = np.concatenate([[0], np.cumsum(sizes[0].astype(np.int64) * sizes[1])])
plans = np.empty(plan_offsets[-1], np.float32)


def solve():
    worst, made, total = 0.0, 0, 0.0
    for size in np.unique(bucket_of):
        members = np.nonzero(bucket_of == size)[0]
        # As many at once as a cache holds.
        for some in np.array_split(members, max(1, len(members) * size * size * 8 // (8 << 20))):
            error, iterations, cost = solve_bucket(some, size)
            worst, made, total = max(worst, error), max(made, iterations), total + cost
    return worst, made, total


def solve_bucket(members, size):
    count = len(members)
    xs, ys = np.zeros((2, count, size, dimension))
    a, b = np.zeros((2, count, size))
    for k, p in enumerate(members):
        n, m = sizes[:, p]
        xs[k, :n] = x[row_offsets[p] : row_offsets[p + 1]]
        ys[k, :m] = y[column_offsets[p] : column_offsets[p + 1]]
        a[k, :n], b[k, :m] = 1.0 / n, 1.0 / m
    costs = (xs * xs).sum(-1)[:, :, None] + (ys * ys).sum(-1)[:, None, :] - 2.0 * (xs @ ys.transpose(0, 2, 1))
    present = (a > 0)[:, :, None] & (b > 0)[:, None, :]
    epsilons = epsilon * np.where(present, costs, 0.0).max(axis=(1, 2))
    power = np.where(present, costs, np.inf) / -epsilons[:, None, None]
    top = power.max(axis=2, keepdims=True)
    kernel = np.exp(power - np.where(np.isfinite(top), top, 0.0))
    u, v = np.ones((count, size)), (b > 0).astype(float)
    done_u, done_v = np.zeros_like(u), np.zeros_like(v)
    active = np.arange(count)
    live, av, bv = kernel, a, b
    worst, iterations = 0.0, 0
    with np.errstate(divide="ignore", invalid="ignore"):
        while True:
            sums = (live @ v[:, :, None])[:, :, 0]
            if iterations > 0:
                errors = np.abs(u * sums - av).sum(axis=1)
                over = errors <= tolerance
                if over.any():
                    worst = max(worst, errors[over].max())
                    done_u[active[over]], done_v[active[over]] = u[over], v[over]
                    stay = ~over
                    active, live, av, bv, v, sums = (z[stay] for z in (active, live, av, bv, v, sums))
                    if not len(active):
                        break
            u = np.where(av > 0, av / sums, 0.0)
            v = np.where(bv > 0, bv / (u[:, None, :] @ live)[:, 0, :], 0.0)
            iterations += 1
    kernel *= done_u[:, :, None]
    kernel *= done_v[:, None, :]
    total = float((kernel * costs).sum())
    for k, p in enumerate(members):
        n, m = sizes[:, p]
        plans[plan_offsets[p] : plan_offsets[p + 1]].reshape(n, m)[:] = kernel[k, :n, :m]
    return worst, iterations, total


for _ in sys.stdin:
    start = time.perf_counter()
    error, iterations, cost = solve()
    milliseconds = 1000 * (time.perf_counter() - start)
    print(json.dumps({"ms": milliseconds, "error": error, "iterations": iterations, "cost": cost}), flush=True)
