"""Which cells of a comparison are meant."""

import pytest

import makd
from makd.comparison.cells import all_cells, select


class TestSelection:
    def test_only_names_cells(self, done):
        cells = all_cells(done[0])
        assert [cell.names["seed"] for cell in select(cells, "task=mrpc,method=low_rank_svd")] == [1, 2]
        assert len(select(cells, "task=mrpc,task=stsb,seed=1")) == 4
        assert len(select(cells, "budget=keep_linears=0.6")) == 8

    @pytest.mark.parametrize(
        ("only", "told"),
        [
            ("tusk=mrpc", "task, method, seed, budget"),
            ("task=cola", "mrpc, stsb"),
            ("method=makd", "low_rank_svd, makd_paper"),
            ("seed=7", "1, 2"),
            ("mrpc", "key=value"),
        ],
    )
    def test_what_is_not_there_is_told_with_what_is(self, done, only, told):
        with pytest.raises(makd.MakdError, match=told):
            select(all_cells(done[0]), only)
