"""PyTorch on the problems of bench/native/ot_gpu.cpp: Sinkhorn in logarithms, compiled, padded to four sizes, and only the
problems that have not converged go on. float32 without TF32; points are padded beforehand. Prints Markdown."""

import torch

from torch_timing import RUNS

PROBLEMS, DIMENSION, TOLERANCE = 4096, 64, 1e-5
SIZES = (40, 60, 80, 100)

torch.backends.cuda.matmul.allow_tf32 = False


def costs(x, y, x_mask, y_mask, relative):
    cost = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.transpose(1, 2)
    mask = x_mask[:, :, None] & y_mask[:, None, :]
    epsilon = relative * torch.where(mask, cost, 0.0).amax((1, 2))
    return torch.where(mask, cost, torch.inf) / epsilon[:, None, None]


def iterate(cost, log_a, log_b, f, g, count):
    # Potentials over epsilon; padding has masses of log -inf, and a potential of -inf.
    for _ in range(count):
        f = log_a - (g[:, None, :] - cost).logsumexp(2)
        f = torch.where(log_a.isinf(), -torch.inf, f)
        g = log_b - (f[:, :, None] - cost).logsumexp(1)
        g = torch.where(log_b.isinf(), -torch.inf, g)
    rows = (f[:, :, None] + g[:, None, :] - cost).exp().sum(2)
    return f, g, (rows - log_a.exp()).abs().sum(1)


def plans(cost, f, g):
    return (f[:, :, None] + g[:, None, :] - cost).exp()


costs, iterate, plans = (torch.compile(each, dynamic=True) for each in (costs, iterate, plans))


def solve(bucket, relative, count, most):
    x, y, x_mask, y_mask, log_a, log_b = bucket
    cost = costs(x, y, x_mask, y_mask, relative)
    f_all, g_all = torch.zeros_like(log_a), torch.where(log_b.isinf(), -torch.inf, 0.0)
    error_all = torch.full_like(f_all[:, 0], torch.inf)
    active = torch.arange(len(x), device=x.device)
    own_cost, own_a, own_b, f, g = cost, log_a, log_b, f_all, g_all
    done = 0
    while done < most:
        f, g, error = iterate(own_cost, own_a, own_b, f, g, count)
        done += count
        f_all = f_all.index_copy(0, active, f)
        g_all = g_all.index_copy(0, active, g)
        error_all = error_all.index_copy(0, active, error)
        left = (error > TOLERANCE).nonzero()[:, 0]
        if len(left) == 0:
            break
        if len(left) < 0.7 * len(active):
            active, own_cost, own_a, own_b = active[left], own_cost[left], own_a[left], own_b[left]
            f, g = f[left], g[left]
    return plans(cost, f_all, g_all), error_all


def main():
    torch.manual_seed(1)
    device = "cuda"
    n, m = torch.randint(10, 101, (2, PROBLEMS), device=device)
    larger = torch.maximum(n, m)
    buckets = []
    for index, size in enumerate(SIZES):
        own = (larger <= size) & (larger > (SIZES[index - 1] if index else 0))
        counts = (n[own], m[own])
        masks = [torch.arange(size, device=device)[None] < count[:, None] for count in counts]
        points = [torch.randn(len(mask), size, DIMENSION, device=device) * mask[:, :, None] for mask in masks]
        logs = [torch.where(mask, -count[:, None].float().log(), -torch.inf) for mask, count in zip(masks, counts)]
        buckets.append((*points, *masks, *logs))
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    print("| epsilon / max C | iterations between checks | forward | worst error |\n|--:|--:|--:|--:|")
    for relative, choices in ((0.05, (2, 4)), (0.005, (10, 25))):
        for count in choices:
            work = lambda: [solve(bucket, relative, count, 20000) for bucket in buckets]
            for _ in range(3):
                results = work()
            times = []
            for _ in range(RUNS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            worst = max(error.max().item() for _, error in results)
            print(f"| {relative} | {count} | {sorted(times)[RUNS // 2]:.3f} ms | {worst:.1e} |", flush=True)


main()
