"""The names that users may rely on: what is there, that it is documented, and that nothing else slipped in."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch import nn

import fastsharp

CALLS = {
    "batch_loss",
    "batch_sharpness",
    "boundary_tightness",
    "bracket",
    "coherence",
    "compare",
    "critical_sharpness",
    "density",
    "diagonal",
    "directional_sharpness",
    "edge_of_stability",
    "explain",
    "fisher_rao",
    "frobenius",
    "ggn_spectrum",
    "gradient_overlap",
    "hessian_measures",
    "info",
    "input_jacobian",
    "invariance",
    "lanczos",
    "layer_spectra",
    "load",
    "logdet",
    "logit_scale",
    "loss_trace",
    "margin",
    "measure",
    "prediction_confidence",
    "relative_flatness",
    "row_norms",
    "sample_curvature",
    "sharpness",
    "soft_rank",
    "tic",
    "spectrum",
    "trace",
    "trace_function",
}
CALLS |= {"block_diagonal", "identity_like", "restrict", "with_weight_decay"}
CLASSES = {
    "ActivationHessian",
    "Bracket",
    "CallableOperator",
    "Comparison",
    "CountingOperator",
    "Coupling",
    "DenseOperator",
    "Density",
    "DiagonalOperator",
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "Explanation",
    "Fisher",
    "GGN",
    "GradientCovariance",
    "GGNSpectrum",
    "Hessian",
    "InputHessian",
    "Preconditioned",
    "LayerSpectra",
    "Invariance",
    "Landscape2D",
    "Report",
    "SampleEstimate",
    "Sharpness",
    "Residual",
    "Spectrum",
    "SymmetricOperator",
    "Tracker",
}
MODULES = {"data", "errors", "models"}


def test_the_names_are_these():
    public = {name for name in vars(fastsharp) if not name.startswith("_")}
    submodules = {name for name in public if isinstance(getattr(fastsharp, name), types.ModuleType)}
    assert public - submodules == CALLS | CLASSES
    assert submodules >= MODULES
    assert isinstance(fastsharp.__version__, str)


@pytest.mark.parametrize("name", sorted(CALLS | CLASSES))
def test_each_is_documented_and_typed(name):
    thing = getattr(fastsharp, name)
    assert inspect.getdoc(thing)
    call = thing.__init__ if inspect.isclass(thing) else thing
    hints = inspect.signature(call).parameters
    assert all(p.annotation is not inspect.Parameter.empty for key, p in hints.items() if key != "self")


def test_the_one_line_of_the_readme():
    model, loader = nn.Linear(4, 2), [(torch.randn(8, 4), torch.randint(2, (8,)))]
    result = fastsharp.lanczos(model, loader)
    values, vectors = result
    assert len(result) == len(values) == len(vectors) == 5


def test_lanczos_takes_three_arguments_by_position():
    kinds = [p.kind for p in inspect.signature(fastsharp.lanczos).parameters.values()]
    assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
    assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
