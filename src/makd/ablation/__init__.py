"""Station 10: what each aspect of one's own run is good for: the run again, with one aspect off at a time."""

from makd.ablation.report import write_ablation_report
from makd.ablation.run import TABLE, Ablation, ablate
from makd.ablation.table import ablation_table, shown_table

__all__ = ["TABLE", "Ablation", "ablate", "ablation_table", "shown_table", "write_ablation_report"]
