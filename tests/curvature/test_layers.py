"""Blocks of single layers, locally and by the engine, against dense float64 blocks; and that a local factor is not used where it is wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.curvature.layers import LayerBlocks, blocks, layers_of, survey
from fastsharp.curvature.rop import split
from fastsharp.curvature.rop.split import Split
from fastsharp.errors import UnusedParamWarning
from tests.cases import Residual, ViTBlock
from tests.curvature.explicit import KINDS
from tests.oracles.dense import dense_hessian
from tests.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = nn.CrossEntropyLoss()
SIZES = (4, 4, 3)
GATE = 1e-10  # of the block's norm, float64
LOCAL = {"dense", "jacobian", "sensitivity"}


class Tied(nn.Module):
    """The same weight at the entrance and, transposed, at the exit."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(6, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.mix(F.relu(self.embed(x)))) @ self.embed.weight[:, :3]


class Twice(nn.Module):
    """One layer on two halves of the input: used in parallel, so that the network is linear in it."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(F.relu(self.shared(x[:, :3])) + F.relu(self.shared(x[:, 3:])))


class Centred(nn.Module):
    """Features are centred over the batch: a sample's output depends on the others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.last(h - h.mean(0))


class Gated(nn.Module):
    """x w in two places of a product: bilinear, with one layer on both sides of it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h * h)


class Turned(nn.Module):
    """Time-major in between: the second dimension holds the samples."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.first(x.view(-1, 3, 2).transpose(0, 1)))
        return self.last(h.mean(0))


def conv_net():
    """Convolutions plain, grouped and strided, norms folded and not, pooling of both kinds, a one-dimensional tail."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, dilation=1, groups=2),
        nn.LeakyReLU(0.2),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 2),
        nn.Hardtanh(-0.5, 0.5),
        nn.Flatten(),
        nn.Linear(4 * 3, 3),
    )


def residual_norm():
    net = Residual()
    net.stem = nn.Sequential(net.stem, nn.BatchNorm2d(4))
    net.conv = nn.Sequential(net.conv, nn.BatchNorm2d(4))
    return net


NETS = {
    "relu": (lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU6(), nn.Linear(5, 3)), (6,)),
    "conv": (conv_net, (2, 9, 9)),
    "residual": (residual_norm, (2, 5, 5)),
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)), (6,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)), (6,)),
    "transformer": (ViTBlock, (3, 4)),
    "tied": (Tied, (6,)),
    "twice": (Twice, (6,)),
    "centred": (Centred, (6,)),
    "gated": (Gated, (6,)),
    "turned": (Turned, (6,)),
}
# layers whose Hessian block is its Gauss-Newton block, and what computes the others
LINEAR = {
    "relu": {"0", "2", "4"},
    "conv": {"0", "1", "3", "5", "8", "11"},
    "residual": {"stem.0", "stem.1", "conv.0", "conv.1", "head"},
    "gelu": {"2", "4"},
    "layer norm": {"1", "3"},
    "transformer": {"down", "head"},
    "tied": {"mix"},
    "twice": {"shared", "last"},
    "centred": {"last"},
    "gated": {"last"},
    "turned": {"last"},
}


def problem(name):
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().double().eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0.0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    x, y = torch.randn(sum(SIZES), *shape, dtype=torch.float64), torch.arange(sum(SIZES)) % 3
    return model, list(zip(x.split(SIZES), y.split(SIZES), strict=True))


def whole(kind, model, batches, loss=LOSS):
    """The dense matrix; of the Gauss-Newton kind by a dense Jacobian of each batch's outputs."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    n = sum(len(y) for _, y in batches)

    def objective(call, data):
        return sum(loss(call(x), y) * len(y) for x, y in data) / n

    if kind == "hessian":
        return dense_hessian(model, objective, batches), names
    params = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for x, y in batches:
        z = model(x)
        flat = z.reshape(-1)
        grads = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True, materialize_grads=True) for e in flat]
        J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
        L = torch.autograd.functional.hessian(lambda z, y=y: loss(z, y) * len(y) / n, z.detach()).reshape(len(flat), len(flat))
        total = total + J.T @ L @ J
    return total.detach(), names


def found(kind, model, batches, loss=LOSS, layers=None, reduction="auto", **options):
    """{layer: (dense block, route, reason)} and the positions of each layer's parameters."""
    matrix = KINDS[kind](model, batches, loss, reduction=reduction)
    chosen = layers_of(model, matrix.objective.selection, layers)
    out = {}
    with unchanged(model, *(t for batch in batches for t in batch)):
        for block in LayerBlocks(matrix, chosen, **options):
            n = block.layout.n
            A = (
                torch.zeros(n, n, dtype=torch.float64)
                if block.operator is None
                else block.operator.apply(torch.eye(n, dtype=torch.float64))
            )
            out[block.layer.name] = (A.detach(), block.route, block.reason, block.trace)
    assert out.keys() == {layer.name for layer in chosen}
    return out, {layer.name: layer.params for layer in chosen}


def check(kind, model, batches, loss=LOSS, **options):
    H, names = whole(kind, model, batches, loss)
    sizes = dict(model.named_parameters())
    place, start = {}, 0
    for name in names:
        place[name] = torch.arange(start, start + sizes[name].numel())
        start += sizes[name].numel()
    got, params = found(kind, model, batches, loss, **options)
    for layer, (A, route, reason, trace) in got.items():
        rows = torch.cat([place[name] for name in params[layer]])
        want = H[rows][:, rows]
        assert float((A - want).norm()) <= GATE * max(float(want.norm()), 1e-3), (layer, route, reason)
        if trace is not None:
            assert trace == pytest.approx(float(want.trace()), rel=GATE, abs=1e-12), (layer, route)
        assert (reason == "") == (route in LOCAL | {"none"}), (layer, route, reason)
    return {layer: (route, reason) for layer, (_, route, reason, _) in got.items()}


@pytest.mark.parametrize("name", NETS)
def test_hessian_blocks_are_those_of_the_dense_hessian(name):
    model, batches = problem(name)
    routes = check("hessian", model, batches)
    assert {layer for layer, (route, _) in routes.items() if route in LOCAL} == LINEAR[name]


@pytest.mark.parametrize("name", NETS)
def test_gauss_newton_blocks_are_those_of_dense_jacobians(name):
    """Local for any network whose samples stay apart, smooth or not."""
    model, batches = problem(name)
    routes = check("ggn", model, batches)
    by_engine = {layer for layer, (route, _) in routes.items() if route not in LOCAL}
    assert by_engine == {"tied": {"embed"}, "centred": {"first"}, "turned": {"first"}}.get(name, set())


@pytest.mark.parametrize("form", sorted(LOCAL))
@pytest.mark.parametrize("name", ["relu", "residual"])
def test_every_form_is_the_same_block(form, name, monkeypatch):
    monkeypatch.setattr(survey, "_forms", lambda *args: ((form, 1),))
    model, batches = problem(name)
    assert {route for route, _ in check("hessian", model, batches).values()} == {form}


def saddle(z, y):
    """Indefinite in the output, and different for each sample."""
    return (z[:, 0] ** 3 - z[:, 1] ** 2 + z[:, 0] * z[:, 2] + 0.1 * y * z[:, 2] ** 2).mean()


LOSSES = {
    "saddle": saddle,
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z)),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z)),
    "linear": lambda z, y: (z * F.one_hot(y, 3)).sum(1).mean(),
}


@pytest.mark.parametrize("form", sorted(LOCAL))
@pytest.mark.parametrize("loss", LOSSES)
def test_other_losses(loss, form, monkeypatch):
    monkeypatch.setattr(survey, "_forms", lambda *args: ((form, 1),))
    model, batches = problem("relu")
    routes = check("hessian", model, batches, LOSSES[loss])
    assert {route for route, _ in routes.values()} == ({form} if loss != "linear" else {"engine"})


def test_a_loss_in_which_samples_meet_is_left_to_the_engine():
    model, batches = problem("relu")
    routes = check("hessian", model, batches, lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))), reduction="mean")
    assert {reason for _, reason in routes.values()} == {"samples meet in the loss"}


def test_many_outputs_are_left_to_the_engine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 25)).double()
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.arange(5))]
    routes = check("hessian", model, batches)
    assert all("25 outputs a sample" in reason for _, reason in routes.values())


def test_a_loss_of_a_whole_batch_has_no_output_to_split_at():
    model, batches = problem("relu")
    loss = fastsharp.batch_loss(lambda model, batch: (F.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])))
    got, _ = found("hessian", model, batches, loss)
    assert {route for _, route, _, _ in got.values()} == {"engine"}
    assert all("no output is known" in reason for _, _, reason, _ in got.values())


def test_a_tight_budget_takes_the_layers_in_groups_and_changes_no_bit(monkeypatch):
    model, batches = problem("residual")
    monkeypatch.setattr(survey, "_forms", lambda n, rows, d, by_sample, size: (("jacobian", size * rows * n),))
    passes = []
    original = LayerBlocks._pass
    monkeypatch.setattr(LayerBlocks, "_pass", lambda self, *args: (passes.append(1), original(self, *args))[1])
    plenty, _ = found("hessian", model, batches)
    assert len(passes) == 1
    monkeypatch.setattr(fastsharp.Hessian, "release", squeeze(40_000))
    tight, _ = found("hessian", model, batches)
    assert 1 < len(passes) - 1 < 5
    assert all(torch.equal(tight[name][0], plenty[name][0]) for name in plenty)


def test_a_factor_beyond_the_budget_is_left_to_the_engine(monkeypatch):
    monkeypatch.setattr(fastsharp.Hessian, "release", squeeze(3_000))
    model, batches = problem("residual")
    routes = check("hessian", model, batches)
    assert routes["conv.0"] == ("engine", "its factor exceeds the memory budget")
    assert routes["stem.1"][0] in LOCAL


def squeeze(size):
    """`release` of an operator that leaves its objective a budget of so many bytes."""

    def release(self):
        self._reset()
        self.objective._graph_budget = size

    return release


# --- a local factor that is wrong gives no number --------------------------------------------------------------------------


def test_a_wrong_adjoint_of_the_output_is_noticed(monkeypatch):
    original = Split.pull
    monkeypatch.setattr(
        Split, "pull", lambda self, g, wanted: ((s, None if t is None else 1.001 * t) for s, t in original(self, g, wanted))
    )
    model, batches = problem("residual")
    routes = check("hessian", model, batches)
    assert {route for route, _ in routes.values()} == {"engine"}
    assert all("misses the engine's adjoint" in reason for _, reason in routes.values())


def test_a_wrong_gradient_of_a_sample_is_noticed(monkeypatch):
    original = split.sample_gradients
    monkeypatch.setattr(split, "sample_gradients", lambda part, g, n: [None if t is None else t.flip(1) for t in original(part, g, n)])
    monkeypatch.setattr(survey, "_forms", lambda *args: (("jacobian", 1),))
    model, batches = problem("relu")
    assert {route for route, _ in check("hessian", model, batches).values()} == {"engine"}


def test_a_bend_that_is_overlooked_is_noticed_by_products(monkeypatch):
    monkeypatch.setattr(split, "bends", lambda part, on: False)
    for name in ("gelu", "layer norm", "tied", "gated"):
        model, batches = problem(name)
        routes = check("hessian", model, batches)
        assert {layer for layer, (route, _) in routes.items() if route in LOCAL} == LINEAR[name], name


def test_a_wrong_root_of_the_loss_is_noticed(monkeypatch):
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda H: (original(H)[0] * 1.01, original(H)[1]))
    model, batches = problem("relu")
    routes = check("hessian", model, batches)
    assert {reason for _, reason in routes.values()} == {"samples meet in the loss"}


# --- parameters without a path, frozen and grouped ones --------------------------------------------------------------------


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(6, 5), nn.Linear(2, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


@pytest.mark.parametrize("local", [True, False])
def test_a_layer_without_a_path_has_a_zero_block(local):
    torch.manual_seed(0)
    model = Partly().double()
    batches = problem("relu")[1]
    with pytest.warns(UnusedParamWarning, match=r"spare\.weight"):
        routes = check("hessian", model, batches, local=local)
    assert routes["spare"] == ("none", "")


def test_groups_of_parameters_and_whole_containers():
    """A convolution together with its norm multiplies itself: not linear, though each of them is. In all biases at once the network is."""
    model, batches = problem("residual")
    routes = check("hessian", model, batches, layers=["stem", "conv.*", "head"])
    assert routes.keys() == {"stem", "conv.0", "conv.1", "head"}
    assert routes["stem"][0] == "engine" and routes["conv.0"][0] in LOCAL
    routes = check("hessian", model, batches, layers={"weights": "*.weight", "rest": "*.bias"})
    assert routes["weights"][0] == "engine" and routes["rest"][0] in LOCAL


class Changing(nn.Module):
    """Another network for batches of three samples; and a table of positions that belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(6, 5), nn.Linear(2, 5), nn.Linear(5, 3)
        self.register_buffer("places", torch.linspace(-1.0, 1.0, 8).view(4, 2))

    def forward(self, x):
        h = self.first(x)
        h = F.relu(h) if len(x) != 3 else h * h
        return self.last(F.relu(h + self.table(self.places).sum(0)))


class Rigid(nn.Module):
    """Takes batches of eleven samples alone."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(F.relu(self.first(x.view(11, 6))))


def test_a_model_of_one_batch_size():
    torch.manual_seed(0)
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.arange(11) % 3
    routes = check("hessian", Rigid().double(), [(x, y)])
    assert all(route in LOCAL for route, _ in routes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_take_another_way(kind):
    torch.manual_seed(0)
    routes = check(kind, Changing().double(), problem("relu")[1])
    assert routes["last"][0] in LOCAL
    assert routes["table"][0] == "engine"
    if kind == "hessian":
        assert routes["first"] == ("engine", "other batches take another way through the network")


def test_frozen_statistics():
    model, batches = problem("residual")
    model[0].train() if isinstance(model, nn.Sequential) else model.stem[1].train()
    matrix = fastsharp.Hessian(model, batches, LOSS, bn="frozen-batch-stats")
    dense = matrix.apply(torch.eye(matrix.n, dtype=torch.float64))
    layers = layers_of(model, matrix.objective.selection)
    for block in LayerBlocks(matrix, layers):
        rows = torch.cat([torch.arange(a, b) for name, a, b in places(matrix) if name in block.layer.params])
        A = block.operator.apply(torch.eye(len(rows), dtype=torch.float64))
        assert float((A - dense[rows][:, rows]).norm()) <= GATE * float(dense[rows][:, rows].norm()), block.layer.name
        assert block.route in LOCAL


def places(matrix):
    return zip(matrix.layout.names, matrix.layout.offsets, matrix.layout.offsets[1:], strict=False)


def test_blocks_go_stale_with_the_weights():
    model, batches = problem("relu")
    matrix = fastsharp.Hessian(model, batches, LOSS)
    block = next(iter(LayerBlocks(matrix, layers_of(model, matrix.objective.selection))))
    assert isinstance(block.operator, blocks.LocalBlock)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(fastsharp.errors.StaleOperatorError, match=r"0\.weight"):
        block.operator.apply(torch.zeros(1, block.layout.n, dtype=torch.float64))
