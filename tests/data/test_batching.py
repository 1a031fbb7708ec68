"""Batches by a budget of tokens: nothing is lost, nothing is too large, and the seed says all."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from makd.data import TokenBatchSampler, padding_share, token_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
BUDGET = st.integers(1, 200)
SEED = st.integers(0, 5)


@given(lengths=LENGTHS, tokens=BUDGET, seed=SEED)
def test_every_row_is_in_one_batch(lengths, tokens, seed):
    rows = [index for batch in token_batches(lengths, tokens, seed) for index in batch]
    assert sorted(rows) == list(range(len(lengths)))


@given(lengths=LENGTHS, tokens=BUDGET, seed=SEED)
def test_no_batch_exceeds_the_budget_but_a_row_that_does_so_alone(lengths, tokens, seed):
    for batch in token_batches(lengths, tokens, seed):
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= tokens


@given(lengths=LENGTHS, tokens=BUDGET, seed=SEED)
def test_the_same_seed_gives_the_same_batches_and_any_seed_as_many(lengths, tokens, seed):
    batches = token_batches(lengths, tokens, seed)
    assert batches == token_batches(lengths, tokens, seed)
    shapes = [sorted(lengths[index] for index in batch) for batch in batches]
    others = [sorted(lengths[index] for index in batch) for batch in token_batches(lengths, tokens, seed + 1)]
    assert sorted(shapes) == sorted(others)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), tokens=BUDGET)
def test_lengths_of_two_batches_do_not_interleave(lengths, tokens):
    ranges = sorted(
        (min(lengths[index] for index in batch), max(lengths[index] for index in batch))
        for batch in token_batches(lengths, tokens)
    )
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


@given(lengths=LENGTHS.filter(len), tokens=BUDGET, seed=SEED, epoch=st.integers(0, 3), processes=st.integers(1, 4))
def test_processes_have_equally_many_batches_and_all_rows_between_them(lengths, tokens, seed, epoch, processes):
    samplers = [TokenBatchSampler(lengths, tokens, seed, rank, processes) for rank in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in found} == {len(sampler) for sampler in samplers}
    rows = [index for batches in found for batch in batches for index in batch]
    assert set(rows) == set(range(len(lengths)))
    firsts = [
        batches[: len(batches) - sampler.ends_in_repetition] for batches, sampler in zip(found, samplers, strict=True)
    ]
    assert sorted(index for batches in firsts for batch in batches for index in batch) == list(range(len(lengths)))


def test_rows_of_equal_length_meet_others_in_the_next_epoch():
    sampler = TokenBatchSampler([8] * 32, 32)
    first = {frozenset(batch) for batch in sampler}
    sampler.set_epoch(1)
    assert first != {frozenset(batch) for batch in sampler}


def test_short_rows_come_in_larger_batches():
    batches = token_batches([2] * 12 + [12] * 2, 24)
    assert sorted(map(len, batches)) == [2, 12]


def test_padding_is_what_is_computed_beyond_the_rows():
    assert padding_share([2, 4, 6], [[0, 1], [2]]) == 1 - 12 / 14
    assert padding_share([], []) == 0
