"""Sharpness measures and what they are compared with; they receive objectives and operators and know no curvature."""

from fastsharp.measures.statistic import SampleEstimate as SampleEstimate
