"""The one-line calls: a model and its data in, a result with its doubt out."""

from fastsharp.api.bracket import bracket as bracket
from fastsharp.api.density import density as density
from fastsharp.api.eigenpairs import lanczos as lanczos
from fastsharp.api.explain import explain as explain
from fastsharp.api.measure import measure as measure
from fastsharp.api.measures_closed import fisher_rao as fisher_rao
from fastsharp.api.measures_closed import relative_flatness as relative_flatness
from fastsharp.api.measures_function import boundary_tightness as boundary_tightness
from fastsharp.api.measures_function import coherence as coherence
from fastsharp.api.measures_function import input_jacobian as input_jacobian
from fastsharp.api.measures_function import logit_scale as logit_scale
from fastsharp.api.measures_function import loss_trace as loss_trace
from fastsharp.api.measures_function import margin as margin
from fastsharp.api.measures_function import prediction_confidence as prediction_confidence
from fastsharp.api.measures_function import sample_curvature as sample_curvature
from fastsharp.api.sharpness import sharpness as sharpness
from fastsharp.api.spectrum import spectrum as spectrum
from fastsharp.api.trace import frobenius as frobenius
from fastsharp.api.trace import logdet as logdet
from fastsharp.api.trace import trace as trace
from fastsharp.api.trace import trace_function as trace_function
from fastsharp.api.trajectory import batch_sharpness as batch_sharpness
from fastsharp.api.trajectory import critical_sharpness as critical_sharpness
from fastsharp.api.trajectory import directional_sharpness as directional_sharpness
from fastsharp.api.trajectory import edge_of_stability as edge_of_stability
from fastsharp.api.trajectory import gradient_overlap as gradient_overlap
