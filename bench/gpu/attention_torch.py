"""PyTorch's decode attention over bf16, each backend, for attention.ts: cases as JSON in, the best of each out."""

import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_timing import ROTATED_BYTES, median_milliseconds

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attention(case):
    batch, heads, group = case["batch"], case["kv_heads"], case["group"]
    tokens, dim = case["tokens"], case["head_dim"]
    size = batch * heads * tokens * dim
    copies = max(2, -(-int(ROTATED_BYTES) // (size * 4)))
    make = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
    keys = [make(batch, heads, tokens, dim) for _ in range(copies)]
    values = [make(batch, heads, tokens, dim) for _ in range(copies)]
    # The heads of a group as rows of one query: they share a read of the keys and values.
    query = make(batch, heads, group, dim)
    best = None
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                run = lambda copy: torch.nn.functional.scaled_dot_product_attention(
                    query, keys[copy], values[copy]
                )
                milliseconds = median_milliseconds(run, copies)
        except RuntimeError as error:
            print(f"{case['name']}: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if best is None or milliseconds < best["milliseconds"]:
            best = {"name": case["name"], "milliseconds": milliseconds, "kernel": name}
    return best


print(json.dumps([attention(case) for case in json.loads(sys.argv[1])]))
