"""fastsharp: how sharp the minimum is that a trained PyTorch network sits in, fast, with the doubt stated."""

from fastsharp import data as data
from fastsharp import errors as errors
from fastsharp import models as models
from fastsharp._environment import __version__ as __version__
from fastsharp._environment import info as info
from fastsharp.api import bracket as bracket
from fastsharp.api import density as density
from fastsharp.api import frobenius as frobenius
from fastsharp.api import lanczos as lanczos
from fastsharp.api import logdet as logdet
from fastsharp.api import spectrum as spectrum
from fastsharp.api import trace as trace
from fastsharp.api import trace_function as trace_function
from fastsharp.curvature.gauss_newton import GGN as GGN
from fastsharp.curvature.hessian import Hessian as Hessian
from fastsharp.losses import batch_loss as batch_loss
from fastsharp.operator import CallableOperator as CallableOperator
from fastsharp.operator import CountingOperator as CountingOperator
from fastsharp.operator import DenseOperator as DenseOperator
from fastsharp.operator import SymmetricOperator as SymmetricOperator
from fastsharp.results import Bracket as Bracket
from fastsharp.results import Density as Density
from fastsharp.results import Eigenpairs as Eigenpairs
from fastsharp.results import Estimate as Estimate
from fastsharp.results import Spectrum as Spectrum
from fastsharp.training import Tracker as Tracker
