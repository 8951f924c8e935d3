"""Logits of transformers for the random-weight models of tests/fixtures/llm_families/cases.json.

    python3 tests/oracles/llm_families.py

Needs PyTorch and transformers; runs on the CPU in float32 within a minute. Writes logits.json beside the cases, which
tests/llm_families_test.ts compares with Packhorse's. Weights come from their tensors' names, as in
tests/llm_checkpoints.ts, so that no weights are stored.
"""
import json
import math
import pathlib

import numpy
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent.parent / "fixtures" / "llm_families"
KEPT = 3  # tokens whose logits are kept: the last ones


def weights(name, shape):
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x01000193) & 0xFFFFFFFF
    if name.endswith("norm.weight"):
        scale, offset = 0.5, 1.0
    elif name.endswith(".bias"):
        scale, offset = 0.2, 0.0
    elif "embed_tokens" in name or "lm_head" in name:
        scale, offset = 0.04, 0.0
    else:
        scale, offset = 1.5 / math.sqrt(shape[1]), 0.0
    mask = numpy.uint64(0xFFFFFFFF)
    u64 = numpy.uint64
    count = math.prod(shape)
    state = (u64(seed) + numpy.arange(1, count + 1, dtype=u64) * u64(0x6D2B79F5)) & mask
    bits = ((state ^ (state >> u64(15))) * (state | u64(1))) & mask
    bits ^= (bits + (((bits ^ (bits >> u64(7))) * (bits | u64(61))) & mask)) & mask
    uniform = (bits ^ (bits >> u64(14))).astype(numpy.float64) / 2**32
    return torch.from_numpy((offset + scale * (2 * uniform - 1)).astype(numpy.float32)).reshape(tuple(shape))


def run(case, count):
    fields = dict(case["config"])
    kind = fields.pop("model_type")
    (architecture,) = fields.pop("architectures")
    fields.pop("torch_dtype")
    config = transformers.AutoConfig.for_model(kind, **fields, attn_implementation="eager")
    model = getattr(transformers, architecture)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(name, tuple(parameter.shape)))
    tokens = torch.tensor([[(i * 37 + 11) % 251 + 3 for i in range(count)]])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0].double()
    return [[round(value, 6) for value in row] for row in logits[-KEPT:].tolist()]


def main():
    torch.manual_seed(0)
    cases = json.loads((FOLDER / "cases.json").read_text())
    logits = {case["name"]: run(case, cases["tokens"]) for case in cases["cases"]}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = [f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in logits.items()]
    body = ",\n".join(lines)
    text = f'{{"versions": {json.dumps(versions)}, "logits": {{\n{body}\n}}}}\n'
    (FOLDER / "logits.json").write_text(text)


if __name__ == "__main__":
    main()
