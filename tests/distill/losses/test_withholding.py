"""Training without the logits of a whole batch is training with them."""

import logging
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import makd
from makd.aspects import vocabulary
from makd.distill import DistillTrainer
from makd.solvers.factors import Factors
from tests.distill.test_trainer import make_arguments, make_rows, same_weights
from tests.models import VOCABULARY, batch, tiny

MODELS = {
    "llama": ("causal_lm", {}),
    "gpt2": ("causal_lm", {}),
    "gemma2": ("causal_lm", {"final_logit_softcapping": 2.0}),
    "granite": ("causal_lm", {"logits_scaling": 4.0}),
    "bert": ("masked_lm", {}),
    "t5": ("seq2seq_lm", {}),
    "bart": ("seq2seq_lm", {}),
}
PLANS = {
    "preset": "full",
    "two and the task": makd.Plan(
        terms=(
            makd.Term(aspect="logits", temperature=2.0, weight=3.0),
            makd.Term(aspect="logits", divergence="jsd", beta=0.3),
            makd.Term(aspect="task", weight=0.5),
        )
    ),
    "hidden": makd.Plan(terms=(makd.Term(aspect="hidden"),)),
}


def make_pair(name, **changes):
    head, settings = MODELS[name]
    teacher = tiny(name, head=head, **(settings | changes))
    return teacher, makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def make_trainer(folder, name="llama", plan="full", pair=None, **settings):
    teacher, student = pair or make_pair(name)
    rows = make_rows()
    rows = rows.add_column("labels", rows["input_ids"])
    return DistillTrainer(student, teacher, plan, args=make_arguments(folder, **settings), train_dataset=rows)


def labelled(model):
    inputs = batch(model)
    target = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    mask = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    inputs["labels"] = torch.where(inputs[mask].bool(), inputs[target].roll(1, 0), -100)
    return inputs


def losses_and_gradients(trainer, inputs):
    """What is logged, what is minimised, and its gradients."""
    model = trainer.model
    model.zero_grad()
    total = trainer.compute_loss(model.train(), dict(inputs))
    total.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return trainer.learned.take(trainer.args.device), total.detach(), gradients


def assert_near(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = max(1e-3, float(abs(torch.as_tensor(other[name])).max()))
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_dense_way(name, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_BYTES", 4 * 7 * VOCABULARY)
    trainer = make_trainer(tmp_path, name, plan)
    assert (
        trainer.distillation_forward.label_shift == {"causal_lm": 1}.get(MODELS[name][0], 0) or plan is PLANS["hidden"]
    )
    inputs = labelled(trainer.model)
    logged, total, gradients = losses_and_gradients(trainer, inputs)
    trainer.distillation_forward = replace(trainer.distillation_forward, label_shift=None)
    dense_logged, dense_total, dense_gradients = losses_and_gradients(trainer, inputs)
    assert_near(logged, dense_logged, 1e-5)
    torch.testing.assert_close(total, dense_total, rtol=1e-5, atol=1e-6)
    used = {name: gradient for name, gradient in dense_gradients.items() if name in gradients or gradient.any()}
    assert_near(gradients, used, 1e-4)


class SeesLogits(TorchDispatchMode):
    """Elements of the largest tensor that ends in the vocabulary."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_no_logits_of_a_whole_batch_are_made(name, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_CHUNK_BYTES", 4 * 3 * VOCABULARY)
    # feed-forwards as wide as the vocabulary would look like logits; the weight's transpose is (32, vocabulary)
    wide = {"t5": {"d_ff": 48}}.get(name, {"intermediate_size": 48})
    trainer = make_trainer(tmp_path, plan=plan, pair=make_pair(name, **wide))
    inputs = labelled(trainer.model)
    inputs = {key: value.repeat(3, 1) for key, value in inputs.items()}
    tokens = inputs["labels"].numel()
    with SeesLogits() as seen:
        trainer.compute_loss(trainer.model.train(), inputs).backward()
    assert seen.elements <= 32 * VOCABULARY < tokens * VOCABULARY
    trainer.distillation_forward = replace(trainer.distillation_forward, label_shift=None)
    with SeesLogits() as seen:
        trainer.compute_loss(trainer.model.train(), inputs)
    assert seen.elements >= tokens * VOCABULARY


def gradients_as_of_whole_logits(trainer, student):
    """Those without logits, which are the same with them."""
    inputs = labelled(student)
    _, _, gradients = losses_and_gradients(trainer, inputs)
    trainer.distillation_forward = replace(trainer.distillation_forward, label_shift=None)
    _, _, dense = losses_and_gradients(trainer, inputs)
    assert_near(gradients, dense, 1e-4)
    return gradients


def test_a_tied_embedding_is_trained_through_both_its_uses(tmp_path):
    teacher, student = make_pair("llama", tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    trainer = make_trainer(tmp_path, pair=(teacher, student), plan=PLANS["two and the task"])
    gradients = gradients_as_of_whole_logits(trainer, student)
    assert gradients["model.embed_tokens.weight"].abs().max() > 0


def test_a_factored_head_is_trained_in_both_factors(tmp_path):
    teacher, student = make_pair("llama", tie_word_embeddings=False)
    weight = student.lm_head.weight.detach().clone()
    student.lm_head = makd.LowRankLinear.from_factors(Factors(expand=weight[:, :8], reduce=weight[:8], error=0.0), None)
    trainer = make_trainer(tmp_path, pair=(teacher, student))
    assert trainer.distillation_forward.label_shift == 1
    gradients = gradients_as_of_whole_logits(trainer, student)
    assert gradients["lm_head.reduce.weight"].abs().max() > 0


def test_only_what_is_trained_gets_a_gradient(tmp_path):
    teacher, student = make_pair("llama", tie_word_embeddings=False)
    student.lm_head.weight.requires_grad_(False)
    _, _, gradients = losses_and_gradients(make_trainer(tmp_path, pair=(teacher, student)), labelled(student))
    assert "lm_head.weight" not in gradients
    assert gradients["model.embed_tokens.weight"].abs().max() > 0


def test_accumulation_checkpointing_and_autocast_go_on_working(tmp_path):
    plan = PLANS["two and the task"]  # each a mean over tokens of equally long rows, so a mean of means is the mean
    plain = make_trainer(tmp_path / "a", plan=plan, max_steps=2, per_device_train_batch_size=4)
    settings = [
        {"activation_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ]
    plain.train()
    expected = plain.state.log_history[0]
    for number, changes in enumerate(settings):
        trainer = make_trainer(tmp_path / str(number), plan=plan, max_steps=2, **changes)
        trainer.train()
        found = trainer.state.log_history[0]
        for name in ("logits", "task", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=0.05 if "bf16" in changes else 2e-3), changes


def test_the_same_seed_gives_the_same_student(tmp_path):
    one, other = (make_trainer(tmp_path / name, "gpt2") for name in "ab")
    for trainer in (one, other):
        trainer.train()
    assert same_weights(one.model, other.model)


def test_evaluation_gives_logits_when_metrics_ask_for_them_and_only_then(tmp_path):
    trainer = make_trainer(tmp_path)
    model, inputs = trainer.model, labelled(trainer.model)
    expected = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    loss, logits, labels = trainer.prediction_step(model, inputs, prediction_loss_only=False)
    torch.testing.assert_close(logits, expected.detach())
    assert torch.equal(labels, inputs["labels"])
    alone, nothing, _ = trainer.prediction_step(model, inputs, prediction_loss_only=True)
    assert nothing is None
    torch.testing.assert_close(alone, loss)


def test_the_decoders_inputs_are_made_from_labels_where_the_batch_has_none(tmp_path):
    trainer = make_trainer(tmp_path, "t5", PLANS["two and the task"])
    inputs = labelled(trainer.model)
    given = dict(inputs, decoder_input_ids=trainer.model.prepare_decoder_input_ids_from_labels(inputs["labels"]))
    del inputs["decoder_input_ids"]
    losses = [trainer.compute_loss(trainer.model, dict(batch)) for batch in (given, inputs)]
    torch.testing.assert_close(*losses)


def test_a_model_that_makd_cannot_repeat_makes_its_logits_and_the_log_says_why(tmp_path, caplog):
    teacher, student = make_pair("llama")
    student.lm_head.register_forward_hook(lambda _module, _inputs, output: output.sin())
    with caplog.at_level(logging.WARNING, "makd"):
        trainer = make_trainer(tmp_path, pair=(teacher, student))
    assert trainer.distillation_forward.label_shift is None
    assert "makes the logits of all tokens" in caplog.text
    assert losses_and_gradients(trainer, labelled(student))[0]["logits"] > 0


def test_classification_keeps_its_logits_and_takes_any_divergence(tmp_path):
    teacher = tiny("bert", head="sequence_classification")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    plan = makd.Plan(terms=(makd.Term(aspect="logits", divergence="total_variation"),))
    trainer = DistillTrainer(student, teacher, plan, args=make_arguments(tmp_path), train_dataset=Dataset.from_dict({}))
    assert trainer.distillation_forward.label_shift is None
    inputs = batch(student)
    loss = trainer.compute_loss(student, dict(inputs))
    p, q = (model(**inputs).logits.softmax(-1) for model in (teacher, student))
    torch.testing.assert_close(loss, (p - q).abs().sum(-1).mean() / 2)


def test_labels_that_are_not_of_tokens_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, "bert")
    inputs = dict(batch(trainer.model), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(makd.MakdError, match=r"shape \(4,\).*\(4, 12\)"):
        trainer.compute_loss(trainer.model, inputs)


def test_a_loss_of_other_tokens_than_the_class_says_is_refused(tmp_path):
    teacher, student = make_pair("llama")
    student.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(logits[0], labels[0])
    with pytest.raises(makd.MakdError, match=r"looks at the label 0 tokens further on, .* the token 1 further on"):
        make_trainer(tmp_path, pair=(teacher, student))
