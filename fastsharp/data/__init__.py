"""Image sets for measurements: read from files that are there, checked, frozen in order, named exactly in results."""

from __future__ import annotations

from fastsharp.data.api import load as load
from fastsharp.data.api import loader as loader
from fastsharp.data.api import names as names
from fastsharp.data.record import ImageData as ImageData
