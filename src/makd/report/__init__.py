"""Station 9: what a person looks at, and what a run leaves on disk."""

from makd.report.card import write_card
from makd.report.file import OutputFile
from makd.report.folder import OutputFolder, copy_sentence_transformers_files
from makd.report.manifest import MANIFEST
from makd.report.record import describe_environment, plain, write_json, write_recipe
from makd.report.tables import metrics_table, scores_table

__all__ = [
    "MANIFEST",
    "OutputFile",
    "OutputFolder",
    "copy_sentence_transformers_files",
    "describe_environment",
    "metrics_table",
    "plain",
    "scores_table",
    "write_card",
    "write_json",
    "write_recipe",
]
