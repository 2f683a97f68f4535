"""Sharpness by perturbation against its definitions in float64, closed forms, and the published estimator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import ArgumentTypeError, InputError, Interrupted, ModelModeError, NondeterministicOperatorError, NonFiniteError
from tests.cases import net
from tests.oracles.perturbation import changes, largest_on_ball, published_sam, standard_normals
from tests.unchanged import unchanged

NETS = ("mlp_tanh", "cnn_residual", "vit_block", "lstm", "tied_language_model", "regression", "hf_style", "two_inputs")


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETS)
def test_sam_is_its_definition(name: str, dtype: torch.dtype) -> None:
    case = net(name, dtype)
    result = fastsharp.sharpness(case.model, case.batches, case.loss_fn, rho=0.05, directions=12, seed=3)
    theta = flat(case.model)
    delta = 0.05 * standard_normals(len(theta), 12, 3).to(dtype) / len(theta) ** 0.5
    exact = changes(case.model, case.objective, case.whole, delta)
    # a loss is known to a few eps, a change is the difference of two
    room = 64 * torch.finfo(dtype).eps
    assert (result.changes - exact).abs().max() <= room
    assert float(result) == pytest.approx(float(exact.abs().mean() / 0.05), abs=room / 0.05)
    assert result.signed == pytest.approx(float(exact.mean()), abs=room)


@pytest.mark.parametrize("scale", ["none", "adaptive", "layer", "filter"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_average_is_its_definition(scale: str, norm: str) -> None:
    case = net("mlp_tanh")
    if norm == "linf" and scale in ("layer", "filter"):
        with pytest.raises(InputError, match="norm='linf' with scale"):
            fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind="average", norm=norm, scale=scale)
        return
    result = fastsharp.sharpness(
        case.model, case.batches, case.loss_fn, kind="average", rho=0.1, directions=8, norm=norm, scale=scale, seed=5
    )
    theta = flat(case.model)
    if norm == "linf":
        g = torch.Generator().manual_seed(5)
        z = torch.stack([2 * torch.rand(len(theta), generator=g).double() - 1 for _ in range(8)])
    else:
        z = standard_normals(len(theta), 8, 5).double()
    exact = changes(case.model, case.objective, case.whole, 0.1 * literally_scaled(case.model, z, scale))
    assert (result.changes - exact).abs().max() <= 64 * torch.finfo(torch.float64).eps
    assert float(result) == pytest.approx(float(exact.mean()), abs=1e-14)


def literally_scaled(model: nn.Module, z: torch.Tensor, scale: str) -> torch.Tensor:
    """The perturbation of each parameter by its own loop."""
    rows = []
    for vector in z:
        at, parts = 0, []
        modules: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, p in model.named_parameters():
            part = vector[at : at + p.numel()].view_as(p)
            modules.setdefault(name.split(".")[0], []).append((p.detach(), part))
            at += p.numel()
        for pairs in modules.values():
            weight = math.sqrt(sum(float(p.square().sum()) for p, _ in pairs))
            length = math.sqrt(sum(float(part.square().sum()) for _, part in pairs))
            for p, part in pairs:
                if scale == "none":
                    parts.append(part)
                elif scale == "adaptive":
                    parts.append(p.abs() * part)
                elif scale == "layer":
                    parts.append(part * weight / length)
                elif p.ndim < 2:
                    parts.append(torch.zeros_like(p))
                else:
                    parts.append(torch.stack([d * w.norm() / d.norm() for d, w in zip(part, p, strict=True)]))
        rows.append(torch.cat([p.reshape(-1) for p in parts]))
    return torch.stack(rows)


def test_at_a_minimum_the_mean_change_is_the_trace() -> None:
    model, (x, y), A, _ = least_squares()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    rho, n = 0.3, len(A)
    result = fastsharp.sharpness(model, [(x, y)], F.mse_loss, rho=rho, directions=4000)
    exact = rho**2 * float(torch.trace(A)) / (2 * n)
    stderr = float(result.changes.std()) / 4000**0.5
    assert abs(result.signed - exact) <= 4 * stderr <= 0.1 * exact
    assert float(result) == pytest.approx(result.signed / rho)  # no change is negative


def least_squares(features: int = 6, samples: int = 40) -> tuple[nn.Module, Any, torch.Tensor, torch.Tensor]:
    """A linear model of squared error: its loss is the quadratic d'Ad / 2 + b'd around the weights."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, features, generator=g).double(), torch.randn(samples, 1, generator=g).double()
    model = nn.Linear(features, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, features, generator=g))
    b = 2 * x.T @ (x @ model.weight.detach().T - y)[:, 0] / samples
    return model, (x, y), 2 * x.T @ x / samples, b


@pytest.mark.parametrize("scale", ["none", "adaptive", "layer"])
@pytest.mark.parametrize("rho", [0.05, 0.7])
def test_worst_of_a_quadratic_is_the_trust_region_maximum(rho: float, scale: str) -> None:
    model, batch, A, b = least_squares()
    w = model.weight.detach()[0]
    D = {"none": torch.ones_like(w), "adaptive": w.abs(), "layer": w.norm().expand_as(w)}[scale]
    result = fastsharp.sharpness(model, [batch], F.mse_loss, kind="worst", rho=rho, steps=60, scale=scale)
    exact = largest_on_ball(D[:, None] * A * D, D * b, rho)
    assert exact * (1 - 1e-3) <= float(result) <= exact * (1 + 1e-12)
    assert any("lower bound" in note for note in result.notes)


def test_a_maximum_inside_the_ball_is_found_there() -> None:
    model, (x, y), A, b = least_squares()
    top = torch.linalg.solve(A, -b)
    result = fastsharp.sharpness(
        model, [(x, y)], lambda f, t: -F.mse_loss(f, t), reduction="mean", kind="worst", rho=1.5 * float(top.norm()), steps=400
    )
    exact = float(-(top @ A @ top) / 2 - b @ top)
    assert exact * (1 - 1e-2) <= float(result) <= exact * (1 + 1e-12)


def test_worst_in_the_box_is_at_a_corner() -> None:
    model, batch, A, b = least_squares(4)
    rho = 0.3
    corners = torch.cartesian_prod(*[torch.tensor([-rho, rho], dtype=torch.float64)] * 4)
    exact = float((torch.einsum("ki,ij,kj->k", corners, A, corners) / 2 + corners @ b).max())
    result = fastsharp.sharpness(model, [batch], F.mse_loss, kind="worst", norm="linf", rho=rho, steps=40)
    assert float(result) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("scale", ["none", "adaptive", "layer", "filter"])
def test_worst_stays_in_its_ball_and_beats_random_points_of_it(scale: str) -> None:
    case = net("mlp_relu")
    options: dict[str, Any] = {"rho": 0.2, "scale": scale, "seed": 1}
    worst = fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind="worst", steps=30, **options)
    step = fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind="ascent", **options)
    assert float(worst) >= float(step) > 0
    theta = flat(case.model)
    z = literally_scaled(case.model, standard_normals(len(theta), 50, 9).double(), scale)
    if scale in ("none", "adaptive"):
        u = z / theta.abs() if scale == "adaptive" else z
        z = z / u.norm(dim=1, keepdim=True)
    assert float(worst) > float(changes(case.model, case.objective, case.whole, 0.2 * z).max())


def test_ascent_is_one_step_along_the_gradient() -> None:
    case = net("mlp_tanh")
    result = fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind="ascent", rho=0.1)
    grads = torch.autograd.grad(case.objective(case.model, case.whole), list(case.model.parameters()))
    g = torch.cat([p.reshape(-1) for p in grads])
    exact = changes(case.model, case.objective, case.whole, (0.1 * g / g.norm())[None])
    assert float(result) == pytest.approx(float(exact[0]), rel=1e-10)


def test_m_sharpness_is_the_mean_of_the_parts_maxima() -> None:
    case = net("mlp_tanh")
    result = fastsharp.sharpness(case.model, [case.whole], case.loss_fn, kind="ascent", rho=0.1, m=4)
    x, y = case.whole
    pieces = [(x[i : i + 4], y[i : i + 4]) for i in range(0, len(x), 4)]
    each = [float(fastsharp.sharpness(case.model, [piece], case.loss_fn, kind="ascent", rho=0.1)) for piece in pieces]
    sizes = [len(piece[1]) for piece in pieces]
    mean = sum(e * s for e, s in zip(each, sizes, strict=True)) / sum(sizes)
    assert float(result) == pytest.approx(mean, rel=1e-12)
    assert result.samples == len(pieces) and result.stderr > 0
    whole = fastsharp.sharpness(case.model, [case.whole], case.loss_fn, kind="ascent", rho=0.1)
    assert float(result) > float(whole)  # Jensen: parts have maxima of their own


@pytest.mark.parametrize("kind", ["sam", "average", "worst", "ascent"])
def test_the_cut_into_batches_does_not_matter(kind: str) -> None:
    case = net("tied_language_model")  # ignored labels, unevenly spread
    many = fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind=kind, rho=0.1)
    one = fastsharp.sharpness(case.model, [case.whole], case.loss_fn, kind=kind, rho=0.1)
    assert float(many) == pytest.approx(float(one), rel=1e-9)


def test_normalised_logits_do_not_see_their_scale() -> None:
    case = net("mlp_tanh")
    head = case.model[-1]

    def value(**options: Any) -> float:
        return float(fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind="sam", rho=0.01, scale="layer", **options))

    before, plain = value(normalize_logits=True), value()
    with torch.no_grad():
        head.weight.mul_(3.0), head.bias.mul_(3.0)
    assert value(normalize_logits=True) == pytest.approx(before, rel=1e-9)
    assert abs(value() / plain - 1) > 0.1


def test_adaptive_survives_a_rescaling_of_layers_and_isotropic_does_not() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
    data = [(net("mlp_relu").whole[0], net("mlp_relu").whole[1])]

    def value(scale: str) -> float:
        return float(fastsharp.sharpness(model, data, nn.CrossEntropyLoss(), kind="average", rho=0.05, scale=scale))

    before = {scale: value(scale) for scale in ("none", "adaptive", "layer", "filter")}
    with torch.no_grad():
        model[0].weight.mul_(5.0), model[2].weight.div_(5.0)
    for scale in ("adaptive", "layer", "filter"):
        assert value(scale) == pytest.approx(before[scale], rel=1e-9)
    assert abs(value("none") / before["none"] - 1) > 0.1


def test_stacked_and_single_evaluations_agree() -> None:
    from fastsharp.measures.landscape import Landscape
    from fastsharp.objective import Objective

    case = net("vit_block")
    land = Landscape(Objective(case.model, case.batches, case.loss_fn))
    deltas = 0.1 * standard_normals(len(land.theta), 5, 0).double()
    assert land.stacked
    together = land.changes(deltas)
    assert land.stacked
    land.stacked = False
    assert (land.changes(deltas) - together).abs().max() <= 1e-14


def test_a_model_that_cannot_be_stacked_is_evaluated_one_by_one() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.net(x)
            return out if float(out.detach().sum()) > 1e9 else out * 2

    case = net("mlp_tanh", torch.float32)
    result = fastsharp.sharpness(Asks(), case.batches, case.loss_fn, directions=6)
    assert result.settings["stacked"] is False and float(result) > 0


def test_paired_data_lower_the_noise_floor_a_hundredfold() -> None:
    """On a perfectly flat landscape the published estimator prints the noise of the shuffle, ours only rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(600, 6), torch.randint(3, (600,))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=256, shuffle=True)
    n = sum(p.numel() for p in model.parameters())
    still = torch.zeros(20, n)
    published = published_sam(model, loader, nn.CrossEntropyLoss(), still, 0.005)
    result = fastsharp.sharpness(model, loader, nn.CrossEntropyLoss(), rho=0.005)
    assert 0 < result.noise_floor < published / 100


def test_intervals_cover_the_mean_over_all_directions() -> None:
    case = net("mlp_tanh", torch.float32)
    exact = float(fastsharp.sharpness(case.model, [case.whole], case.loss_fn, rho=0.05, directions=20_000, seed=10**6))
    hits = 0
    for seed in range(200):
        low, high = fastsharp.sharpness(case.model, [case.whole], case.loss_fn, rho=0.05, directions=40, seed=seed).interval
        hits += low <= exact <= high
    assert 180 <= hits <= 198


def test_nothing_of_the_model_changes() -> None:
    case = net("cnn_batchnorm_eval", torch.float32)
    for kind in ("sam", "worst"):
        with unchanged(case.model):
            fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind=kind, directions=6, steps=2) if kind == "worst" else (
                fastsharp.sharpness(case.model, case.batches, case.loss_fn, kind=kind, directions=6)
            )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rho": 0.0}, "rho=0.0"),
        ({"rho": -1.0}, "rho=-1.0"),
        ({"rho": math.inf}, "rho=inf"),
        ({"rho": "a"}, "rho='a'"),
        ({"kind": "best"}, "kind='best'"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"scale": "neuron"}, "scale='neuron'"),
        ({"directions": 1}, "directions=1"),
        ({"directions": 2.5}, "directions=2.5"),
        ({"kind": "worst", "m": 0}, "m=0"),
        ({"kind": "worst", "steps": 0}, "steps=0"),
        ({"m": 4}, "m= is the size"),
        ({"norm": "linf"}, "kind='sam' moves"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"steps": 3}, "steps= belongs"),
    ],
)
def test_arguments_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    case = net("mlp_tanh")
    with pytest.raises(InputError, match=named):
        fastsharp.sharpness(case.model, case.batches, case.loss_fn, **options)


def test_other_bad_input() -> None:
    case = net("mlp_tanh")
    with pytest.raises(ArgumentTypeError, match="Tensor"):
        fastsharp.sharpness(torch.eye(3), case.batches)
    with pytest.raises(InputError, match="needs data"):
        fastsharp.sharpness(case.model, None)
    regression = net("regression")
    with pytest.raises(InputError, match="normalize_logits"):
        fastsharp.sharpness(regression.model, regression.batches, regression.loss_fn, normalize_logits=True)
    with pytest.raises(ModelModeError, match="Dropout"):
        fastsharp.sharpness(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).double(), case.batches, case.loss_fn)
    with pytest.raises(NonFiniteError, match="rho"):
        fastsharp.sharpness(nn.Linear(6, 3), net("mlp_tanh", torch.float32).batches, F.cross_entropy, rho=1e38)


def test_a_random_model_is_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    with pytest.raises(NondeterministicOperatorError, match="random"):
        fastsharp.sharpness(Noisy(6, 3), net("mlp_tanh", torch.float32).batches, F.cross_entropy)


def test_ctrl_c_keeps_the_directions_so_far() -> None:
    class Stops(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Stops.calls += 1
            if Stops.calls > 400:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Stops(6, 300), nn.Conv1d(300, 3, 1), nn.Flatten()).double()  # a convolution: one direction after another
    data = [(net("mlp_tanh").whole[0], net("mlp_tanh").whole[1])]

    class Lifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net[2](self.net[1](self.net[0](x)[..., None]))

    with pytest.raises(Interrupted) as caught:
        fastsharp.sharpness(Lifted(), data, nn.CrossEntropyLoss(), directions=5000)
    partial = caught.value.partial
    assert partial is not None and 32 <= partial.samples < 400 and math.isfinite(float(partial))
