"""Diagonal blocks of a curvature matrix, layer by layer, from shared passes over the data."""

from fastsharp.curvature.layers.blocks import Block as Block
from fastsharp.curvature.layers.blocks import LayerBlocks as LayerBlocks
from fastsharp.curvature.layers.blocks import route_notes as route_notes
from fastsharp.curvature.layers.choice import Layer as Layer
from fastsharp.curvature.layers.choice import Layers as Layers
from fastsharp.curvature.layers.choice import layers_of as layers_of
