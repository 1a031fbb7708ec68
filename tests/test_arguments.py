"""Python calls with arguments of another kind: told by name, with what is allowed, before any work."""

import peft
import pytest
import torch

import makd
from makd.errors import DataError, ModelLoadError, SettingError
from tests.models import VOCABULARY, tiny


@pytest.fixture(scope="module")
def teacher():
    return tiny("bert")


@pytest.fixture
def ids():
    return torch.arange(12).reshape(2, 6)


HALF = makd.Budget(keep_linears=0.5)
LORA = peft.LoraConfig(target_modules=["query"])


class TestOfAnotherKind:
    @pytest.mark.parametrize(
        ("call", "told"),
        [
            (lambda teacher: makd.factorize(teacher, 0.5), "budget of factorize is a Budget; got 0.5"),
            (lambda teacher: makd.factorize("bert", HALF), "teacher of factorize is a PreTrainedModel; got 'bert'"),
            (lambda teacher: makd.factorize(teacher), "missing a required argument: 'budget'"),
            (lambda teacher: makd.factorize(teacher, HALF, solvr="svd"), "'solvr'"),
            (lambda teacher: makd.factorize(teacher, HALF, solver=3), "solver of factorize is a text; got 3"),
            (lambda teacher: makd.factorize(teacher, HALF, calibration="text"), "calibration of factorize is a list"),
            (lambda teacher: makd.factorize(teacher, HALF, calibration={"input_ids": 1}), "calibration of factorize"),
            (lambda teacher: makd.factorize(teacher, HALF, on_progress=3), "on_progress of factorize is a function"),
            (lambda teacher: makd.inspect("bert"), "model of inspect is a PreTrainedModel; got 'bert'"),
            (lambda teacher: makd.fidelity(teacher, "bert", []), "teacher of fidelity is a PreTrainedModel"),
            (lambda teacher: makd.fidelity(teacher, teacher, None), "batches of fidelity is a list"),
            (lambda teacher: makd.fidelity(teacher, teacher, [], pooling="middle"), "got 'middle'"),
            (lambda teacher: makd.perplexity(teacher, 3), "batches of perplexity is a list"),
            (lambda teacher: makd.compress(teacher, 3, HALF), "data of compress is"),
            (lambda teacher: makd.compress(teacher, ["a", 3], HALF), "data of compress is"),
            (lambda teacher: makd.compress(teacher, "pydoc", 0.5), "budget of compress is a Budget; got 0.5"),
            (lambda teacher: makd.compress(teacher, "pydoc", HALF, {}), "recipe of compress is a Recipe or null"),
            (lambda teacher: makd.compress(teacher, "pydoc", HALF, overwrite="false"), "true or false; got 'false'"),
            (lambda teacher: makd.compress(teacher, "pydoc", HALF, output=3), "output of compress is"),
            (lambda teacher: makd.evaluate(teacher, 7, "pydoc"), "teacher of evaluate is"),
            (lambda teacher: makd.finetune("x", "glue/cola"), "task of finetune is a TaskConfig"),
            (lambda teacher: makd.bench(teacher, teacher, {}), "settings of bench is a BenchConfig or null"),
            (
                lambda teacher: makd.build_cache(teacher, "pydoc", settings=3),
                "settings of build_cache is a CacheConfig",
            ),
            (lambda teacher: makd.compare("experiment.yaml"), "experiment of compare is an Experiment"),
            (lambda teacher: makd.fold(3), "student of fold is a PreTrainedModel"),
            (lambda teacher: makd.fingerprint("bert"), "model of fingerprint is a PreTrainedModel"),
        ],
    )
    def test_an_argument_is_named_with_what_it_may_be(self, teacher, call, told):
        with pytest.raises(SettingError) as error:
            call(teacher)
        assert told in str(error.value)

    def test_what_is_of_the_right_kind_goes_through_unchanged(self, teacher, ids):
        student = makd.factorize(teacher, HALF, calibration=({"input_ids": ids} for _ in range(2)))
        assert 0.5 < makd.fidelity(student, teacher, [{"input_ids": ids}])["cosine"] <= 1.0


class TestAModelThatIsNotPlain:
    """A PeftModel, a compiled one, one with adapters inside, one of inference mode: what to give instead."""

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
    def test_a_peft_model_is_to_be_merged(self):
        adapted = peft.get_peft_model(tiny("bert"), LORA)
        with pytest.raises(SettingError, match="Merge its adapters first"):
            makd.factorize(adapted, HALF, solver="svd")
        makd.factorize(adapted.merge_and_unload(), HALF, solver="svd")

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
    def test_of_a_compiled_one_the_original_is_to_be_given(self):
        with pytest.raises(SettingError, match=r"`model\._orig_mod`"):
            makd.factorize(torch.compile(tiny("bert")), HALF, solver="svd")

    def test_adapters_inside_are_named(self):
        adapted = peft.inject_adapter_in_model(LORA, tiny("bert"))
        with pytest.raises(ModelLoadError, match=r"has adapters: encoder\.layer\.0\.attention\.self\.query is one of"):
            makd.factorize(adapted, HALF, solver="svd")

    def test_one_made_in_inference_mode_is_to_be_loaded_outside(self):
        with torch.inference_mode():
            made = tiny("bert")
        with pytest.raises(ModelLoadError, match="Load the model outside of it"):
            makd.factorize(made, HALF, solver="svd")


WRONG_BATCHES = [
    (["a text"], "A batch is a dict of tensors"),
    ([torch.arange(4)], "A batch is a dict of tensors"),
    ([3], "A batch is a dict of tensors"),
    ([{}], "this one has nothing"),
    ([{"labels": torch.ones(2)}], "this one has 'labels'"),
    ([{"input_ids": [[1, 2]]}], "input_ids of a batch is a tensor"),
    ([{"input_ids": torch.rand(2, 3)}], "got float32 of shape (2, 3)"),
    ([{"input_ids": torch.arange(3)}], "rows x tokens, at least one; got int64 of shape (3,)"),
    ([{"input_ids": torch.ones(0, 3, dtype=torch.int64)}], "shape (0, 3)"),
    ([{"input_ids": torch.full((1, 2), VOCABULARY)}], f"token {VOCABULARY}, but the model has embeddings for"),
    ([{"input_ids": torch.full((1, 2), -1)}], "token -1"),
    ([{"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}], "got (2, 4)"),
    ([{"input_ids": torch.ones(1, 3, dtype=torch.int64), "text": ["a"]}], "text of a batch is a tensor; got ['a']"),
    ([{"input_ids": torch.ones(1, 3, dtype=torch.int64), "use_cache": True}], "use_cache of a batch is a tensor"),
    ([{"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": [1]}], "labels of a batch is a tensor; got [1]"),
]


class TestBatches:
    @pytest.mark.parametrize(("batches", "told"), WRONG_BATCHES)
    @pytest.mark.parametrize("solver", ["auto", "whitened"])
    def test_calibration_that_the_model_cannot_read(self, teacher, batches, told, solver):
        with pytest.raises(DataError) as error:
            makd.factorize(teacher, HALF, calibration=(batch for batch in batches), solver=solver)
        assert told in str(error.value)

    @pytest.mark.parametrize(("batches", "told"), WRONG_BATCHES)
    def test_fidelity_and_perplexity_on_them(self, teacher, batches, told):
        for measure in (
            lambda given: makd.fidelity(teacher, teacher, given),
            lambda given: makd.perplexity(teacher, given),
        ):
            with pytest.raises(DataError) as error:
                measure(batch for batch in batches)
            assert told in str(error.value)

    @pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "bart"])
    def test_rows_longer_than_the_positions(self, name):
        model = tiny(name)
        limit = 63 if name == "roberta" else 64
        for length in (limit, limit + 1):
            batch = {"input_ids": torch.full((2, length), 7)}
            if name == "bart":
                batch = {"input_ids": batch["input_ids"][:, :9], "decoder_input_ids": batch["input_ids"]}
            works = (
                lambda given: makd.factorize(model, HALF, calibration=given, solver="whitened"),
                lambda given: makd.fidelity(model, model, given),
            )
            for work in works:
                if length == limit:
                    work([batch])
                    continue
                with pytest.raises(DataError, match=f"{length} tokens a row, but .* has positions for {limit}"):
                    work([batch])

    def test_packed_rows_may_be_longer_than_the_positions_of_each_text(self):
        model = tiny("gpt2", "causal_lm")
        ids, positions = torch.full((1, 80), 7), torch.arange(40).repeat(2)[None]
        assert makd.fidelity(model, model, [{"input_ids": ids, "position_ids": positions}])["top1_agreement"] == 1
        with pytest.raises(DataError, match="position 79, from 0, but GPT2LMHeadModel has 64"):
            makd.fidelity(model, model, [{"input_ids": ids, "position_ids": torch.arange(80)[None]}])

    @pytest.mark.parametrize("solver", ["auto", "whitened", "fisher", "two_sided", "regression"])
    def test_no_batch_at_all(self, teacher, solver):
        with pytest.raises(DataError):
            makd.factorize(teacher, HALF, calibration=[], solver=solver)
