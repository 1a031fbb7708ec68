"""Every pooling against a loop over the real tokens, in float64; what is no pooling is refused by name."""

import pytest
import torch

import makd
from makd.sentence_encoder import POOLINGS, check_pooling, pool
from tests.sentence_encoder.folders import by_hand

RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("mask", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize("how", [*POOLINGS, "cls+mean", "max+last+weighted_mean"])
def test_takes_the_real_tokens_alone(how, mask):
    hidden = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), float("nan"))
    expected = [
        torch.cat([by_hand(tokens[keep].double(), each) for each in how.split("+")])
        for tokens, keep in zip(hidden, mask, strict=True)
    ]
    torch.testing.assert_close(pool(hidden, mask, how).double(), torch.stack(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", POOLINGS)
def test_a_text_without_tokens_is_zeros(how):
    assert (pool(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool), how) == 0).all()


@pytest.mark.parametrize("wrong", ["", "median", "cls+", "mean,cls", "auto+cls"])
def test_what_is_no_pooling_is_refused_with_those_that_are(wrong):
    with pytest.raises(makd.errors.SettingError, match=f"weighted_mean.*got {wrong!r}".replace("+", r"\+")):
        check_pooling(wrong, "A term's pooling")


def test_a_term_takes_several_and_refuses_others():
    assert makd.Term(aspect="embedding", pooling="cls+mean").pooling == "cls+mean"
    with pytest.raises(makd.errors.SettingError, match="A term's pooling is auto"):
        makd.Term(aspect="embedding", pooling="median")
    with pytest.raises(makd.errors.SettingError, match=r"evaluation\.pooling is auto"):
        makd.EvaluationConfig(pooling="median")
