"""Curvature operators of a model; they know no solver."""

from fastsharp.curvature.covariance import GradientCovariance as GradientCovariance
from fastsharp.curvature.finite_sum import FiniteSum as FiniteSum
from fastsharp.curvature.fisher import Fisher as Fisher
from fastsharp.curvature.gauss_newton import GGN as GGN
from fastsharp.curvature.hessian import Hessian as Hessian
from fastsharp.curvature.residual import Residual as Residual
