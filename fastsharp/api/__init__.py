"""The one-line calls: a model and its data in, a result with its doubt out."""

from fastsharp.api.bracket import bracket as bracket
from fastsharp.api.density import density as density
from fastsharp.api.eigenpairs import lanczos as lanczos
