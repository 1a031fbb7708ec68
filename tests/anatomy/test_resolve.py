"""From a model to its anatomy: heads, missing stacks, students, unknown architectures."""

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import makd
from makd.anatomy import Role, linear_shape, resolve
from makd.errors import UnsupportedModelError
from makd.student.linear import LowRankLinear
from tests.anatomy.recording import watch
from tests.models import AUTO, BART, CONFIGS, DECODER, ENCODER, T5, batch, tiny

XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}


def offers(name, head):
    """Whether transformers has a model of this kind with this head."""
    prefix, _ = CONFIGS[name]
    return getattr(transformers, f"{prefix}Config") in AUTO[head]._model_mapping


# The base model is among them: it has no head
WITH_HEAD = [(name, head) for name in CONFIGS for head in AUTO if offers(name, head)]


def inputs_for(model):
    """A batch; sequence classifiers of encoder-decoders make their own target tokens, and need one end in each row."""
    inputs = batch(model)
    if model.config.is_encoder_decoder and "SequenceClassification" in type(model).__name__:
        inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
        inputs["input_ids"][:, 3] = model.config.eos_token_id
    return inputs


class TestHeads:
    @pytest.mark.parametrize(("name", "head"), WITH_HEAD)
    def test_names_lead_to_the_same_linears_under_every_head(self, name, head):
        base, model = tiny(name), tiny(name, head)
        inside = model.base_model
        prefix = "" if inside is model else f"{model.base_model_prefix}."
        expected = [prefix + linear for linear in resolve(base).linears]
        found = list(resolve(model).linears)
        # bart's causal_lm has no encoder, t5's token_classification no decoder
        assert found == [linear for linear in expected if linear in found]
        assert {linear.split(".")[-1] for linear in found} == {linear.split(".")[-1] for linear in expected}
        assert all(linear_shape(model.get_submodule(linear)) for linear in found)

    @pytest.mark.parametrize(
        ("name", "head"),
        # MobileBERT puts its LM head together of two weights
        [pair for pair in WITH_HEAD if pair[1] != "base" and pair != ("mobilebert", "masked_lm")],
    )
    def test_the_head_is_the_module_that_gives_the_logits(self, name, head):
        model = tiny(name, head)
        named = resolve(model).head
        given = []
        model.get_submodule(named).register_forward_hook(lambda _module, _inputs, output: given.append(output))
        with torch.no_grad():
            output = model(**inputs_for(model))
        (logits,) = given
        if head == "question_answering":
            expected = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            expected = output.logits
        if name == "gemma2" and head == "causal_lm":
            cap = model.config.final_logit_softcapping
            logits = cap * torch.tanh(logits / cap)
        if logits.ndim > expected.ndim:  # decoders score every token and keep the last that is not padding
            last = batch(model)["attention_mask"].sum(dim=1) - 1
            torch.testing.assert_close(logits[torch.arange(len(last)), last], expected)
        else:
            torch.testing.assert_close(logits, expected)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_base_model_has_no_head(self, name):
        assert resolve(tiny(name)).head is None

    @pytest.mark.parametrize(
        ("build", "head"),
        [
            (lambda: transformers.BertForPreTraining(transformers.BertConfig(**ENCODER)), "cls.predictions.decoder"),
            (lambda: transformers.BertForMultipleChoice(transformers.BertConfig(**ENCODER)), "classifier"),
            (
                lambda: transformers.ElectraForPreTraining(transformers.ElectraConfig(**ENCODER)),
                "discriminator_predictions",
            ),
        ],
    )
    def test_heads_outside_the_auto_classes_are_found(self, build, head):
        assert resolve(build()).head == head


class TestStacks:
    def test_an_encoder_decoder_has_the_encoder_first(self):
        anatomy = resolve(tiny("t5", "seq2seq_lm"))
        assert [layer.stack for layer in anatomy.layers] == ["encoder", "encoder", "decoder", "decoder"]
        assert [layer.index for layer in anatomy.layers] == [0, 1, 2, 3]
        assert anatomy.is_encoder_decoder

    def test_t5_without_its_decoder_is_an_encoder(self):
        anatomy = resolve(transformers.T5EncoderModel(transformers.T5Config(**T5)))
        assert [layer.module for layer in anatomy.layers] == ["encoder.block.0", "encoder.block.1"]
        assert not anatomy.is_encoder_decoder

    def test_bart_without_its_encoder_is_a_decoder(self):
        anatomy = resolve(transformers.BartForCausalLM(transformers.BartConfig(**BART)))
        assert [layer.module for layer in anatomy.layers] == ["model.decoder.layers.0", "model.decoder.layers.1"]
        assert not anatomy.is_encoder_decoder

    def test_a_model_without_layers_is_an_error_that_says_so(self):
        with pytest.raises(UnsupportedModelError, match="no layers"):
            resolve(tiny("bert", num_hidden_layers=0))

    def test_linears_that_no_role_names_are_in_the_notes(self):
        config = transformers.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
        anatomy = resolve(transformers.BertLMHeadModel(config))
        assert len(anatomy.linears) == 2 * 6
        (note,) = anatomy.notes
        assert "crossattention.self.query" in note
        assert "attention.self.query," not in note.replace("crossattention", "")

    def test_a_linear_that_is_not_where_the_family_keeps_it_is_named_in_the_error(self):
        model = tiny("llama")
        del model.layers[1].mlp.up_proj
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj.*'up'.*anatomy/table"):
            resolve(model)


class TestStudents:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_a_student_has_the_anatomy_of_its_teacher(self, name):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd")
        assert any(isinstance(module, LowRankLinear) for module in student.modules())
        assert resolve(student) == resolve(teacher)

    def test_a_fully_factored_student_of_an_unknown_architecture_has_its_anatomy_too(self):
        teacher = Unknown(UnknownConfig())
        before = resolve(teacher)
        for linear in before.linears:
            out_features, in_features = linear_shape(teacher.get_submodule(linear))
            teacher.set_submodule(linear, LowRankLinear(in_features, out_features, rank=2))
        assert resolve(teacher) == before


class TestLinearShape:
    @pytest.mark.parametrize(
        "linear", [nn.Linear(3, 5), Conv1D(5, 3), LowRankLinear(3, 5, rank=2)], ids=lambda linear: type(linear).__name__
    )
    def test_it_is_out_and_in(self, linear):
        assert linear_shape(linear) == (5, 3)
        assert linear(torch.zeros(2, 3)).shape == (2, 5)

    def test_a_module_that_is_no_linear_is_an_error_that_names_it(self):
        with pytest.raises(UnsupportedModelError, match="LayerNorm is not a linear"):
            linear_shape(nn.LayerNorm(3))


class UnknownConfig(PreTrainedConfig):
    model_type = "unknown-to-makd"

    def __init__(self, stacks=1, **settings):
        super().__init__(**settings)
        self.stacks = stacks


class UnknownAttention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, hidden):
        scores = self.q_proj(hidden) @ self.k_proj(hidden).transpose(-1, -2)
        return self.out_proj(scores.softmax(-1) @ self.v_proj(hidden))


class UnknownLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = UnknownAttention()
        self.fc1, self.fc2, self.mystery = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, hidden):
        return self.mystery(self.fc2(self.fc1(self.attention(hidden)).relu()))


class Unknown(PreTrainedModel):
    config_class = UnknownConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(16, 8)
        self.stacks = nn.ModuleDict(
            {f"tower{index}": nn.ModuleList(UnknownLayer() for _ in range(3)) for index in range(config.stacks)}
        )
        self.post_init()

    def forward(self, input_ids):
        hidden = self.words(input_ids)
        for layer in self.stacks["tower0"]:
            hidden = layer(hidden)
        return hidden


class TestUnknownArchitectures:
    def test_layers_and_roles_are_read_from_the_structure(self):
        model = Unknown(UnknownConfig()).eval()
        anatomy = resolve(model)
        seen = watch(model, {"input_ids": torch.arange(4)[None]})
        modules = [layer.module for layer in anatomy.layers]
        assert [called for called in seen.order if called in modules] == modules == [
            f"stacks.tower0.{index}" for index in range(3)
        ]  # fmt: skip
        assert {role.value: linear.module for role, linear in anatomy.layers[1].roles.items()} == {
            "q": "stacks.tower0.1.attention.q_proj",
            "k": "stacks.tower0.1.attention.k_proj",
            "v": "stacks.tower0.1.attention.v_proj",
            "o": "stacks.tower0.1.attention.out_proj",
            "up": "stacks.tower0.1.fc1",
            "down": "stacks.tower0.1.fc2",
        }

    def test_what_was_read_and_what_was_not_is_in_the_notes(self):
        anatomy = resolve(Unknown(UnknownConfig()))
        assert anatomy.family == "resolved from structure"
        notes = "\n".join(anatomy.notes)
        assert "'unknown-to-makd'" in notes
        assert "3 layers in stacks.tower0" in notes
        assert "mystery" in notes
        assert "embeddings" in notes

    def test_attention_is_off_if_it_does_not_go_through_the_interface(self):
        anatomy = resolve(Unknown(UnknownConfig()))
        assert "attention interface" in anatomy.off["attention"]
        assert all(layer.attention is None for layer in anatomy.layers)

    def test_attention_is_found_if_it_goes_through_the_interface(self):
        model = transformers.StableLmForCausalLM(transformers.StableLmConfig(**DECODER)).eval()
        anatomy = resolve(model)
        seen = watch(model, batch(model))
        assert anatomy.off == {}
        assert [call.module for call in seen.attention] == [
            model.get_submodule(layer.attention) for layer in anatomy.layers
        ]
        assert (anatomy.head, anatomy.embeddings) == ("lm_head", ("model.embed_tokens",))
        assert Role.GATE in anatomy.layers[0].roles

    def test_two_lists_of_layers_are_ambiguous_and_the_error_names_both(self):
        with pytest.raises(UnsupportedModelError, match=r"stacks\.tower0, stacks\.tower1.*anatomy/table") as caught:
            resolve(Unknown(UnknownConfig(stacks=2)))
        assert "llama" in str(caught.value)

    def test_an_encoder_decoder_is_never_read_half(self):
        with pytest.raises(UnsupportedModelError, match=r"'unknown-to-makd'.*encoder-decoder.*anatomy/table"):
            resolve(Unknown(UnknownConfig(is_encoder_decoder=True)))

    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (lambda: transformers.WhisperModel(transformers.WhisperConfig(**BART)), "reads sound, not token ids"),
            (lambda: transformers.XLNetModel(transformers.XLNetConfig(**XLNET)), "bare parameters"),
            (
                lambda: transformers.MambaModel(transformers.MambaConfig(**ENCODER)),
                "not all of its layers have attention",
            ),
        ],
    )
    def test_a_type_that_no_row_can_describe_is_refused_with_its_reason(self, build, reason):
        with pytest.raises(UnsupportedModelError, match=reason):
            resolve(build())

    def test_experts_are_not_taken_for_a_feed_forward(self):
        for layer in (*resolve(tiny("mixtral")).layers, *resolve(tiny("granitemoeshared")).layers):
            assert list(layer.roles) == [Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT]

    def test_layers_with_and_without_experts_have_the_roles_that_each_has(self):
        dense, mixture = resolve(tiny("qwen3_moe_mixed")).layers
        assert set(dense.roles) - set(mixture.roles) == {Role.GATE, Role.UP, Role.DOWN}
        dense, mixture = resolve(tiny("glm4_moe_mixed")).layers
        assert dense.roles[Role.UP].module == "layers.0.mlp.up_proj"
        assert mixture.roles[Role.UP].module == "layers.1.mlp.shared_experts.up_proj"

    def test_a_layer_that_lacks_its_feed_forward_without_experts_is_refused(self):
        model = tiny("qwen3_moe_mixed")
        model.layers[0].mlp = torch.nn.Identity()
        with pytest.raises(UnsupportedModelError, match="cannot read it from its structure"):
            resolve(model)
