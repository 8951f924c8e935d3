"""Outputs of graph layers on a small random graph, which tests/graph_layers_oracle_test.ts compares with Packhorse's.

    python3 tests/oracles/graph_layers.py numpy     # formulas of PyTorch Geometric's documentation, dense, in float64
    python3 tests/oracles/graph_layers.py pyg       # torch_geometric.nn itself, in float64

Writes tests/fixtures/graph_layers.json: graph, parameters and outputs, and under "source" which of the two they come from.
Both start from the same seed, so that one can be compared with the other:

    python3 tests/oracles/graph_layers.py pyg --compare    # writes nothing, prints the largest differences

The layers are GCNConv, SAGEConv(aggr="mean"), GINConv(Sequential(Linear, Tanh, Linear)) and GATConv(heads=2).
"""

import argparse
import json
import pathlib

import numpy

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "graph_layers.json"
NODES, INPUTS, OUTPUTS, HEADS, SLOPE = 14, 3, 8, 2, 0.2
SHAPES = {
    "gcn": {"weight": (INPUTS, OUTPUTS), "bias": (1, OUTPUTS)},
    "sage": {
        "neighbours.weight": (INPUTS, OUTPUTS),
        "neighbours.bias": (1, OUTPUTS),
        "self.weight": (INPUTS, OUTPUTS),
    },
    "gin": {
        "first.weight": (INPUTS, OUTPUTS),
        "first.bias": (1, OUTPUTS),
        "second.weight": (OUTPUTS, OUTPUTS),
        "second.bias": (1, OUTPUTS),
    },
    "gat": {
        "linear.weight": (INPUTS, OUTPUTS),
        "attention_target": (1, OUTPUTS),
        "attention_source": (1, OUTPUTS),
        "bias": (1, OUTPUTS),
    },
}


def make_case():
    """Edges (source, target), node features, and parameters by layer and name, all representable in float32."""
    random = numpy.random.default_rng(20261125)
    gaussian = lambda *shape: random.standard_normal(shape).astype(numpy.float32).astype(numpy.float64)
    pairs = [(s, t) for s in range(NODES - 1) for t in range(NODES - 1) if s != t]  # the last node has no edge
    chosen = sorted(random.permutation(len(pairs))[:40])
    edges = numpy.array([pairs[i] for i in chosen])
    x = gaussian(NODES, INPUTS)
    parameters = {
        kind: {name: gaussian(*shape) for name, shape in shapes.items()} for kind, shapes in SHAPES.items()
    }
    return edges, x, parameters


def with_numpy(edges, x, parameters):
    adjacency = numpy.zeros((NODES, NODES))  # [target, source]
    adjacency[edges[:, 1], edges[:, 0]] = 1
    degree = adjacency.sum(1)

    p = parameters["gcn"]
    looped = adjacency + numpy.eye(NODES)
    root = 1 / numpy.sqrt(looped.sum(1))
    gcn = (root[:, None] * looped * root[None, :]) @ x @ p["weight"] + p["bias"]

    p = parameters["sage"]
    mean = (adjacency @ x) / numpy.maximum(degree, 1)[:, None]
    sage = mean @ p["neighbours.weight"] + p["neighbours.bias"] + x @ p["self.weight"]

    p = parameters["gin"]
    hidden = numpy.tanh((x + adjacency @ x) @ p["first.weight"] + p["first.bias"])
    gin = hidden @ p["second.weight"] + p["second.bias"]

    p = parameters["gat"]
    width = OUTPUTS // HEADS
    heads = []
    for head in range(HEADS):
        own = slice(head * width, (head + 1) * width)
        values = x @ p["linear.weight"][:, own]
        scores = (values @ p["attention_target"][0, own])[:, None] + (values @ p["attention_source"][0, own])[None, :]
        scores = numpy.where(scores > 0, scores, SLOPE * scores)
        weights = numpy.where(looped > 0, numpy.exp(scores), 0)
        heads.append(weights / weights.sum(1, keepdims=True) @ values)
    gat = numpy.concatenate(heads, 1) + p["bias"]
    return {"gcn": gcn, "sage": sage, "gin": gin, "gat": gat}


def with_pyg(edges, x, parameters):
    import torch
    from torch import nn
    from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

    gin = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, OUTPUTS))
    layers = {
        "gcn": GCNConv(INPUTS, OUTPUTS),
        "sage": SAGEConv(INPUTS, OUTPUTS, aggr="mean"),
        "gin": GINConv(gin),
        "gat": GATConv(INPUTS, OUTPUTS // HEADS, heads=HEADS, negative_slope=SLOPE),
    }
    # Of theirs, which is ours; their matrices are [outputs, inputs].
    names = {
        "gcn": {"lin.weight": "weight", "bias": "bias"},
        "sage": {"lin_l.weight": "neighbours.weight", "lin_l.bias": "neighbours.bias", "lin_r.weight": "self.weight"},
        "gin": {
            "nn.0.weight": "first.weight",
            "nn.0.bias": "first.bias",
            "nn.2.weight": "second.weight",
            "nn.2.bias": "second.bias",
        },
        "gat": {
            "lin.weight": "linear.weight",
            "att_dst": "attention_target",
            "att_src": "attention_source",
            "bias": "bias",
        },
    }
    outputs = {}
    for kind, layer in layers.items():
        layer.double().eval()
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                value = parameters[kind][names[kind].pop(name)]
                value = value.T if name.endswith("weight") else value
                parameter.copy_(torch.from_numpy(value.copy()).reshape(parameter.shape))
            assert not names[kind], f"{kind} has no {list(names[kind])}"
            outputs[kind] = layer(torch.from_numpy(x), torch.from_numpy(edges.T.copy())).numpy()
    return outputs


def source_of(choice):
    if choice == "numpy":
        return f"numpy {numpy.__version__}, formulas of PyTorch Geometric's documentation, dense, float64"
    import torch
    import torch_geometric

    return f"torch_geometric {torch_geometric.__version__}, torch {torch.__version__}, float64"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=["numpy", "pyg"])
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    case = make_case()
    outputs = (with_numpy if arguments.source == "numpy" else with_pyg)(*case)
    if arguments.compare:
        kept = json.loads(FIXTURE.read_text())
        print("fixture:", kept["source"])
        for kind, values in outputs.items():
            print(kind, numpy.abs(values - numpy.array(kept["layers"][kind]["out"])).max())
        return
    edges, x, parameters = case
    listed = lambda array: [[round(value, 9) for value in row] for row in array.tolist()]
    document = {
        "source": source_of(arguments.source),
        "edges": edges.tolist(),
        "x": x.tolist(),
        "layers": {
            kind: {
                "parameters": {name: value.tolist() for name, value in parameters[kind].items()},
                "out": listed(outputs[kind]),
            }
            for kind in SHAPES
        },
    }
    FIXTURE.write_text(json.dumps(document, separators=(",", ":")) + "\n")


main()
