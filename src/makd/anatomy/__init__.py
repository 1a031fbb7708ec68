"""Station 1: where a model keeps its layers, linears, attention, embeddings and head."""

from makd.anatomy.describe import Inspection, describe, inspect, to_table
from makd.anatomy.resolve import linear_shape, resolve
from makd.anatomy.roles import Anatomy, Layer, OutputSlice, Role, RoleLinear
from makd.anatomy.skipped import SkippedLayer
from makd.anatomy.stand_in import StandIn

__all__ = [
    "Anatomy",
    "Inspection",
    "Layer",
    "OutputSlice",
    "Role",
    "RoleLinear",
    "SkippedLayer",
    "StandIn",
    "describe",
    "inspect",
    "linear_shape",
    "resolve",
    "to_table",
]
