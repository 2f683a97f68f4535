"""Results are frozen, carry their own doubt, and hold no reference to a model, a graph or a cache."""

from fastsharp.results._files import load as load
from fastsharp.results.bracket import Bracket as Bracket
from fastsharp.results.comparison import Comparison as Comparison
from fastsharp.results.density import Density as Density
from fastsharp.results.density import spacing as spacing
from fastsharp.results.diagonal import DiagonalEstimate as DiagonalEstimate
from fastsharp.results.eigenpairs import Eigenpairs as Eigenpairs
from fastsharp.results.estimate import Estimate as Estimate
from fastsharp.results.explanation import Calls as Calls
from fastsharp.results.explanation import Explanation as Explanation
from fastsharp.results.ggn_spectrum import GGNSpectrum as GGNSpectrum
from fastsharp.results.invariance import Invariance as Invariance
from fastsharp.results.layer_spectra import Coupling as Coupling
from fastsharp.results.layer_spectra import LayerSpectra as LayerSpectra
from fastsharp.results.layer_spectra import LayerSpectrum as LayerSpectrum
from fastsharp.results.report import Landscape2D as Landscape2D
from fastsharp.results.report import Report as Report
from fastsharp.results.result import Result as Result
from fastsharp.results.sharpness import Sharpness as Sharpness
from fastsharp.results.spectrum import Spectrum as Spectrum
