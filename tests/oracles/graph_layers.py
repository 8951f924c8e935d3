"""Outputs and gradients of graph layers and readouts by PyTorch Geometric, for tests/graph_layers_oracle_test.ts.

    python3 tests/oracles/graph_layers.py              # on the GPU if there is one
    python3 tests/oracles/graph_layers.py --compare    # writes nothing, prints the largest differences to the fixture

Writes tests/fixtures/graph_layers.json: graphs as GraphDataset.fromGraphs takes them, and for each case its parameters, what
comes out, the gradient of a loss with respect to that, and the gradients that follow for nodes and parameters. All is computed
in float64, from numbers that float32 holds; "source" says by which versions and where.

The graphs have self-loops, a repeated edge, nodes without edges, and features of edges; one object has no node.
"""

import argparse
import json
import pathlib

import numpy
import torch
import torch_geometric
from torch import nn
from torch_geometric import nn as pyg
from torch_geometric.data import Batch, Data

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "graph_layers.json"
SEED = 20261125
NODES, EDGES = [7, 1, 0, 4, 9], [14, 0, 0, 6, 24]
INPUTS, OUTPUTS, EDGE_INPUTS, HEADS = 3, 8, 2, 2


def mlp():
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, OUTPUTS))


def gat(**options):
    return pyg.GATConv(INPUTS, OUTPUTS // HEADS, heads=HEADS, negative_slope=0.2, **options)


GCN = {"lin.weight": "weight", "bias": "bias"}
SAGE = {"lin_l.weight": "neighbours.weight", "lin_l.bias": "neighbours.bias", "lin_r.weight": "self.weight"}
GIN = {
    "nn.0.weight": "first.weight",
    "nn.0.bias": "first.bias",
    "nn.2.weight": "second.weight",
    "nn.2.bias": "second.bias",
}
GIN_EDGES = {**GIN, "lin.weight": "edges.weight", "lin.bias": "edges.bias"}
GAT = {"lin.weight": "linear.weight", "att_dst": "attention_target", "att_src": "attention_source", "bias": "bias"}
GAT_EDGES = {**GAT, "lin_edge.weight": "edges.weight", "att_edge": "attention_edge"}
GATE = {"gate_nn.weight": "gate.weight", "gate_nn.bias": "gate.bias"}

# What Packhorse calls it, whether it sees features of edges, theirs, and the names of its parameters: theirs, ours.
LAYERS = [
    ("gcn", False, pyg.GCNConv(INPUTS, OUTPUTS), GCN),
    ("sage", False, pyg.SAGEConv(INPUTS, OUTPUTS, aggr="mean"), SAGE),
    ("gin", False, pyg.GINConv(mlp()), GIN),
    ("gin", True, pyg.GINEConv(mlp(), edge_dim=EDGE_INPUTS), GIN_EDGES),
    ("gat", False, gat(), GAT),
    ("gat", True, gat(edge_dim=EDGE_INPUTS), GAT_EDGES),
]
READOUTS = [
    ("sum", pyg.SumAggregation(), {}),
    ("mean", pyg.MeanAggregation(), {}),
    ("max", pyg.MaxAggregation(), {}),
    ("attention", pyg.AttentionalAggregation(nn.Linear(INPUTS, 1)), GATE),
]


def gaussian(random, *shape):
    """Numbers that float32 holds."""
    return torch.from_numpy(random.standard_normal(shape).astype(numpy.float32).astype(numpy.float64))


def make_graphs(random):
    graphs = []
    for nodes, edges in zip(NODES, EDGES):
        ends = torch.empty((2, 0), dtype=torch.int64)
        if edges > 0:
            connected = nodes - 1  # the last one has no edge
            ends = torch.from_numpy(random.integers(0, connected, (2, edges)))
            ends[:, 1] = ends[:, 0]  # twice the same
            ends[1, 2] = ends[0, 2]  # to itself
        graphs.append(
            Data(x=gaussian(random, nodes, INPUTS), edge_index=ends, edge_attr=gaussian(random, edges, EDGE_INPUTS))
        )
    return graphs


def run(random, module, names, x, forward, device):
    """Gives a module parameters, and computes what comes out of it and what goes back."""
    module.to(device).double().eval()
    parameters, own = {}, dict(module.named_parameters())
    assert own.keys() == names.keys(), f"{module} has {list(own)}"
    for theirs in sorted(own):
        value = gaussian(random, *own[theirs].shape)
        with torch.no_grad():
            own[theirs].copy_(value)
        parameters[names[theirs]] = ours(theirs, value)
    x = x.clone().requires_grad_()
    out = forward(module, x)
    dout = gaussian(random, *out.shape)
    out.backward(dout.to(device))
    return {
        "parameters": parameters,
        "out": listed(out),
        "dout": listed(dout),
        "dx": listed(x.grad),
        "gradients": {names[theirs]: ours(theirs, parameter.grad) for theirs, parameter in own.items()},
    }


def ours(name, value):
    """A parameter as Packhorse keeps it: matrices [inputs, outputs], all else one row."""
    return listed(value.T if name.endswith("weight") else value.reshape(1, -1))


def listed(matrix):
    return [[round(value, 9) for value in row] for row in matrix.tolist()]


def make_document(device):
    random = numpy.random.default_rng(SEED)
    graphs = make_graphs(random)
    batch = Batch.from_data_list(graphs).to(device)
    layers = []
    for kind, has_edges, layer, names in LAYERS:
        attributes = [batch.edge_attr] if has_edges else []
        forward = lambda layer, x: layer(x, batch.edge_index, *attributes)
        layers.append({"kind": kind, "edges": has_edges, **run(random, layer, names, batch.x, forward, device)})
    readouts = []
    for kind, readout, names in READOUTS:
        forward = lambda readout, x: readout(x, batch.batch, dim_size=len(graphs))
        readouts.append({"kind": kind, **run(random, readout, names, batch.x, forward, device)})
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "source": f"torch_geometric {torch_geometric.__version__}, torch {torch.__version__}, {where}, float64",
        "graphs": [
            {
                "nodeAttributes": listed(graph.x),
                "edges": graph.edge_index.T.tolist(),
                "edgeAttributes": listed(graph.edge_attr),
            }
            if len(graph.x) > 0
            else None
            for graph in graphs
        ],
        "layers": layers,
        "readouts": readouts,
    }


def compare(actual, expected, path=""):
    """Prints the largest difference in each list of numbers."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            compare(actual[name], value, f"{path} {name}")
    elif path.endswith(("graphs", "layers", "readouts")):
        for i, value in enumerate(expected):
            compare(actual[i], value, f"{path} {i}")
    elif isinstance(expected, list):
        difference = numpy.abs(numpy.array(actual) - numpy.array(expected)).max(initial=0)
        print(f"{difference:.1e}{path}")
    elif actual != expected:
        print(f"{path}: {actual}; in the fixture: {expected}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    document = make_document("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.compare:
        compare(document, json.loads(FIXTURE.read_text()))
    else:
        FIXTURE.write_text(json.dumps(document, separators=(",", ":")) + "\n")


main()
