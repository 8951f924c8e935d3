"""torch.matmul of a query with bf16 keys, and of weights with bf16 values, for products.ts: a case as JSON in."""

import json
import sys

import torch

from torch_timing import ROTATED_BYTES, median_milliseconds

case = json.loads(sys.argv[1])
heads, tokens, dim = case["heads"], case["tokens"], case["head_dim"]
copies = max(2, -(-int(ROTATED_BYTES) // (heads * tokens * dim * 2)))
make = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")
memory = [make(heads, tokens, dim) for _ in range(copies)]
query, weights = make(heads, 1, dim), make(heads, 1, tokens)
scores, sums = make(heads, 1, tokens), make(heads, 1, dim)
score = lambda copy: torch.matmul(query, memory[copy].transpose(1, 2), out=scores)
weigh = lambda copy: torch.matmul(weights, memory[copy], out=sums)
print(
    json.dumps(
        {
            "score": median_milliseconds(score, copies),
            "weigh": median_milliseconds(weigh, copies),
        }
    )
)
