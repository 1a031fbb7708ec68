"""sentence-transformers itself opens a student, encodes with it, trains it further and saves it."""

import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import cosine_similarity

from makd.pipeline import evaluate, factorize_only
from makd.student.linear import LowRankLinear
from tests.sentence_encoder.folders import make_folder
from tests.sentence_encoder.test_students import BUDGET, HELD_OUT, RECIPE, TEXTS

pytestmark = pytest.mark.filterwarnings("default:Importing from 'sentence_transformers.models")  # in modules.json
PROMPTS = {"prompts": {"query": "find: ", "document": "a text: "}, "default_prompt_name": "document",
           "similarity_fn_name": "dot"}  # fmt: skip


def open_(folder):
    return SentenceTransformer(str(folder), device="cpu")


def encode(encoder, texts=HELD_OUT, **settings):
    return torch.tensor(encoder.encode(texts, show_progress_bar=False, **settings))


def ranks(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]


@pytest.mark.parametrize(
    ("pooling", "after", "transformer", "lower"),
    [("cls", ("Normalize",), "", True), ("mean", ("Dense", "Normalize"), "0_Transformer", False),
     ("cls+max+mean+mean_sqrt_len+weighted_mean+last", ("Dense",), "", False)],
)  # fmt: skip
def test_students_encode_as_makd_measured(tokenizer, tmp_path, pooling, after, transformer, lower):
    settings = {"max_seq_length": 9, "do_lower_case": lower}
    teacher = make_folder(tmp_path / "teacher", tokenizer, pooling, after, transformer, settings)
    report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
    ours, theirs = encode(open_(tmp_path / "student")), encode(open_(teacher))
    expected = float(cosine_similarity(ours, theirs).mean())
    assert report.metrics["fidelity"]["after"]["cosine"] == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A student with a Dense module and prompts."""
    place = tmp_path_factory.mktemp("sentence")
    teacher = make_folder(place / "teacher", tokenizer, "mean", ("Dense", "Normalize"), common=PROMPTS)
    factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, place / "student")
    return place / "student"


def test_prompts_and_similarity_are_the_teachers(folder):
    encoder = open_(folder)
    assert encoder.similarity_fn_name == "dot"
    torch.testing.assert_close(encode(encoder), encode(encoder, [f"a text: {text}" for text in HELD_OUT], prompt=""))
    torch.testing.assert_close(
        encode(encoder, prompt_name="query"), encode(encoder, [f"find: {text}" for text in HELD_OUT], prompt="")
    )


@pytest.fixture(scope="module")
def encoder(folder, tmp_path_factory):
    """The student after three steps of sentence-transformers' trainer."""
    encoder = open_(folder)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path_factory.mktemp("run")), max_steps=3, per_device_train_batch_size=8, learning_rate=1e-2,
        use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    pairs = Dataset.from_dict({"anchor": TEXTS[:30], "positive": TEXTS[30:]})
    SentenceTransformerTrainer(encoder, arguments, pairs, loss=MultipleNegativesRankingLoss(encoder)).train()
    return encoder.eval()


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    encoder.save(str(folder))
    return folder


class TestTrainedFurther:
    def test_learns_in_its_factors_and_in_its_dense_module(self, folder, encoder):
        before, after = dict(open_(folder).named_parameters()), dict(encoder.named_parameters())
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        factors = {name for name in before if ".reduce." in name or ".expand." in name}
        assert factors
        assert factors | {"2.linear.weight"} <= changed
        assert before.keys() == after.keys()

    def test_saved_and_opened_again_gives_the_same_embeddings(self, encoder, saved):
        assert torch.equal(encode(open_(saved)), encode(encoder))

    def test_saved_is_a_student_with_all_of_its_modules_and_prompts(self, folder, saved):
        assert ranks(saved) == ranks(folder)
        encoder = open_(saved)
        assert [type(module).__name__ for module in encoder] == ["Transformer", "Pooling", "Dense", "Normalize"]
        assert any(isinstance(module, LowRankLinear) for module in encoder.modules())
        assert encoder.prompts == PROMPTS["prompts"]
        assert encoder.default_prompt_name == "document"

    def test_makd_says_that_it_measures_without_the_trained_dense_module(self, folder, saved, caplog):
        for student, says in ((folder, False), (saved, True)):
            caplog.clear()
            evaluate(str(student), str(folder), TEXTS, RECIPE)
            assert (f"{student} pools, or goes on after the pooling, in another way" in caplog.text) == says
