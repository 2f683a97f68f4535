"""The example of hessian-eigenthings runs with its imports changed; products and values are the library's; the rest is refused by name."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
import fastsharp.compat.hessian_eigenthings as ours
from fastsharp.errors import DeviceError, InputError, ModelModeError, NotConvergedWarning, NotSymmetricError, ShapeError
from tests.compat.scripts import changed_lines, run
from tests.oracles.dense import dense_hessian
from tests.oracles.matrices import orthogonal

OURS = "fastsharp.compat.hessian_eigenthings"
SCRIPT = "script_eigenthings.py"
EVEN = [(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)), torch.arange(6) % 3) for s in range(3)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip("hessian_eigenthings", reason="hessian-eigenthings is not installed")


def matrix(n: int = 90) -> torch.Tensor:
    Q = torch.from_numpy(orthogonal(n))
    d = torch.cat([torch.tensor([9.0, -7.0, 5.0, 3.0]), torch.linspace(-1, 1, n - 4)]).double()
    return (Q * d) @ Q.T


def operator(A: torch.Tensor) -> Any:
    return ours.LambdaOperator(lambda v: A @ v, len(A), dtype=A.dtype)


# --- the example --------------------------------------------------------------------------------------------------------


def test_the_example_runs_with_its_imports_changed() -> None:
    found = run(SCRIPT, package=OURS)
    assert changed_lines(SCRIPT, "hessian_eigenthings", OURS) == 3  # its three imports
    assert found["converged"] == [True] * 3 and found["vectors"] == [3, 65]
    assert found["integral"] == pytest.approx(1.0, abs=1e-4)
    assert (found["runs"], found["points"], found["samples"]) == ([4, 20], 10000, 20)


def test_the_example_gives_what_hessian_eigenthings_gives(theirs: Any) -> None:
    a, b = run(SCRIPT, package=OURS), run(SCRIPT)
    assert a["eigenvalues"] == pytest.approx(b["eigenvalues"], rel=1e-7)
    assert {k: a[k] for k in ("vectors", "runs", "points", "samples")} == {k: b[k] for k in ("vectors", "runs", "points", "samples")}


# --- operators ----------------------------------------------------------------------------------------------------------


def criteria(lib: Any) -> dict[str, Any]:
    """A loss that the shim sees through, and one that it does not."""
    return {"supervised": lib.supervised_loss(F.cross_entropy), "own": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])}


@pytest.mark.parametrize("loss", ["supervised", "own"])
@pytest.mark.parametrize("num_batches", [None, 2])
def test_hessian_products_are_the_librarys(theirs: Any, loss: str, num_batches: int | None) -> None:
    model, v = net(), torch.randn(43, dtype=torch.float64)
    for params in (None, ("match_names", "0.*"), ("match_regex", r"weight$")):
        a, b = (
            lib.HessianOperator(
                model, EVEN, criteria(lib)[loss], num_batches=num_batches, param_filter=params and getattr(lib, params[0])(params[1])
            )
            for lib in (ours, theirs)
        )
        assert (a.size, a.dtype, a.device) == (b.size, b.dtype, b.device)
        product = b.matvec(v[: b.size]).detach()
        for mine in (a.matvec(v[: a.size]), a @ v[: a.size], a(v[: a.size]), a.rmatvec(v[: a.size])):
            assert float((mine - product).norm()) <= 1e-13 * float(product.norm())


@pytest.mark.parametrize("native", [True, False])
def test_ggn_products_are_the_librarys(theirs: Any, native: bool) -> None:
    model, v = net(), torch.randn(25, dtype=torch.float64)

    def made(lib: Any) -> Any:
        forward = lib.supervised_forward if native else (lambda model, batch: model(batch[0]))
        loss = lib.supervised_loss_of_output(F.cross_entropy) if native else (lambda out, batch: F.cross_entropy(out, batch[1]))
        return lib.GGNOperator(model, EVEN, forward, loss, param_filter=lib.match_names("0.*"), num_batches=2)

    a, b = made(ours), made(theirs)
    assert a.size == b.size == 25
    product = b.matvec(v).detach()
    assert float((a.matvec(v) - product).norm()) <= 1e-13 * float(product.norm())


def test_uneven_batches_weigh_as_many_examples_as_they_hold() -> None:
    """hessian-eigenthings gives each batch the same weight, so that the matrix depends on the batch size."""
    model, (x, y) = net(), EVEN[0]
    H = dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), (x, y))
    v = torch.randn(len(H), dtype=torch.float64)
    for loss in criteria(ours).values():
        uneven = ours.HessianOperator(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
        assert float((uneven @ v - H @ v).norm()) <= 1e-12 * float((H @ v).norm())


def test_products_follow_the_weights() -> None:
    model = net()
    a = ours.HessianOperator(model, EVEN, ours.supervised_loss(F.cross_entropy))
    v = torch.randn(a.size, dtype=torch.float64)
    before = a @ v
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    fresh = ours.HessianOperator(model, EVEN, ours.supervised_loss(F.cross_entropy))
    assert torch.allclose(a @ v, fresh @ v, rtol=1e-12) and not torch.allclose(a @ v, before)
    assert float(ours.lanczos(a, k=1).eigenvalues[0]) == pytest.approx(float(ours.lanczos(fresh, k=1).eigenvalues[0]))


class Own(ours.CurvatureOperator):
    """An operator of the caller's."""

    size, device, dtype = 90, torch.device("cpu"), torch.float64  # type: ignore[assignment]

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return matrix() @ v


def test_own_operators_are_served() -> None:
    exact = torch.linalg.eigvalsh(matrix())
    for op in (Own(), operator(matrix()), fastsharp.DenseOperator(matrix())):
        assert ours.lanczos(op, k=2, which="LA", tol=1e-8).eigenvalues.tolist() == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-7)


# --- algorithms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "expected"), [("LM", [9.0, -7.0, 5.0]), ("LA", [9.0, 5.0, 3.0]), ("SA", [-7.0, -1.0, -0.976])])
def test_lanczos(theirs: Any, which: str, expected: list[float]) -> None:
    A = matrix()
    found = ours.lanczos(operator(A), k=3, which=which, tol=1e-9, max_iter=90)
    library = theirs.lanczos(theirs.LambdaOperator(lambda v: A @ v, 90, dtype=A.dtype), k=3, which=which, max_iter=90, reorthogonalize=True)
    assert found.eigenvalues.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.eigenvalues.tolist() == pytest.approx(library.eigenvalues.tolist(), rel=1e-8)
    assert vars(found).keys() == vars(library).keys()
    assert all(
        getattr(found, name).dtype == getattr(library, name).dtype for name in ("eigenvalues", "eigenvectors", "residuals", "converged")
    )
    for value, v, residual in zip(found.eigenvalues, found.eigenvectors, found.residuals, strict=True):
        assert float((A @ v - value * v).norm()) == pytest.approx(float(residual), abs=1e-12)
        assert float(residual) <= 1e-9 * abs(float(value))


def test_power_iterations() -> None:
    A = matrix()
    found = ours.deflated_power_iteration(operator(A), k=2, tol=1e-6)
    assert found.eigenvalues.tolist() == pytest.approx([9.0, -7.0], rel=1e-6) and found.converged.all()
    value, v, residual, products, converged = ours.power_iteration_one(operator(A), tol=1e-6, init=A[0])
    assert value == pytest.approx(9.0, rel=1e-6) and float((A @ v - 9 * v).norm()) <= 1e-5
    assert (converged, residual <= 9e-6, products < 40) == (True, True, True)
    eigenvector = torch.from_numpy(orthogonal(90))[:, 0].contiguous()
    with pytest.warns(NotConvergedWarning):
        assert ours.power_iteration_one(operator(A), max_iter=1, init=eigenvector)[0] > 8.5  # a share of it is random
        assert ours.power_iteration_one(operator(A), max_iter=1)[0] < 8.0
        assert not ours.power_iteration_one(operator(A), max_iter=2)[4]


def test_traces() -> None:
    A = matrix()
    exact, off = float(A.trace()), A - A.diagonal().diag()
    for m in (64, 65):
        found = ours.hutchinson(operator(A), num_samples=m, seed=3)
        assert len(found.samples) == m and found.estimate == pytest.approx(float(found.samples.mean()))
        assert found.stderr == pytest.approx(float(found.samples.std()) / math.sqrt(m))
        assert abs(found.estimate - exact) < 4.5 * math.sqrt(2 * float(off.square().sum()) / m)
    gaussian = ours.trace(operator(A), num_matvecs=64, method="hutchinson", distribution="gaussian")
    assert abs(gaussian.estimate - exact) < 4.5 * math.sqrt(2 * float(A.square().sum()) / 64)
    with pytest.raises(NotSymmetricError):
        ours.hutchinson(operator(A.tril()))
    assert math.isnan(ours.hutchinson(operator(A), num_samples=1).stderr)


def test_hutch_plus_plus_is_exact_for_a_rank_that_its_sketch_holds() -> None:
    U = torch.from_numpy(orthogonal(90))[:, :20]
    A = (U * torch.linspace(-3, 5, 20, dtype=torch.float64)) @ U.T
    found = ours.trace(operator(A), num_matvecs=75)
    assert found.estimate == pytest.approx(float(A.trace()), abs=1e-10) and found.stderr < 1e-10 and len(found.samples) == 25
    full = ours.hutch_plus_plus(operator(matrix()), num_matvecs=60)
    assert abs(full.estimate - float(matrix().trace())) < 5 * full.stderr
    assert ours.hutch_plus_plus(operator(1e200 * matrix()), num_matvecs=60).estimate == pytest.approx(1e200 * full.estimate)


def test_hutch_plus_plus_is_unbiased() -> None:
    """The probes of the rest are others than those of the sketch: 200 seeds, 4.5 standard errors."""
    A = matrix(30)
    found = torch.tensor([ours.hutch_plus_plus(operator(A), num_matvecs=12, seed=s).estimate for s in range(200)])
    assert abs(float(found.mean() - A.trace())) < 4.5 * float(found.std()) / math.sqrt(200)


def test_density() -> None:
    A = matrix()
    found = ours.spectral_density(operator(A), num_runs=3, lanczos_steps=30, num_grid_points=4001)
    assert found.raw_eigenvalues.shape == found.raw_weights.shape == (3, 30) and found.grid.shape == (4001,)
    assert found.raw_weights.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-6)
    assert found.sigma == pytest.approx(16 / 30, rel=1e-6)
    one = ours.spectral_density(operator(A), num_runs=1, lanczos_steps=30, num_grid_points=10, sigma=0.25)
    assert torch.allclose(found.raw_eigenvalues[0], one.raw_eigenvalues[0]) and one.sigma == 0.25
    own = sum(w * torch.exp(-(((one.grid - x) / 0.25) ** 2) / 2) for x, w in zip(one.raw_eigenvalues[0], one.raw_weights[0], strict=True))
    assert torch.allclose(one.density, own / (0.25 * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("A", [torch.eye(30), torch.zeros(30, 30), 1e-20 * torch.eye(30), 1e9 * torch.eye(30)])
def test_density_of_a_single_value_integrates_to_one(A: torch.Tensor) -> None:
    """hessian-eigenthings gives 0 for the float32 identity: its kernel is narrower than float32 resolves around 1."""
    found = ours.spectral_density(operator(A), num_runs=2, lanczos_steps=10)
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-6)


def test_runs_of_different_lengths_are_padded_with_nan_and_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = torch.ones(1, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    measure = fastsharp.density(torch.eye(3), steps=2)
    monkeypatch.setattr(fastsharp, "density", lambda *a, **k: type(measure)(**{**vars(measure), "probes": ((one, one), (two, two / 3))}))
    found = ours.spectral_density(operator(torch.eye(3)), num_runs=2, lanczos_steps=2)
    assert found.raw_eigenvalues[0, 0] == 1.0 and math.isnan(found.raw_eigenvalues[0, 1]) and found.raw_weights[0].tolist() == [1.0, 0.0]
    assert float(torch.trapezoid(found.density, found.grid)) == pytest.approx(1.0, abs=1e-6)


def test_the_call_of_release_0() -> None:
    model = net()
    exact = torch.linalg.eigvalsh(sum(dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), batch) for batch in EVEN) / 3)
    largest = exact[exact.abs().argsort(descending=True)][:2].tolist()
    for mode in ("power_iter", "lanczos"):
        values, vectors = ours.compute_hessian_eigenthings(model, EVEN, nn.CrossEntropyLoss(), 2, mode=mode, use_gpu=False)
        assert values.tolist() == pytest.approx(largest, rel=1e-4) and vectors.shape == (2, 43)
    for wrong in ({"fp16": True}, {"full_dataset": False}, {"momentum": 0.9}, {"max_possible_gpu_samples": 64}, {"mode": "qr"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ours.compute_hessian_eigenthings(model, EVEN, nn.CrossEntropyLoss(), 2, use_gpu=False, **wrong)
    with pytest.raises(DeviceError, match="use_gpu=False"):
        ours.compute_hessian_eigenthings(model, EVEN, nn.CrossEntropyLoss(), 2)


# --- parameters, language models --------------------------------------------------------------------------------------------


def test_parameters_and_vectors(theirs: Any) -> None:
    model = net()
    a, b = (lib.select_parameters(model, lib.match_names("*.weight")) for lib in (ours, theirs))
    assert list(a) == list(b) == ["0.weight", "2.weight"]
    flat = ours.params_to_vector(a)
    assert torch.equal(flat, theirs.params_to_vector(b))
    back = ours.vector_to_params(flat, a)
    assert all(torch.equal(back[name], p) for name, p in a.items())
    with pytest.raises(ShapeError, match=r"\(35,\)"):
        ours.vector_to_params(flat[1:], a)


class TinyLM(nn.Module):
    """The outputs of a causal language model of Hugging Face."""

    class Output:
        def __init__(self, logits: torch.Tensor, loss: torch.Tensor | None) -> None:
            self.logits, self.loss = logits, loss

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        logits = self.head(torch.tanh(self.embed(input_ids)))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return self.Output(logits, loss)


def test_language_models(theirs: Any) -> None:
    model = TinyLM().double()
    ids = torch.arange(24).reshape(4, 6) % 7
    batches = [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]
    v = torch.randn(63, dtype=torch.float64)
    a, b = (lib.HessianOperator(model, batches, lib.hf_lm_loss()) @ v for lib in (ours, theirs))
    assert float((a - b).norm()) <= 1e-13 * float(b.norm())
    a, b = (lib.GGNOperator(model, batches, lib.hf_lm_forward(), lib.hf_lm_loss_of_output()) @ v for lib in (ours, theirs))
    b = b.detach()
    assert float((a - b).norm()) <= 1e-13 * float(b.norm())


# --- what has no meaning here ---------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[("HessianOperator", {n: v}) for n, v in {"full_dataset": False, "microbatch_size": 2, "microbatch_unsafe": True}.items()],
    *[("HessianOperator", {n: v}) for n, v in {"method": "finite_difference", "fd_eps": 1e-3, "backend": object()}.items()],
    *[("GGNOperator", {n: v}) for n, v in {"full_dataset": False, "backend": object()}.items()],
    *[("lanczos", {n: v}) for n, v in {"reorthogonalize": False, "backend": object(), "which": "BE"}.items()],
    *[(call, {"momentum": 0.5}) for call in ("deflated_power_iteration", "power_iteration_one")],
    *[(call, {"backend": object()}) for call in ("hutchinson", "hutch_plus_plus", "trace", "spectral_density", "power_iteration_one")],
    *[("trace", {n: v}) for n, v in {"method": "xtrace", "distribution": "gaussian", "num_matvecs": 0}.items()],
    *[("hutchinson", {n: v}) for n, v in {"distribution": "normal", "num_samples": 0}.items()],
    *[("spectral_density", {n: v}) for n, v in {"sigma": 0.0, "num_grid_points": 0}.items()],
    ("HessianOperator", {"num_batches": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "given"), REFUSED, ids=lambda v: v if isinstance(v, str) else next(iter(v)))
def test_arguments_without_a_meaning_are_refused_by_name(call: str, given: dict[str, Any]) -> None:
    first: dict[str, tuple[Any, ...]] = {
        "HessianOperator": (net(), EVEN, ours.supervised_loss(F.cross_entropy)),
        "GGNOperator": (net(), EVEN, ours.supervised_forward, ours.supervised_loss_of_output(F.cross_entropy)),
    }
    with pytest.raises(InputError, match=next(iter(given))):
        getattr(ours, call)(*first.get(call, (operator(matrix()),)), **given)


def test_reorthogonalize_true_is_what_happens_anyway() -> None:
    assert ours.lanczos(operator(matrix()), k=1, reorthogonalize=True).converged.all()


def test_names_that_are_not_served_say_why() -> None:
    module = importlib.import_module(OURS)
    for name in module._ABSENT:
        with pytest.raises(ImportError, match=name):
            exec(f"from {OURS} import {name}")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = module.nothing_like_it


def test_every_name_of_the_library_is_served_or_refused(theirs: Any) -> None:
    missing = set(theirs.__all__) - set(vars(ours)) - set(ours._ABSENT)
    assert missing <= {"__version__"}
    assert not set(ours._ABSENT) & set(vars(ours))


def test_train_mode_is_refused() -> None:
    """hessian-eigenthings takes batch statistics and changes the buffers while it measures."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ModelModeError):
        ours.HessianOperator(model, EVEN, ours.supervised_loss(F.cross_entropy))
