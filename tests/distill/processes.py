"""What `test_processes.py` runs in several processes, and alone: one optimizer step of every case, in float64.

    torchrun --nproc-per-node 2 tests/distill/processes.py ENGINE FOLDER [CASE MODE]...

MODE is one of `MODES`; or `begin` or `resume` of a run that is stopped; or `fine-tune`, whatever the case.

Two or four batches make a step, whoever reads them. Rows are ragged, some have no label. Plain gradient descent, so
that an update is the gradient times the rate, whose error can be told.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

import makd
from makd.aspects import PRESETS, Term
from makd.distill import SupervisedTrainer
from makd.distill.engines import support
from tests.models import tiny

MODES = {"plain": 2, "accumulated": 4, "checkpointing": 2}
"""Batches of an optimizer step, over all processes and accumulated ones."""
ROWS = 2
"""Of a batch."""
RATE = 1e-2


@dataclass(frozen=True)
class Case:
    """One way to teach."""

    plan: makd.Plan
    model: str
    head: str
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: Callable[[], Any] | None = None
    """Another than the model of the student's size."""
    shards_teacher: bool = False
    prepare: Callable[[Any], None] = lambda student: None
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the model's config."""


def only(aspect: str, **settings: Any) -> makd.Plan:
    return makd.Plan(terms=(Term(aspect=aspect, **settings),))


def mixed(*aspects: str) -> makd.Plan:
    return makd.Plan(terms=tuple(Term(aspect=aspect) for aspect in aspects))


def freeze(student: Any) -> None:
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("layer.0" not in name and "layers.0" not in name)


def tie(student: Any) -> None:
    student.config.tie_word_embeddings = True
    student.tie_weights()


BERT, LLAMA, T5 = ("bert", "sequence_classification"), ("llama", "causal_lm"), ("t5", "seq2seq_lm")
CHECKPOINTING: dict[str, Any] = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}
WIDE = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64}

CASES: dict[str, Case] = {
    **{
        f"{aspect} {model[0]}": Case(only(aspect), *model)
        for aspect in ("matrix", "hidden", "attention", "logits", "task")
        for model in (BERT, LLAMA)
    },
    "relation": Case(only("relation", relation_heads=2), *BERT),
    "embedding": Case(only("embedding"), "bert", "base"),
    "similarity": Case(only("similarity"), "bert", "base"),
    "completions": Case(
        makd.Plan(terms=tuple(Term(aspect=one, tokens="completion") for one in ("logits", "hidden", "attention"))),
        *LLAMA,
    ),
    "encoder-decoder": Case(mixed("matrix", "hidden", "attention", "logits", "task"), *T5),
    **{name: Case(makd.Plan(preset=name), *(BERT if name in ("feature",) else LLAMA)) for name in PRESETS},
    "full bert": Case(makd.Plan(), *BERT),
    "full base": Case(makd.Plan(), "bert", "base"),
    "hidden of the first layer": Case(only("hidden", layers=[0]), *LLAMA),
    "clipped": Case(makd.Plan(), *LLAMA, settings={"max_grad_norm": 0.1}),
    "shared inputs": Case(makd.Plan(), *LLAMA),
    "tied": Case(makd.Plan(), *LLAMA, prepare=tie),
    "sharded teacher": Case(makd.Plan(), *LLAMA, shards_teacher=True),
    "frozen": Case(makd.Plan(), *LLAMA, prepare=freeze),
    # prompts of 2 to 6 tokens: after 4 and more there is less room than is asked for
    "gkd near the last position": Case(
        makd.Plan(preset="gkd", completions=makd.Completions(student_share=1.0, max_new_tokens=11)),
        *LLAMA,
        changes={"max_position_embeddings": 14},
    ),
    "narrower": Case(
        mixed("hidden", "matrix", "task"), *BERT, teacher=lambda: tiny("bert", head="sequence_classification", **WIDE)
    ),
}


def make_rows(head: str, preset: str) -> Dataset:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 14, (16,), generator=random).tolist()
    rows: list[dict[str, Any]] = []
    for place, length in enumerate(lengths):
        ids = torch.randint(5, 60, (length,), generator=random).tolist()
        row: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * length}
        if head == "sequence_classification":
            row["labels"] = -100 if place % 3 == 0 else place % 2
        elif head != "base":
            row["labels"] = [-100] * (length // 2) + ids[length // 2 :]
            if place % 3 == 0 and preset not in ("seq_kd", "minillm", "gkd", "distillm"):
                row["labels"] = [-100] * (length - 2) + ids[-2:]
        rows.append(row)
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            values = [value + [fillers[name]] * (width - len(value)) for value in values]
        found[name] = torch.tensor(values)
    return found


def run(name: str, mode: str, folder: Path, processes: int) -> dict[str, Any]:
    """The update of one optimizer step, and what is logged and evaluated; of two where a share is to rise after one."""
    case = CASES[name]
    teacher = (case.teacher or (lambda: tiny(case.model, head=case.head, **case.changes)))().double()
    if case.teacher is None:
        student = makd.factorize(
            teacher,
            makd.Budget(keep_linears=0.5),
            solver="svd",
            share_input="always" if name == "shared inputs" else "never",
        )
    else:
        student = tiny(case.model, head=case.head, seed=1).double()
    case.prepare(student)
    before = {key: value.detach().clone() for key, value in student.state_dict().items()}
    rows = make_rows(case.head, case.plan.preset)
    settings = {"max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant", "seed": 3} | case.settings
    settings |= CHECKPOINTING if mode == "checkpointing" else {}
    arguments = TrainingArguments(
        output_dir=str(folder / f"{name} {mode}".replace(" ", "_")),
        max_steps=2 if case.plan.writers.adaptive else 1,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        gradient_accumulation_steps=MODES[mode] // processes,
        learning_rate=RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = makd.DistillTrainer(
        student,
        teacher,
        case.plan,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows.select(range(len(rows) - 3)),
        data_collator=collate,
        shard_teacher=case.shards_teacher and processes > 1,
    )
    if trainer.projections is not None:
        trainer.projections.double()
    trainer.train()
    evaluated = trainer.evaluate()
    after = full_state(trainer.model)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    kept = ("loss", *(active.name for active in trainer.plan.terms))
    return {
        "update": {key: (after[key] - before[key]) / RATE for key in before if before[key].is_floating_point()},
        "log": {key: log[key] for key in kept if key in log},
        "eval": {key: evaluated[f"eval_{key}"] for key in kept if f"eval_{key}" in evaluated},
    }


def fine_tune(folder: Path) -> dict[str, float]:
    """What an evaluation of a fine-tuning tells, of ragged rows, some without a label."""
    rows = make_rows("sequence_classification", "").select(range(13))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=ROWS, report_to="none", use_cpu=True, disable_tqdm=True
    )
    model = tiny("bert", head="sequence_classification").double()
    found = {}
    for tokens in (None, 1, 40):  # a batch each row, and few of many: neither number of batches is even
        trainer = SupervisedTrainer(model, args=arguments, tokens_per_batch=tokens, data_collator=collate)
        found[f"eval_loss, {tokens} tokens"] = trainer.evaluate(rows)["eval_loss"]
    return found


def resume(name: str, folder: Path, processes: int, stop: int, resumes: bool, engine: str) -> dict[str, torch.Tensor]:
    """Weights after three steps of Adam, or after `stop` of them, each of which is kept."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    case = CASES[name]
    teacher = tiny(case.model, head=case.head).double()
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=4 // processes,
        learning_rate=1e-3,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = makd.DistillTrainer(
        student,
        teacher,
        case.plan,
        args=arguments,
        train_dataset=make_rows(case.head, case.plan.preset),
        data_collator=collate,
        callbacks=[Stop()],
    )
    trainer.train(resume_from_checkpoint=resumes)
    if engine == "fsdp":
        trainer.save_model(str(folder / "saved"))
    return full_state(trainer.model)


def full_state(model: Any) -> dict[str, torch.Tensor]:
    """Whole tensors, of a sharded model too."""
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for key, value in model.state_dict().items()
    }


def shard_on_a_cpu() -> None:
    """Ask for FSDP2. Accelerate takes it for accelerators alone; torch's own runs on CPUs as well."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    begin = AcceleratorState.__init__

    def pretending(self: Any, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = pretending
    support._unsharded_where = lambda device: None


def main() -> None:
    engine, folder = sys.argv[1], Path(sys.argv[2])
    logging.disable(logging.WARNING)
    if engine == "fsdp":
        shard_on_a_cpu()
    state = PartialState(cpu=True)
    found: dict[tuple[str, str], Any] = {}
    for name, mode in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
        if mode == "fine-tune":
            found[name, mode] = fine_tune(folder)
        elif mode in ("begin", "resume"):
            stop = 2 if mode == "begin" else 3
            found[name, mode] = resume(name, folder / "run", state.num_processes, stop, mode == "resume", engine)
        else:
            found[name, mode] = run(name, mode, folder, state.num_processes)
    if state.is_main_process:
        torch.save(found, folder / f"{engine}{state.num_processes}.pt")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
