"""The head of a student's card is what the hub reads, says only what is known, and goes up with the student."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoTokenizer

import makd
from makd.data import DataConfig, Source
from makd.pipeline import distill, factorize_only
from makd.run_folder import write_card
from makd.run_folder.metadata import auto_class_of, find_source
from makd.tasks import TaskConfig
from tests.models import tiny

GUIDE = Path(__file__).parents[2] / "docs" / "how-to" / "publish-a-student.md"
METRICS = {
    "params": {key: {"teacher": 10, "student": 5} for key in ("total", "linears")},
    "fidelity": {"after": {"cosine": 0.9}},
    "tokens": {"calibration": 100, "training": 100, "evaluation": 100},
}
ENVIRONMENT = {"device_name": "a processor", "threads": 1}
CARD = "---\n{}\n---\n# A teacher\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that has files of the model org/teacher."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--org--teacher"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def make_card(
    folder, teacher="BertModel", architecture="BertModel", data=None, command="compress", kind="factored", **metrics
):
    """Written, and read as the hub's own library reads it: what it refuses is an error."""
    folder.mkdir(exist_ok=True)
    about = (str(teacher), architecture, METRICS | metrics, ENVIRONMENT, command, data)
    write_card(folder, "student", *about, kind=kind)
    return ModelCard.load(folder / "README.md")


def test_a_teacher_that_nobody_knows_leaves_what_makd_knows_itself(tmp_path):
    card = make_card(tmp_path / "student")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["makd", "low-rank", "distillation"],
    }
    assert "The teacher's licence was not at hand" in card.text


def test_a_teacher_of_the_hub_is_the_base_model_with_its_licence_and_languages(tmp_path, cache):
    (cache / "README.md").write_text(CARD.format("license: apache-2.0\nlanguage: [en, no]\ntags: [theirs]"))
    card = make_card(tmp_path / "student", "org/teacher", "BertForMaskedLM")
    assert card.data.to_dict() == {
        "base_model": "org/teacher",
        "base_model_relation": "finetune",
        "language": ["en", "no"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "fill-mask",
        "tags": ["makd", "low-rank", "distillation"],
    }
    assert "`org/teacher`" in card.text
    assert "not at hand" not in card.text


def test_a_folder_of_the_hubs_cache_is_known_by_its_place(tmp_path, cache):
    assert make_card(tmp_path / "student", cache).data.base_model == "org/teacher"


@pytest.mark.parametrize("name", ["org/other", "BertModel", "runs/gone", "package:json", "a" * 300, "..", "org/x/y"])
def test_a_name_that_the_cache_does_not_hold_is_no_base_model(name, tmp_path, cache):
    data = make_card(tmp_path / "student", name).data.to_dict()
    assert not {"base_model", "base_model_relation", "license"} & data.keys()


def test_a_folder_is_no_base_model_and_gives_its_licence_and_the_end_of_its_name(tmp_path, cache):
    teacher = tmp_path / "org" / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "README.md").write_text(CARD.format("license: mit\nlanguage: de"))
    card = make_card(tmp_path / "student", teacher)
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "de", None)
    assert "`teacher`" in card.text
    assert str(tmp_path) not in str(card)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("license: other", {}),
        ("license: other\nlicense_name: gemma", {"license": "other", "license_name": "gemma"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {
                "license": "other",
                "license_name": "own",
                "license_link": "https://huggingface.co/org/teacher/blob/main/LICENSE",
            },
        ),
        ("license_link: https://example.org", {}),
        ("license: mit\nlicense_link: https://example.org", {"license": "mit", "license_link": "https://example.org"}),
        ("license: [mit, apache-2.0]", {}),
        ("license:", {}),
        ("license: {a: b", {}),
        ("- license", {}),
        ("language: false", {"language": "no"}),
        ("language: [1, en]", {"language": ["en"]}),
        ("language: 7", {}),
    ],
    ids=str,
)
def test_of_a_teachers_card_is_taken_what_the_hub_would_take(said, expected, tmp_path, cache):
    (cache / "README.md").write_text(CARD.format(said))
    data = make_card(tmp_path / "student", "org/teacher").data.to_dict()
    keys = ("license", "license_name", "license_link", "language")
    assert {key: data[key] for key in keys if key in data} == expected


def test_a_card_that_is_no_text_gives_nothing(tmp_path, cache):
    (cache / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert find_source("org/teacher").card == {}


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("T5ForConditionalGeneration", None),
        ("Gemma3ForConditionalGeneration", "text-generation"),
        ("Qwen2VLForConditionalGeneration", "image-text-to-text"),
    ],
)
def test_the_task_is_that_of_the_head(architecture, task, tmp_path):
    assert make_card(tmp_path / "student", architecture=architecture).data.pipeline_tag == task


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("BertModel", "AutoModel"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("Gemma3ForConditionalGeneration", "AutoModelForCausalLM"),
        ("Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
    ],
)
def test_it_is_loaded_by_the_class_that_transformers_has_for_it(architecture, auto):
    assert auto_class_of(architecture) == auto


def test_a_student_that_makes_embeddings_is_found_as_such(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    data = make_card(tmp_path).data
    assert data.pipeline_tag == "sentence-similarity"
    assert "sentence-transformers" in data.tags


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataConfig(path="pydoc"), None),
        (DataConfig(path="org/texts"), ["org/texts"]),
        (DataConfig(path="texts.jsonl"), None),
        (DataConfig(path="org/texts/more"), None),
        (
            DataConfig(
                mixture=(Source(path="org/one"), Source(path="two.csv"), Source(path="org/one", train_split="more"))
            ),
            ["org/one"],
        ),
        (TaskConfig(name="glue/sst2"), ["nyu-mll/glue"]),
        (TaskConfig(name="glue/sst2", path="rows.csv", extra_text="org/texts"), ["org/texts"]),
    ],
    ids=str,
)
def test_data_sets_are_those_of_the_hub(data, expected, tmp_path):
    assert make_card(tmp_path / "student", data=data).data.datasets == expected


def test_data_that_is_a_folder_here_is_none_of_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "texts").mkdir(parents=True)
    assert make_card(tmp_path / "student", data=DataConfig(path="org/texts")).data.datasets is None


def test_what_was_measured_on_a_task_is_a_result(tmp_path):
    scores = {"matthews": 0.5, "score": 0.5}
    task = {"name": "glue/cola", "splits": ["validation"], "teacher": scores, "after": scores}
    data = make_card(
        tmp_path / "student", architecture="BertForSequenceClassification", data=TaskConfig(name="glue/cola"), task=task
    ).data
    assert data.metrics == ["matthews_correlation"]
    assert data.to_dict()["model-index"] == [
        {
            "name": "student",
            "results": [
                {
                    "task": {"type": "text-classification"},
                    "dataset": {
                        "name": "glue/cola", "type": "nyu-mll/glue", "config": "cola", "split": "validation",
                    },
                    "metrics": [{"type": "matthews_correlation", "value": 0.5, "name": "Matthews correlation"}],
                }
            ],
        }
    ]  # fmt: skip


def test_splits_and_parts_of_the_data_are_told_apart(tmp_path):
    scores = {"accuracy_matched": 0.75, "accuracy_mismatched": 0.5, "score": 0.625}
    task = {"name": "glue/mnli", "teacher": scores, "after": scores}
    config = TaskConfig(name="glue/mnli", path="rows.csv", evaluation_rows=8)
    results = make_card(tmp_path / "student", data=config, task=task).data.eval_results
    assert [(one.metric_type, one.metric_name, one.metric_value) for one in results] == [
        ("accuracy", "accuracy (matched)", 0.75),
        ("accuracy", "accuracy (mismatched)", 0.5),
    ]
    assert {(one.dataset_type, one.dataset_split, str(one.dataset_args)) for one in results} == {
        ("glue/mnli", None, "{'rows': 8}")
    }


def test_perplexity_is_named_as_a_metric(tmp_path):
    found = {"teacher": 10.0, "after": 11.0}
    assert make_card(tmp_path / "student", perplexity=found).data.metrics == ["perplexity"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run's folder."""
    folder = tmp_path_factory.mktemp("run")
    tiny("bert", vocab_size=300, max_position_embeddings=128).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "teacher" / "README.md").write_text(CARD.format("license: mit"))
    recipe = makd.Recipe(
        training=makd.TrainingConfig(steps=0),
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=8, latency=False),
        device="cpu",
    )
    texts = [f"The class number {index} is a sequence of names." for index in range(20)]
    return makd.compress(
        str(folder / "teacher"), texts, makd.Budget(keep_linears=0.5), recipe, folder / "student"
    ).folder


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """What is put on the hub: name in the repository -> content. Nothing leaves this machine."""
    there = {}

    class Made:
        repo_id = "me/student"

    def commit(self, repo_id, operations, **_others):
        assert repo_id == "me/student"
        for operation in operations:
            with operation.as_file() as file:
                there[operation.path_in_repo] = file.read()
        return Made()

    def download(repo_id, filename, **_others):
        assert (repo_id, filename) == ("me/student", "README.md")
        (tmp_path / filename).write_bytes(there[filename])
        return tmp_path / filename

    def validate(self, content, **_others):
        assert ModelCard(content).data.library_name == "transformers"

    monkeypatch.setattr(HfApi, "_validate_yaml", validate)  # the hub itself looks at the card's head
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)  # all in one commit
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_others: Made())
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)
    return there


def upload_folder(run):
    """As the guide's command does."""
    (command,) = re.findall(r"^hf upload (.*)$", GUIDE.read_text(), re.MULTILINE)
    excluded = re.findall(r'--exclude "([^"]+)"', command)
    assert len(excluded) > 2
    HfApi().upload_folder(repo_id="me/student", folder_path=run, ignore_patterns=excluded)


def test_a_folder_goes_up_with_its_card_and_without_what_tells_of_this_machine(run, uploads):
    upload_folder(run)
    assert set(uploads) == {
        "README.md", "config.json", "metrics.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert ModelCard(uploads["README.md"].decode()).data.license == "mit"
    here = str(run.parent).encode()
    assert not [name for name, content in uploads.items() if here in content]
    assert here in (run / "recipe.yaml").read_bytes()


def test_what_went_up_is_the_student(run, uploads, tmp_path):
    upload_folder(run)
    for name, content in uploads.items():
        (tmp_path / name).write_bytes(content)
    fingerprint = json.loads((run / "metrics.json").read_text())["fingerprint"]
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path)) == fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path)("a text") == AutoTokenizer.from_pretrained(run)("a text")


def test_a_student_that_is_pushed_later_keeps_the_card(run, uploads):
    upload_folder(run)
    card = uploads["README.md"]
    AutoModel.from_pretrained(run).push_to_hub("me/student")
    assert ModelCard(uploads["README.md"].decode()).content == ModelCard(card.decode()).content
    assert json.loads(uploads["config.json"])["quantization_config"]["quant_method"] == "makd"
    assert yaml.safe_load(card.split(b"---")[1])["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("measured", "split"), [(["held_out"], "held_out"), (["validation"], "validation"), (["a", "b"], None)]
)
def test_the_split_is_the_one_that_was_measured_on(tmp_path, measured, split):
    task = {"name": "glue/mrpc", "splits": measured, "teacher": {"accuracy": 0.75}, "after": {"accuracy": 0.5}}
    (result,) = make_card(
        tmp_path / "student", data=TaskConfig(name="glue/mrpc", path="pairs.jsonl"), task=task
    ).data.eval_results
    assert result.dataset_split == split


def test_latency_is_told_of_what_was_timed_and_only_where_it_was(tmp_path):
    timed = {side: {"batch1": 1.0, "batch16": 9.0} for side in ("teacher", "student")}
    assert "Latency" not in make_card(tmp_path / "student").text
    found = make_card(tmp_path / "student", latency_ms=timed, latency_tokens=64).text
    assert "Latency: median of forwards of 64 tokens a row on a processor with 1 threads" in found


UNTAUGHT = {"tokens": {"training": 0, "evaluation": 100}}


@pytest.mark.parametrize(
    ("done", "told", "tags"),
    [
        ({}, "its linears are low-rank factors, taught to mimic the original.", ["low-rank", "distillation"]),
        ({"command": "factorize", **UNTAUGHT}, "its linears are low-rank factors, not trained yet.", ["low-rank"]),
        ({"command": "distill", **UNTAUGHT}, "its linears are low-rank factors.", ["low-rank"]),
        (
            {"command": "factorize", **UNTAUGHT, "layerwise": [{"tokens": 5}]},
            "its linears are low-rank factors, its layers taught to mimic the original's.",
            ["low-rank", "distillation"],
        ),
        (
            {"command": "distill", "kind": "dense"},
            "a dense model of its own, taught to mimic the original.",
            ["distillation"],
        ),
    ],
    ids=["compressed", "factorized", "not taught further", "layer by layer", "dense"],
)
def test_it_says_what_was_done_to_the_student(tmp_path, done, told, tags):
    card = make_card(tmp_path / "student", **done)
    assert told in card.text
    assert card.data.tags == ["makd", *tags]


def test_a_student_that_lost_layers_alone_is_called_so(run, tmp_path):
    recipe = makd.Recipe(
        factorize=makd.FactorizeConfig(depth=1), evaluation=makd.EvaluationConfig(rows=8, latency=False), device="cpu"
    )
    texts = [f"The class number {index} is a sequence of names." for index in range(20)]
    teacher, budget = str(run.parent / "teacher"), makd.Budget(keep=0.9)
    made = factorize_only(teacher, texts, budget, recipe, tmp_path / "shallow").folder
    assert "the same without some of its layers, not trained yet." in (made / "README.md").read_text()


def test_fidelity_is_spoken_of_only_where_it_was_measured(tmp_path):
    assert "Fidelity: on held-out text." in make_card(tmp_path / "student").text
    assert "Fidelity" not in make_card(tmp_path / "streamed", fidelity={}).text


def test_a_dense_student_of_a_run_is_not_called_factored(run, tokenizer, tmp_path):
    tiny("bert", seed=1, vocab_size=300, max_position_embeddings=128).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = makd.Recipe(
        training=makd.TrainingConfig(steps=1), evaluation=makd.EvaluationConfig(rows=8, latency=False), device="cpu"
    )
    texts = [f"The class number {index} is a sequence of names." for index in range(20)]
    taught = distill(str(tmp_path / "dense"), str(run.parent / "teacher"), texts, recipe, tmp_path / "taught").folder
    assert "a dense model of its own, taught to mimic the original." in (taught / "README.md").read_text()
