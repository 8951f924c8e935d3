"""Epochs of late fusion of graph isomorphism networks in plain PyTorch, for graph.ts: a case as JSON in.

The model of src/graph/network.ts: in each view, layers of x + sum of neighbours (index_add),
linear, batch norm, ReLU, linear, batch norm, ReLU; the sum over nodes; both views side by side; linear, ReLU, dropout,
linear. Adam with decoupled weight decay, gradients clipped. Batches are shuffled anew every epoch, but put together and
copied to the GPU before its clock starts.
"""

import glob
import gzip
import json
import sys
import time

import numpy
import torch
from torch import nn

LEARNING_RATE, WEIGHT_DECAY, MOST_NORM = 0.005, 1e-4, 5.0


def read(folder, part, kind):
    (path,) = glob.glob(f"{folder}/*_{part}.txt*")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        return numpy.loadtxt(file, delimiter=",", dtype=kind, ndmin=2)


class View:
    """A data set's graphs one behind another, and where each begins."""

    def __init__(self, folder):
        self.features = read(folder, "node_attributes", numpy.float32)
        of_node = read(folder, "graph_indicator", numpy.int64)[:, 0] - 1
        self.labels = numpy.unique(read(folder, "graph_labels", numpy.int64)[:, 0], return_inverse=True)[1]
        graphs = range(len(self.labels) + 1)
        self.nodes = numpy.searchsorted(of_node, graphs)
        edges = read(folder, "A", numpy.int64) - 1
        of_edge = of_node[edges[:, 0]]
        edges, of_edge = (array[numpy.argsort(of_edge, kind="stable")] for array in (edges, of_edge))
        self.edges, self.starts = edges, numpy.searchsorted(of_edge, graphs)

    def batch(self, graphs):
        features, edges, objects, first = [], [], [], 0
        for place, graph in enumerate(graphs):
            begin, end = self.nodes[graph], self.nodes[graph + 1]
            features.append(self.features[begin:end])
            edges.append(self.edges[self.starts[graph] : self.starts[graph + 1]] - begin + first)
            objects.append(numpy.full(end - begin, place))
            first += end - begin
        arrays = (numpy.concatenate(features), numpy.concatenate(edges).T.copy(), numpy.concatenate(objects))
        return [torch.from_numpy(array).cuda() for array in arrays]


class Gin(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        norm = lambda: nn.BatchNorm1d(width)
        self.first, self.norm = nn.Linear(inputs, width), norm()
        self.second, self.norm_after = nn.Linear(width, width), norm()

    def forward(self, x, edges):
        x = x.index_add(0, edges[1], x.index_select(0, edges[0]))
        x = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(self.norm_after(x))


class LateFusion(nn.Module):
    def __init__(self, inputs, classes, case):
        super().__init__()
        width = case["width"]
        self.encoders = nn.ModuleList(
            nn.ModuleList(Gin(each if layer == 0 else width, width) for layer in range(case["layers"]))
            for each in inputs
        )
        self.head = nn.Sequential(
            nn.Linear(len(inputs) * width, width),
            nn.ReLU(),
            nn.Dropout(case["headDropout"]),
            nn.Linear(width, classes),
        )

    def forward(self, views, count):
        sums = []
        for encoder, (x, edges, objects) in zip(self.encoders, views):
            for layer in encoder:
                x = layer(x, edges)
            sums.append(x.new_zeros(count, x.shape[1]).index_add(0, objects, x))
        return self.head(torch.cat(sums, 1))


def main():
    case = json.loads(sys.argv[1])
    torch.manual_seed(1)
    random = numpy.random.default_rng(1)
    views = [View(folder) for folder in case["folders"]]
    labels = views[0].labels
    inputs = [view.features.shape[1] for view in views]
    model = LateFusion(inputs, int(labels.max()) + 1, case).cuda()
    adam = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    milliseconds, losses = [], []
    for _ in range(case["epochs"]):
        order = random.permutation(len(labels))
        batches = []
        for start in range(0, len(order), case["batch"]):
            graphs = order[start : start + case["batch"]]
            batches.append(([view.batch(graphs) for view in views], torch.from_numpy(labels[graphs]).cuda()))
        total = torch.zeros((), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch, expected in batches:
            adam.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(batch, len(expected)), expected)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM, foreach=True)
            adam.step()
            total += loss.detach() * len(expected)
        losses.append(total.item() / len(labels))  # waits
        milliseconds.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps({"milliseconds": milliseconds, "losses": losses}))


main()
