"""Means, differences and their errors over tasks and seeds."""

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from makd.comparison.statistics import average, difference, mean, pairs


class TestStatistics:
    def test_means_and_errors_are_those_of_textbooks(self):
        found = mean([1.0, 2.0, 3.0])
        assert (found.value, found.count) == (2.0, 3)
        assert found.error == pytest.approx(1 / 3**0.5)
        assert mean([1.0]).error is None
        assert mean([]) is None

    def test_the_average_is_of_seeds_that_have_every_task(self):
        found = {("a", 1): 0.2, ("b", 1): 0.4, ("a", 2): 0.9}
        assert average(found, ["a", "b"]).value == pytest.approx(0.3)
        assert average({("a", 1): 0.2}, ["a", "b"]) is None

    def test_differences_are_paired(self):
        ours = {("a", 1): 0.5, ("a", 2): 0.9, ("b", 1): 0.4, ("c", 9): 1.0}
        gains = pairs(ours, {("a", 1): 0.4, ("a", 2): 0.7, ("b", 1): 0.1})
        assert gains == pytest.approx({("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.3})

    def test_every_task_counts_the_same_in_a_difference_however_many_seeds_it_has(self):
        gains = {("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.3}
        assert difference(gains).mean == pytest.approx((0.15 + 0.3) / 2)
        assert difference({}) is None

    def test_over_tasks_a_difference_has_the_spread_of_their_means_and_more_seeds_tell_nothing_more(self):
        means = {"a": 2.0, "b": 0.1, "c": -0.1, "d": 0.0}
        for seeds in (2, 20):
            gains = {(task, seed): mean + 0.1 * (-1) ** seed for task, mean in means.items() for seed in range(seeds)}
            found = difference(gains).over_tasks
            expected = ttest_1samp(list(means.values()), 0)
            assert (found.count, found.probability) == pytest.approx((expected.statistic, expected.pvalue))
        assert difference({("a", 1): 0.1, ("a", 2): 0.3}).over_tasks is None

    def test_over_seeds_a_difference_has_the_spread_within_tasks_and_not_what_tasks_differ_by(self):
        gains = {("a", 1): 0.4, ("a", 2): 0.6, ("b", 1): 0.0, ("b", 2): 0.1, ("b", 3): -0.1}
        found = difference(gains)
        design = np.array([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 3)  # a mean for each task, by least squares
        (squares,) = np.linalg.lstsq(design, np.array(list(gains.values())))[1]
        share = np.full(2, 0.5)  # of each task's mean in the mean of all
        error = (squares / 3 * share @ np.linalg.inv(design.T @ design) @ share) ** 0.5
        assert found.over_seeds.count == pytest.approx(found.mean / error)
        assert found.over_seeds.probability == pytest.approx(2 * t.sf(found.mean / error, 3))
        one_each = {key: value for key, value in gains.items() if key[1] == 1}
        assert difference(one_each).over_seeds is None
        assert difference(dict.fromkeys(gains, 0.1)).over_seeds is None

    def test_of_one_task_it_is_the_paired_t_test(self):
        found = difference({("a", 1): 0.1, ("a", 2): 0.2, ("a", 3): 0.3}).over_seeds
        expected = ttest_1samp([0.1, 0.2, 0.3], 0)
        assert (found.count, found.probability) == pytest.approx((expected.statistic, expected.pvalue))
