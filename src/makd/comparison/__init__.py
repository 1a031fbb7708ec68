"""Station 10: methods side by side: the same teacher, rows, steps and budget, over tasks and seeds."""

from makd.comparison.cells import Cell, all_cells, select
from makd.comparison.done import done_lines
from makd.comparison.language import LanguageConfig
from makd.comparison.page import write_page
from makd.comparison.report import write_comparison_report
from makd.comparison.run import compare
from makd.comparison.settings import Experiment, MethodConfig, SearchConfig

__all__ = [
    "Cell",
    "Experiment",
    "LanguageConfig",
    "MethodConfig",
    "SearchConfig",
    "all_cells",
    "compare",
    "done_lines",
    "select",
    "write_comparison_report",
    "write_page",
]
