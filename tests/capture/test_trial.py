"""What a trial forward promises for every type: copies are equal, padding has no influence, or it is off and said."""

import copy
import re

import numpy as np
import pytest
import torch
import transformers

import makd
from makd.anatomy import Role, resolve
from makd.aspects import Plan, Term, activate
from makd.calibration.gradients import collect_gradient_moments
from makd.calibration.statistics import collect_input_moments
from makd.capture import capture, examine
from makd.distill.losses.layers import LayerLosses
from makd.errors import UnsupportedModelError
from tests.flash import set_flash
from tests.models import AUTO, CONFIGS, ENCODER, RELATIVES, STRUCTURAL, batch, tiny

NAMES = (*CONFIGS, *RELATIVES, *STRUCTURAL)
OWN_ATTENTION = "does not go through transformers' attention interface"
OUTSIDE = "outside the attention interface"
PADDED = r"have the shape \(\d+, \d+, \d+\), where batch and tokens are \(3, \d+, \.\.\.\)"
OFF = {
    **{
        name: {"attention": OWN_ATTENTION}
        for name in ("convbert", "lilt", "megatron_bert", "mpnet", "nystromformer", "rembert", "roformer", "tapas",
                     "visual_bert", "xglm", "yoso")
    },
    **{
        name: {"attention": OUTSIDE}
        for name in ("deberta", "deberta_v2", "bloom", "mpt", "openai_gpt", "gpt_neo", "gpt_neox_japanese", "ctrl",
                     "longt5", "longt5_global", "mvp", "bigbird_pegasus")
    },
    **{
        name: {"attention": OUTSIDE, "matrix": r"dense_4h_to_h \(down\) are changed in place"}
        for name in ("falcon", "falcon_multi_query", "falcon_alibi")
    },
    **{
        name: {"attention": OUTSIDE, "matrix": PADDED, "relation": PADDED, "hidden": PADDED}
        for name in ("led", "pegasus_x", "prophetnet")
    },
    "gpt_oss": {"attention": "sinks"},
    "doge": {"attention": "never given"},
    "llama4": {"matrix": r"shared_expert\.down_proj \(down\) are changed in place"},
    "gemma3n": {"hidden": r"shape \(2, 3, 7, 32\)"},
    "longformer": {"attention": OWN_ATTENTION, "matrix": PADDED, "relation": PADDED, "hidden": PADDED},
    "big_bird": {"attention": OWN_ATTENTION, "matrix": PADDED, "relation": PADDED, "hidden": PADDED},
}  # fmt: skip
"""Name -> aspects that are off, with what the reason says; all other types have none."""
SOLVERS_OFF = {
    **{name: {"in_forward_order"} for name in ("llama4", "falcon", "falcon_multi_query", "falcon_alibi")},
    **{name: {"inputs", "gradients", "in_forward_order"} for name in ("led", "pegasus_x", "prophetnet")},
    "gemma3n": {"in_forward_order"},
    "longformer": {"inputs", "gradients", "in_forward_order"},
    "big_bird": {"inputs", "gradients", "in_forward_order"},
}
READS_PADDING = ("convbert", "nystromformer", "yoso")
"""Their own outputs at real tokens depend on the ids in the padding, whatever makd does."""


def everything_on(anatomy):
    """A plan of every aspect inside the layers that is on, with every role."""
    terms = (
        Term(aspect="matrix", roles=tuple(role.value for role in Role)),
        Term(aspect="hidden"),
        Term(aspect="attention"),
        Term(aspect="relation", relation_heads=2),
    )
    return Plan(terms=(*(term for term in terms if term.aspect not in anatomy.off), Term(aspect="embedding")))


@torch.no_grad()
def losses_between(teacher, student, inputs):
    anatomy = examine(teacher)
    active = activate(everything_on(anatomy), examine(student), anatomy)
    with capture(teacher, anatomy, active.teacher_taps) as theirs:
        teacher(**inputs)
    layers = LayerLosses(anatomy, inputs, theirs, active)
    with capture(student, anatomy, active.taps, layers.receive):
        student(**inputs)
    assert layers.keys() == set(active.comparisons)
    return {comparison.tap: loss.item() for comparison, loss in layers.items()}


def perturbed(teacher):
    """A student that is near its teacher."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(1)
    for name in resolve(student).linears:
        weight = student.get_submodule(name).weight
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return student


def with_other_padding(inputs):
    changed = dict(inputs)
    for prefix in ("", "decoder_"):
        if f"{prefix}input_ids" in inputs:
            real = inputs[f"{prefix}attention_mask"].bool()
            changed[f"{prefix}input_ids"] = torch.where(real, inputs[f"{prefix}input_ids"], 9)
    assert not torch.equal(changed["input_ids"], inputs["input_ids"])
    return changed


@pytest.mark.parametrize("name", NAMES)
class TestEveryType:
    def test_what_is_off_is_known_by_name_and_has_its_reason(self, name):
        anatomy = examine(tiny(name))
        expected = OFF.get(name, {})
        assert anatomy.off.keys() == expected.keys()
        for aspect, words in expected.items():
            assert re.search(words, anatomy.off[aspect]), anatomy.off[aspect]
        assert anatomy.solvers_off.keys() == SOLVERS_OFF.get(name, set())
        assert any("depend on what stands in the padding" in note for note in anatomy.notes) == (name in READS_PADDING)

    def test_an_identical_copy_has_loss_0_for_every_aspect_that_is_on(self, name):
        teacher = tiny(name)
        for tap, loss in losses_between(teacher, copy.deepcopy(teacher), batch(teacher)).items():
            assert abs(loss) <= 1e-6, tap

    def test_other_ids_in_the_padding_change_no_loss(self, name):
        if name in READS_PADDING:
            pytest.skip("the model's own outputs depend on them")
        teacher = tiny(name)
        student = perturbed(teacher)
        inputs = batch(teacher)
        before, after = (losses_between(teacher, student, one) for one in (inputs, with_other_padding(inputs)))
        assert not before or max(before.values()) > 0.01  # the relations of a first layer without a norm are nearly 0
        for tap in before:
            assert after[tap] == pytest.approx(before[tap], rel=1e-4, abs=1e-7), tap

    def test_other_ids_in_the_padding_change_no_statistics_or_they_are_refused(self, name):
        teacher = tiny(name)
        inputs = batch(teacher)
        if "inputs" in SOLVERS_OFF.get(name, set()):
            with pytest.raises(UnsupportedModelError, match=r"cannot be used on this model.*These can: svd\."):
                makd.factorize(teacher, makd.Budget(keep_linears=0.9), calibration=[inputs])
            return
        if name in READS_PADDING:
            pytest.skip("the model's own outputs depend on them")
        anatomy = examine(teacher)
        both = [inputs, with_other_padding(inputs)]
        for collect in (collect_input_moments, collect_gradient_moments):
            before, after = (collect(teacher, anatomy, [one]) for one in both)
            for linear in anatomy.linears:
                assert before[linear].rows == after[linear].rows
                torch.testing.assert_close(after[linear].gram, before[linear].gram, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "base") for name in STRUCTURAL),
        *((name, "causal_lm") for name in ("llama4", "gemma3n", "qwen2_moe", "xglm", "doge", "cohere")),
        *((name, "causal_lm") for name in ("falcon", "bloom", "mpt", "codegen", "modernbert_decoder")),
        *((name, "seq2seq_lm") for name in ("marian", "t5gemma", "led", "prophetnet")),
        ("mobilebert", "masked_lm"),
        *((name, "masked_lm") for name in ("longformer", "big_bird", "convbert", "roformer", "nystromformer", "esm")),
        *((name, "sequence_classification") for name in ("longformer", "big_bird", "mpnet", "yoso")),
    ],
)
def test_an_identical_copy_has_loss_0_for_what_models_put_out(name, head, tmp_path):
    teacher, inputs = tiny(name, head), batch(tiny(name, head))
    aspects = ("embedding", "similarity") if head == "base" else ("logits", "task")
    if head == "sequence_classification":
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    elif head != "base":
        side = "decoder_" if head == "seq2seq_lm" else ""
        inputs["labels"] = inputs[f"{side}input_ids"].masked_fill(inputs[f"{side}attention_mask"] == 0, -100)
    plan = Plan(terms=tuple(Term(aspect=aspect) for aspect in aspects))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = makd.DistillTrainer(copy.deepcopy(teacher), teacher, plan, args=arguments)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, inputs)
    losses = trainer.evaluated.take(trainer.args.device)
    assert losses.keys() == set(aspects)
    if "task" in losses:
        with torch.no_grad():
            assert losses.pop("task") == pytest.approx(float(teacher(**inputs).loss), rel=1e-4)
    assert max(map(abs, losses.values())) <= 1e-6


class TestTheModelIsLeftAlone:
    def test_modes_gradients_hooks_and_random_numbers_are_as_they_were(self):
        model = tiny("llama", "causal_lm").train()
        model.model.layers[0].eval()
        model.model.embed_tokens.weight.requires_grad_(False)
        torch.manual_seed(3), np.random.seed(3)
        expected = torch.rand(1).item(), np.random.rand()
        torch.manual_seed(3), np.random.seed(3)
        examine(model)
        assert (torch.rand(1).item(), np.random.rand()) == expected
        assert model.training
        assert not model.model.layers[0].training
        assert not model.model.embed_tokens.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_model_that_changes_itself_in_a_short_forward_does_not(self):
        model = tiny("big_bird", max_position_embeddings=32)  # too few for a row that it reads in blocks
        examine(model)
        assert model.attention_type == "block_sparse"

    def test_several_tokens_that_end_a_text_are_left_out_of_it(self):
        read = []
        model = tiny("llama", "causal_lm", eos_token_id=[3, 4, 5])
        model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        examine(model)
        assert read
        assert not set(torch.cat([ids.flatten() for ids in read]).tolist()) & {3, 4, 5}

    def test_dropout_has_no_part_in_it(self):
        assert examine(tiny("bert", hidden_dropout_prob=0.5).train()).off == {}


class TestWhatIsRemembered:
    def count_forwards(self, monkeypatch):
        calls = []
        forward = transformers.BertModel.forward

        def counted(self, *args, **kwargs):
            calls.append(1)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(transformers.BertModel, "forward", counted)
        return calls

    def test_a_model_is_tried_once(self, monkeypatch):
        calls, model = self.count_forwards(monkeypatch), tiny("bert")
        first = examine(model)
        tried = len(calls)
        assert examine(model) is first
        assert len(calls) == tried == 2

    def test_it_is_tried_again_when_its_attention_is_another(self, monkeypatch):
        calls, model = self.count_forwards(monkeypatch), tiny("bert")
        examine(model)
        model.set_attn_implementation("eager")
        examine(model)
        assert len(calls) == 4

    def test_nothing_keeps_a_model_alive(self):
        from makd.capture import trial

        model = tiny("bert")
        examine(model)
        before = len(trial._KNOWN)
        del model
        assert len(trial._KNOWN) < before


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_nothing_is_off_under_either_attention_implementation(name, attention):
    model = tiny(name)
    model.set_attn_implementation(attention)
    assert examine(model).off == {}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        (name, head)
        for name in ("bert", "albert", "llama", "gemma2", "t5", "bart")
        for head in AUTO
        if getattr(transformers, f"{CONFIGS[name][0]}Config") in AUTO[head]._model_mapping
        and (name, head) != ("bart", "causal_lm")
    ],
)
def test_a_head_takes_nothing_away(name, head):
    anatomy = examine(tiny(name, head))
    assert anatomy.off == anatomy.solvers_off == {}


def test_a_decoder_without_its_encoder_has_its_cross_attention_off():
    anatomy = examine(tiny("bart", "causal_lm"))
    assert "never given" in anatomy.off["attention"]
    assert "(cross_q) are never given" in anatomy.off["matrix"]


def bert_with_values_of_another_input():
    model = tiny("bert")
    attention = model.encoder.layer[1].attention.self
    attention.value.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1.0,))
    return model


def test_linears_that_do_not_read_the_same_tensor_are_no_group():
    model = bert_with_values_of_another_input()
    first, second = (f"encoder.layer.{index}.attention.self" for index in (0, 1))
    assert examine(model).input_groups == (
        (f"{first}.query", f"{first}.key", f"{first}.value"),
        (f"{second}.query", f"{second}.key"),
    )
    assert examine(tiny("mobilebert")).input_groups == resolve(tiny("mobilebert")).input_groups


def test_an_encoder_that_looks_at_the_next_token_is_said_to_read_padding():
    assert "in the padding" in examine(tiny("mobilebert", trigram_input=True)).notes[-1]


def test_without_weights_nothing_is_tried_which_a_note_says():
    with torch.device("meta"):
        model = transformers.LongformerModel(transformers.LongformerConfig(**STRUCTURAL["longformer"][1]))
    anatomy = examine(model)
    assert "no forward was tried" in anatomy.notes[-1]
    assert anatomy.off == resolve(model).off


def test_a_model_that_rolls_dice_in_eval_mode_is_said_to(monkeypatch):
    model = tiny("bert")
    embeddings = type(model.embeddings)
    forward = embeddings.forward
    monkeypatch.setattr(embeddings, "forward", lambda self, *a, **k: forward(self, *a, **k) + torch.rand(1))
    assert "two forwards of the same text differ" in examine(model).notes[-1]


def test_bigbird_on_full_attention_has_everything_but_its_own_attention():
    anatomy = examine(tiny("big_bird", attention_type="original_full"))
    assert anatomy.off.keys() == {"attention"}
    assert anatomy.solvers_off == {}


def bert_that_divides_queries_in_place(in_place):
    model = tiny("bert")
    attention = model.encoder.layer[0].attention.self

    def forward(hidden, *_args, **_named):
        query = attention.query(hidden)
        if in_place:
            query /= 2.0
        else:
            query = query / 2.0
        return query * attention.key(hidden) + attention.value(hidden), None

    attention.forward = forward
    return model


def test_solvers_that_differentiate_work_where_an_output_is_changed_in_place():
    inputs = [batch(tiny("bert"))]
    models = [bert_that_divides_queries_in_place(in_place) for in_place in (True, False)]
    ours, expected = (collect_gradient_moments(model, resolve(model), inputs) for model in models)
    for linear in expected:
        torch.testing.assert_close(ours[linear].gram, expected[linear].gram)


def refused(model):
    """The error that says why, from every way in that would trust the model's tensors."""
    inputs = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    arguments = transformers.TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    with pytest.raises(UnsupportedModelError) as caught:
        makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=[inputs])
    with pytest.raises(UnsupportedModelError):
        makd.DistillTrainer(copy.deepcopy(model), model, args=arguments)
    with pytest.raises(UnsupportedModelError):
        makd.inspect(model)
    return str(caught.value)


class TestWhatIsRefused:
    def test_a_model_of_pictures(self):
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8,
        )  # fmt: skip
        error = refused(transformers.ViTModel(config))
        assert "ViTModel cannot be run on token ids and an attention mask" in error
        assert "Give a model that reads text" in error

    def test_a_model_that_needs_more_than_ids(self):
        config = transformers.BrosConfig(**ENCODER)
        assert "You have to specify bbox" in refused(transformers.BrosModel(config))

    def test_a_text_model_that_ends_in_a_projection(self):
        config = transformers.CLIPTextConfig(**ENCODER, projection_dim=16)
        error = refused(transformers.CLIPTextModelWithProjection(config).eval())
        assert "gives (3, 16) first" in error
        assert "Load its base model" in error

    def test_a_text_model_that_ends_in_a_pooled_text(self):
        assert "gives (3, 32) first" in refused(transformers.DPRQuestionEncoder(transformers.DPRConfig(**ENCODER)))

    def test_flash_attention_in_float32(self):
        with pytest.raises(UnsupportedModelError, match=r"takes 16 bits alone, .*set_attn_implementation\('sdpa'\)"):
            examine(set_flash(tiny("llama")))
        assert "attention" not in examine(set_flash(tiny("llama").bfloat16())).off

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="there it has a backward")
    def test_flex_attention_on_the_cpu(self):
        model = tiny("bert")
        model.set_attn_implementation("flex_attention")
        assert "set_attn_implementation('sdpa')" in refused(model)

    def test_a_model_that_computes_without_gradients_has_a_solver_that_needs_none(self):
        model = transformers.MraModel(transformers.MraConfig(**ENCODER)).eval()
        with pytest.raises(UnsupportedModelError, match=r"No gradient of the model's outputs reaches .*'whitened'"):
            makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=[batch(model)])
        assert makd.factorize(model, makd.Budget(keep_linears=0.5), solver="whitened", calibration=[batch(model)])


def test_the_encoder_of_t5gemma_is_read_and_factorized():
    part = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False, vocab_size=64)
    model = transformers.T5GemmaEncoderModel(config).eval()
    assert examine(model).off == {}
    makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=[batch(model)])
