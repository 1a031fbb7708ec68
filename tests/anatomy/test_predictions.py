"""What heads predict: every known one by what it predicts, and no unknown one by a guess."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    XLNetConfig,
    XLNetForQuestionAnswering,
)
from transformers.models.auto import modeling_auto

import makd
from makd.anatomy import check_predictions, predictions_of, resolve
from makd.aspects import activate
from makd.capture import label_shift_of
from makd.errors import SettingError, UnsupportedModelError
from tests.models import ENCODER, batch, tiny

SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}
NUMBERS = {"num_labels": 3, "problem_type": "regression"}


@pytest.mark.parametrize(
    ("head", "settings", "target", "each"),
    [
        ("sequence_classification", {"num_labels": 3}, "classes", "row"),
        ("sequence_classification", SEVERAL, "labels", "row"),
        ("sequence_classification", {**SEVERAL, "num_labels": 1}, "labels", "row"),
        ("sequence_classification", NUMBERS, "numbers", "row"),
        ("sequence_classification", {"num_labels": 1}, "numbers", "row"),
        ("token_classification", {"num_labels": 3}, "classes", "token"),
        ("token_classification", {"num_labels": 1}, "numbers", "token"),
        ("question_answering", {}, "places", "row"),
        ("masked_lm", {}, "classes", "token"),
    ],
)
def test_a_head_is_read_by_its_class_and_config(head, settings, target, each):
    model = tiny("bert", head, **settings)
    found = predictions_of(model)
    assert (found.target, found.each) == (target, each)
    assert resolve(model).predictions == found
    check_predictions(model)


@pytest.mark.parametrize(("name", "head"), [("llama", "causal_lm"), ("t5", "seq2seq_lm"), ("bart", "seq2seq_lm")])
def test_language_models_choose_one_token_of_a_vocabulary(name, head):
    found = predictions_of(tiny(name, head))
    assert (found.target, found.each, found.size) == ("classes", "token", None)


@pytest.mark.parametrize(
    ("name", "head"),
    [("gemma3_images", "causal_lm"), ("bert_generation", "causal_lm"), ("bert", "causal_lm"), ("bert", "masked_lm"),
     ("llama", "causal_lm"), ("gpt2", "causal_lm"), ("t5", "seq2seq_lm"), ("bart", "seq2seq_lm"),
     ("t5gemma", "seq2seq_lm")],
)  # fmt: skip
def test_a_language_models_predictions_are_of_the_labels_that_its_own_loss_looks_at(name, head):
    model = tiny(name, head)
    assert predictions_of(model).label_shift == label_shift_of(model)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_a_model_without_a_head_predicts_nothing(name):
    assert predictions_of(tiny(name)) is None


def test_every_language_model_of_transformers_is_known():
    for names in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for entry in names.values():
            for name in [entry] if isinstance(entry, str) else entry:
                cls = type(name, (PreTrainedModel,), {})
                model = cls.__new__(cls)
                model.config = PreTrainedConfig()
                assert predictions_of(model).target == "classes", name


def test_a_class_of_ones_own_is_read_as_what_it_inherits():
    class Mine(BertForSequenceClassification):
        pass

    assert predictions_of(Mine(BertConfig(**ENCODER, **SEVERAL))).target == "labels"


def test_next_sentences_are_one_of_two_classes():
    model = BertForNextSentencePrediction(BertConfig(**ENCODER))
    assert (predictions_of(model).target, predictions_of(model).size) == ("classes", 2)
    check_predictions(model)


class TestUnknownHeads:
    @pytest.mark.parametrize("cls", [BertForPreTraining, BertForMultipleChoice])
    def test_are_refused_before_any_work_with_what_to_do(self, cls):
        with pytest.raises(UnsupportedModelError, match=f"{cls.__name__} predicts.*recipe.head"):
            check_predictions(cls(BertConfig(**ENCODER)))

    def test_have_no_logits_term(self):
        plan = activate(makd.Plan(preset="full"), resolve(BertForPreTraining(BertConfig(**ENCODER))))
        assert "BertForPreTraining predicts" in plan.off["logits"]
        assert {"hidden", "matrix", "attention"} <= {active.name for active in plan.terms}

    def test_are_refused_by_fidelity(self):
        model = BertForPreTraining(BertConfig(**ENCODER))
        with pytest.raises(UnsupportedModelError, match="neither taught nor measured"):
            makd.fidelity(model, model, [batch(model)])

    def test_are_refused_by_a_run_before_its_output_is_made(self, tmp_path, tokenizer):
        model = BertForPreTraining(BertConfig(**ENCODER | {"vocab_size": 300}))
        with pytest.raises(UnsupportedModelError, match="BertForPreTraining"):
            makd.compress(
                model, ["a text", "another"], makd.Budget(keep_linears=0.5), output=tmp_path / "o", tokenizer=tokenizer
            )
        assert not list(tmp_path.iterdir())

    def test_a_problem_type_that_a_head_does_not_have_is_unknown(self):
        found = predictions_of(tiny("bert", "token_classification", problem_type="multi_label_classification"))
        assert (found.target, "multi_label" in found.reason) == ("unknown", True)

    def test_an_output_that_is_not_what_the_class_says_is_told(self):
        settings = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}
        with pytest.raises(UnsupportedModelError, match="no start_logits"):
            check_predictions(XLNetForQuestionAnswering(XLNetConfig(**settings)))


class TestPairs:
    def why(self, ours, theirs):
        student, teacher = (tiny("bert", "sequence_classification", **settings) for settings in (ours, theirs))
        with pytest.raises(SettingError) as error:
            makd.fidelity(student, teacher, [batch(student)])
        assert "logits" in activate(makd.Plan(), resolve(student), resolve(teacher)).off
        return str(error.value)

    def test_that_predict_otherwise_are_not_compared(self):
        assert "student predicts classes of each row, its teacher labels" in self.why({"num_labels": 3}, SEVERAL)

    def test_with_other_numbers_of_classes_are_not_compared(self):
        assert "3 classes, its teacher 4" in self.why({"num_labels": 3}, {"num_labels": 4})

    def test_with_the_classes_in_another_order_are_not_compared(self):
        names = [{"id2label": dict(enumerate(order)), "label2id": {}} for order in ("ab", "ba")]
        assert "student's classes are a, b, in this order, its teacher's b, a" in self.why(*names)


def test_electras_discriminator_says_yes_or_no_of_each_token():
    model = ElectraForPreTraining(ElectraConfig(**ENCODER, embedding_size=16)).eval()
    inputs = batch(model)
    predictions = predictions_of(model)
    assert (predictions.target, predictions.each) == ("labels", "token")
    output = model(**inputs)
    real = inputs["attention_mask"].bool()
    rows = predictions.rows(output, real)
    assert rows.shape == (int(real.sum()), 2)
    torch.testing.assert_close(rows.softmax(-1)[:, 0], output.logits[real].sigmoid())
