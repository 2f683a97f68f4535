"""Krylov methods for symmetric operators; knows no models."""

from fastsharp.krylov.lanczos import lanczos as lanczos
from fastsharp.krylov.slq import density as density
