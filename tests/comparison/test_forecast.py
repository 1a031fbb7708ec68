"""How long a comparison will take."""

from dataclasses import replace

import pytest

import makd
from makd.comparison.cells import all_cells
from makd.comparison.forecast import forecast_seconds


class TestForecast:
    def test_a_cell_takes_what_its_task_and_method_take_elsewhere(self, done):
        cells = all_cells(done[0])
        seconds = {"mrpc": 2.0, "stsb": 3.0, "low_rank_svd": 5.0, "makd_paper": 7.0}
        lines = [
            {
                "cell": cell.names,
                "seconds": {"total": seconds[str(cell.names["task"])] * seconds[str(cell.names["method"])]},
            }
            for cell in cells
        ]
        told = ("stsb", "makd_paper")
        known = [line for line in lines if (line["cell"]["task"], line["cell"]["method"]) != told]
        wanted = [cell for cell in cells if (cell.names["task"], cell.names["method"]) == told]
        assert forecast_seconds(wanted, known) == pytest.approx(len(wanted) * 3.0 * 7.0)

    def test_what_no_line_has_is_like_the_others(self, done):
        cell = all_cells(done[0])[0]
        lines = [{"cell": cell.names, "seconds": {"total": 4.0}}]
        other = replace(cell, budget=makd.Budget(keep=0.5))
        assert forecast_seconds([other], lines) == pytest.approx(4.0)
        assert forecast_seconds([], lines) == 0.0
        with pytest.raises(ValueError, match="nothing is done yet"):
            forecast_seconds([cell], [])
