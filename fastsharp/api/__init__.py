"""The one-line calls: a model and its data in, a result with its doubt out."""

from fastsharp.api.bracket import bracket as bracket
from fastsharp.api.density import density as density
from fastsharp.api.diagonal import diagonal as diagonal
from fastsharp.api.diagonal import row_norms as row_norms
from fastsharp.api.eigenpairs import lanczos as lanczos
from fastsharp.api.explain import explain as explain
from fastsharp.api.ggn_spectrum import ggn_spectrum as ggn_spectrum
from fastsharp.api.spectrum import spectrum as spectrum
from fastsharp.api.trace import frobenius as frobenius
from fastsharp.api.trace import logdet as logdet
from fastsharp.api.trace import trace as trace
from fastsharp.api.trace import trace_function as trace_function
