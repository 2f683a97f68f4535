"""BatchNorm and Dropout do what was chosen: each choice against the dense Hessian of the function meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsharp
from fastsharp.errors import ModelModeError, NondeterministicOperatorError
from tests.cases import net
from tests.curvature.checks import exact
from tests.oracles.dense import dense_hessian
from tests.unchanged import refuses, unchanged

pytestmark = pytest.mark.usefixtures("one_thread")
LOSS = nn.CrossEntropyLoss()


def close(operator: fastsharp.Hessian, H: torch.Tensor) -> bool:
    A = operator.apply(torch.eye(operator.n, dtype=operator.dtype))
    return float((A - H).norm()) <= 1e-10 * float(H.norm())


def mean_over(terms: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    return sum(value * n for value, n in terms) / sum(n for _, n in terms)


# --- BatchNorm ---------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two BatchNorms in a row of layers, the second behind the first; `stats` are used in their place where given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1, self.b, self.n2, self.c = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        for m in (self.n1, self.n2):
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.4, 2)
            nn.init.normal_(m.weight, 1, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.n2(self.b(torch.tanh(self.n1(self.a(x)))))))


def normed() -> Normed:
    return Normed().double().train()


def test_bn_eval_is_the_hessian_of_the_model_in_eval_mode():
    model, n = normed(), net("mlp_tanh")
    with unchanged(model):
        operator = fastsharp.Hessian(model, n.batches, LOSS, bn="eval")
        assert close(operator, _in_eval(model, n.whole))
    assert "BatchNorm: eval" in operator.notes


def _in_eval(model: nn.Module, whole: Any) -> torch.Tensor:
    model.eval()
    H = dense_hessian(model, lambda call, b: F.cross_entropy(call(b[0]), b[1]), whole)
    model.train()
    return H


def test_bn_frozen_batch_stats_holds_each_batch_s_statistics_constant():
    model, n = normed(), net("mlp_tanh")
    with torch.no_grad():
        stats = [_statistics(model, x) for x, _ in n.batches]

    def objective(call: Callable[..., Any], batch: Any) -> torch.Tensor:
        return mean_over([(F.cross_entropy(_with_statistics(call, x, s), y), len(y)) for (x, y), s in zip(batch, stats, strict=True)])

    class Parts(Normed):
        """Gives the oracle the model's layers as one function of weights, input and statistics."""

        def forward(self, x: torch.Tensor, s: Any) -> torch.Tensor:
            h = F.batch_norm(self.a(x), *s[0], self.n1.weight, self.n1.bias, eps=self.n1.eps)
            h = F.batch_norm(self.b(torch.tanh(h)), *s[1], self.n2.weight, self.n2.bias, eps=self.n2.eps)
            return self.c(torch.tanh(h))

    parts = Parts().double()
    parts.load_state_dict(model.state_dict())
    H = dense_hessian(parts, objective, n.batches)
    with unchanged(model):
        operator = fastsharp.Hessian(model, n.batches, LOSS, bn="frozen-batch-stats")
        assert close(operator, H)
        result = fastsharp.lanczos(model, n.batches, LOSS, bn="frozen-batch-stats", method="lanczos", tol=1e-9, preflight="full")
    assert float((result.eigenvalues - torch.linalg.eigvalsh((H + H.T) / 2).flip(0)[:5]).abs().max()) <= 1e-10
    assert "BatchNorm: frozen-batch-stats" in operator.notes
    assert not close(operator, _in_eval(model, n.whole))


def _statistics(model: Normed, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first = model.a(x)
    s1 = first.mean(0), first.var(0, unbiased=False)
    second = model.b(torch.tanh(F.batch_norm(first, *s1, model.n1.weight, model.n1.bias, eps=model.n1.eps)))
    return [s1, (second.mean(0), second.var(0, unbiased=False))]


def _with_statistics(call: Callable[..., Any], x: torch.Tensor, s: Any) -> torch.Tensor:
    return call(x, s)


def test_bn_without_running_statistics():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    n = net("mlp_tanh")
    for choice in (None, "eval"):
        with refuses(ModelModeError, "'1'", "frozen-batch-stats", model=model):
            fastsharp.lanczos(model, n.batches, LOSS, bn=choice)
    with unchanged(model):
        fastsharp.lanczos(model, n.batches, LOSS, bn="frozen-batch-stats", k=2, tol=1e-6)


def test_frozen_statistics_refuse_another_grouping():
    model, (x, y) = normed(), net("mlp_tanh").whole
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, sampler=Turning())
    with refuses(NondeterministicOperatorError, "batch 0", "grouped", "shuffle", model=model):
        fastsharp.lanczos(model, loader, LOSS, bn="frozen-batch-stats", memory=64)


class Turning(torch.utils.data.Sampler):
    """The same samples, each pass beginning with the next one."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 11

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(i + self.passes) % 11 for i in range(11)])


# --- Dropout -----------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(self.drop(h) if mask is None else h * mask)


def test_dropout_eval_is_the_hessian_without_dropout():
    model, n = Dropping().double().train(), net("mlp_tanh")
    with unchanged(model):
        operator = fastsharp.Hessian(model, n.batches, LOSS, dropout="eval")
        assert close(operator, _in_eval(model, n.whole))
    assert "Dropout: eval" in operator.notes


def test_dropout_eval_reaches_into_attention():
    n = net("transformer_encoder")
    n.model.train()
    with unchanged(n.model):
        assert close(fastsharp.Hessian(n.model, n.batches, n.loss_fn, dropout="eval"), exact("transformer_encoder"))


@pytest.mark.parametrize("memory", ["auto", 64], ids=["kept", "streamed"])
def test_dropout_fixed_masks_is_the_hessian_under_one_mask_a_batch(memory):
    model, n = Dropping().double().train(), net("mlp_tanh")
    masks: dict[int, list[torch.Tensor]] = {}

    def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        which = next(i for i, (x, _) in enumerate(n.batches) if torch.equal(torch.tanh(model.first(x)), inputs[0]))
        masks.setdefault(which, []).append((output / inputs[0]).detach())

    with unchanged(model):
        operator = fastsharp.Hessian(model, n.batches, LOSS, dropout="fixed-masks", seed=3, memory=memory)
        handle = model.drop.register_forward_hook(record)
        A = operator.apply(torch.eye(operator.n, dtype=torch.float64))
        again = operator.apply(torch.eye(operator.n, dtype=torch.float64))
        handle.remove()
    assert torch.equal(A, again)
    assert sorted(masks) == [0, 1, 2] and all(torch.equal(m, own[0]) for own in masks.values() for m in own)
    fixed = [masks[i][0] for i in range(3)]
    assert not torch.equal(fixed[0], fixed[1])
    assert {round(float(v), 9) for m in fixed for v in m.flatten()} == {0.0, round(1 / 0.6, 9)}

    def objective(call: Callable[..., Any], batch: Any) -> torch.Tensor:
        return mean_over([(F.cross_entropy(call(x, m), y), len(y)) for (x, y), m in zip(batch, fixed, strict=True)])

    H = dense_hessian(model, objective, n.batches)
    assert float((A - H).norm()) <= 1e-10 * float(H.norm())


def test_another_seed_gives_other_masks_and_the_same_seed_the_same():
    model, n = Dropping().double().train(), net("mlp_tanh")

    def top(seed: int) -> torch.Tensor:
        return fastsharp.lanczos(model, n.batches, LOSS, dropout="fixed-masks", seed=seed, k=3, tol=1e-8, preflight="full").eigenvalues

    with unchanged(model):
        assert torch.equal(top(1), top(1))
        assert not torch.allclose(top(1), top(2), rtol=1e-3, atol=0)
