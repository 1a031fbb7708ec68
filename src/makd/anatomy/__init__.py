"""Station 1: where a model keeps its layers, linears, attention, embeddings and head."""

from makd.anatomy.describe import Inspection, describe, inspection_content, to_table
from makd.anatomy.experts import count_experts
from makd.anatomy.families import (
    Family,
    Fused,
    Layout,
    Stack,
    cross_attention,
    fused_gate_up,
    fused_qkv,
    self_attention,
)
from makd.anatomy.predictions import Predictions, check_predictions, predictions_of
from makd.anatomy.resolve import linear_shape, resolve
from makd.anatomy.roles import Anatomy, ExpertStack, Layer, OutputSlice, Role, RoleLinear
from makd.anatomy.skipped import SkippedLayer
from makd.anatomy.stand_in import StandIn
from makd.anatomy.structure import is_adapted, is_factored
from makd.anatomy.table import ANATOMIES

__all__ = [
    "ANATOMIES",
    "Anatomy",
    "ExpertStack",
    "Family",
    "Fused",
    "Inspection",
    "Layer",
    "Layout",
    "OutputSlice",
    "Predictions",
    "Role",
    "RoleLinear",
    "SkippedLayer",
    "Stack",
    "StandIn",
    "check_predictions",
    "count_experts",
    "cross_attention",
    "describe",
    "fused_gate_up",
    "fused_qkv",
    "inspection_content",
    "is_adapted",
    "is_factored",
    "linear_shape",
    "predictions_of",
    "resolve",
    "self_attention",
    "to_table",
]
