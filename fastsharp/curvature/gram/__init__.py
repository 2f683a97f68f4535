"""The Gauss-Newton matrix by the Gram matrix of its factors, for few samples and outputs."""

from fastsharp.curvature.gram.gram import Gram as Gram
from fastsharp.curvature.gram.gram import gram as gram
