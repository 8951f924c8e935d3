"""Times of PyTorch's work by the GPU's clock, for the benches beside."""

import torch

# What the copies of a measurement hold together, so that each is cold again when its turn comes.
ROTATED_BYTES = 400e6
RUNS = 21
# Of a GPU that waits while the host enqueues what is measured, so that the host is not.
LEAD_CYCLES = 4_000_000


def median_milliseconds(work, copies):
    for copy in range(copies):
        work(copy)
    times = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(LEAD_CYCLES)
        begin.record()
        for copy in range(copies):
            work(copy)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / copies)
    return sorted(times)[RUNS // 2]
