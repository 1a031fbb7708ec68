"""Students of sentence-transformers folders: taught and measured as their users call them, and whole on disk."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments

import makd
from makd.caching import build_cache
from makd.data.sources import hold_out
from makd.loading import load_model
from makd.pipeline import evaluate, factorize_only
from makd.speed import bench
from makd.streaming import factorize_streamed
from tests.sentence_encoder.folders import copy, embed, make_folder, write_json

TEXTS = [
    f"{subject} {verb} {thing}."
    for subject in ("A Tuple", "The List", "An Iterator", "The Generator")
    for verb in ("binds the Names of", "raises an Exception before", "is compared with")
    for thing in ("a Mapping", "every Object of the Class", "the Module", "its Argument", "None")
]
HELD_OUT = list(hold_out(TEXTS, makd.DataConfig()).evaluation["text"])
BUDGET = makd.Budget(keep_linears=0.5)
SVD = makd.FactorizeConfig(solver="svd")
RECIPE = makd.Recipe(
    factorize=SVD,
    training=makd.TrainingConfig(steps=2),
    evaluation=makd.EvaluationConfig(latency=False),
    device="cpu",
)


@pytest.fixture(scope="module")
def make(tmp_path_factory, tokenizer):
    def maker(*arguments, **settings):
        return make_folder(tmp_path_factory.mktemp("teacher"), tokenizer, *arguments, **settings)

    return maker


@pytest.fixture(scope="module")
def cls_student(make, tmp_path_factory):
    teacher, student = make("cls", after=("Normalize",)), tmp_path_factory.mktemp("student") / "student"
    report = makd.compress(str(teacher), TEXTS, BUDGET, RECIPE, student)
    return SimpleNamespace(teacher=teacher, folder=student, scores=report.metrics["fidelity"]["after"])


def scores_by_hand(teacher, student, pooling, **how):
    """Cosine and rank correlation over the held-out texts, of embeddings in float64."""
    ours, theirs = embed(student, HELD_OUT, pooling, **how), embed(teacher, HELD_OUT, pooling, **how)
    pairs = torch.triu_indices(len(HELD_OUT), len(HELD_OUT), offset=1)
    similarities = [cosine_similarity(side[pairs[0]], side[pairs[1]]) for side in (ours, theirs)]
    return {
        "cosine": float(cosine_similarity(ours, theirs).mean()),
        "rank_correlation": float(spearmanr(*similarities).statistic),
    }


class TestMeasures:
    def test_are_of_the_folders_own_pooling(self, cls_student):
        expected = scores_by_hand(cls_student.teacher, cls_student.folder, "cls")
        assert cls_student.scores == pytest.approx(expected, abs=1e-5)
        mean = scores_by_hand(cls_student.teacher, cls_student.folder, "mean")
        assert abs(mean["cosine"] - expected["cosine"]) > 1e-3  # what is not measured is something else

    def test_of_a_saved_student_are_the_same(self, cls_student):
        found = evaluate(str(cls_student.folder), str(cls_student.teacher), TEXTS, RECIPE)["fidelity"]["after"]
        assert found == pytest.approx(cls_student.scores, abs=1e-6)

    def test_take_another_pooling_when_told(self, cls_student):
        recipe = makd.Recipe(evaluation=makd.EvaluationConfig(latency=False, pooling="mean"), device="cpu")
        found = evaluate(str(cls_student.folder), str(cls_student.teacher), TEXTS, recipe)["fidelity"]["after"]
        assert found == pytest.approx(scores_by_hand(cls_student.teacher, cls_student.folder, "mean"), abs=1e-5)

    @pytest.mark.parametrize("pooling", ["auto", "mean"])
    def test_from_python_take_it_from_where_the_teacher_was_loaded(self, cls_student, pooling):
        student, teacher = (AutoModel.from_pretrained(path) for path in (cls_student.folder, cls_student.teacher))
        tokenizer = AutoTokenizer.from_pretrained(cls_student.teacher)
        batches = [tokenizer(HELD_OUT, padding=True, return_tensors="pt")]
        own = "cls" if pooling == "auto" else "mean"
        expected = scores_by_hand(cls_student.teacher, cls_student.folder, own)
        assert makd.fidelity(student, teacher, batches, pooling) == pytest.approx(expected, abs=1e-5)

    def test_from_python_refuse_what_is_no_pooling(self, cls_student):
        model = AutoModel.from_pretrained(cls_student.teacher)
        with pytest.raises(makd.errors.SettingError, match="got 'median'"):
            makd.fidelity(model, model, [], "median")

    def test_are_of_what_comes_out_of_all_modules(self, make, tmp_path):
        teacher = make("cls+mean", after=("Dense", "Normalize"))
        report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        expected = scores_by_hand(teacher, tmp_path / "student", "cls+mean", dense=teacher / "2_Dense")
        assert report.metrics["fidelity"]["after"] == pytest.approx(expected, abs=1e-5)
        assert (tmp_path / "student" / "2_Dense" / "model.safetensors").is_file()

    @pytest.mark.parametrize("name", ["dot", "euclidean", "manhattan"])
    @pytest.mark.parametrize("after", [(), ("Normalize",)])
    def test_order_pairs_by_the_folders_own_similarity(self, make, tmp_path, name, after):
        teacher = make("mean", after=after, common={"similarity_fn_name": name})
        report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        alike = {
            "dot": lambda one, other: float(one @ other),
            "euclidean": lambda one, other: -float((one - other).norm()),
            "manhattan": lambda one, other: -float((one - other).abs().sum()),
        }[name]
        sides = [embed(folder, HELD_OUT, "mean") for folder in (tmp_path / "student", teacher)]
        sides = [side / side.norm(dim=-1, keepdim=True) for side in sides] if after else sides
        pairs = torch.triu_indices(len(HELD_OUT), len(HELD_OUT), offset=1).T.tolist()
        expected = spearmanr(*([alike(side[i], side[j]) for i, j in pairs] for side in sides)).statistic
        assert report.metrics["fidelity"]["after"]["rank_correlation"] == pytest.approx(expected, abs=2e-4)

    def test_of_an_unknown_similarity_are_refused_before_any_work(self, make, tmp_path):
        teacher = make("mean", common={"similarity_fn_name": "hamming"})
        with pytest.raises(makd.errors.SettingError, match="'hamming'; makd knows cosine, dot, euclidean, manhattan"):
            factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        assert not (tmp_path / "student").exists()


class TestTeaching:
    def losses(self, teacher_folder, student, tmp_path, **settings):
        teacher, tokenizer = load_model(str(teacher_folder)), AutoTokenizer.from_pretrained(teacher_folder)
        batch = tokenizer(HELD_OUT, padding=True, return_tensors="pt")
        rows = [{name: value[index] for name, value in batch.items()} for index in range(len(HELD_OUT))]
        plan = makd.Plan(terms=(makd.Term(aspect="embedding", **settings),))
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False, per_device_eval_batch_size=99
        )
        trainer = makd.DistillTrainer(load_model(str(student)), teacher, plan, args=arguments, eval_dataset=rows)
        return trainer.evaluate()["eval_embedding"]

    def test_compares_the_folders_own_pooling(self, cls_student, tmp_path):
        found = self.losses(cls_student.teacher, cls_student.folder, tmp_path)
        assert found == pytest.approx(1 - cls_student.scores["cosine"], abs=1e-5)

    def test_compares_another_one_when_told(self, cls_student, tmp_path):
        found = self.losses(cls_student.teacher, cls_student.folder, tmp_path, pooling="mean")
        expected = scores_by_hand(cls_student.teacher, cls_student.folder, "mean")["cosine"]
        assert found == pytest.approx(1 - expected, abs=1e-5)

    def test_compares_what_comes_out_of_all_modules(self, make, tmp_path):
        teacher = make("max", after=("Dense",))
        factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        expected = scores_by_hand(teacher, tmp_path / "student", "max", dense=teacher / "2_Dense")["cosine"]
        assert self.losses(teacher, tmp_path / "student", tmp_path) == pytest.approx(1 - expected, abs=1e-5)

    def test_from_a_cache_is_the_same(self, make, tmp_path):
        teacher = make("cls+last", after=("Dense",))
        plan = makd.Plan(terms=(makd.Term(aspect="embedding"), makd.Term(aspect="similarity")))
        settings = {"factorize": SVD, "training": makd.TrainingConfig(steps=3), "plan": plan, "device": "cpu",
                    "evaluation": RECIPE.evaluation}  # fmt: skip
        report = build_cache(str(teacher), TEXTS, makd.Recipe(**settings), tmp_path / "cache")
        assert report.content["parts"] == ["embedding.cls+last"]
        direct = makd.compress(str(teacher), TEXTS, BUDGET, makd.Recipe(**settings), tmp_path / "direct")
        cached = makd.Recipe(**settings, cache=str(tmp_path / "cache"))
        cached = makd.compress(str(teacher), TEXTS, BUDGET, cached, tmp_path / "cached")
        for when in ("before", "after"):
            assert cached.metrics["fidelity"][when] == pytest.approx(direct.metrics["fidelity"][when], abs=1e-5)
        assert direct.metrics["fidelity"]["after"] != direct.metrics["fidelity"]["before"]


class TestText:
    def test_in_lower_case_is_what_is_taught_measured_and_given_out(self, make, tmp_path):
        teacher = make("mean", settings={"max_seq_length": 48, "do_lower_case": True})
        report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        lowered = [text.lower() for text in HELD_OUT]
        expected = cosine_similarity(
            embed(tmp_path / "student", lowered, "mean"), embed(teacher, lowered, "mean")
        ).mean()
        assert report.metrics["fidelity"]["after"]["cosine"] == pytest.approx(float(expected), abs=1e-5)
        # the student's own tokenizer reads so, too
        torch.testing.assert_close(
            embed(tmp_path / "student", HELD_OUT, "mean"), embed(tmp_path / "student", lowered, "mean")
        )

    def test_is_cut_where_the_folder_says_and_that_is_said(self, make, tmp_path, caplog):
        teacher = make("mean", settings={"max_seq_length": 7, "do_lower_case": False})
        with caplog.at_level(logging.WARNING):
            report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        assert "Texts are cut at 7 tokens, not at data.max_length 64" in caplog.text
        expected = scores_by_hand(teacher, tmp_path / "student", "mean", max_length=7)
        found = report.metrics["fidelity"]["after"]
        assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-5)
        # texts that are alike up to there have similarities of 1 but for rounding, which has no order
        assert found["rank_correlation"] == pytest.approx(expected["rank_correlation"], abs=0.02)

    def test_stands_after_the_default_prompt(self, make, tmp_path):
        common = {"prompts": {"query": "find the module: "}, "default_prompt_name": "query"}
        teacher = make("mean", common=common)
        report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        texts = ["find the module: " + text for text in HELD_OUT]
        expected = cosine_similarity(embed(tmp_path / "student", texts, "mean"), embed(teacher, texts, "mean")).mean()
        assert report.metrics["fidelity"]["after"]["cosine"] == pytest.approx(float(expected), abs=1e-5)

    def test_after_a_prompt_that_is_not_pooled_is_refused(self, make, tmp_path):
        teacher = make("mean", common={"prompts": {"q": "x "}, "default_prompt_name": "q"})
        pooling = json.loads((teacher / "1_Pooling" / "config.json").read_text())
        write_json(teacher / "1_Pooling" / "config.json", pooling | {"include_prompt": False})
        with pytest.raises(makd.errors.SettingError, match="include_prompt"):
            factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")


class TestFiles:
    def test_of_every_module_are_copied_as_they_are(self, make, tmp_path):
        teacher = make("mean", after=("Dense", "LayerNorm", "Normalize"))
        write_json(teacher / "3_LayerNorm" / "config.json", {"dimension": 16})
        from safetensors.torch import save_file

        norm = {"norm.weight": torch.rand(16) + 0.5, "norm.bias": torch.rand(16)}
        save_file(norm, teacher / "3_LayerNorm" / "model.safetensors")
        factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        names = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
                 "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
                 "3_LayerNorm/model.safetensors")  # fmt: skip
        for name in names:
            assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes(), name

    def test_of_a_streamed_student_are_the_same(self, make, tmp_path):
        teacher = make("cls", after=("Dense",), transformer="0_Transformer")
        factorize_streamed(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "streamed")
        factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "whole")
        there = [
            {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}
            for name in ("streamed", "whole")
        ]
        assert there[0] == there[1]
        assert "2_Dense/model.safetensors" in there[0]

    def test_survive_the_folding_of_a_faster_student(self, make, tmp_path):
        teacher = make("cls", after=("Dense",))
        factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        settings = makd.BenchConfig(batches=(1,), lengths=(8,), repeats=2)
        bench(str(tmp_path / "student"), str(teacher), settings, fold=True, output=tmp_path / "folded")
        for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"):
            assert (tmp_path / "folded" / name).read_bytes() == (teacher / name).read_bytes(), name

    def test_of_the_layout_with_a_subfolder_become_those_of_today(self, make, tmp_path):
        teacher = make("cls", after=("Normalize",), transformer="0_Transformer")
        report = factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        modules = json.loads((tmp_path / "student" / "modules.json").read_text())
        assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
        assert not (tmp_path / "student" / "0_Transformer").exists()
        assert json.loads((tmp_path / "student" / "sentence_bert_config.json").read_text()) == {"max_seq_length": 48}
        expected = cosine_similarity(
            embed(tmp_path / "student", HELD_OUT, "cls"), embed(teacher / "0_Transformer", HELD_OUT, "cls")
        ).mean()
        assert report.metrics["fidelity"]["after"]["cosine"] == pytest.approx(float(expected), abs=1e-5)

    def test_of_setfits_classifier_are_copied_unopened_and_that_is_said(self, make, tmp_path, caplog):
        teacher = make("mean")
        write_json(teacher / "config_setfit.json", {"labels": ["good", "bad"]})
        (teacher / "model_head.pkl").write_bytes(b"\x80\x04 no pickle at all")
        with caplog.at_level(logging.WARNING):
            factorize_only(str(teacher), TEXTS, BUDGET, RECIPE, tmp_path / "student")
        for name in ("config_setfit.json", "model_head.pkl"):
            assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
        assert "fitted on the teacher's embeddings" in caplog.text

    def test_of_a_module_that_makd_does_not_know_are_copied_beside_a_head(self, make, tmp_path, caplog):
        teacher = copy(make("mean"), tmp_path / "teacher")
        AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(teacher)).save_pretrained(teacher)
        types = ("sentence_transformers.sparse_encoder.models.MLMTransformer", "custom.Splade")
        paths = ("", "1_Pooling")
        write_json(teacher / "modules.json", [{"type": t, "path": p} for t, p in zip(types, paths, strict=True)])
        recipe = makd.Recipe(head="masked_lm", factorize=SVD, evaluation=RECIPE.evaluation, device="cpu")
        with caplog.at_level(logging.WARNING):
            data = makd.DataConfig(path="pydoc", rows=12, max_length=16)
            factorize_only(str(teacher), data, BUDGET, recipe, tmp_path / "student")
        assert (tmp_path / "student" / "1_Pooling" / "config.json").is_file()
        assert "custom.Splade" in caplog.text
