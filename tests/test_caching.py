"""`makd cache`, then `makd compress` from it: the same rows, and a student that is as good as one taught live."""

import json

import pytest
import yaml

import makd
from makd.data import load_texts
from tests.models import tiny

DATA = ["--data.path", "pydoc", "--data.rows", "40", "--data.max_length", "16", "--recipe.device", "cpu"]
TRAIN = [
    "--budget.keep_linears", "0.5", "--recipe.training.steps", "2", "--recipe.training.batch_size", "4",
    "--recipe.evaluation.rows", "8", "--recipe.evaluation.latency", "false", "--recipe.calibration.rows", "16",
]  # fmt: skip


def test_a_student_is_taught_from_a_cache_and_a_stale_one_is_refused(run, encoder_folder, tmp_path):
    cache = tmp_path / "cache"
    code, out, err = run("cache", "--teacher", encoder_folder, "--output", cache, "--cache.dtype", "float32", *DATA)
    assert code == 0, err
    assert "40 rows" in out
    assert not (tmp_path / ".cache.makd").exists()
    assert {path.suffix for path in cache.iterdir()} == {".json", ".safetensors"}

    compress = ["compress", "--teacher", encoder_folder, *DATA, *TRAIN]
    found = {}
    for name, more in {"live": [], "cached": ["--recipe.cache", cache]}.items():
        code, _, err = run(*compress, "--output", tmp_path / name, *more)
        assert code == 0, err
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())["fidelity"]["after"]["cosine"]
    assert found["cached"] == pytest.approx(found["live"], abs=1e-4)

    code, _, err = run(*compress, "--output", tmp_path / "stale", "--recipe.cache", cache, "--recipe.seed", "1")
    assert code == 2
    assert "is stale: its data is" in err
    code, _, err = run("cache", "--teacher", encoder_folder, "--output", cache, *DATA)
    assert code == 2
    assert "not empty" in err


def test_the_report_says_what_is_kept(encoder_folder, tmp_path):
    recipe = makd.Recipe(plan=makd.Plan(preset="logits"), device="cpu")
    texts = [f"The list number {index} is a sequence." for index in range(20)]
    data = makd.DataConfig(path=str(tmp_path / "texts.txt"), max_length=16)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    report = makd.build_cache(str(encoder_folder), data, recipe, tmp_path / "cache")
    assert report.rows == len(load_texts(data).train)
    assert report.content["parts"] == ["embedding.mean"]
    assert report.bytes_per_token > 0


def test_a_cache_of_a_task_serves_both_stages_of_a_run(run, tokenizer, tmp_path):
    teacher, reviews = tmp_path / "teacher", tmp_path / "reviews.csv"
    tiny("bert", "sequence_classification", vocab_size=300).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    reviews.write_text("text,label\n" + "".join(f"a good list {n},1\na bad list {n},0\n" for n in range(10)))
    stages = [{"plan": {"terms": [{"aspect": aspect}]}, "training": {"steps": 2}} for aspect in ("hidden", "logits")]
    recipe = {"stages": stages, "device": "cpu", "calibration": {"rows": 8}, "evaluation": {"latency": False}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    same = ["--config", tmp_path / "recipe.yaml", "--teacher", teacher, "--task.max_length", "16"]
    same += ["--task", "classification", "--task_data", reviews]
    code, out, err = run("cache", *same, "--output", tmp_path / "cache")
    assert code == 0, err
    assert "logits" in out
    teach = ["--recipe.cache", tmp_path / "cache", "--budget.keep", "0.8", "--output", tmp_path / "student"]
    code, _, err = run("compress", *same, *teach)
    assert code == 0, err


@pytest.fixture
def chats(tmp_path):
    rows = [{"prompt": f"What is the list number {n}?", "response": f"a sequence of names {n}"} for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_columns": ("prompt",), "response_column": "response", "template": "none"}
    return makd.DataConfig(path=str(tmp_path / "chats.jsonl"), max_length=64, **columns)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (makd.Plan(preset="gkd"), "a teacher cache knows the data's alone"),
        (
            makd.Plan(terms=(makd.Term(aspect="logits", divergence="top_k", k=128),)),
            "tells 128 tokens apart, cache.top_k keeps 64.* with --cache.top_k 128",
        ),
    ],
)
def test_what_no_run_could_learn_from_is_not_kept(decoder_folder, chats, tmp_path, plan, said):
    told, recipe = [], makd.Recipe(plan=plan, device="cpu")
    with pytest.raises(makd.MakdError, match=said):
        makd.build_cache(
            str(decoder_folder), chats, recipe, tmp_path / "cache", on_progress=lambda one: told.append(one.what)
        )
    assert set(told) == {"load"}
    assert not (tmp_path / "cache").exists()


def test_an_empty_name_is_not_a_cache():
    with pytest.raises(makd.MakdError, match="empty name"):
        makd.Recipe(cache="")
