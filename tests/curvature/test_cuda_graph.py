"""Products replayed as CUDA graphs: the same bits as call by call, at any sequence of sizes, and never of weights that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import fastsharp
from fastsharp.curvature import GGN, Hessian, cuda_graph, finite_sum
from fastsharp.curvature.cuda_graph import MOST, Graphs
from fastsharp.curvature.rop.tree import mapped
from fastsharp.errors import StaleOperatorError
from fastsharp.losses import BatchLoss
from fastsharp.ops import force
from tests.cases import NAMES, net
from tests.curvature.tape_recorder import TapeRecorder

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))
DATA = [(X[:8], Y[:8]), (X[8:], Y[8:])]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeRecorder]:
    """Operators made in the test record by this; products are torch's calls alone, which it sees."""
    one = TapeRecorder()
    monkeypatch.setattr(finite_sum, "recorder_of", lambda device: one)
    with force("reference"):
        yield one


def small(**options: Any) -> Hessian:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))
    return Hessian(model, DATA, nn.CrossEntropyLoss(), **({"backend": "rop"} | options))


def vectors(n: int, b: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(b, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def eager(H: Hessian, V: torch.Tensor) -> torch.Tensor:
    """The same product, call by call."""
    out = torch.empty_like(V)
    by_call = H._kept_sum()
    with by_call.mode():
        by_call.run(V, out)
    return out


@pytest.mark.filterwarnings("ignore::fastsharp.errors.UnusedParamWarning")
@pytest.mark.parametrize("kind", [Hessian, GGN])
@pytest.mark.parametrize("name", NAMES)
def test_replayed_products_have_the_bits_of_eager_ones(recorder: TapeRecorder, name: str, kind: Any) -> None:
    n = net(name)
    if kind is GGN and isinstance(n.loss_fn, BatchLoss):
        pytest.skip("a batch_loss has no Gauss-Newton matrix")
    H = kind(n.model, n.batches, n.loss_fn, backend="rop")
    for seed in range(5):
        V = vectors(H.n, 2, seed, H.dtype)
        found = H.apply(V)
        if seed:
            assert torch.equal(found, eager(H, V))
    if H._islands:
        assert recorder.captures == 0 and any("products without a CUDA graph: torch's double backward" in note for note in H.notes)
    else:
        assert (recorder.warm_ups, recorder.captures, recorder.replays) == (1, 1, 2)
        assert H.cuda_graph == (2,) and not any("CUDA graph" in note for note in H.notes)


def test_each_number_of_rows_has_a_graph_of_its_own(recorder: TapeRecorder) -> None:
    H = small()
    for seed, b in enumerate((1, 1, 3, 1, 3, 3, 1, 3)):
        V = vectors(H.n, b, seed)
        found = H.apply(V)
        assert seed == 0 or torch.equal(found, eager(H, V))
    assert H.cuda_graph == (1, 3) and recorder.captures == 2 and recorder.replays == 3  # one of b = 1, two of b = 3


def test_further_sizes_run_call_by_call(recorder: TapeRecorder) -> None:
    H = small()
    for b in range(1, MOST + 3):
        for seed in range(3):
            V = vectors(H.n, b, seed)
            assert torch.equal(H.apply(V), H.apply(V.clone()))
    assert H.cuda_graph == tuple(range(1, MOST + 1)) and recorder.captures == MOST


def test_a_replay_reads_this_vector_and_leaves_earlier_results_alone(recorder: TapeRecorder) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    results = [H.apply(V) for _ in range(4)]
    before = results[3].clone()
    V.mul_(2)
    doubled = H.apply(V)
    assert torch.equal(results[3], before) and torch.equal(results[1], before)
    torch.testing.assert_close(doubled, 2 * before)
    wide = torch.full((1, H.n + 4), 7.0)
    H.apply(V, out=wide[:, : H.n])
    assert torch.equal(wide[:, : H.n], doubled) and bool((wide[:, H.n :] == 7.0).all())


def test_other_weights_are_never_multiplied_by_an_old_graph(recorder: TapeRecorder) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    for _ in range(4):
        old = H.apply(V)
    with torch.no_grad():
        H.objective.model[0].weight.mul_(1.5)
    with pytest.raises(StaleOperatorError):
        H.apply(V)
    H.refresh()
    assert H.cuda_graph == ()
    fresh = Hessian(H.objective.model, DATA, nn.CrossEntropyLoss(), backend="rop").apply(V)
    assert float((fresh - old).norm()) > 1e-3 * float(old.norm())
    for _ in range(4):
        assert torch.equal(H.apply(V), fresh)
    assert recorder.captures == 2


def test_release_drops_graphs_and_their_memory(recorder: TapeRecorder) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    results = [H.apply(V) for _ in range(4)]
    assert H._sum is not None and H._sum.nbytes == 2 * V.nbytes
    H.release()
    assert H.cuda_graph == () and H._sum is None
    assert torch.equal(H.apply(V), results[0])


def test_a_twin_of_another_precision_has_graphs_of_its_own(recorder: TapeRecorder) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    exact = [H.apply(V) for _ in range(4)][-1]
    cheap = H.cheap("bf16")
    rounded = [cheap.apply(V) for _ in range(4)][-1]
    assert H.cuda_graph == cheap.cuda_graph == (1,) and recorder.captures == 2
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 0.1
    assert torch.equal(H.apply(V), exact)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backend": "autograd"}, "autograd walks its graph on the host"),
        ({"backend": "mlp"}, "the native kernel takes a batch in one launch or two"),
    ],
)
def test_backends_that_cannot_be_captured_say_why(recorder: TapeRecorder, options: dict[str, Any], reason: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    H = Hessian(model, DATA, nn.CrossEntropyLoss(), **options)
    for seed in range(4):
        H.apply(vectors(H.n, 1, seed))
    assert recorder.captures == 0 and f"products without a CUDA graph: {reason}" in H.notes


def test_batches_that_are_not_kept_are_not_captured(recorder: TapeRecorder) -> None:
    H = small(memory=2 * sum(x.nbytes + y.nbytes for x, y in DATA) + 1)
    V = vectors(H.n, 1, 0)
    for _ in range(4):
        H.apply(V)
    assert recorder.captures == 0 and H.cuda_graph == ()


@pytest.mark.parametrize(
    "failure", [RuntimeError("operation not permitted\nCUDA kernel errors might"), torch.OutOfMemoryError("no memory")]
)
def test_a_failed_capture_leaves_eager_products_and_one_note(recorder: TapeRecorder, failure: Exception) -> None:
    recorder.failure = failure
    H = small()
    for seed in range(5):
        V = vectors(H.n, 1 + seed % 2, seed)
        found = H.apply(V)
        assert seed == 0 or torch.equal(found, eager(H, V))
    text = str(failure).splitlines()[0]
    assert recorder.captures == 1
    assert [note for note in H.notes if "CUDA graph" in note] == [f"products without a CUDA graph: the capture failed: {text}"]


def test_a_product_that_waits_for_the_device_is_not_replayed(recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    first = H.apply(V)
    made, _ = H._kept[0]
    inner = made.add_products

    def waiting(V: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        inner(V * float(V[0, 0].sign().item()) * float(V[0, 0].sign().item()), out, scale)

    monkeypatch.setattr(made, "add_products", waiting)
    for _ in range(3):
        assert torch.equal(H.apply(V), first)
    assert any("the capture failed: operation not permitted" in note for note in H.notes)


def test_graphs_count_in_the_memory_budget(recorder: TapeRecorder) -> None:
    recorder.held = 1 << 50
    H = small()
    V = vectors(H.n, 1, 0)
    results = [H.apply(V) for _ in range(4)]
    assert all(torch.equal(r, results[0]) for r in results)
    assert recorder.captures == 1 and recorder.replays == 0
    assert any("one for b = 1 holds" in note and "more than the memory budget has left" in note for note in H.notes)
    recorder.held = 0
    other = small()
    for _ in range(3):
        other.apply(V)
    free = other.objective.graph_budget - other._kept_bytes
    assert other._fits(free - 2 * V.nbytes) and not other._fits(free - 2 * V.nbytes + 1)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_modes_do_not_matter(recorder: TapeRecorder, mode: Any) -> None:
    H = small()
    V = vectors(H.n, 1, 0)
    expected = H.apply(V)
    with mode():
        rows = V.clone().requires_grad_(mode is torch.enable_grad)
        for _ in range(5):
            assert torch.equal(H.apply(rows), expected)
            assert not H.apply(rows).requires_grad
    assert H.cuda_graph == (1,) and torch.equal(H.apply(V), expected)


def test_products_on_this_cpu_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_graph.recorder_of(torch.device("cpu")) is None
    monkeypatch.setenv("FASTSHARP_CUDA_GRAPHS", "0")
    assert cuda_graph.recorder_of(torch.device("cuda")) is None


class _Plain:
    """A product of plain calls; counts how often Python ran it, and in which mode."""

    def __init__(self) -> None:
        self.runs = self.modes = 0
        self.A = vectors(4, 4, 9)

    def run(self, V: torch.Tensor, out: torch.Tensor) -> None:
        self.runs += 1
        torch.mm(V, self.A, out=out)

    def mode(self) -> AbstractContextManager[Any]:
        self.modes += 1
        return nullcontext()


def test_replays_run_no_python_of_the_product() -> None:
    product, recorder = _Plain(), TapeRecorder()
    graphs = Graphs(recorder)
    for seed in range(6):
        V, out = vectors(4, 2, seed), torch.empty(2, 4)
        graphs.product(product, V, out, lambda nbytes: True)
        assert torch.equal(out, V @ product.A)
    assert (product.runs, product.modes, recorder.replays, recorder.turns) == (3, 3, 4, 6)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
@pytest.mark.filterwarnings("ignore::fastsharp.errors.UnusedParamWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_replayed_products_have_the_bits_of_eager_ones(name: str, dtype: torch.dtype) -> None:
    n = net(name, dtype)
    batches = mapped(lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, n.batches)
    H = Hessian(n.model.cuda(), batches, n.loss_fn, backend="rop")
    for seed in range(6):
        V = vectors(H.n, 1 + seed % 2, seed, dtype).cuda()
        found = H.apply(V)
        if seed:
            assert torch.equal(found, eager(H, V)), f"product {seed}, graphs for {H.cuda_graph}"
    assert H.cuda_graph == (1, 2) or any("without a CUDA graph" in note for note in H.notes)


@needs_gpu
def test_on_a_gpu_graphs_follow_the_stream_of_the_caller() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).cuda()
    x, y = torch.randn(512, 64).cuda(), torch.randint(0, 10, (512,)).cuda()
    H = fastsharp.Hessian(model, [(x, y)], nn.CrossEntropyLoss(), backend="rop")
    block = vectors(H.n, 20, 0).cuda()
    expected = torch.cat([eager(H, v[None]) for v in block]) if H.apply(block[:1]) is not None else block
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for i, v in enumerate(block):
        with torch.cuda.stream(streams[i % 2]):
            results.append(H.apply(v[None]))
    torch.cuda.synchronize()
    assert torch.equal(torch.cat(results), expected)
    assert H.cuda_graph == (1,) and H._sum is not None and H._sum.nbytes > 0
