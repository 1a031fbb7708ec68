"""How many tokens a model reads at once."""

import pytest

from makd.anatomy.limits import token_limit
from tests.models import tiny


@pytest.mark.parametrize(
    ("name", "limit"), [("roberta", 63), ("xlm_roberta", 63), ("bert", 64), ("gpt2", 64), ("llama", 64), ("t5", None)]
)
def test_tokens_that_a_model_has_positions_for(name, limit):  # RoBERTa's begin after that of padding, token 0
    assert token_limit(tiny(name)) == limit
