"""How each tool trains: functions from a cell to its loop, which never ends by itself.

Each first imports its library and returns the rest as a function, so that imports are not counted as memory of a step.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from distilling.subjects import Subject, load, rows
from distilling.worker import Turns

Cell = dict[str, Any]
Loop = Callable[[Turns], None]
ENDLESS = 10**6
LEARNING_RATE = 1e-5
OPTIMIZER: dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True}


def pair(cell: Cell, attention: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher."""
    models = [
        load(Path(cell["place"]), which, attention, cell["dtype"], cell["device"]) for which in ("student", "teacher")
    ]
    models[1].requires_grad_(False)
    return models[0], models[1]


def data(cell: Cell, model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Rows of all steps, in the order of training."""
    return rows(
        Subject(**cell["subject"]), model.config.vocab_size, cell["tokens"], cell["batch"] * cell["steps"], cell["seed"]
    )


def loader(cell: Cell, model: PreTrainedModel, collate: Callable[..., Any]) -> DataLoader[dict[str, Tensor]]:
    """The rows of `data` in batches."""
    rows = cast(Dataset[dict[str, Tensor]], data(cell, model))  # a list will do
    return DataLoader(rows, batch_size=cell["batch"], collate_fn=collate)


def batches(cell: Cell, model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What a plain loop reads: the batches of `data`, again and again."""
    for batch in itertools.chain.from_iterable(itertools.repeat(loader(cell, model, default_data_collator))):
        yield {name: value.to(cell["device"]) for name, value in batch.items()}


def trainer_settings(cell: Cell) -> dict[str, Any]:
    """Arguments of a transformers Trainer, in whatever class of them."""
    return {
        "output_dir": str(Path(cell["place"]) / "runs"), "per_device_train_batch_size": cell["batch"],
        "max_steps": ENDLESS, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": cell["device"] == "cpu", "dataloader_pin_memory": False,
        "remove_unused_columns": False, "seed": cell["seed"],
    }  # fmt: skip


def makd_loop(cell: Cell) -> Loop:
    """makd.DistillTrainer."""
    import makd

    trainer_class = makd.DistillTrainer

    def run(turns: Turns) -> None:
        student, teacher = pair(cell, "sdpa")
        trainer = trainer_class(
            student,
            teacher,
            cell["plan"],
            args=TrainingArguments(**trainer_settings(cell)),
            train_dataset=data(cell, student),
            data_collator=default_data_collator,
        )
        trainer.compute_loss = turns.note(trainer.compute_loss)  # type: ignore[method-assign]
        turns.start()
        trainer.train()

    return run


def eager_loop(cell: Cell) -> Loop:
    """The plain reference in a plain loop."""
    from distilling.reference import Eager

    def run(turns: Turns) -> None:
        student, teacher = pair(cell, "eager")
        loss = turns.note(Eager(student, teacher, cell["plan"]).loss)
        optimizer = torch.optim.AdamW(student.parameters(), **OPTIMIZER)
        turns.start()
        for batch in batches(cell, student):
            loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def _peer(name: str) -> Callable[[Cell], Loop]:
    def prepare(cell: Cell) -> Loop:
        from distilling import peers

        loop: Loop = getattr(peers, f"{name}_loop")(cell)
        return loop

    return prepare


TOOLS: dict[str, Callable[[Cell], Loop]] = {
    "makd": makd_loop,
    "eager": eager_loop,
    "torchdistill": _peer("torchdistill"),
    "textbrewer": _peer("textbrewer"),
    "gkd": _peer("gkd"),
}
