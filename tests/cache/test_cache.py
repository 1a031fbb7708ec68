"""A teacher cache: training from it is training with the teacher, and a cache of something else is refused."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import DefaultDataCollator, TrainerCallback, TrainingArguments

import makd
from makd.anatomy import resolve
from makd.aspects import activate
from makd.baselines.narrow import narrower
from makd.cache import CacheConfig, TeacherCache, identify, take_up, write_cache
from makd.cache.identity import hash_rows
from makd.cache.write import FORMAT, shards_of
from makd.distill import DistillTrainer
from makd.errors import CacheError, DataError
from makd.progress import Progress
from tests.models import VOCABULARY, tiny

LENGTHS = [12, 5, 9, 7, 12, 3, 8, 10]


def make_rows(labels=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {
        "input_ids": [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS],
        "attention_mask": [[1] * n for n in LENGTHS],
    }
    return Dataset.from_dict(rows | ({} if labels is None else {"label": labels}))


class Pad:
    """A collator that pads on either side, with labels where the rows have some or the model reads its own input."""

    def __init__(self, side="right", own_labels=False, two_stacks=False):
        self.side, self.own_labels, self.two_stacks = side, own_labels, two_stacks

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in ("input_ids", "attention_mask"):
            padded = []
            for row in rows:
                padding = [0] * (longest - len(row[name]))
                padded.append(row[name] + padding if self.side == "right" else padding + row[name])
            batch[name] = torch.tensor(padded)
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        elif self.own_labels:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if self.two_stacks:
            batch |= {f"decoder_{name}": value for name, value in list(batch.items()) if name != "labels"}
        return batch


def make_pair(name="bert", head="base"):
    teacher = tiny(name, head=head)
    return teacher, makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def build(folder, teacher, rows, plan="full", collate=None, **settings):
    """A cache of `rows`, opened."""
    plan = plan if isinstance(plan, makd.Plan) else makd.Plan(preset=plan)
    settings = CacheConfig(**({"dtype": "float32", "batch_size": 8} | settings))
    write_cache(
        teacher, rows, collate or Pad(), activate(plan, resolve(teacher)), folder, identify(teacher, rows), settings
    )
    return TeacherCache.open(folder, teacher, rows)


def make_trainer(folder, teacher, student, rows, plan="full", collate=None, cache=None, callbacks=None, **settings):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return DistillTrainer(
        student, teacher, plan, cache=cache, args=TrainingArguments(**(arguments | settings)), train_dataset=rows,
        data_collator=collate or Pad(), callbacks=callbacks,
    )  # fmt: skip


def losses(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def compare(tmp_path, name="bert", head="base", rows=None, plan="full", collate=None, dtype="float32", **settings):
    """Logs of a run with the teacher and of one from a cache."""
    rows = rows or make_rows()
    found = []
    for place in ("live", "cached"):
        teacher, student = make_pair(name, head)
        cache = build(tmp_path / "cache", teacher, rows, plan, collate, dtype=dtype) if place == "cached" else None
        trainer = make_trainer(tmp_path / place, teacher, student, rows, plan, collate, cache, **settings)
        if cache is not None:
            teacher.forward = refuse
        found.append(losses(trainer))
    return found


def refuse(*_arguments, **_named):
    raise AssertionError("the teacher was asked in a training step")


def assert_near(live, cached, tolerance=1e-4, absolute=1e-6):
    assert len(live) == len(cached) > 0
    for one, other in zip(live, cached, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"epoch", "learning_rate"}:
            assert other[name] == pytest.approx(one[name], rel=tolerance, abs=absolute), name


TEXT = makd.Plan(terms=(makd.Term(aspect="embedding"), makd.Term(aspect="similarity"), makd.Term(aspect="hidden")))
EXPERTS = makd.Plan(terms=(makd.Term(aspect="experts"),))
CASES = {
    "encoder, every aspect": ("bert", "base", None, "full", Pad()),
    "encoder, padded on the left": ("bert", "base", None, "full", Pad("left")),
    "similarities": ("bert", "base", None, TEXT, Pad()),
    "decoder, every aspect": ("llama", "causal_lm", None, "full", Pad(own_labels=True)),
    "decoder, padded on the left": ("llama", "causal_lm", None, "full", Pad("left", own_labels=True)),
    "decoder with a sliding window": ("mistral", "causal_lm", None, "full", Pad(own_labels=True)),
    "joined rows in the feed-forward": ("opt", "causal_lm", None, "full", Pad(own_labels=True)),
    "mixtures of experts": ("llama4", "causal_lm", None, EXPERTS, Pad(own_labels=True)),
    "masked tokens": ("bert", "masked_lm", None, "full", Pad(own_labels=True)),
    "classes": ("bert", "sequence_classification", [0, 1] * 4, "full", Pad()),
    "classes of tokens": ("bert", "token_classification", None, "full", Pad()),
    "answers": ("bert", "question_answering", None, "full", Pad()),
    "two stacks": ("bart", "base", None, "full", Pad(two_stacks=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_training_from_a_float32_cache_is_training_with_the_teacher(case, tmp_path):
    name, head, labels, plan, collate = CASES[case]
    assert_near(*compare(tmp_path, name, head, make_rows(labels), plan, collate))


def test_the_same_batches_give_the_same_student_bit_for_bit(tmp_path):
    """Built and trained in one batch of all rows: a row's forward rounds as the rows beside it make it."""
    live, cached = compare(tmp_path, per_device_train_batch_size=8, max_steps=1, seed=0)
    same = {name for name in live[0] if name.endswith(("matrix", "hidden", "attention", "embedding"))}
    assert same == {"matrix", "hidden", "attention", "embedding"}
    assert_near(live, cached, 1e-6, 1e-8)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)])
@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_rounding_stays_within_its_bound(name, head, dtype, bound, tmp_path):
    live, cached = compare(tmp_path, name, head, collate=Pad(own_labels=head != "base"), dtype=dtype, max_steps=1)
    assert_near(live, cached, bound, 1e-3 * bound)


def test_accumulation_and_several_epochs_in_shuffled_order(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5}
    assert_near(*compare(tmp_path, **settings), 1e-3)


def test_the_column_survives_where_unused_ones_are_removed(tmp_path):
    assert_near(*compare(tmp_path, remove_unused_columns=True))


def test_rows_in_a_list_are_numbered_too(tmp_path):
    rows = [dict(row) for row in make_rows()]
    assert_near(*compare(tmp_path, rows=rows, collate=Pad()))


def test_rows_of_one_length_need_no_padding(tmp_path):
    ids = torch.randint(5, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 6] * 8})
    assert_near(*compare(tmp_path, rows=rows, collate=DefaultDataCollator()))


def test_evaluation_asks_the_teacher(tmp_path):
    teacher, student = make_pair()
    rows = make_rows()
    trainer = make_trainer(tmp_path, teacher, student, rows, cache=build(tmp_path / "cache", teacher, rows))
    found = trainer.evaluate(make_rows(seed=1))
    plain = make_trainer(tmp_path, teacher, student, rows).evaluate(make_rows(seed=1))
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"])


def test_a_cached_run_that_was_stopped_resumes_to_the_same_student(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    rows = make_rows()
    teacher = tiny("bert")
    cache = build(tmp_path / "cache", teacher, rows)
    settings = {"max_steps": 6, "per_device_train_batch_size": 3}
    whole = make_trainer(tmp_path / "whole", *make_pair(), rows, cache=cache, **settings)
    whole.train()
    settings |= {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "cut", *make_pair(), rows, cache=cache, callbacks=[Stop()], **settings).train()
    going_on = make_trainer(tmp_path / "cut", *make_pair(), rows, cache=cache, **settings)
    going_on.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, going_on.model.state_dict()[name]), name


ATTENTION = makd.Plan(terms=(makd.Term(aspect="attention"),))


def test_attention_of_a_model_with_a_scale_of_its_own_is_kept(tmp_path):
    live, cached = compare(tmp_path, "granite", "causal_lm", plan=ATTENTION)
    assert resolve(tiny("granite", head="causal_lm")).layers[0].attention is not None
    assert tiny("granite", head="causal_lm").config.attention_multiplier != 8**-0.5
    assert_near(live, cached)


def test_attention_is_compared_with_narrower_heads(tmp_path):
    rows, found = make_rows(), []
    for place in ("live", "cached"):
        teacher = tiny("bert", head="base")
        student = narrower(teacher, makd.Budget(keep_linears=0.5))
        assert student.config.hidden_size < teacher.config.hidden_size
        cache = build(tmp_path / "cache", teacher, rows, ATTENTION) if place == "cached" else None
        found.append(losses(make_trainer(tmp_path / place, teacher, student, rows, ATTENTION, cache=cache)))
    assert_near(*found)


class TestPredictions:
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_the_top_k_divergence_of_fewer_tokens_is_exact(self, tmp_path, temperature):
        plan = makd.Plan(terms=(makd.Term(aspect="logits", divergence="top_k", k=5, temperature=temperature),))
        live, cached = compare(tmp_path, "llama", "causal_lm", plan=plan, collate=Pad(own_labels=True))
        assert_near(live, cached)

    def test_every_divergence_is_bounded_by_that_of_all_tokens(self, tmp_path):
        rows = make_rows()
        for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
            plan = makd.Plan(terms=(makd.Term(aspect="logits", divergence=divergence),))
            teacher, student = make_pair("llama", "causal_lm")
            cache = build(tmp_path / divergence, teacher, rows, plan, top_k=8)
            inputs = Pad()(list(rows))
            live = make_trainer(tmp_path, teacher, student, rows, plan).compute_loss(student, inputs)
            inputs["row"] = torch.arange(len(rows))
            kept = make_trainer(tmp_path, teacher, student, rows, plan, cache=cache).compute_loss(student, inputs)
            assert 0.2 * live < kept < live * (1 + 1e-5), divergence

    def test_more_tokens_than_were_kept_are_refused(self, tmp_path):
        rows, (teacher, student) = make_rows(), make_pair("llama", "causal_lm")
        plan = makd.Plan(terms=(makd.Term(aspect="logits", divergence="top_k", k=9),))
        cache = build(tmp_path, teacher, rows, plan, top_k=8)
        with pytest.raises(CacheError, match=r"tells 9 tokens apart, the cache .* 8"):
            cache.check_plan(activate(plan, resolve(student)), student)

    def test_another_temperature_is_refused(self, tmp_path):
        rows, (teacher, student) = make_rows(), make_pair("llama", "causal_lm")
        cache = build(tmp_path, teacher, rows, makd.Plan(terms=(makd.Term(aspect="logits"),)))
        other = makd.Plan(terms=(makd.Term(aspect="logits", temperature=2.0),))
        with pytest.raises(CacheError, match=r"'logits' compares with: predictions.log_missing_2"):
            cache.check_plan(activate(other, resolve(student)), student)


class TestWhatIsKept:
    def test_only_real_tokens(self, tmp_path):
        teacher = tiny("bert")
        build(tmp_path, teacher, make_rows(), "feature", dtype="float16")
        (shard,) = (load_file(path) for path in shards_of(tmp_path))
        assert shard["hidden.0"].shape == (sum(LENGTHS), 32)
        assert shard["hidden.0"].dtype == torch.float16
        assert shard["attention.1.query"].shape == (sum(LENGTHS), 4, 8)
        assert shard["embedding.mean"].shape == (len(LENGTHS), 32)
        assert shard["offsets.encoder"].diff().tolist() == sorted(LENGTHS)

    def test_int8_is_of_states_only(self, tmp_path):
        build(tmp_path, tiny("bert"), make_rows(), dtype="int8")
        (shard,) = (load_file(path) for path in shards_of(tmp_path))
        assert shard["hidden.0"].dtype == torch.int8
        assert shard["hidden.0.scale"].shape == (sum(LENGTHS),)
        assert shard["attention.0.key.scale"].shape == (sum(LENGTHS), 4)
        assert shard["embedding.mean"].dtype == torch.float16

    def test_of_a_vocabulary_a_few_tokens_and_the_rest_as_one(self, tmp_path):
        teacher, rows = tiny("llama", "causal_lm"), make_rows()
        build(tmp_path, teacher, rows, "logits", top_k=4)
        (shard,) = (load_file(path) for path in shards_of(tmp_path))
        assert shard["predictions.tokens"].dtype == torch.uint16
        mass = shard["predictions.log_probabilities"].exp().sum(-1) + shard["predictions.log_missing_1"].exp()
        torch.testing.assert_close(mass, torch.ones(sum(LENGTHS)))

    def test_a_plan_that_is_part_of_the_cached_one_runs(self, tmp_path):
        teacher, student = make_pair()
        cache = build(tmp_path, teacher, make_rows(), "full")
        for preset in ("feature", "balanced", "fast", "logits"):
            cache.check_plan(activate(makd.Plan(preset=preset), resolve(student)), student)

    def test_a_plan_that_asks_for_more_is_refused_with_the_aspect(self, tmp_path):
        teacher, student = make_pair()
        cache = build(tmp_path, teacher, make_rows(), "fast")
        with pytest.raises(CacheError, match=r"aspect 'hidden' compares with: hidden.0"):
            make_trainer(tmp_path, teacher, student, make_rows(), "feature", cache=cache)

    def test_attention_with_a_learned_bias_is_refused(self, tmp_path):
        with pytest.raises(makd.MakdError, match="learned bias"):
            build(tmp_path, tiny("t5"), make_rows(), makd.Plan(terms=(makd.Term(aspect="attention"),)),
                  Pad(two_stacks=True))  # fmt: skip

    def test_numbers_too_large_for_the_dtype_are_named(self, tmp_path):
        teacher = tiny("bert")
        teacher.encoder.layer[1].output.LayerNorm.bias.data[0] = 1e5
        with pytest.raises(
            makd.MakdError, match=r"hidden.1 has numbers up to 1e\+05, too large for cache.dtype float16"
        ):
            build(tmp_path, teacher, make_rows(), "fast", dtype="float16")

    def test_a_teacher_that_gives_nan_is_named(self, tmp_path):
        teacher = tiny("bert")
        teacher.encoder.layer[0].output.dense.bias.data.fill_(math.nan)
        with pytest.raises(makd.MakdError, match="NaN or infinity in"):
            build(tmp_path, teacher, make_rows())


class TestStale:
    """A cache of something else is refused, and the text says of what."""

    @pytest.fixture
    def made(self, tmp_path):
        teacher, rows = tiny("bert"), make_rows()
        build(tmp_path / "cache", teacher, rows, "fast")
        return tmp_path / "cache", teacher, rows

    def test_other_weights(self, made):
        folder, teacher, rows = made
        teacher.encoder.layer[0].output.dense.bias.data[0] += 1e-3
        with pytest.raises(CacheError, match=r"stale: its teacher is [0-9a-f]{12}, here it is [0-9a-f]{12}"):
            TeacherCache.open(folder, teacher, rows)

    def test_another_config(self, made):
        folder, teacher, rows = made
        teacher.config.layer_norm_eps *= 2
        with pytest.raises(CacheError, match="its teacher is"):
            TeacherCache.open(folder, teacher, rows)

    def test_another_order_of_the_rows(self, made):
        folder, teacher, rows = made
        with pytest.raises(CacheError, match="its data is"):
            TeacherCache.open(folder, teacher, rows.shuffle(seed=1))

    def test_fewer_rows(self, made):
        folder, teacher, rows = made
        with pytest.raises(CacheError, match="its data is"):
            TeacherCache.open(folder, teacher, rows.select(range(4)))

    def test_labels_are_not_the_teachers_business(self, made):
        folder, teacher, rows = made
        assert len(TeacherCache.open(folder, teacher, rows.add_column("label", [0] * len(rows)))) == len(rows)

    def test_another_tokenizer_or_length(self, tmp_path, tokenizer, encoder_folder):
        teacher, rows = tiny("bert"), make_rows()
        identity = identify(teacher, rows, tokenizer, 16)
        write_cache(teacher, rows, Pad(), activate(makd.Plan(preset="fast"), resolve(teacher)), tmp_path, identity)
        assert TeacherCache.open(tmp_path, teacher, rows, tokenizer, 16)
        with pytest.raises(CacheError, match="its max_length is 16, here it is 32"):
            TeacherCache.open(tmp_path, teacher, rows, tokenizer, 32)
        other = type(tokenizer).from_pretrained(encoder_folder)
        other.add_tokens(["unheard-of"])
        with pytest.raises(CacheError, match="its tokenizer is"):
            TeacherCache.open(tmp_path, teacher, rows, other, 16)

    def test_another_format(self, made):
        folder, teacher, rows = made
        content = json.loads((folder / "cache.json").read_text())
        (folder / "cache.json").write_text(json.dumps(content | {"format": 0}))
        with pytest.raises(CacheError, match=f"its format is 0, here it is {FORMAT}"):
            TeacherCache.open(folder, teacher, rows)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
    def test_a_note_that_is_none(self, made, text):
        folder, teacher, rows = made
        (folder / "cache.json").write_text(text)
        with pytest.raises(CacheError, match=r"cache\.json (is damaged|holds an object)"):
            TeacherCache.open(folder, teacher, rows)

    @pytest.mark.parametrize("value", [None, "load", [], {}, ["../other.safetensors"], 3.5])
    @pytest.mark.parametrize("key", ["shards", "settings", "dtype", "vocabulary"])
    def test_a_note_with_something_else_in_it(self, made, key, value):
        folder, teacher, rows = made
        content = json.loads((folder / "cache.json").read_text())
        if (key, value) in (("shards", []), ("vocabulary", None)):  # a cache without these may be
            value = {"not": "that"}
        (folder / "cache.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(CacheError, match="is damaged"):
            TeacherCache.open(folder, teacher, rows)

    def test_a_folder_without_a_cache(self, tmp_path, made):
        _, teacher, rows = made
        with pytest.raises(CacheError, match="does not exist"):
            TeacherCache.open(tmp_path / "nowhere", teacher, rows)
        with pytest.raises(CacheError, match="holds no teacher cache"):
            TeacherCache.open(tmp_path, teacher, rows)

    def test_a_damaged_shard(self, made):
        folder, teacher, rows = made
        (shard,) = shards_of(folder)
        shard.write_bytes(shard.read_bytes()[:1000])
        with pytest.raises(CacheError, match="damaged"):
            TeacherCache.open(folder, teacher, rows)

    def test_the_trainers_rows_are_as_many(self, made, tmp_path):
        folder, teacher, rows = made
        cache = TeacherCache.open(folder, teacher, rows)
        with pytest.raises(CacheError, match="of 8 rows, the training data has 4"):
            make_trainer(tmp_path, *make_pair(), rows.select(range(4)), "fast", cache=cache)

    def test_a_batch_of_other_tokens(self, made):
        folder, teacher, rows = made
        cache, plan, anatomy = TeacherCache.open(folder, teacher, rows), makd.Plan(preset="fast"), resolve(teacher)
        inputs = Pad()([rows[0], rows[1]])
        with pytest.raises(DataError, match=r"\[12, 5\] real tokens where the cache .* has \[5, 12\]"):
            cache.recall([1, 0], activate(plan, anatomy), anatomy, inputs)


class TestAKilledBuild:
    def cut(self, folder, teacher, rows, plan):
        """A build that is killed after two of its four batches."""
        forward, calls = teacher.forward, []

        def until_the_third(**inputs):
            calls.append(inputs)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return forward(**inputs)

        teacher.forward = until_the_third
        with pytest.raises(KeyboardInterrupt):
            write(folder, teacher, rows, plan)
        teacher.forward = forward

    def test_goes_on_at_the_next_shard(self, tmp_path):
        teacher, rows = tiny("bert"), make_rows()
        write(tmp_path / "whole", teacher, rows)
        self.cut(tmp_path / "cut", teacher, rows, "fast")
        (tmp_path / "cut" / "00000004-00000006.safetensors.part").write_bytes(b"half a shard")
        with pytest.raises(CacheError, match="unfinished"):
            TeacherCache.open(tmp_path / "cut", teacher, rows)
        told = []
        write(tmp_path / "cut", teacher, rows, on_progress=told.append)
        assert told[0] == Progress("cache", 4, 8, "rows")
        assert told[-1] == Progress("cache", 8, 8, "rows")
        one, other = shards_of(tmp_path / "whole"), shards_of(tmp_path / "cut")
        assert [path.name for path in one] == [path.name for path in other]
        for a, b in zip(map(load_file, one), map(load_file, other), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)

    def test_is_not_continued_by_another(self, tmp_path):
        teacher, rows = tiny("bert"), make_rows()
        self.cut(tmp_path, teacher, rows, "fast")
        with pytest.raises(CacheError, match="unfinished cache of something else: its parts"):
            write(tmp_path, teacher, rows, "feature")

    def test_a_damaged_note_is_no_traceback(self, tmp_path):
        teacher, rows = tiny("bert"), make_rows()
        self.cut(tmp_path, teacher, rows, "fast")
        (tmp_path / "unfinished.json").write_text('{"data"')
        with pytest.raises(CacheError, match=r"unfinished\.json is damaged"):
            write(tmp_path, teacher, rows)

    def test_a_finished_one_is_taken_up_without_asking_the_teacher(self, tmp_path):
        teacher, rows, told = tiny("bert"), make_rows(), []
        content = write(tmp_path, teacher, rows)
        take_up(tmp_path)
        again = write(tmp_path, teacher, rows, on_progress=told.append)
        assert told == [Progress("cache", 8, 8, "rows")]
        assert again == content

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(CacheError, match="not empty"):
            write(tmp_path, tiny("bert"), make_rows())


def write(folder, teacher, rows, plan="fast", on_progress=None):
    """Two rows a batch, and a shard for each batch."""
    settings = CacheConfig(batch_size=2)
    object.__setattr__(settings, "shard_megabytes", 1e-6)
    plan = activate(makd.Plan(preset=plan), resolve(teacher))
    return write_cache(teacher, rows, Pad(), plan, folder, identify(teacher, rows), settings, on_progress)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({"top_k": 0}, "top_k is at least 1"),
     ({"batch_size": 0}, "batch_size"), ({"shard_megabytes": 0}, "shard_megabytes")],
)  # fmt: skip
def test_settings_that_are_not_allowed(settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        CacheConfig(**settings)


def test_rows_in_another_order_are_other_rows(tmp_path):
    teacher = tiny("llama", head="causal_lm")
    rows = make_rows()
    plan = makd.Plan(preset="fast")
    identity = {"data": hash_rows(rows)}
    active = activate(plan, resolve(teacher))
    folder = tmp_path / "cache"
    cache = TeacherCache(
        folder, write_cache(teacher, rows, Pad(own_labels=True), active, folder, identity, CacheConfig())
    )
    settings = {
        "args": TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"), "cache": cache,
        "data_collator": Pad(own_labels=True),
    }  # fmt: skip
    DistillTrainer(tiny("llama", head="causal_lm"), teacher, plan, train_dataset=rows, **settings)
    with pytest.raises(CacheError, match="is of other rows than the training data, or of these in another order"):
        DistillTrainer(tiny("llama", head="causal_lm"), teacher, plan, train_dataset=rows.shuffle(seed=1), **settings)
