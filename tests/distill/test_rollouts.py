"""Completions that are written while a student learns: whose turn it is, what is kept, and that it resumes."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

import makd
from makd.aspects import Completions, Plan, Term
from makd.distill import DistillTrainer, training_lengths
from makd.distill.rollouts import Rollouts, prompts_of, to_batch
from makd.errors import DataError, SettingError
from makd.generation import Sampling, generate, stop_tokens
from tests.data.chats import PLAIN, chat, with_template
from tests.distill.test_trainer import make_arguments, same_weights
from tests.models import tiny

LOGITS = (Term(aspect="logits", divergence="jsd"),)


def make_pair():
    teacher = tiny("llama", head="causal_lm")
    return teacher, makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def make_rows(count=16):
    """Prompts of 3 to 6 tokens and completions of 4."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        prompt = 3 + number % 4
        ids = torch.randint(5, 60, (prompt + 4,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(rows)


def as_batch(rows):
    return to_batch([(row["input_ids"][:-4], row["input_ids"][-4:]) for row in rows], {"input_ids": torch.zeros(1)})


def collate(rows):
    return as_batch(rows)


def make_trainer(folder, completions, pair=None, terms=LOGITS, **settings):
    teacher, student = pair or make_pair()
    return DistillTrainer(
        model=student,
        teacher=teacher,
        plan=Plan(terms=terms, completions=completions),
        args=make_arguments(folder, remove_unused_columns=False, **settings),
        train_dataset=make_rows(),
        eval_dataset=make_rows(4),
        data_collator=collate,
    )


def test_a_prompt_is_all_before_the_last_completion():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6]),
        "labels": torch.tensor([[-100, -100, 7, 8, 9, -100], [-100, 6, -100, -100, 9, 10]]),
    }
    assert prompts_of(batch) == [[5, 6], [5, 6, 7, 8]]


def test_padding_on_the_left_is_no_prompt():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, 6]]),
    }
    assert prompts_of(batch) == [[5]]


@pytest.mark.parametrize(
    ("labels", "missing"), [([[-100, -100]], "no answer"), ([[5, 6]], "no prompt"), (None, "no labels")]
)
def test_rows_that_are_not_prompt_and_completion_are_refused(labels, missing):
    batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    batch |= {} if labels is None else {"labels": torch.tensor(labels)}
    with pytest.raises(DataError, match=missing):
        prompts_of(batch)


def rewrite(rollouts, step=0, progress=0.0, pair=None, count=4, batches=1):
    teacher, student = pair or make_pair()
    given = [as_batch(make_rows(count)) for _ in range(batches)]
    return given, rollouts.rewrite(given, step, progress, student, teacher)


def test_the_datas_own_completions_stay_where_nobody_writes():
    given, found = rewrite(Rollouts(Completions(), 0))
    assert found[0] is given[0]


def test_the_student_writes_after_the_datas_prompts_and_labels_are_what_it_wrote():
    teacher, student = make_pair()
    rollouts = Rollouts(Completions(student_share=1.0, max_new_tokens=5), 0)
    given, (found,) = rewrite(rollouts, pair=(teacher, student))
    assert prompts_of(found) == prompts_of(given[0])
    learned = found["labels"] != -100
    assert torch.equal(found["labels"][learned], found["input_ids"][learned])
    assert rollouts.tokens == {"teacher": 0, "student": int(learned.sum())}
    assert not torch.equal(found["input_ids"][:, :8], given[0]["input_ids"][:, :8])


@pytest.mark.parametrize("settings", [{"temperature": 1e-6}, {"top_p": 1e-6}])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_completions_are_drawn_at_the_plans_temperature_from_its_likeliest_tokens(who, settings):
    """Where either is next to nothing, that is the most likely token each time."""
    pair = make_pair()
    prompts = [row["input_ids"][:-4] for row in make_rows(4)]
    model = pair[who == "student"]
    likeliest = generate(
        model, prompts, Sampling(max_new_tokens=8, temperature=0.0), stop_tokens(model), 0, seed=0, batch_size=4
    )

    def written(**given):
        _, (found,) = rewrite(Rollouts(Completions(**{f"{who}_share": 1.0}, max_new_tokens=8, **given), 0), pair=pair)
        return [labels[labels != -100].tolist() for labels in found["labels"]]

    assert written(**settings) == likeliest
    assert written() != likeliest


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_what_is_drawn_is_another_text_at_each_step(who):
    pair, settings = make_pair(), Completions(**{f"{who}_share": 1.0}, max_new_tokens=8)
    first, again, other = (rewrite(Rollouts(settings, 0), step, pair=pair)[1][0]["labels"] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_share_is_that_of_the_batches():
    rollouts = Rollouts(Completions(student_share=0.3, teacher_share=0.5), 0)
    turns = [rollouts._writer(chance / 1000, 0.0, 4) for chance in range(1000)]
    assert {who: turns.count(who) for who in ("student", "teacher", "data")} == {
        "student": 300, "teacher": 500, "data": 200,
    }  # fmt: skip


def test_what_the_teacher_wrote_after_a_prompt_is_written_once():
    pair, rollouts = make_pair(), Rollouts(Completions(teacher_share=1.0, max_new_tokens=5), 0)
    _, (first,) = rewrite(rollouts, 0, pair=pair)
    written = rollouts.tokens["teacher"]
    _, (second,) = rewrite(rollouts, 1, pair=pair)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert rollouts.tokens["teacher"] == written > 0


def test_kept_completions_are_drawn_more_and_more_often():
    rollouts = Rollouts(Completions(student_share=0.8, replay=100), 0)
    rollouts.kept.extend([([5], [6])] * 4)
    turns = {
        progress: [rollouts._writer(chance / 1000, progress, 4) for chance in range(1000)].count("kept")
        for progress in (0.0, 0.25, 1.0)
    }
    assert turns == {0.0: 0, 0.25: pytest.approx(200, abs=1), 1.0: 800}


def test_nothing_is_drawn_before_a_batch_of_it_is_kept():
    rollouts = Rollouts(Completions(student_share=1.0, replay=100), 0)
    rollouts.kept.extend([([5], [6])] * 3)
    assert rollouts._writer(0.5, 1.0, 4) == "student"


def test_the_oldest_completions_make_room():
    rollouts = Rollouts(Completions(student_share=1.0, replay=6, max_new_tokens=2), 0)
    pair = make_pair()
    for step in range(3):
        rewrite(rollouts, step, pair=pair)
    assert len(rollouts.kept) == 6
    prompts = [row["input_ids"][:-4] for row in make_rows(4)]
    assert [prompt for prompt, _ in rollouts.kept] == [*prompts[2:], *prompts]


def test_an_adaptive_share_rises_where_the_loss_does_not_fall():
    rollouts = Rollouts(Completions(adaptive=True), 0)
    shares = []
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.5, 1.0)):
        rollouts.note(loss, step)
        shares.append(round(rollouts.share, 6))
    assert shares == [0.0, 0.0, 0.1, 0.2, 0.2]


def test_a_step_that_is_evaluated_again_does_not_raise_the_share():
    rollouts = Rollouts(Completions(adaptive=True), 0)
    for step in (0, 0, 2, 2):
        rollouts.note(3.0, step)
    assert rollouts.share == pytest.approx(0.1)


def test_batches_of_one_optimizer_step_are_written_together(monkeypatch):
    calls = []
    real = Rollouts._write
    monkeypatch.setattr(Rollouts, "_write", lambda self, *args: calls.append(1) or real(self, *args))
    _, found = rewrite(Rollouts(Completions(student_share=1.0, max_new_tokens=3), 0), batches=3)
    assert len(found) == 3
    assert len(calls) == 1


def test_the_teacher_draws_anew_for_each_batch_of_an_optimizer_step():
    """The same prompts in two batches of a step, the teacher's earlier text forgotten between them."""
    pair, rollouts = make_pair(), Rollouts(Completions(teacher_share=1.0, max_new_tokens=8), 0)
    prompts = [row["input_ids"][:-4] for row in make_rows(4)]
    first, second = (
        (rollouts.by_teacher.clear(), rollouts._by_teacher(pair[0], prompts, 3, place))[1] for place in (0, 1)
    )
    assert first != second
    rollouts.by_teacher.clear()
    assert rollouts._by_teacher(pair[0], prompts, 3, 1) == second


def test_fewer_kept_completions_than_a_batch_has_rows_are_refused(tmp_path):
    """4 rows a batch: 3 kept ones could never fill one."""
    completions = Completions(student_share=1.0, replay=3)
    with pytest.raises(SettingError, match="keeps 3 completions, and a batch has up to 4 rows"):
        make_trainer(tmp_path, completions)
    make_trainer(tmp_path, Completions(student_share=1.0, replay=4))


def test_where_tokens_make_a_batch_the_one_with_most_rows_counts(tmp_path):
    """Rows of 7 to 10 tokens, 16 in all, and completions no longer than theirs: 40 tokens hold 5 rows of 7 or 8."""
    teacher, student = make_pair()
    with pytest.raises(SettingError, match="keeps 4 completions, and a batch has up to 5 rows"):
        DistillTrainer(
            model=student, teacher=teacher, tokens_per_batch=40,
            plan=Plan(terms=LOGITS, completions=Completions(student_share=1.0, replay=4, max_new_tokens=4)),
            args=make_arguments(tmp_path, remove_unused_columns=False), train_dataset=make_rows(),
            data_collator=collate,
        )  # fmt: skip


def test_a_student_learns_from_what_it_writes(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, Completions(student_share=1.0, max_new_tokens=8), max_steps=30)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.parametrize("every", [1, 3], ids=["evaluated where it was saved", "evaluated elsewhere"])
def test_a_run_that_was_cut_resumes_to_the_same_student(tmp_path, every):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings["eval_steps"] = every
    completions = Completions(student_share=0.9, replay=12, adaptive=True, max_new_tokens=4)
    whole = make_trainer(tmp_path / "whole", completions, **settings)
    whole.train()
    cut = make_trainer(tmp_path / "cut", completions, **settings)
    cut.train()
    resumed = make_trainer(tmp_path / "cut", completions, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert same_weights(whole.model, resumed.model)
    assert list(resumed.rollouts.kept) == list(whole.rollouts.kept)
    assert (resumed.rollouts.share, resumed.rollouts.last_loss) == (whole.rollouts.share, whole.rollouts.last_loss)
    assert json.loads((tmp_path / "cut" / "checkpoint-2" / "completions.json").read_text())["kept"]


def test_tokens_that_were_learned_from_are_counted_and_not_those_of_the_data(tmp_path):
    completions = Completions(student_share=1.0, max_new_tokens=20)
    trainer = make_trainer(tmp_path, completions, max_steps=2, include_num_input_tokens_seen="non_padding")
    trainer.train()
    prompts = sum(len(row["input_ids"]) - 4 for row in make_rows()) / 16 * 8
    assert trainer.state.num_input_tokens_seen > prompts + trainer.rollouts.tokens["student"] * 0.9


@pytest.mark.parametrize("preset", ["sft", "kd", "seq_kd", "minillm", "gkd", "distillm"])
def test_every_named_objective_lowers_its_own_loss(tmp_path, preset):
    teacher, student = make_pair()
    trainer = DistillTrainer(
        model=student, teacher=teacher, plan=preset,
        args=make_arguments(tmp_path, max_steps=25, remove_unused_columns=False),
        train_dataset=make_rows(), eval_dataset=make_rows(), data_collator=collate,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before or preset == "seq_kd"  # which learns another text than it is evaluated on


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ({"student_share": 1.5}, r"student_share is a share of the batches, in \[0, 1\]; got 1.5"),
        ({"teacher_share": 0.6, "student_share": 0.6}, "more than all batches"),
        ({"adaptive": True, "teacher_share": 0.2}, "leaves none for the teacher's"),
        ({"max_new_tokens": 0}, "at least 1 token; got 0"),
        ({"temperature": 0.0}, "above 0; got 0.0"),
        ({"top_p": 0.0}, r"in \(0, 1\]; got 0.0"),
    ],
)
def test_impossible_settings_are_refused(completions, message):
    with pytest.raises(SettingError, match=message):
        Completions(**completions)


def test_an_adaptive_share_is_looked_at_first_and_ten_times_where_nobody_says_when(tmp_path):
    trainer = make_trainer(tmp_path, Completions(adaptive=True, max_new_tokens=2), max_steps=20)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == list(range(0, 21, 2))


def test_the_arguments_that_a_plan_is_given_are_another_trainer_s_too(tmp_path):
    """A plan that evaluates by itself, and after it one that does not, without held-out rows."""
    teacher, student = make_pair()
    arguments = make_arguments(tmp_path, max_steps=2, remove_unused_columns=False)
    before = arguments.to_dict()
    given = {"args": arguments, "train_dataset": make_rows(), "data_collator": collate}
    plan = Plan(terms=LOGITS, completions=Completions(adaptive=True, max_new_tokens=2))
    DistillTrainer(student, teacher, plan, eval_dataset=make_rows(4), **given).train()
    assert arguments.to_dict() == before
    trainer = DistillTrainer(student, teacher, "kd", **given)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_share_is_logged_and_the_first_evaluation_is_one_to_rise_from(tmp_path):
    """A learning rate that does harm: the loss rises from the one before training on."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    completions = Completions(adaptive=True, max_new_tokens=2)
    trainer = make_trainer(tmp_path, completions, max_steps=4, learning_rate=3.0, **often)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "student_share" in line and "loss" in line]
    assert [(line["step"], line["student_share"]) for line in lines] == [(1, 0.0), (2, 0.0), (3, 0.1), (4, 0.1)]


@pytest.mark.parametrize(
    ("terms", "every", "message"),
    [
        (LOGITS, 10, r"of which 1 or more .* of 10 steps; with one every 10 steps .* Evaluate every 9 steps"),
        ((*LOGITS, Term(aspect="hidden")), 5, "of which 2 or more .* Evaluate every 4 steps"),
    ],
    ids=["never before the end", "once, and not before the first step"],
)
def test_a_share_that_could_not_rise_before_the_end_is_refused(tmp_path, terms, every, message):
    often = {"eval_strategy": "steps", "eval_steps": every}
    trainer = make_trainer(tmp_path, Completions(adaptive=True), terms=terms, max_steps=10, **often)
    with pytest.raises(SettingError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_share_that_could_not_rise_is_refused_before_there_is_a_student(tmp_path, tokenizer):
    teacher = tiny("llama", head="causal_lm", vocab_size=len(tokenizer), max_position_embeddings=64)
    data = [{"messages": chat(f"number {n}", "the names")} for n in range(20)]
    recipe = makd.Recipe(plan=Plan(preset="distillm"), training=makd.TrainingConfig(steps=5, evaluate_every=5))
    stages = []
    with pytest.raises(SettingError, match="would never write"):
        makd.compress(
            teacher, data, makd.Budget(keep_linears=0.5), recipe, tmp_path / "run",
            tokenizer=with_template(tokenizer, PLAIN), on_progress=lambda told: stages.append(told.what),
        )  # fmt: skip
    assert "load" in stages
    assert "decompose" not in stages


def test_a_student_that_never_wrote_is_told_of(tmp_path, caplog):
    trainer = make_trainer(tmp_path, Completions(adaptive=True), max_steps=4, learning_rate=1e-3)
    trainer.train()
    assert trainer.rollouts.tokens["student"] == 0
    assert "The student wrote no completion in the whole training: its share did not rise" in caplog.text


def test_an_adaptive_share_without_held_out_rows_is_refused(tmp_path):
    teacher, student = make_pair()
    with pytest.raises(SettingError, match="no eval_dataset"):
        DistillTrainer(
            model=student, teacher=teacher, plan="distillm", args=make_arguments(tmp_path),
            train_dataset=make_rows(), data_collator=collate,
        )  # fmt: skip


def test_a_cache_beside_completions_that_are_yet_to_be_written_is_refused_with_the_settings():
    with pytest.raises(SettingError, match="of which a cache knows nothing"):
        makd.Recipe(plan=Plan(preset="gkd"), cache="somewhere")


def test_plain_text_has_no_prompts_to_go_on_from(tmp_path):
    teacher, student = make_pair()
    with pytest.raises(DataError, match="no prompts"):
        DistillTrainer(
            model=student, teacher=teacher, plan="gkd", args=make_arguments(tmp_path),
            train_dataset=make_rows().remove_columns("labels"),
        )  # fmt: skip


def test_an_encoder_writes_nothing(tmp_path):
    teacher = tiny("bert", head="masked_lm")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    with pytest.raises(SettingError, match="BertForMaskedLM is none"):
        make_trainer(tmp_path, Completions(student_share=1.0), (teacher, student))


def test_completions_are_not_written_in_the_place_of_an_encoder_decoders_targets(tmp_path):
    teacher = tiny("t5", head="seq2seq_lm")
    with pytest.raises(SettingError, match="by causal language models alone; T5ForConditionalGeneration is none"):
        make_trainer(tmp_path, Completions(student_share=1.0), (copy.deepcopy(teacher), teacher))


def test_settings_of_what_is_written_are_refused_where_nothing_is():
    with pytest.raises(SettingError, match="max_new_tokens is 8, and nothing is written"):
        Completions(max_new_tokens=8)


def test_completions_do_not_switch_a_preset_that_writes_off_unsaid():
    with pytest.raises(SettingError, match="The preset gkd learns from completions that are written"):
        makd.Plan(preset="gkd", completions=Completions())
    assert makd.Plan(preset="gkd", completions=Completions(student_share=0.2, top_p=0.9)).writers.student_share == 0.2


def test_a_long_prompt_leaves_others_their_room():
    model = tiny("llama", head="causal_lm", max_position_embeddings=32)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    sampling, prompts = Sampling(max_new_tokens=20), [[5, 6], [7] * 29, [8, 9, 10], [11] * 29]
    found = generate(model, prompts, sampling, [], 0, seed=3, batch_size=4)
    assert [len(text) for text in found] == [20, 3, 20, 3]
    for place, prompt in enumerate(prompts):
        alone = generate(model, [prompt], sampling, [], 0, seed=3, batch_size=1, places=[place])
        assert alone == [found[place]]


def test_what_is_written_ends_where_the_data_ends_its_completions(tmp_path):
    """The models name no end; whatever they write first is one of the `stops`."""
    pair = make_pair()
    for model in pair:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    rollouts = Rollouts(Completions(student_share=1.0, max_new_tokens=5), 0, stops=range(pair[0].config.vocab_size))
    _, (found,) = rewrite(rollouts, pair=pair)
    assert (found["labels"] != -100).sum(-1).tolist() == [1, 1, 1, 1]


def test_a_trainer_stops_where_its_tokenizers_chat_template_does(tmp_path, tokenizer):
    teacher, student = make_pair()
    settings = {"args": make_arguments(tmp_path), "train_dataset": make_rows(), "data_collator": collate}
    chatting = with_template(tokenizer, PLAIN.replace("[SEP]", "[MASK]"))
    trainer = DistillTrainer(student, teacher, "gkd", processing_class=chatting, stops=[50], **settings)
    assert {50, tokenizer.mask_token_id, tokenizer.eos_token_id} <= trainer.rollouts.stops


def test_rows_whose_completions_end_otherwise_than_what_is_written_are_told(tmp_path, caplog):
    make_trainer(tmp_path, Completions(student_share=1.0))
    assert "none of the first 16 rows' completions ends with one" in caplog.text
    caplog.clear()
    teacher, student = make_pair()
    ends = [row["labels"][-1] for row in make_rows()]
    DistillTrainer(
        student, teacher, "gkd", stops=ends[:1], args=make_arguments(tmp_path), train_dataset=make_rows(),
        data_collator=collate,
    )  # fmt: skip
    assert "completions ends with one" not in caplog.text


def test_a_run_ends_what_it_writes_as_its_chat_template_ends_answers(tmp_path, tokenizer):
    """A base model's tokenizer: the template ends turns with [MASK], and nothing else names it."""
    chatting = with_template(tokenizer, PLAIN.replace("[SEP]", "[MASK]"))
    seen = []
    teacher = tiny("llama", head="causal_lm", vocab_size=len(tokenizer), max_position_embeddings=64)
    data = [{"messages": chat(f"number {n}", "the names")} for n in range(20)]
    real = Rollouts.rewrite

    def rewrite_noted(self, *given):
        seen.append(self.stops)
        return real(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "rewrite", rewrite_noted)
        recipe = makd.Recipe(
            plan=Plan(preset="gkd", completions=Completions(student_share=1.0, max_new_tokens=2)),
            training=makd.TrainingConfig(steps=1, batch_size=2),
            evaluation=makd.EvaluationConfig(latency=False, samples=0),
        )
        budget = makd.Budget(keep_linears=0.5)
        report = makd.compress(teacher, data, budget, recipe, tmp_path / "run", tokenizer=chatting)
    assert tokenizer.mask_token_id in seen[0]
    written = report.metrics["tokens"]["written"]
    assert written["teacher"] == 0
    assert 0 < written["student"] < report.metrics["tokens"]["training"]


class Sizing(DistillTrainer):
    """Notes the size of each training batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.sizes = [*getattr(self, "sizes", []), tuple(inputs["input_ids"].shape)]
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("replay", [0, 50], ids=["written anew", "drawn again"])
def test_no_batch_of_written_completions_has_more_tokens_than_it_may(tmp_path, replay):
    """Rows of 8 tokens, one in four of 40: as the data have them, 60 tokens hold 7; as they may be written, 2."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(40):
        ids = torch.randint(5, 60, (8 if number % 4 else 40,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (len(ids) - 4) + ids[-4:]})
    teacher, student = make_pair()
    for model in (teacher, student):  # both write on to the end
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    completions = Completions(student_share=1.0, replay=replay, max_new_tokens=20)
    trainer = Sizing(
        student, teacher, Plan(terms=LOGITS, completions=completions),
        tokens_per_batch=60, args=make_arguments(tmp_path, remove_unused_columns=False, max_steps=30),
        train_dataset=Dataset.from_list(rows), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    assert trainer.rollouts.tokens["student"] > 0
    assert max(width for _, width in trainer.sizes) == 56
    assert max(rows * width for rows, width in trainer.sizes) <= 60


def test_of_kept_completions_those_are_taken_that_a_batch_has_room_for():
    rollouts = Rollouts(Completions(student_share=1.0, replay=9), 0, tokens_per_batch=12)
    short, long = ([5], [6, 7]), ([5] * 5, [6])
    assert rollouts._within([short, short, long, short]) == [short, short]
    assert rollouts._within([([5] * 20, [6]), short]) == [([5] * 20, [6])]
    assert Rollouts(Completions(student_share=1.0), 0)._within([long] * 9) == [long] * 9


def test_rows_may_be_as_long_as_a_completion_that_is_written_up_to_the_last_position():
    rows = [{"input_ids": [5] * 9, "labels": [-100] * 3 + [5] * 6}, {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]}]
    writes = Completions(student_share=0.1, max_new_tokens=4)
    for given in (rows, Dataset.from_list(rows), [{name: torch.tensor(row[name]) for name in row} for row in rows]):
        assert training_lengths(given, writes, None) == [9, 12]
        assert training_lengths(given, writes, 10) == [9, 10]
        assert training_lengths(given, Completions(), None) == [9, 9]


def test_without_a_mask_all_tokens_are_real():
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, -100, -100, 8]])}
    assert prompts_of(batch) == [[5, 6, 7]]


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["the data's turn", "the student's turn"])
def test_rows_of_several_texts_have_no_completion_to_write(share):
    pack = DataCollatorWithFlattening()
    packed = pack([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in make_rows(2)])
    teacher, student = make_pair()
    rollouts = Rollouts(Completions(student_share=share, teacher_share=0.0), 0)
    with pytest.raises(DataError, match="several texts in a row"):
        rollouts.rewrite([packed], 0, 0.0, student, teacher)


class ThirdStage:
    """What DeepSpeed's settings say of themselves."""

    def is_zero3(self):
        return True


def test_nothing_is_written_by_weights_that_deepspeed_has_split(tmp_path):
    pair, settings = make_pair(), ThirdStage()
    set_hf_deepspeed_config(settings)
    try:
        with pytest.raises(SettingError, match="ZeRO-3 splits the weights"):
            make_trainer(tmp_path, Completions(student_share=1.0), pair)
        make_trainer(tmp_path, None, pair)
    finally:
        unset_hf_deepspeed_config()
