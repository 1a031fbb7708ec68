"""The words that every station shares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makd.anatomy import OutputSlice, Role


@given(groups=st.integers(1, 4), width=st.integers(1, 6), data=st.data())
def test_a_slice_is_the_same_features_of_every_group(groups, width, data):
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width))
    output = torch.arange(3 * groups * width, dtype=torch.float32).reshape(3, groups * width)
    part = OutputSlice(start, stop, groups)
    columns = [group * width + feature for group in range(groups) for feature in range(start, stop)]
    assert torch.equal(part.select(output), output[:, columns])
    assert part.features == len(columns)


@pytest.mark.parametrize("role", Role)
def test_a_cross_attention_role_answers_to_the_same_role_in_self_attention(role):
    assert role.base.value == role.value.replace("cross_", "")
