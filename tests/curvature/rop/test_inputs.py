"""Parts seen from some inputs: linear where they say so, the same numbers for fewer inputs, gradients sample by sample as autograd has them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastsharp.curvature.rop.inputs import bends, by_sample, only, sample_gradients
from fastsharp.curvature.rop.linearise import Linearised
from fastsharp.curvature.rop.tape import record
from tests.curvature.rop.engine import same

torch.manual_seed(0)
N = 5
X = torch.randn(N, 3, 6, 7, dtype=torch.float64)
W, C = torch.randn(4, 3, 3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
GAMMA, BETA = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
MEAN, VAR = torch.randn(4, dtype=torch.float64) / 4, torch.rand(4, dtype=torch.float64) + 0.5
ROWS, U, B = torch.randn(N, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
PLACES = torch.randn(N, 3, 6, dtype=torch.float64)


def conv(x, w, c):
    return F.conv2d(x, w, c, stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def conv_norm_relu(x, w, c, gamma, beta):
    return F.relu(F.batch_norm(conv(x, w, c), MEAN, VAR, gamma, beta, False, 0.0, 1e-5))


def norm(x, gamma, beta):
    return F.batch_norm(x, MEAN[:3], VAR[:3], gamma[:3], beta[:3], False, 0.0, 1e-5)


def linear_relu(x, w, c):
    return F.relu(F.linear(x, w, c))


CASES = {
    "conv": (conv, (X, W, C)),
    "conv without bias": (lambda x, w: F.conv2d(x, w), (X, W)),
    "conv, norm, relu": (conv_norm_relu, (X, W, C, GAMMA, BETA)),
    "norm": (norm, (X, GAMMA[:3], BETA[:3])),
    "group norm": (lambda x, w, c: F.group_norm(x, 3, w, c), (X, GAMMA[:3], BETA[:3])),
    "linear, relu": (linear_relu, (ROWS, U, B)),
    "linear on places": (F.linear, (PLACES.flatten(0, 1), U, B)),
    "product": (torch.bmm, (PLACES[:, :, :3].contiguous(), PLACES)),
    "gelu": (F.gelu, (ROWS,)),
    "relu": (F.relu, (ROWS,)),
    "layer norm": (lambda x, w, c: F.layer_norm(x, (6,), w, c), (ROWS, U[0].clone(), U[1].clone())),
    "elementwise product": (torch.mul, (ROWS, ROWS.flip(0))),
    "max pool": (lambda x: F.max_pool2d(x, 2), (X,)),
    "softmax": (lambda x: x.softmax(-1), (ROWS,)),
}


def part_of(f, args):
    """The last part that f is made of, its inputs as numbers of args, and the output's shape; args are the parameters."""
    leaves = [a.clone().requires_grad_() for a in args]
    shape = []

    def evaluate():
        y = f(*leaves)
        shape.append(y.shape)
        return None, (y * weights(y)).sum()

    steps = Linearised(record(evaluate, leaves)).steps
    step = next(s for s in steps if set(range(len(args))) <= set(s.inputs))
    return step.part, step.inputs, shape[0]


def meant(inputs, on):
    """`on` by arguments as a mark for each input of the part."""
    return [i >= 0 and on[i] for i in inputs]


def weights(y):
    return torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view(y.shape)


def is_curved(f, args, on):
    """Whether d^2 <c, f> over the inputs meant is other than zero, by autograd."""
    leaves = [a.clone().requires_grad_() for a in args]
    some = [leaf for leaf, o in zip(leaves, on, strict=True) if o]
    y = f(*leaves)
    grads = torch.autograd.grad((y * weights(y)).sum(), some, create_graph=True)
    total = sum((g * torch.randn_like(g)).sum() for g in grads if g.requires_grad)
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        return False
    second = torch.autograd.grad(total, some, allow_unused=True)
    return any(g is not None and float(g.abs().max()) > 1e-12 for g in second)


@pytest.mark.parametrize("name", CASES)
def test_bends_where_autograd_has_a_second_derivative(name):
    """For every subset of the inputs. A part may bend though it need not (norms know their statistics), never the other way round."""
    f, args = CASES[name]
    part, inputs, _ = part_of(f, args)
    for on in product((False, True), repeat=len(args)):
        if any(on):
            assert bends(part, meant(inputs, on)) == is_curved(f, args, on), on


@pytest.mark.parametrize("name", [name for name in CASES if "pool" not in name])
def test_only_gives_the_same_adjoints(name):
    f, args = CASES[name]
    part, inputs, shape = part_of(f, args)
    g = torch.randn(2, *shape, dtype=torch.float64)
    whole = part.backward([g], None, [None] * len(inputs))
    for on in product((False, True), repeat=len(args)):
        if not any(on):
            continue
        some = only(part, meant(inputs, on)).backward([g], None, [None] * len(inputs))
        for i, got, want in zip(inputs, some, whole, strict=True):
            if i >= 0 and on[i]:
                same(got, want, 1e-14)


def test_only_leaves_out_what_nobody_asked_for():
    for name in ("conv", "conv, norm, relu", "linear, relu", "product", "norm"):
        f, args = CASES[name]
        part, inputs, shape = part_of(f, args)
        first = [i == 0 for i in inputs]
        out = only(part, first).backward([torch.randn(1, *shape, dtype=torch.float64)], None, [None] * len(inputs))
        assert [t is not None for t in out] == first, name


@pytest.mark.parametrize("name", ["conv", "conv without bias", "conv, norm, relu", "linear, relu", "linear on places"])
def test_sample_gradients_are_those_of_each_sample_alone(name):
    f, args = CASES[name]
    part, inputs, shape = part_of(f, args)
    part = only(part, [i > 0 for i in inputs])
    g = torch.randn(3, *shape, dtype=torch.float64)
    assert by_sample(part, N)
    found = dict(zip(inputs, sample_gradients(part, g, N), strict=True))
    for i in range(1, len(args)):
        for r, s in product(range(3), range(N)):
            leaves = [a.clone().requires_grad_() for a in args]
            own = slice(s * len(leaves[0]) // N, (s + 1) * len(leaves[0]) // N)  # the rows of a sample: its places
            (want,) = torch.autograd.grad(f(leaves[0][own], *leaves[1:]), leaves[i], g[r, own])
            same(found[i][r, s], want, 1e-13)


@pytest.mark.parametrize("options", [{"groups": 3}, {}])
def test_convolutions_that_are_left_to_the_segment(options):
    if options:
        f, args = (lambda x, w: F.conv2d(x, w, **options)), (X, torch.randn(6, 1, 3, 3, dtype=torch.float64))
    else:
        f, args = F.conv1d, (X[:, :, 0].contiguous(), torch.randn(2, 3, 3, dtype=torch.float64))
    part, _, _ = part_of(f, args)
    assert not by_sample(part, N)
