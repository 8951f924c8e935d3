"""Training of late fusion and AMoSL with PyTorch Geometric, for graph.ts: a case as JSON in, times and losses as JSON out.

The models of src/graph: in each view, layers of GINConv with batch norm inside and after, ReLU; AMoSL's projections, plans,
messages, combinations and learned penalty (amosl_fusion.ts); the sum over nodes; linear, ReLU, dropout, linear. Initial
values come from a file that Packhorse wrote. Adam with decoupled weight decay (fused), gradients clipped.

Plans are padded to the largest graphs of a batch, and found by Sinkhorn's iterations in logarithms for the whole batch, until
every object's marginals are as near as Packhorse's, which is looked at every few iterations. Their gradient goes through the
iterations ("unrolled"), or is implicit: a linear system for each object, solved as one batch. "compile" has torch.compile
make kernels of the iterations.

Batches are shuffled anew every epoch, but put together, copied to the GPU and indexed for padding before its clock starts.
"""

import glob
import gzip
import json
import math
import struct
import sys
import time

import numpy

try:
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, softplus
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GINConv, global_add_pool
except ImportError as error:
    sys.exit(f"graph_pyg.py needs PyTorch and PyTorch Geometric where python3 finds them: {error}")

LEARNING_RATE, WEIGHT_DECAY, MOST_NORM = 0.005, 1e-4, 5.0
EPSILON, TOLERANCE, ITERATIONS, RELAXATION, STRENGTH = 0.05, 1e-4, 500, 1.5, 0.1
# Iterations between looks at the marginals, each of which waits for the GPU.
CHECK_EVERY = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(folder, part, kind):
    (path,) = glob.glob(f"{folder}/*_{part}.txt*")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        return torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=kind, ndmin=2))


def read_view(folder):
    """Graphs and labels of a folder of text files."""
    features = read(folder, "node_attributes", numpy.float32)
    of_node = read(folder, "graph_indicator", numpy.int64)[:, 0] - 1
    labels = read(folder, "graph_labels", numpy.int64)[:, 0].unique(return_inverse=True)[1]
    ends = read(folder, "A", numpy.int64) - 1
    of_edge = of_node[ends[:, 0]]
    graphs = []
    for graph in range(len(labels)):
        nodes = (of_node == graph).nonzero()[:, 0]
        own = ends[of_edge == graph] - nodes[0]
        graphs.append(Data(x=features[nodes], edge_index=own.T.contiguous()))
    return graphs, labels


class PaddedView:
    """Graphs of a batch as one, and where each node is once all have as many as the largest."""

    def __init__(self, graphs):
        batch = Batch.from_data_list(graphs)
        sizes = batch.ptr.diff()
        self.most = int(sizes.max())
        self.count = len(sizes)
        places = torch.arange(len(batch.batch)) - batch.ptr[batch.batch] + self.most * batch.batch
        mask = torch.arange(self.most) < sizes[:, None]
        # Padding has mass 0.
        logs = torch.where(mask, -sizes[:, None].float().log(), torch.tensor(-math.inf))
        tensors = batch.x, batch.edge_index, batch.batch, places, mask, logs, sizes[:, None, None].float()
        self.x, self.edge_index, self.objects, self.places, self.mask, self.log_mass, self.sizes = (
            tensor.to(DEVICE) for tensor in tensors
        )

    def pad(self, nodes):
        padded = nodes.new_zeros(self.count * self.most, nodes.shape[1])
        return padded.index_copy(0, self.places, nodes).view(self.count, self.most, -1)

    def take(self, padded):
        return padded.flatten(0, 1).index_select(0, self.places)


def plan_of(scaled, f, g):
    return (f[:, :, None] + g[:, None, :] - scaled).exp()


def iterate(scaled, log_a, log_b, f, g, relaxation):
    """Some iterations, for costs and potentials over epsilon; padding stays at -inf. Also the L1 error of the rows."""
    for _ in range(CHECK_EVERY):
        next_f = log_a - (g[:, None, :] - scaled).logsumexp(2)
        f = torch.where(log_a.isinf(), log_a, f + relaxation * (next_f - f))
        next_g = log_b - (f[:, :, None] - scaled).logsumexp(1)
        g = torch.where(log_b.isinf(), log_b, g + relaxation * (next_g - g))
    # As when the last one is not relaxed: then columns are exact, and the error is that of rows.
    g = torch.where(log_b.isinf(), log_b, log_b - (f[:, :, None] - scaled).logsumexp(1))
    rows = plan_of(scaled, f, g).detach().sum(2)
    return f, g, (rows - log_a.exp()).abs().sum(1)


def sinkhorn(costs, log_a, log_b):
    scaled = costs / EPSILON
    f = torch.where(log_a.isinf(), log_a, torch.zeros_like(log_a))
    g = torch.where(log_b.isinf(), log_b, torch.zeros_like(log_b))
    relaxation = torch.ones_like(f[:, :1])
    for _ in range(ITERATIONS // CHECK_EVERY):
        f, g, error = iterate(scaled, log_a, log_b, f, g, relaxation)
        if bool((error <= TOLERANCE).all()):
            break
        relaxation = torch.where(error[:, None] < 0.05, RELAXATION, 1.0)
    return plan_of(scaled, f, g)


class ImplicitPlan(torch.autograd.Function):
    """The plan of costs; backwards by the conditions that it fulfils, T1 = a and T'1 = b."""

    @staticmethod
    def forward(context, costs, log_a, log_b):
        plan = sinkhorn(costs, log_a, log_b)
        context.save_for_backward(plan)
        return plan

    @staticmethod
    def backward(context, dplan):
        (plan,) = context.saved_tensors
        weighted = plan * dplan
        rows, columns = plan.sum(2), plan.sum(1)
        isolated = lambda masses: torch.where(masses > 0, masses, torch.ones_like(masses)).diag_embed()
        upper = torch.cat([isolated(rows), plan], 2)
        lower = torch.cat([plan.transpose(1, 2), isolated(columns)], 2)
        # Potentials are determined but for a constant: this sets it, and changes nothing else.
        constant = torch.cat([(rows > 0).float(), -(columns > 0).float()], 1)
        system = torch.cat([upper, lower], 1) + constant[:, :, None] * constant[:, None, :] / constant.shape[1] ** 2
        sums = torch.cat([weighted.sum(2), weighted.sum(1)], 1)
        u, v = torch.linalg.solve(system, sums[:, :, None])[:, :, 0].split([rows.shape[1], columns.shape[1]], 1)
        return (plan * (u[:, :, None] + v[:, None, :]) - weighted) / EPSILON, None, None


class Layer(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        parts = nn.Sequential()
        parts.add_module("first", nn.Linear(inputs, width))
        parts.add_module("norm", nn.BatchNorm1d(width))
        parts.add_module("activation", nn.ReLU())
        parts.add_module("second", nn.Linear(width, width))
        self.convolution = GINConv(parts)
        self.norm_after = nn.BatchNorm1d(width)

    def forward(self, x, edge_index):
        return torch.relu(self.norm_after(self.convolution(x, edge_index)))


class Projection(nn.Linear):
    def __init__(self, inputs, width):
        super().__init__(inputs, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, x):
        return self.norm(super().forward(x)) / math.sqrt(2 * self.out_features)


class Combination(nn.Linear):
    def __init__(self, inputs, width):
        super().__init__(inputs, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return torch.relu(self.norm(super().forward(x)))


class AmoslFusion(nn.Module):
    """Of two views: each node learns what corresponds to it, and by how much that differs."""

    def __init__(self, inputs, width, gradient):
        super().__init__()
        self.projections = nn.ModuleList(Projection(each + width, width) for each in inputs)
        self.combinations = nn.ModuleList(Combination(3 * width, width) for _ in inputs)
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.plan = ImplicitPlan.apply if gradient == "implicit" else sinkhorn

    def forward(self, nodes, views):
        first, second = views
        points = [
            view.pad(projection(torch.cat([view.x, own], 1)))
            for view, own, projection in zip(views, nodes, self.projections)
        ]
        x, y = points
        costs = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.transpose(1, 2)
        plan = self.plan(costs, first.log_mass, second.log_mass)
        of_first, of_second = (view.pad(own) for view, own in zip(views, nodes))
        messages = [
            first.take(first.sizes * (plan @ of_second)),
            second.take(second.sizes * (plan.transpose(1, 2) @ of_first)),
        ]
        fused = [
            own + combination(torch.cat([own, message, (own - message).square()], 1))
            for own, message, combination in zip(nodes, messages, self.combinations)
        ]
        cost = (plan * costs).sum((1, 2)).mean()
        penalty = self.weight.sigmoid() * cost + STRENGTH * softplus(-self.weight)
        return fused, penalty.squeeze()


class Model(nn.Module):
    def __init__(self, inputs, classes, case):
        super().__init__()
        width = case["width"]
        self.encoders = nn.ModuleList(
            nn.ModuleList(Layer(each if layer == 0 else width, width) for layer in range(case["layers"]))
            for each in inputs
        )
        is_amosl = case["fusion"] == "amosl"
        self.fusion = AmoslFusion(inputs, width, case["gradient"]) if is_amosl else None
        self.head = nn.ModuleList([nn.Linear(len(inputs) * width, width), nn.Linear(width, classes)])
        self.dropout = nn.Dropout(case["headDropout"])

    def forward(self, views):
        nodes, penalty = [], 0.0
        for encoder, view in zip(self.encoders, views):
            x = view.x
            for layer in encoder:
                x = layer(x, view.edge_index)
            nodes.append(x)
        if self.fusion is not None:
            nodes, penalty = self.fusion(nodes, views)
        sums = [global_add_pool(own, view.objects, view.count) for own, view in zip(nodes, views)]
        hidden = torch.relu(self.head[0](torch.cat(sums, 1)))
        return self.head[1](self.dropout(hidden)), penalty


def begin_with(model, path):
    """Sets the values of a .safetensors file, whose matrices are [inputs, outputs]."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        content = file.read()
    for name, value in model.state_dict().items():
        if name.endswith((".eps", ".num_batches_tracked")):
            continue
        # Packhorse names no module for what GINConv has, nor one for a projection's norm.
        ours = name.replace(".convolution.nn.", ".").replace("running_var", "running_variance")
        if "projections" in ours:
            ours = ours.replace(".norm.", ".")
        entry = header[("state." if ".running_" in ours else "parameters.") + ours]
        begin, end = entry["data_offsets"]
        array = torch.from_numpy(numpy.frombuffer(content[begin:end], numpy.float32).reshape(entry["shape"]).copy())
        value.copy_((array.T if value.ndim == 2 else array).reshape(value.shape))


def main():
    case = json.loads(sys.argv[1])
    if case.get("compile"):
        global iterate
        iterate = torch.compile(iterate, dynamic=True)
    torch.manual_seed(1)
    random = numpy.random.default_rng(1)
    read_views = [read_view(folder) for folder in case["folders"]]
    graphs = [own for own, _ in read_views]
    labels = read_views[0][1]
    model = Model([own[0].x.shape[1] for own in graphs], int(labels.max()) + 1, case)
    begin_with(model, case["weights"])
    model.to(DEVICE)
    fused = {"fused": True} if DEVICE == "cuda" else {}
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **fused)
    milliseconds, losses = [], []
    for _ in range(case["epochs"]):
        order = random.permutation(case["objects"])
        batches = []
        for start in range(0, len(order), case["batch"]):
            objects = order[start : start + case["batch"]]
            batches.append(([PaddedView([own[i] for i in objects]) for own in graphs], labels[objects].to(DEVICE)))
        total = torch.zeros((), device=DEVICE)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for views, expected in batches:
            adam.zero_grad(set_to_none=True)
            logits, penalty = model(views)
            loss = cross_entropy(logits, expected)
            (loss + penalty).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
            adam.step()
            total += loss.detach() * len(expected)
        losses.append(total.item() / len(order))  # waits
        milliseconds.append(1e3 * (time.perf_counter() - begin))
    print(json.dumps({"milliseconds": milliseconds, "losses": losses}))


main()
