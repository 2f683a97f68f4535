"""The calls of hessian-eigenthings 1.0 (github.com/noahgolmant/pytorch-hessian-eigenthings), served by fastsharp.

    from fastsharp.compat.hessian_eigenthings import HessianOperator, lanczos      # was: from hessian_eigenthings import ...

Arguments and returns are those of 1.0.0a5; what has no meaning here is refused by name. `compute_hessian_eigenthings` is the call of 0.x.
What differs is in docs/how-to/coming-from-hessian-eigenthings.md.
"""

from __future__ import annotations

from typing import Any

from fastsharp.compat.hessian_eigenthings.algorithms import EigenResult as EigenResult
from fastsharp.compat.hessian_eigenthings.algorithms import SpectralDensityResult as SpectralDensityResult
from fastsharp.compat.hessian_eigenthings.algorithms import TraceResult as TraceResult
from fastsharp.compat.hessian_eigenthings.algorithms import compute_hessian_eigenthings as compute_hessian_eigenthings
from fastsharp.compat.hessian_eigenthings.algorithms import deflated_power_iteration as deflated_power_iteration
from fastsharp.compat.hessian_eigenthings.algorithms import hutch_plus_plus as hutch_plus_plus
from fastsharp.compat.hessian_eigenthings.algorithms import hutchinson as hutchinson
from fastsharp.compat.hessian_eigenthings.algorithms import lanczos as lanczos
from fastsharp.compat.hessian_eigenthings.algorithms import power_iteration_one as power_iteration_one
from fastsharp.compat.hessian_eigenthings.algorithms import spectral_density as spectral_density
from fastsharp.compat.hessian_eigenthings.algorithms import trace as trace
from fastsharp.compat.hessian_eigenthings.loss_fns import hf_lm_forward as hf_lm_forward
from fastsharp.compat.hessian_eigenthings.loss_fns import hf_lm_loss as hf_lm_loss
from fastsharp.compat.hessian_eigenthings.loss_fns import hf_lm_loss_of_output as hf_lm_loss_of_output
from fastsharp.compat.hessian_eigenthings.loss_fns import hf_seq2seq_loss as hf_seq2seq_loss
from fastsharp.compat.hessian_eigenthings.loss_fns import supervised_forward as supervised_forward
from fastsharp.compat.hessian_eigenthings.loss_fns import supervised_loss as supervised_loss
from fastsharp.compat.hessian_eigenthings.loss_fns import supervised_loss_of_output as supervised_loss_of_output
from fastsharp.compat.hessian_eigenthings.operators import CurvatureOperator as CurvatureOperator
from fastsharp.compat.hessian_eigenthings.operators import GGNOperator as GGNOperator
from fastsharp.compat.hessian_eigenthings.operators import HessianOperator as HessianOperator
from fastsharp.compat.hessian_eigenthings.operators import LambdaOperator as LambdaOperator
from fastsharp.compat.hessian_eigenthings.param_utils import ParamFilter as ParamFilter
from fastsharp.compat.hessian_eigenthings.param_utils import match_names as match_names
from fastsharp.compat.hessian_eigenthings.param_utils import match_regex as match_regex
from fastsharp.compat.hessian_eigenthings.param_utils import params_to_vector as params_to_vector
from fastsharp.compat.hessian_eigenthings.param_utils import select_parameters as select_parameters
from fastsharp.compat.hessian_eigenthings.param_utils import vector_to_params as vector_to_params

_ABSENT = {
    "DDPHessianOperator": "products of several processes have no counterpart here",
    "EmpiricalFisherOperator": "use fastsharp.Fisher(model, loader, loss_fn, kind='empirical'), which takes the loss of a batch",
    "supervised_per_sample_loss": "it belongs to EmpiricalFisherOperator; fastsharp.Fisher takes the loss of a batch",
    "lanczos_tridiagonal": "fastsharp keeps its Lanczos basis to itself; lanczos gives eigenpairs, spectral_density the quadrature",
    "LanczosTridiag": "fastsharp keeps its Lanczos basis to itself",
    "tlens_forward": "TransformerLens is not served here; write loss_fn(model, batch)",
    "tlens_loss": "TransformerLens is not served here; write loss_fn(model, batch)",
    "tlens_loss_of_output": "TransformerLens is not served here; write loss_fn(model, batch)",
}


def __getattr__(name: str) -> Any:
    if name in _ABSENT:
        raise ImportError(f"fastsharp.compat.hessian_eigenthings has no {name}: {_ABSENT[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
