"""A whole run of an encoder-decoder on prompts with responses: what it learns from, and what is measured of it."""

import json
import math

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import makd
from makd.data import DataConfig, collator, hold_out, tokenize
from makd.distill import DistillTrainer
from makd.evaluation import perplexity
from makd.loading import load_tokenizer
from tests.distill.test_trainer import make_arguments
from tests.models import tiny

ROWS = [
    {"prompt": f"Name the {kind} number {index} of the names.", "response": f"The {kind} of {index} names is a list."}
    for kind in ("list", "class")
    for index in range(40)
]
RECIPE = makd.Recipe(
    plan=makd.Plan(preset="balanced"),
    training=makd.TrainingConfig(steps=3, batch_size=8, learning_rate=1e-3),
    calibration=makd.CalibrationConfig(rows=16),
    evaluation=makd.EvaluationConfig(rows=8, latency=False),
    device="cpu",
)
BUDGET = makd.Budget(keep_linears=0.6)


@pytest.fixture(scope="module", params=["t5", "bart"])
def folder(request, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param, head="seq2seq_lm", vocab_size=300, eos_token_id=3, decoder_start_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(folder, tmp_path_factory):
    return makd.compress(str(folder), ROWS, BUDGET, RECIPE, tmp_path_factory.mktemp("runs") / "student")


def held_out(folder, model):
    """The rows that the run measures on."""
    words = load_tokenizer(str(folder))
    rows = hold_out(ROWS, DataConfig()).evaluation
    return list(tokenize(rows, words, model, 64)), collator(words, model)


def test_perplexity_is_that_of_the_responses_given_the_prompts(folder, report):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    rows, _ = held_out(folder, model)
    total = count = 0.0
    for row in rows[:8]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            scores = model(input_ids=ids, labels=labels).logits.double().log_softmax(-1)[0]
        total -= float(scores[range(labels.shape[1]), labels[0]].sum())
        count += labels.shape[1]
    assert report.metrics["perplexity"]["teacher"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_responses_are_learned(report):
    assert report.metrics["perplexity"]["after"] < report.metrics["perplexity"]["before"]


def test_the_report_has_what_both_models_answer(report):
    samples = json.loads((report.folder / "report" / "samples.json").read_text(encoding="utf-8"))
    assert samples["kind"] == "continuations"
    assert all(set(row) == {"prompt", "teacher", "student", "reference"} for row in samples["rows"])
    assert samples["rows"][0]["reference"].startswith("The ")


def test_the_student_is_an_ordinary_model_that_writes(report, folder):
    student = AutoModelForSeq2SeqLM.from_pretrained(report.folder).eval()
    words = load_tokenizer(str(folder))
    inputs = words(["Name the list number 3 of the names."], return_tensors="pt", return_token_type_ids=False)
    assert student.generate(**inputs, max_new_tokens=5).shape[0] == 1


def test_losses_count_the_tokens_of_responses_alone(folder):
    """`logits` and `task` of a batch, written out token by token in float64."""
    teacher = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    student = makd.factorize(teacher, BUDGET, solver="svd")
    rows, collate = held_out(folder, teacher)
    plan = makd.Plan(terms=(makd.Term(aspect="logits", tokens="completion"), makd.Term(aspect="task", weight=2.0)))
    trainer = DistillTrainer(student, teacher, plan, args=make_arguments(folder.parent), train_dataset=rows)
    batch = collate(rows[:4])
    found = trainer.compute_loss(student.eval(), dict(batch))
    divergence = loss = count = 0.0
    for row in rows[:4]:
        inputs = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        with torch.no_grad():
            theirs, ours = (model(**inputs).logits.double().log_softmax(-1)[0] for model in (teacher, student))
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        loss -= float(ours[range(len(row["labels"])), row["labels"]].sum())
        count += len(row["labels"])
    assert float(found.detach()) == pytest.approx((divergence + 2 * loss) / count, rel=1e-4)


@pytest.mark.parametrize("preset", ["kd", "sft"])
def test_objectives_of_the_datas_own_responses_are_learned(preset, folder, tmp_path):
    recipe = makd.Recipe(**{**vars(RECIPE), "plan": makd.Plan(preset=preset)})
    report = makd.compress(str(folder), ROWS, BUDGET, recipe, tmp_path / "student")
    assert report.metrics["perplexity"]["after"] < report.metrics["perplexity"]["before"]


def test_completions_inside_the_layers_are_no_term_of_an_encoder_decoder(folder, tmp_path):
    plan = makd.Plan(terms=(makd.Term(aspect="hidden", tokens="completion"),))
    recipe = makd.Recipe(**{**vars(RECIPE), "plan": plan})
    with pytest.raises(makd.MakdError, match="what a causal language model continues"):
        makd.compress(str(folder), ROWS, BUDGET, recipe, tmp_path / "student")


def test_a_cache_teaches_what_the_teacher_does(folder, tmp_path):
    """T5 adds a learned bias to its scores, which a cache does not hold."""
    plan = makd.Plan(terms=tuple(makd.Term(aspect=aspect) for aspect in ("matrix", "hidden", "logits", "task")))
    training = makd.TrainingConfig(steps=2, batch_size=8, learning_rate=1e-5, log_every=1)
    recipe = makd.Recipe(**{**vars(RECIPE), "plan": plan, "training": training})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    config = makd.DataConfig(path=str(data), max_length=64)
    cache = tmp_path / "cache"
    makd.build_cache(str(folder), config, recipe, cache, settings=makd.CacheConfig(dtype="float32", top_k=300))
    logs = []
    for where in (None, str(cache)):
        asked = makd.Recipe(**{**vars(recipe), "cache": where})
        made = makd.compress(str(folder), config, BUDGET, asked, tmp_path / "student", overwrite=True)
        (training_log,) = json.loads((made.folder / "report" / "training.json").read_text())["trainings"]
        logs.append([entry for entry in training_log["log"] if "logits" in entry])
    assert len(logs[0]) == len(logs[1]) == 2
    for live, cached in zip(*logs, strict=True):
        for name in ("loss", "matrix", "hidden", "logits", "task"):
            assert cached[name] == pytest.approx(live[name], rel=1e-3, abs=1e-6), name


def test_answers_to_instructions_are_scored(folder, report, tmp_path):
    pytest.importorskip("rouge_score")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(json.dumps({"prompt": row["prompt"], "output": row["response"]}) for row in ROWS[:3]))
    instructions = makd.InstructionsConfig(path=str(asked), seeds=(1,), max_prompt_tokens=32, max_answer_tokens=8)
    found = makd.evaluate(str(report.folder), str(folder), ROWS, RECIPE, instructions=instructions)
    assert found["instructions"]["rows"] == 3
    assert 0 <= found["instructions"]["rouge_l"]["teacher"]["mean"] <= 100


def test_plain_text_is_read_on_both_sides_and_has_no_perplexity(folder, tmp_path):
    texts = [row["prompt"] for row in ROWS]
    report = makd.compress(str(folder), texts, BUDGET, RECIPE, tmp_path / "student")
    assert "perplexity" not in report.metrics


def test_perplexity_of_a_batch_without_responses_is_refused(folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(makd.MakdError, match="responses to prompts"):
        perplexity(model, [{"input_ids": ids, "decoder_input_ids": ids}])
