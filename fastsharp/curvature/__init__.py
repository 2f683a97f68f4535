"""Curvature operators of a model; they know no solver."""

from fastsharp.curvature.hessian import Hessian as Hessian
