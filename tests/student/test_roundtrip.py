"""That a student can be saved and loaded is known before there is one, for every architecture and every converter."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AriaTextConfig,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BigBirdConfig,
    BigBirdModel,
    Dots1Config,
    EsmConfig,
    Glm4MoeConfig,
    GteConfig,
    JinaEmbeddingsV3Config,
    NomicBertConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from transformers.core_model_loading import Chunk, WeightConverter, revert_weight_conversion

import makd
from makd.anatomy import SkippedLayer
from makd.errors import UnsupportedModelError
from makd.student.roundtrip import check_round_trip
from tests.models import CONFIGS, DECODER, RELATIVES, STRUCTURAL, batch, tiny

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONVERTED = {
    "nomic_bert": lambda: NomicBertConfig(**SMALL),
    "jina_embeddings_v3": lambda: JinaEmbeddingsV3Config(**SMALL),
    "gte": lambda: GteConfig(**SMALL),
    "esm": lambda: EsmConfig(**SMALL, position_embedding_type="rotary"),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=32, num_experts=4
    ),
    "glm4_moe": lambda: Glm4MoeConfig(**STRUCTURAL["glm4_moe"][1]),
    "aria_text": lambda: AriaTextConfig(**STRUCTURAL["aria"][1]),
    "dots1": lambda: Dots1Config(**STRUCTURAL["glm4_moe"][1]),
}
"""Types whose tensors transformers renames, splits or joins between file and memory."""


def converted(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModel.from_config(CONVERTED[name]()).eval()


@pytest.mark.parametrize("name", [*CONFIGS, *RELATIVES])
def test_every_family_can_be_saved_and_loaded(name):
    model = tiny(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    check_round_trip(model, makd.resolve(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("origin", ["built", "loaded"])
def test_a_student_of_a_model_with_converters_reloads_bit_for_bit(name, origin, tmp_path):
    teacher = converted(name)
    if origin == "loaded":  # with the conversions that were used for it
        teacher.save_pretrained(tmp_path / "teacher")
        teacher = AutoModel.from_pretrained(tmp_path / "teacher")
    check_round_trip(teacher, makd.resolve(teacher))
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.9), solver="svd")
    student.save_pretrained(tmp_path / "student")
    again = AutoModel.from_pretrained(tmp_path / "student")
    wanted, found = student.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    again.save_pretrained(tmp_path / "again")
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "again")) == makd.fingerprint(student)


@pytest.mark.parametrize("model_type", ["exaone", "internlm3", "iquestcoder", "sarvam_moe"])
def test_a_student_of_a_type_that_borrows_anothers_classes_loads_under_any_head(model_type, tmp_path):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {model_type}")
    settings = STRUCTURAL["glm4_moe"][1] if model_type == "sarvam_moe" else DECODER
    teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    student.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert makd.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == makd.fingerprint(student)
    inputs = batch(student)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], student.model(**inputs)[0])


def test_a_folded_student_of_a_model_with_converters_is_stored_as_its_teacher(tmp_path):
    teacher = converted("nomic_bert")
    teacher.save_pretrained(tmp_path / "teacher")
    teacher = AutoModel.from_pretrained(tmp_path / "teacher")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.6), solver="svd")
    folded = makd.fold(student)
    assert (
        revert_weight_conversion(folded, folded.state_dict()).keys()
        == revert_weight_conversion(teacher, teacher.state_dict()).keys()
    )
    folded.save_pretrained(tmp_path / "folded")
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "folded")) == makd.fingerprint(folded)


def test_what_cannot_be_saved_is_refused_before_any_work(monkeypatch):
    from makd.student import hub

    def undoes_conversions(model):  # as transformers does where nothing else is said
        return [WeightConverter("qkv.weight", ["query.expand.weight", "key.expand.weight"], [Chunk(dim=0)])]

    monkeypatch.setattr(hub, "file_names", lambda model: undoes_conversions(model)[0])
    with pytest.raises(UnsupportedModelError, match="A student of BertModel could be saved but not loaded again"):
        makd.factorize(tiny("bert"), makd.Budget(keep_linears=0.5), solver="svd")


def test_a_dropped_layer_of_big_bird_does_not_mind_what_kind_of_attention_it_is_told(tmp_path):
    torch.manual_seed(0)
    config = BigBirdConfig(**{**SMALL, "num_hidden_layers": 4, "block_size": 2, "num_random_blocks": 1})
    teacher = BigBirdModel(config).eval()
    teacher.set_attention_type("original_full")  # of block_sparse, with its padding, no text can say what to drop
    inputs = batch(teacher)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", depth=3, calibration=[inputs])
    assert any(isinstance(layer, SkippedLayer) for layer in student.encoder.layer)
    student.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attention_type="block_sparse")
    assert again.attention_type == "block_sparse"  # the first forward changes it, of all layers
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], student(**inputs)[0])
