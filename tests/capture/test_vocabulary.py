"""What vocabulary heads are handed, and whether makd can repeat what models do from there on."""

import pytest
import torch
from torch import nn

import makd
from makd.capture import has_vocabulary_head, label_shift_of, why_not_repeated, withhold_logits
from makd.solvers.factors import Factors
from tests.models import batch, tiny

HEADS = {
    "llama": ("causal_lm", {}, 1),
    "gpt2": ("causal_lm", {}, 1),
    "gemma2": ("causal_lm", {"final_logit_softcapping": 2.0}, 1),
    "granite": ("causal_lm", {"logits_scaling": 4.0}, 1),
    "opt": ("causal_lm", {}, 1),
    "gpt_neox": ("causal_lm", {}, 1),
    "phi3": ("causal_lm", {}, 1),
    "bert": ("masked_lm", {}, 0),
    "roberta": ("masked_lm", {}, 0),
    "distilbert": ("masked_lm", {}, 0),
    "electra": ("masked_lm", {}, 0),
    "albert": ("masked_lm", {}, 0),
    "modernbert": ("masked_lm", {}, 0),
    "deberta_v2": ("masked_lm", {}, 0),
    "t5": ("seq2seq_lm", {}, 0),
    "bart": ("seq2seq_lm", {}, 0),
}
"""Name -> head, changes of the config, how many tokens on the labels of its own loss are."""


def make(name):
    head, changes, _ = HEADS[name]
    model = tiny(name, head=head, **changes)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("name", HEADS)
class TestEveryVocabularyHead:
    def test_is_repeated_from_what_it_is_handed(self, name):
        model = make(name)
        inputs = batch(model)
        with torch.no_grad():
            expected = model(**inputs).logits
            with withhold_logits(model) as call:
                withheld = model(**inputs)
        assert withheld.logits.shape == (1, 1, expected.shape[-1])
        torch.testing.assert_close(call.logits(), expected)
        torch.testing.assert_close(model(**inputs).logits, expected)

    def test_and_its_own_loss_are_recognised(self, name):
        model = make(name).train()
        assert why_not_repeated(model) is None
        assert label_shift_of(model) == HEADS[name][2]


def test_modes_and_hooks_are_as_before_after_reading():
    model = tiny("bert", head="masked_lm").train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    why_not_repeated(model)
    label_shift_of(model)
    assert [module.training for module in model.modules()] == before
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_hook_is_gone_after_an_error():
    model = tiny("llama", head="causal_lm")
    with pytest.raises(RuntimeError, match="stop"), withhold_logits(model):
        raise RuntimeError("stop")
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_factored_head_is_handed_on_by_its_second_factor():
    model = tiny("llama", head="causal_lm", tie_word_embeddings=False)
    weight = model.lm_head.weight.detach()
    model.lm_head = makd.LowRankLinear.from_factors(Factors(expand=weight[:, :8], reduce=weight[:8], error=0.0), None)
    inputs = batch(model)
    with torch.no_grad(), withhold_logits(model) as call:
        model(**inputs)
    assert call.inputs.shape[-1] == 8
    torch.testing.assert_close(call.logits(), model(**inputs).logits)
    assert why_not_repeated(model) is None


@pytest.mark.parametrize("head", ["base", "sequence_classification", "token_classification", "question_answering"])
def test_heads_over_labels_are_no_vocabulary_heads(head):
    assert not has_vocabulary_head(tiny("bert", head=head))
    assert has_vocabulary_head(tiny("bert", head="masked_lm"))


def test_logits_that_are_more_than_the_head_says_are_noticed():
    model = tiny("llama", head="causal_lm")
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.sin())
    assert "more than its head" in why_not_repeated(model)


def test_a_loss_that_is_more_than_the_cross_entropy_is_noticed():
    model = tiny("llama", head="causal_lm")
    model.loss_function = lambda logits, labels, **_: nn.functional.cross_entropy(logits[0], labels[0]) + 1
    assert why_not_repeated(model) is None
    assert label_shift_of(model) is None


def test_a_model_that_makes_logits_of_labelled_tokens_alone_is_recognised():
    model = tiny("modernbert", head="masked_lm", sparse_prediction=True)
    assert why_not_repeated(model) is None
    assert label_shift_of(model) == 0


def test_what_a_head_is_handed_is_brought_to_its_weight():
    """In a model that is spread over devices a tied head is with the embeddings; `meta` stands for another device."""
    model = tiny("llama", head="causal_lm")
    model.lm_head.to("meta")
    with torch.no_grad(), withhold_logits(model) as call:
        model(**batch(model))
    assert call.inputs.device == call.head.weight.device
