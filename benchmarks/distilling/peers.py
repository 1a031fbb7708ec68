"""Loops of torchdistill, TextBrewer and TRL's GKD: each as its own documentation shows, with the losses that it has.

Nothing here is a peer's code. Where a tool takes losses of one's own (torchdistill), it gets those of `reference`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, default_data_collator

import makd
from distilling import reference
from distilling.tools import (
    ENDLESS,
    LEARNING_RATE,
    OPTIMIZER,
    Cell,
    Loop,
    batches,
    data,
    loader,
    pair,
    trainer_settings,
)
from distilling.worker import Turns
from makd.aspects import activate


def torchdistill_loop(cell: Cell) -> Loop:
    """torchdistill.core.distillation, as in its text classification example."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.core.interfaces.registry import register_forward_proc_func
    from torchdistill.losses.mid_level import KDLoss, SimpleLossWrapper
    from torchdistill.losses.registry import register_func2extract_model_output

    @register_forward_proc_func
    def forward_without_labels(model: Any, batch: Any, *_: Any) -> Any:
        return model(**{name: value for name, value in batch.items() if name != "labels"})

    @register_func2extract_model_output
    def own_loss(output: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {} if output.get("loss") is None else {"loss": output.loss}

    class TokenKD(KDLoss):
        """KDLoss for one prediction a token: its softmax is over axis 1."""

        def forward(self, ours: Any, theirs: Any, *_: Any, **__: Any) -> Tensor:
            path = self.student_module_path
            flat = [{path: {"output": side[path]["output"].flatten(0, 1)}} for side in (ours, theirs)]
            loss: Tensor = super().forward(*flat)
            return loss

    def run(turns: Turns) -> None:
        student, teacher = pair(cell, "eager" if cell["plan"] == "full" else "sdpa")
        outputs, terms = _torchdistill_terms(student, cell["plan"], TokenKD, SimpleLossWrapper)
        hooks = {"forward_hook": {"input": [], "output": outputs}}
        has_labels = student.get_output_embeddings() is not None
        criterion = {"key": "WeightedSumLoss", "func2extract_model_loss": "own_loss",
                     "kwargs": {"sub_terms": terms, "model_term": {"weight": 1.0 if has_labels else 0.0}}}  # fmt: skip
        config = {
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_without_labels", "requires_grad": False, **hooks},
            "student": {"forward_proc": "forward_batch_only_as_kwargs", **hooks},
            "optimizer": {"key": "AdamW", "kwargs": dict(OPTIMIZER), "max_grad_norm": 1.0},
            "criterion": criterion,
        }
        device = torch.device(cell["device"])
        box = get_distillation_box(teacher, student, {}, config, device, [], False, 1)
        loss = turns.note(box.forward_process)
        box.pre_epoch_process(epoch=0)
        turns.start()
        for batch in batches(cell, student):
            box.pre_forward_process()
            box.post_forward_process(loss=loss(batch, None))

    return run


def _torchdistill_terms(
    student: PreTrainedModel, plan: str, token_kd: type, loss_wrapper: type
) -> tuple[list[str], dict[str, Any]]:
    """Modules whose outputs torchdistill hooks, and its `sub_terms`."""
    anatomy = makd.resolve(student)
    outputs, terms = [], {}
    for active in activate(makd.Plan(preset=plan), anatomy).terms:
        aspect, weight = active.term.aspect, active.term.weight
        if aspect == "logits":
            outputs.append("lm_head")
            loss = token_kd("lm_head", "output", "lm_head", "output", temperature=1.0, alpha=None, beta=1.0)
            terms[aspect] = {"criterion": loss, "weight": weight}
        elif aspect == "embedding":
            terms[aspect] = {"criterion": _Pooled(), "weight": weight}
        for tap in active.taps:
            layer = anatomy.layers[tap.layer]
            if tap.kind == "attention":
                path = layer.attention
            else:
                path = layer.module if tap.role is None else layer.roles[tap.role].module
            assert path is not None  # of these models every tap is a module's output
            if tap.kind == "attention":
                loss = _AttentionKL(path)
            else:
                side = {"module_path": path, "io": "output"}
                ends = {"input": {"is_from_teacher": False, **side}, "target": {"is_from_teacher": True, **side}}
                loss = loss_wrapper(nn.MSELoss(), **ends)
            outputs.append(path)
            terms[f"{aspect}.{path}"] = {"criterion": loss, "weight": weight / len(active.taps)}
    return outputs, terms


class _AttentionKL(nn.Module):
    """A loss for torchdistill: eager attention hands out its probabilities beside its output."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, student: Any, teacher: Any, *_: Any, **__: Any) -> Tensor:
        ours, theirs = student[self.path]["output"][1], teacher[self.path]["output"][1]
        return reference.attention(ours, theirs, ours.new_ones(len(ours), ours.shape[2], dtype=torch.bool))


class _Pooled(nn.Module):
    """A loss for torchdistill: it keeps what the whole model gives under the path `.`."""

    def forward(self, student: Any, teacher: Any, *_: Any, **__: Any) -> Tensor:
        ours, theirs = student["."]["output"][0], teacher["."]["output"][0]
        return reference.embedding(ours, theirs, torch.ones_like(ours[..., 0], dtype=torch.bool))


def textbrewer_loop(cell: Cell) -> Loop:
    """textbrewer.GeneralDistiller, with matches on each layer."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    def run(turns: Turns) -> None:
        student, teacher = pair(cell, "eager")
        layers = len(makd.resolve(student).layers)
        matches = [
            {"layer_T": layer + (feature == "hidden"), "layer_S": layer + (feature == "hidden"), "feature": feature,
             "loss": f"{feature}_mse", "weight": 1 / layers}
            for feature in ("hidden", "attention")
            for layer in range(layers)
        ]  # fmt: skip
        has_labels = student.get_output_embeddings() is not None

        def adaptor(batch: Any, output: Any) -> dict[str, Any]:
            found = {"hidden": output.hidden_states, "attention": output.attentions,
                     "inputs_mask": batch["attention_mask"]}  # fmt: skip
            if has_labels:
                found["logits"] = (output.logits,)
                if output.loss is not None:
                    found["losses"] = (output.loss,)
            return found

        place = f"{cell['place']}/textbrewer"
        distiller = GeneralDistiller(
            TrainingConfig(device=cell["device"], ckpt_steps=ENDLESS, output_dir=place),
            DistillationConfig(temperature=1, hard_label_weight=1, intermediate_matches=matches),
            teacher, student, adaptor, adaptor,
        )  # fmt: skip
        distiller.compute_loss = turns.note(distiller.compute_loss)
        optimizer = torch.optim.AdamW(student.parameters(), **OPTIMIZER)
        wants = {"output_hidden_states": True, "output_attentions": True}

        def sides(rows: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
            batch = default_data_collator(rows)
            return {"student": batch, "teacher": {name: value for name, value in batch.items() if name != "labels"}}

        texts = loader(cell, student, sides)
        turns.start()
        with distiller:
            distiller.train(optimizer, texts, num_steps=ENDLESS, max_grad_norm=1.0, **wants)

    return run


def gkd_loop(cell: Cell) -> Loop:
    """trl.experimental.gkd.GKDTrainer on the given texts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def run(turns: Turns) -> None:
        student, teacher = pair(cell, "sdpa")
        words = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")),
            pad_token="[PAD]",
            eos_token="[PAD]",
            unk_token="[UNK]",
        )
        student.warnings_issued = {}  # type: ignore[assignment]
        settings = {**trainer_settings(cell), "learning_rate": LEARNING_RATE, "gradient_checkpointing": False}
        if cell["dtype"] == "float32":
            settings["bf16"] = False
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(**settings, lmbda=0.0, beta=0.0, temperature=1.0, max_length=None),
            train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in data(cell, student)]),
            data_collator=default_data_collator,
            processing_class=words,
        )
        trainer.compute_loss = turns.note(trainer.compute_loss)
        turns.start()
        trainer.train()

    return run
