"""Station 9: what a run leaves on disk, and the tables of it that a person looks at."""

from makd.run_folder.card import folded_card, write_card
from makd.run_folder.findings import Findings
from makd.run_folder.folder import OutputFolder
from makd.run_folder.manifest import MANIFEST, warn_changed_weights
from makd.run_folder.noted import noting_warnings
from makd.run_folder.record import describe_environment, plain, to_json, write_json, write_recipe
from makd.run_folder.tables import metrics_table, scores_table
from makd.run_folder.unmeasured import token_counts, unmeasured_metrics
from makd.run_folder.worsened import warn_worsened

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
    "token_counts",
    "unmeasured_metrics",
    "warn_changed_weights",
    "warn_worsened",
    "write_card",
    "write_json",
    "write_recipe",
]
