"""Station 9: what a person looks at, and what a run leaves on disk."""

from makd.report.card import folded_card, write_card
from makd.report.findings import Findings
from makd.report.folder import OutputFolder
from makd.report.manifest import MANIFEST, warn_changed_weights
from makd.report.noted import noting_warnings
from makd.report.record import describe_environment, plain, to_json, write_json, write_recipe
from makd.report.tables import metrics_table, scores_table
from makd.report.worsened import warn_worsened

__all__ = [
    "MANIFEST",
    "Findings",
    "OutputFolder",
    "describe_environment",
    "folded_card",
    "metrics_table",
    "noting_warnings",
    "plain",
    "scores_table",
    "to_json",
    "warn_changed_weights",
    "warn_worsened",
    "write_card",
    "write_json",
    "write_recipe",
]
