"""Station 7: transformers' Trainer, with the loss of a plan.

Everything that is not the loss is the Trainer's own: accumulation, mixed precision, checkpoints and resuming, many
processes, evaluation during training, loggers. The teacher is a frozen guest: eval mode, no gradients, no optimizer
state, and it is not part of what is saved.

A step's loss is a mean over all its tokens, whether they are read at once, one batch after the other or by several
processes: `makd.distill.losses.shares`.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.limits import token_limit
from makd.aspects import ActivePlan, Plan, activate
from makd.cache import ROW, RowCollator, TeacherCache, number_rows
from makd.cache.identity import hash_rows
from makd.capture import Recording, examine
from makd.distill.adapted import check_kept, inside
from makd.distill.apart import check_apart
from makd.distill.arguments import check_checkpointing, check_loss
from makd.distill.distillation_forward import DistillationForward, DistillationOutput
from makd.distill.dropout import switch_dropout_off_
from makd.distill.engines.sharded import check_teacher, settle_teacher_
from makd.distill.engines.support import (
    check_checkpoint,
    check_writers_whole,
    prepare_engine_,
)
from makd.distill.fitting import TrainingRows, check_training
from makd.distill.lengths import training_lengths
from makd.distill.losses.counted import loss_keys
from makd.distill.losses.projections import PROJECTIONS, Projections, check_layer_map, learned_with, make_projections
from makd.distill.losses.shares import SHARE, WHOLE, RunningMeans, Shares, count_vector, shares_of, terms_of
from makd.distill.losses.teacher_variances import TeacherVariances
from makd.distill.losses.withholding import warn_whole_logits
from makd.distill.mean_loss_trainer import MeanLossTrainer
from makd.distill.packing import PackedTexts
from makd.distill.precision import check_precision
from makd.distill.reporting import report_frozen, report_off
from makd.distill.rising import CheckRises, evaluate_for_share_, evaluates_first
from makd.distill.rollouts import Rollouts, find_tokenizer, warn_other_ends
from makd.errors import CacheError
from makd.generation import stop_tokens
from makd.kinds import fit
from makd.processes.started import process_count
from makd.weights.sound import check_plain

_logger = logging.getLogger(__name__)


class DistillTrainer(MeanLossTrainer):
    """Teach `model` to mimic `teacher` as `plan` says.

    Batches are padded on the right before they are read, on whichever side the collator does it; what is predicted is
    of tokens there. They may hold labels or not; with labels (or a causal language model's own tokens) the plan's
    `task` term adds the model's own loss. Each aspect's loss, unweighted, is logged beside the sum, as `matrix`,
    `hidden`, … and `eval_matrix`, … during evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        plan: Plan | str = "full",
        student_dropout: bool = False,
        tokens_per_batch: int | None = None,
        teacher_dtype: torch.dtype | None = None,
        cache: TeacherCache | None = None,
        shard_teacher: bool = False,
        stops: Collection[int] = (),
        **kwargs: Any,
    ) -> None:
        """Arguments besides these are `transformers.Trainer`'s.

        Args:
            model: the student, as `makd.factorize` makes it; or one with fewer layers or of another width: see
                `Term.teacher_layers` and `Projections`. A `PeftModel` learns by its adapters, which alone are saved.
            teacher: the model to mimic; it may be a `PeftModel`, too. It is in eval mode from then on, and on
                `args.device`, unless its `device_map` has put it elsewhere.
            plan: a `Plan`, or a preset's name.
            student_dropout: whether the student's dropout is on in training. Off by default: the teacher's states,
                which the student is fitted to, have none.
            tokens_per_batch: tokens of a training batch on each device, padding counted, in the place of a number of
                rows: see `makd.data.token_batches`. None leaves batches to the Trainer.
            teacher_dtype: of the teacher's products in training and evaluation, by autocast; None: as the student's.
            cache: the teacher's outputs on the rows of `train_dataset`, so that training steps do not ask it.
                Evaluation does, on rows that are not in there.
            shard_teacher: whether the teacher is spread over the processes, as FSDP2 does the student; for good. By
                default it is whole in each, or where its `device_map` has put it.
            stops: tokens that end a completion which is written, besides those that the models, and the tokenizer where
                `processing_class` is one, end texts with: see `makd.generation.stop_tokens`.
            kwargs: `args`, `train_dataset`, `eval_dataset`, `data_collator`, `callbacks`, … of the Trainer.

        Raises:
            SettingError: parameters that learn are the teacher's, too, or in float16; teacher and student do not line
                up, the plan does not fit the model, or the arguments of the Trainer do not fit the plan.
            CacheError: the cache is of other rows, or lacks something that the plan compares with.
            UnknownNameError: the plan has no such name.
            UnsupportedModelError: a model's linears cannot be told apart, or it does not read token ids.
        """
        plan = Plan(preset=plan) if isinstance(plan, str) else fit(plan, Plan, "plan of a DistillTrainer")
        student = inside(fit(model, nn.Module, "model of a DistillTrainer"), "student")
        teacher = inside(fit(teacher, nn.Module, "teacher of a DistillTrainer"), "teacher")
        _check_models(student, teacher)
        self._fit_plan(plan, student, teacher)
        self._begin_means()
        self.teacher_dtype, self.cache = teacher_dtype, cache
        if cache is not None:
            _check_cache(cache, self.plan, student, kwargs.get("train_dataset"))
            kwargs["train_dataset"] = number_rows(kwargs["train_dataset"])
        check_loss(kwargs.get("args"), kwargs.get("compute_loss_func"), kwargs.get("eval_dataset"), self.plan)
        super().__init__(
            model,
            student,
            RunningMeans(terms_of(self.plan)),
            dropout=student_dropout,
            tokens_per_batch=tokens_per_batch,
            **kwargs,
        )
        prepare_engine_(self, student, self.anatomy)
        if cache is not None:
            self._keep_row_numbers()
        check_checkpointing(self.args)
        label_shift = self._check_training(student, teacher)
        self.rollouts = self._make_rollouts(student, teacher, stops)
        self.projections = self._make_projections(model, student, teacher)
        self.teacher = settle_teacher_(self, teacher, self.teacher_anatomy, self.plan, shard_teacher)
        self.distillation_forward = self._make_forward(student, label_shift)
        asked = [student] if cache is not None or not self.plan.needs_teacher else [student, self.teacher]
        self._packed = PackedTexts(asked)
        # labels are optional: without this the Trainer would not report a loss on batches that have none
        self.can_return_loss = True

    def _fit_plan(self, plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """What both models are made of, and what of the plan these allow; tells what is off, and what is frozen."""
        self.anatomy: Anatomy = examine(student)
        self.teacher_anatomy: Anatomy = examine(teacher)
        check_layer_map(self.anatomy, self.teacher_anatomy)
        self.plan: ActivePlan = activate(plan, self.anatomy, self.teacher_anatomy)
        report_off(self.plan, self.anatomy, self.teacher_anatomy)
        report_frozen(student)

    def _begin_means(self) -> None:
        """Nothing is learned or measured yet."""
        self.learned = RunningMeans(terms_of(self.plan))
        self.teacher_variances = TeacherVariances(self.plan)
        self._told_of_variances = False

    def _keep_row_numbers(self) -> None:
        """Let batches say which rows they are of: a cache is asked by these."""
        self.data_collator = RowCollator(self.data_collator)
        self._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.append(ROW)  # where unused columns are removed, this one stays

    def _check_training(self, student: PreTrainedModel, teacher: PreTrainedModel) -> int | None:
        """Refuse what cannot be learned from these rows; gives the shift of the labels, as `check_training` does."""
        given = TrainingRows(
            self.train_dataset, self.args.train_batch_size, self.tokens_per_batch, cached=self.cache is not None
        )
        label_shift, reason = check_training(self.plan, student, teacher, self.anatomy, self.teacher_anatomy, given)
        warn_whole_logits(student, reason)
        return label_shift

    def _make_rollouts(
        self, student: PreTrainedModel, teacher: PreTrainedModel, stops: Collection[int]
    ) -> Rollouts | None:
        """What writes completions; None where the plan has none written."""
        completions = self.plan.completions
        if not completions.written:
            return None
        check_writers_whole()
        if completions.adaptive:
            evaluate_for_share_(self.args, self.eval_dataset is not None)
            self.add_callback(CheckRises(self.plan))
        stops = {*stops, *stop_tokens(student, find_tokenizer(self.processing_class)), *stop_tokens(teacher)}
        warn_other_ends(self.train_dataset, stops)
        return Rollouts(completions, self.args.seed, stops, self.tokens_per_batch)

    def _make_projections(
        self, model: nn.Module, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> Projections | None:
        """Where widths differ, what makes the student's as wide as the teacher's, on the student's device."""
        found = make_projections(self.plan, student, teacher, self.anatomy, self.teacher_anatomy, self.args.seed)
        check_kept(model, found)
        if found is not None:
            nn.Module.to(found, self.args.device)
        return found

    def _make_forward(self, student: PreTrainedModel, label_shift: int | None) -> DistillationForward:
        """Teacher, student and losses of a batch as one forward."""
        return DistillationForward(
            student=student,
            teacher=self.teacher,
            plan=self.plan,
            anatomy=self.anatomy,
            teacher_anatomy=self.teacher_anatomy,
            projections=self.projections,
            label_shift=label_shift,
            cache=self.cache,
            teacher_variances=self.teacher_variances,
            label_names=frozenset(self.label_names),
            teacher_precision=self._teacher_precision,
        )

    def find_lengths(self, rows: Any) -> list[int]:
        """Tokens of each row; where completions are written, with the longest that there may be."""
        return training_lengths(rows, self.plan.completions, token_limit(self.distillation_forward.student))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which learns the projections too, and says so where a student that was to write never did."""
        if self.rollouts is not None and self.plan.completions.adaptive:
            goes_on = bool(args[0] if args else kwargs.get("resume_from_checkpoint"))  # it has evaluated before
            self.args.eval_on_start = evaluates_first(self.plan) and not goes_on
        with learned_with(self.distillation_forward.student, self.projections):
            found = super().train(*args, **kwargs)
        if self.rollouts is not None:
            self.rollouts.warn_unwritten()
        return found

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The Trainer's batches of an optimizer step, each with its share of it; completions as the plan wants them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        if self.rollouts is not None:
            step = self.state.global_step
            with self.accelerator.autocast():  # around all steps of a generation: weights are rounded once
                batches = self.rollouts.rewrite(
                    batches, step, step / self.state.max_steps, self.distillation_forward.student, self.teacher
                )
            items = self._get_num_items_in_batch(batches, device)
        if self.teacher_variances.are_missing:
            with self.compute_loss_context_manager():
                self.teacher_variances.measure(batches, self.anatomy, self._recorded, self.args.device)
        shares = shares_of(self.plan, self.anatomy, batches, self.args.device)
        return [{**batch, SHARE: share} for batch, share in zip(batches, shares, strict=True)], items

    def _recorded(self, batch: Mapping[str, Any]) -> Recording:
        inputs = self._prepare_inputs(dict(batch))
        rows = inputs.pop(ROW, None)
        return self.distillation_forward.teacher_forward(inputs, rows)[0]

    def _sum_up(self, means: Mapping[str, float]) -> dict[str, float]:
        weights = {active.name: active.term.weight for active in self.plan.terms}
        return {"loss": sum(weights[name] * mean for name, mean in means.items()), **means}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; an adaptive share of the student's completions follows the loss."""
        if self.teacher_variances.are_missing and not self._told_of_variances:
            self._told_of_variances = True
            _logger.warning(
                "Evaluated before the first step: squared differences are in units of each batch, and after it in "
                "those of the training. The losses are not to be compared"
            )
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.rollouts is not None and "eval_loss" in metrics and not self.teacher_variances.are_missing:
            self.rollouts.note(metrics["eval_loss"], self.state.global_step)
        return metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The plan's weighted sum on one batch. The Trainer calls it, in training and in evaluation."""
        result = self._forward(model, inputs, return_outputs)
        return (result.total, result.output) if return_outputs else result.total

    def _forward(
        self, model: nn.Module, inputs: Mapping[str, Any], with_logits: bool, noted: bool = True
    ) -> DistillationOutput:
        """The forward of one batch, whose losses are `noted` for the log."""
        training = self.distillation_forward.student.training  # an engine's own mode is not always its model's
        if training and not self.dropout:
            switch_dropout_off_(self.distillation_forward.student)
        shares: Shares | None = inputs.get(SHARE)
        rows, batch = inputs.get(ROW), {name: value for name, value in inputs.items() if name not in (ROW, SHARE)}
        self._packed.check(batch)
        result = self.distillation_forward(model, batch, rows, shares or WHOLE, with_logits=with_logits)
        if training:
            self.learned.add(result.losses, shares or WHOLE)
            if shares is not None and process_count() > 1:  # engines take the mean of the processes' gradients
                result = replace(result, total=result.total * process_count())
        elif noted:
            counts = count_vector(self.plan, self.anatomy, batch, self.args.device).tolist()
            self.evaluated.add(result.losses, dict(zip(loss_keys(self.plan), counts, strict=True)))
        return result

    def _predict(
        self, model: nn.Module, inputs: Mapping[str, Any], *, with_logits: bool, noted: bool
    ) -> tuple[Tensor, Any]:
        result = self._forward(model, inputs, with_logits, noted)
        return result.total, result.output

    def _teacher_precision(self) -> AbstractContextManager[Any]:
        if self.teacher_dtype is None:
            own: AbstractContextManager[Any] = self.accelerator.autocast()
            return own
        reduced = self.teacher_dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.args.device.type, self.teacher_dtype if reduced else None, enabled=reduced)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The Trainer's, without the projections."""
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(PROJECTIONS)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.teacher_variances.save(output_dir)
            if self.rollouts is not None:
                self.rollouts.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_checkpoint(self, Path(resume_from_checkpoint))
        if self.rollouts is not None:  # a training that had ended is not gone on with, and has no more to load
            self.rollouts.load(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.teacher_variances.load(checkpoint)
            if self.rollouts is not None:
                self.rollouts.load(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each aspect's mean loss since the last log, and the student's share of what is written as it is now."""
        if "loss" in logs:
            logs.update(self.learned.take(self.args.device))
        if self.rollouts is not None and self.plan.completions.adaptive and {"loss", "eval_loss"} & logs.keys():
            logs["student_share"] = self.rollouts.share
        super().log(logs, start_time)


def _check_models(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models that cannot teach or learn as they are, or that share what learns."""
    check_plain(student)
    check_teacher(teacher)
    check_apart(student, teacher)
    check_precision(student)


def _check_cache(cache: TeacherCache, plan: ActivePlan, student: PreTrainedModel, rows: Any) -> None:
    cache.check_plan(plan, student)
    if hasattr(rows, "__len__") and len(rows) != len(cache):
        raise CacheError(
            f"The cache {cache.folder} is of {len(cache)} rows, the training data has {len(rows)}. Make the cache anew "
            "with `makd cache`."
        )
    known = cache.content.get("data")
    if known is not None and hasattr(rows, "__len__") and known != _hash(rows, student):
        raise CacheError(
            f"The cache {cache.folder} is of other rows than the training data, or of these in another order. Give the "
            "rows as it was made of them: a trainer shuffles by itself; or make the cache anew with `makd cache`."
        )


def _hash(rows: Any, student: PreTrainedModel) -> str:
    return hash_rows(rows, with_labels=bool(student.config.is_encoder_decoder))
