"""What each measure of a report is, in a line, and what it survives."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """A measure's formula, its direction and what leaves it unchanged."""

    formula: str
    larger: str  # what a larger value means
    rescaling: bool  # survives a rescaling of layers that leaves the function as it is
    temperature: bool  # survives a scaling of the logits


MEANINGS: dict[str, Meaning] = {
    "lambda_max": Meaning("largest eigenvalue of H", "sharper", False, False),
    "lambda_min": Meaning("smallest eigenvalue of H", "nearer to convex", False, False),
    "trace": Meaning("tr H", "sharper", False, False),
    "frobenius": Meaning("||H||_F", "sharper", False, False),
    "negative_share": Meaning("share of negative eigenvalues", "more of a saddle", True, False),  # inertia
    "outliers": Meaning("eigenvalues above the bulk", "more sharp directions", False, False),
    "bulk_edge": Meaning("where the bulk ends", "sharper bulk", False, False),
    "effective_rank": Meaning("(tr H)^2 / ||H||_F^2", "curvature spread wider", False, False),
    "ggn_lambda_max": Meaning("largest eigenvalue of G = J'H_L J", "sharper", False, False),
    "ggn_trace": Meaning("tr G", "sharper", False, False),
    "ggn_effective_rank": Meaning("(tr G)^2 / ||G||_F^2", "curvature spread wider", False, False),
    "soft_rank": Meaning("tr G (G + cI)^-1", "more directions above c", False, False),
    "tic": Meaning("tr (G + cI)^-1 C", "more noise per curvature", False, False),
    "sam": Meaning("mean |L(theta + rho z/sqrt n) - L| / rho", "sharper", False, False),
    "layer_sam": Meaning("the same, each layer moved by rho ||w||", "sharper", True, False),
    "filter_sam": Meaning("the same, each filter moved by rho ||w||", "sharper", True, False),
    "ascent": Meaning("L(theta + rho g/||g||) - L", "sharper", False, False),
    "adaptive_ascent": Meaning("the same, weights measured by their size", "sharper", True, False),
    "gradient_norm": Meaning("||g||", "further from stationary", False, False),
    "directional": Meaning("g'Hg / ||g||^2", "sharper along the gradient", False, False),
    "gradient_overlap": Meaning("||P g||^2 / ||g||^2", "gradient in the top space", False, False),
    "fisher_rao": Meaning("sqrt mean <grad l_i, theta>^2", "sharper", True, False),
    "fisher_rao_closed": Meaning("L sqrt mean (<p, f> - f_y)^2", "sharper", True, False),
    "relative_flatness": Meaning("sum <w_s, w_t> tr H_st of the head", "sharper", True, False),
    "margin": Meaning("mean f_y - max f_c", "further from the boundary", True, False),
    "prediction_confidence": Meaning("mean max p", "surer", True, False),
    "logit_scale": Meaning("mean ||f - mean f||", "larger logits", True, False),
    "boundary_tightness": Meaning("1 / mean |distance to the boundary|", "tighter boundary", True, True),
    "input_jacobian": Meaning("mean ||df/dx||_F", "steeper function", True, False),
    "top_curvature": Meaning("mean u'H_i u, u the top eigenvector", "sharper", False, False),
}
GROUPS = {
    "curvature": "Hessian",
    "gauss-newton": "Gauss-Newton matrix",
    "perturbation": "Perturbed weights",
    "trajectory": "Along the gradient",
    "function": "Samples and function",
}
