"""G = M' D M for the Gauss-Newton matrix of few samples and outputs: K = M M' has its whole non-zero spectrum.

M stacks the rows sqrt(scale_b / count) S_s J_s of all samples, with H_L = S' D S of `root` and J_s the Jacobian of sample s. A matrix
product that a sample passes through once has J_l = b a' row by row: its part of K is (B B') o (A A'), with the input Gram A A' spread
over the rows of a sample, and 1 added for a bias (ViViT, Dangel et al. 2022, and the NTK of Novak et al. 2022 use the same structure).
Weights that serve several positions or calls get explicit rows J_l, parameters without a rule one backward pass a row.

Every parameter's part is compared with a backward pass on a random combination of all rows; what misses it (samples that the network
couples, calls that were not seen) goes by the backward pass, which assumes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsharp.batches import count_of
from fastsharp.curvature.gram.root import loss_root
from fastsharp.curvature.gram.uses import Record, Use
from fastsharp.curvature.network_output import check_separable, network_output
from fastsharp.errors import BasisMemoryError, InputError
from fastsharp.objective import Objective

_GATE = 2.0**12  # eps, of rows against a backward pass
_COPIES = 5  # matrices of the size of K: K, its decomposition, workspace, K in another scaling
_COLUMNS = 1 << 14  # columns of explicit rows that are multiplied in float64 at once


@dataclass(frozen=True)
class _Part:
    """Rows of one batch: row[c, s] is the number in M of row c of sample s, -1 where there is none; `rows` are scaled."""

    rows: Tensor  # (r, samples, width)
    row: Tensor  # (r, samples)
    first: int  # number of the batch's first sample


class Gram:
    """K = M M' in float64 and D; `pull` multiplies by M'.

    K, signs  (R, R) and (R,), on the model's device
    flops     of K and of one product with G: with those of the decomposition they say whether Lanczos is the cheaper way
    by_rows   names of parameters that went by one backward pass a row
    """

    def __init__(self, objective: Objective, max_rows: int, budget: int) -> None:
        self.objective, self._budget = objective, budget
        self.params, self.names, self.layout = objective.selection.params, objective.selection.names, objective.selection.layout
        self._parts: dict[int, _Part] = {}
        self._single: set[int] = set(range(len(self.params)))  # weights of one call that a sample passes through once
        self._ruled: set[int] = set(self._single)  # parameters all of whose calls have a rule
        self._macs: list[tuple[int, int]] = []  # of each batch: multiply-adds, rows
        self.signs = self._survey(max_rows)
        self.rows = len(self.signs)
        self.K = torch.zeros((self.rows, self.rows), dtype=torch.float64, device=objective.device)
        self._w = torch.linspace(-1.0, 1.0, max(self.rows, 1), dtype=torch.float64)[: self.rows].mul(7.0).sin().to(objective.device)
        if self.rows:
            self._fill()

    @property
    def by_rows(self) -> tuple[str, ...]:
        return tuple(name for i, name in enumerate(self.names) if i not in self._ruled)

    @property
    def flops(self) -> dict[str, float]:
        weights = [p.shape for i, p in enumerate(self.params) if i in self._single and p.ndim == 2]
        factors = sum(2.0 * (self.rows**2 * o + self._samples**2 * i + self._samples * o * i) for o, i in weights)
        columns = [p.numel() for i, p in enumerate(self.params) if i not in self._single]
        product = sum(8.0 * macs for macs, _ in self._macs)
        passes = sum(2.0 * macs * self._depth(k) for k, (macs, _) in enumerate(self._macs))
        backward = sum(4.0 * macs * rows for macs, rows in self._macs) if self.by_rows else 0.0
        return {"gram": passes + backward + factors + 2.0 * self.rows**2 * sum(columns), "product": product}

    def _depth(self, k: int) -> int:
        return len(self._parts[k].rows)

    def pull(self, W: Tensor) -> Tensor:
        """Rows of W times M: (b, R) -> (b, n), a backward pass each."""
        out = torch.zeros((len(W), self.layout.n), dtype=self.objective.dtype, device=self.objective.device)
        with self.objective.quiet():
            for index, batch in self.objective.batches:
                part = self._parts[index]
                if part.row.numel() == 0:
                    continue
                z = network_output(self.objective.evaluate(index, batch))
                for w, total in zip(W, out, strict=True):
                    weight = torch.where(part.row >= 0, w[part.row.clamp(min=0)], 0.0).to(z.dtype)
                    u = (weight[:, :, None] * part.rows).sum(0).reshape(z.shape)
                    self._add(total, self._backward(z, u, self.params))
        return out

    def _add(self, total: Tensor, grads: tuple[Tensor, ...]) -> None:
        for view, g in zip(self.layout.views(total), grads, strict=True):
            view += g

    @staticmethod
    def _backward(z: Tensor, u: Tensor, inputs: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = torch.autograd.grad(z, inputs, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        return grads

    def _survey(self, max_rows: int) -> Tensor:
        """One pass: roots of all batches, which parameters have which structure, and refusal of what is too large."""
        found: list[tuple[int, Tensor, Tensor, float]] = []
        counts, samples = 0.0, 0
        with self.objective.quiet():
            for index, batch in self.objective.batches:
                N = count_of(batch)
                with Record(self.params, N) as record:
                    value = self.objective.evaluate(index, batch)
                z = network_output(value)
                check_separable(value.loss, z, self.params, self.names)
                if z.ndim == 0 or z.shape[0] % N:
                    raise InputError(
                        f"ggn_spectrum: the output has shape {tuple(z.shape)} for a batch of {N} samples, so that its rows are no samples'.\n"
                        "Use fastsharp.lanczos(operator='ggn')."
                    )
                self._check_size(max(self.objective.batches.count, samples + N), z.numel() // N, max_rows)
                samples += N
                rows, signs = loss_root(value.loss, z, N)
                counts += 0.0 if value.count is None else value.count
                found.append((index, rows, signs, value.scale))
                self._see(record)
                self._macs.append((sum(use.macs for use in record.uses), int((signs != 0).sum())))
        mean = self.objective.reduction != "sum"
        if mean and not 0.0 < counts < float("inf"):
            raise InputError(
                f"ggn_spectrum: the counts of the loss add up to {counts:g}, so that its mean is not defined. Check the labels."
            )
        return self._number(found, counts if mean else 1.0)

    def _number(self, found: list[tuple[int, Tensor, Tensor, float]], denominator: float) -> Tensor:
        kept, total, first = [], 0, 0
        for index, rows, signs, scale in found:
            there = (signs != 0) & (scale != 0.0)
            row = torch.full(signs.shape, -1, dtype=torch.int64, device=rows.device)
            row[there] = torch.arange(total, total + int(there.sum()), device=rows.device)
            self._parts[index] = _Part(rows * (abs(scale) / denominator) ** 0.5, row, first)
            kept.append(signs[there].double() * (1.0 if scale >= 0.0 else -1.0))
            total, first = total + int(there.sum()), first + rows.shape[1]
        self._samples = first
        return torch.cat(kept)

    def _check_size(self, samples: int, width: int, max_rows: int) -> None:
        rows = samples * width
        need = _COPIES * 8 * rows**2
        advice = "Use fastsharp.lanczos(operator='ggn') or fastsharp.density(operator='ggn'), or fewer samples."
        if rows > max_rows:
            raise InputError(
                f"ggn_spectrum: {samples} samples with {width} outputs each make a Gram matrix of {rows:,} rows ({8 * rows**2 / 1e9:.3g} GB, "
                f"{9 * rows**3:.2g} FLOP to decompose), above max_rows = {max_rows:,}.\n{advice}"
            )
        if need > self._budget:
            raise BasisMemoryError(
                f"ggn_spectrum: a Gram matrix of {rows:,} rows and its decomposition need {need / 1e9:.3g} GB, "
                f"the budget is {self._budget / 1e9:.3g} GB.\n{advice} Or raise memory=."
            )

    def _see(self, record: Record) -> None:
        """What the calls of a batch say of each parameter: it has the structure that it has in every batch."""
        uses = record.uses
        times = [0] * len(self.params)
        for use in uses:
            for i in (use.weight, use.bias):
                if i is not None:
                    times[i] += 1
        ruled = {i for i, count in enumerate(times) if count} - record.others
        alone = {i for i in ruled if times[i] == 1}
        single = {i for use in uses if not use.shared and use.weight in alone for i in (use.weight, use.bias) if i in alone}
        self._ruled &= ruled
        self._single &= single

    def _fill(self) -> None:
        truth = self.layout.views(self.pull(self._w[None])[0])
        self._factors(truth)
        columns = sorted(set(range(len(self.params))) - self._single)
        for group in self._groups(columns):
            wrong = self._explicit(group, truth)
            if wrong:
                self._ruled -= wrong
                if self._explicit(sorted(wrong), truth):
                    raise InputError(
                        "ggn_spectrum: two backward passes disagree: the model is not one fixed function. Check for randomness."
                    )
        self.K = (self.K + self.K.T) / 2

    def _groups(self, columns: list[int]) -> Iterator[list[int]]:
        """Parameters whose explicit rows are held at once."""
        room = max(self._budget - _COPIES * self.K.nbytes, 0)
        size = self.rows * torch.finfo(self.objective.dtype).bits // 8
        group: list[int] = []
        for i in columns:
            need = size * self.params[i].numel()
            if need > room:
                raise BasisMemoryError(
                    f"ggn_spectrum: the {self.rows:,} Jacobian rows of {self.names[i]!r} ({self.params[i].numel():,} numbers each) need "
                    f"{need / 1e9:.3g} GB, {room / 1e9:.3g} GB are left.\n"
                    "Use fastsharp.lanczos(operator='ggn'), fewer samples, or raise memory=."
                )
            if group and size * sum(self.params[j].numel() for j in [*group, i]) > room:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _adjoints(self, wanted: set[int]) -> Iterator[tuple[_Part, int, list[tuple[Use, Tensor]], Tensor]]:
        """For each batch and row number c: the uses of wanted parameters, with their adjoints (1, N, ...)."""
        with self.objective.quiet():
            for index, batch in self.objective.batches:
                part = self._parts[index]
                if part.row.numel() == 0:
                    continue
                with Record(self.params, part.row.shape[1]) as record:
                    value = self.objective.evaluate(index, batch)
                z = network_output(value)
                uses = [use for use in record.uses if use.weight in wanted or use.bias in wanted]
                for c, rows in enumerate(part.rows):
                    grads = self._backward(z, rows.reshape(z.shape), [use.y for use in uses]) if uses else ()
                    yield part, c, [(use, g[None]) for use, g in zip(uses, grads, strict=True)], z

    def _factors(self, truth: list[Tensor]) -> None:
        """K += (A A' spread) o (B B') for weights of a single call; those that miss the backward pass become explicit."""
        inputs: dict[int, Tensor] = {}
        slopes: dict[int, Tensor] = {}
        bias: dict[int, int] = {}
        sample = torch.empty(self.rows, dtype=torch.int64, device=self.K.device)
        for part, c, found, _ in self._adjoints(self._single):
            N, there = part.row.shape[1], part.row[c] >= 0
            number = part.row[c][there]
            sample[number] = part.first + there.nonzero()[:, 0]
            for use, g in found:
                i = use.weight
                if i is None or i not in self._single:
                    continue
                a, b = use.x.reshape(N, -1), g.reshape(N, -1)
                A = inputs.setdefault(i, a.new_zeros((self._samples, a.shape[1])))
                A[part.first : part.first + N] = a
                slopes.setdefault(i, b.new_zeros((self.rows, b.shape[1])))[number] = b[there]
                if use.bias is not None and use.bias in self._single:
                    bias[i] = use.bias
        for i, A in inputs.items():
            A, B = A.double(), slopes[i].double()
            BB, own = B @ B.T, (A @ A.T)[sample][:, sample]
            by_sample = B.new_zeros((self._samples, B.shape[1])).index_add_(0, sample, B * self._w[:, None])
            pairs = [(i, by_sample.T @ A, BB, A.square().sum(1)[sample])]
            if i in bias:
                pairs.append((bias[i], B.T @ self._w, BB, torch.ones_like(self._w)))
                own = own + 1.0
            if all(self._agrees(got.reshape(truth[j].shape), truth[j], (G.diagonal() * size)) for j, got, G, size in pairs):
                self.K += own.mul_(BB)
            else:
                self._single -= {i, bias.get(i, i)}
        self._single &= set(inputs) | set(bias.values())

    def _agrees(self, got: Tensor, truth: Tensor, squares: Tensor) -> bool:
        """Whether sum_r w_r J_r is that of the backward pass; squares (R,): ||J_r||^2."""
        scale: float = float((self._w.square() * squares).sum()) ** 0.5
        return bool((got.double() - truth.double()).norm() <= _GATE * torch.finfo(truth.dtype).eps * scale)

    def _explicit(self, group: list[int], truth: list[Tensor]) -> set[int]:
        """K += J J' for the explicit rows J of these parameters; those whose rows miss the backward pass are left out and returned."""
        J = {i: truth[i].new_zeros((self.rows, *truth[i].shape)) for i in group}
        by_rows = [i for i in group if i not in self._ruled]
        for part, c, found, z in self._adjoints(set(group) & self._ruled):
            there = part.row[c] >= 0
            number = part.row[c][there]
            for use, g in found:
                for i, rows in zip((use.weight, use.bias), use.rows(g), strict=True):
                    if i is not None and i in J and i in self._ruled:
                        J[i][number] += rows[0][there]
            if by_rows:
                self._by_backward(part, c, z, by_rows, J)
        wrong = set()
        for i, rows in J.items():
            flat = rows.reshape(self.rows, -1)
            if self._agrees(
                (self._w.to(flat.dtype) @ flat).reshape(truth[i].shape),
                truth[i],
                torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square(),
            ):
                for part_ in torch.split(flat, _COLUMNS, dim=1):
                    double = part_.double()
                    self.K += double @ double.T
            else:
                wrong.add(i)
        return wrong

    def _by_backward(self, part: _Part, c: int, z: Tensor, which: list[int], J: dict[int, Tensor]) -> None:
        """One backward pass for each row, whatever the samples have to do with each other."""
        for s in (part.row[c] >= 0).nonzero()[:, 0].tolist():
            u = torch.zeros_like(part.rows[c])
            u[s] = part.rows[c, s]
            for i, g in zip(which, self._backward(z, u.reshape(z.shape), [self.params[i] for i in which]), strict=True):
                J[i][part.row[c, s]] = g


def gram(objective: Objective, max_rows: int, budget: int) -> Gram:
    """The Gram matrix of this objective's Gauss-Newton matrix; budget in bytes, for K and explicit rows.

    Raises InputError or BasisMemoryError where it is too large, with what it would take; InputError where the loss couples samples.
    """
    objective.check_marks()
    return Gram(objective, max_rows, budget)
