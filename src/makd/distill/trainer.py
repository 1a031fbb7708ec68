"""Station 7: transformers' Trainer, with the loss of a plan.

Everything that is not the loss is the Trainer's own: accumulation, mixed precision, checkpoints and resuming, data
parallelism, evaluation during training, loggers. The teacher is a frozen guest: eval mode, no gradients, no optimizer
state, and it is not part of what is saved.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from makd.anatomy import Anatomy
from makd.anatomy.key_cache import cache_setting_kept, without_cache
from makd.aspects import ActivePlan, KeptPredictions, Plan, activate
from makd.cache import ROW, RowCollator, TeacherCache, number_rows
from makd.capture import HeadCall, Recording, capture, examine, has_vocabulary_head, withhold_logits, without_labels
from makd.data import TokenBatchSampler, padding_share, row_lengths, token_batches
from makd.distill.dropout import switch_dropout_off_
from makd.distill.layers import LayerLosses
from makd.distill.objective import aspect_losses, prediction_losses, weighted_sum
from makd.distill.precision import check_precision
from makd.distill.projections import ForgetGradients, Projections, check_pair, make_projections
from makd.distill.reporting import report_off
from makd.distill.rollouts import Rollouts, check_replay, check_writers, evaluate_for_share_
from makd.distill.soundness import StopWhereBroken
from makd.distill.steps import training_step
from makd.distill.withholding import withheld_shift
from makd.errors import CacheError, SettingError
from makd.kinds import fit
from makd.weights.sound import check_plain

_logger = logging.getLogger(__name__)


class DistillTrainer(Trainer):
    """Teach `model` to mimic `teacher` as `plan` says.

    The batches may hold labels or not; with labels (or a causal language model's own tokens) the plan's `task` term
    adds the model's own loss. Each aspect's loss, unweighted, is logged beside the sum, as `matrix`, `hidden`, … and
    `eval_matrix`, … during evaluation.
    """

    loss_is_scaled_for_ga = False  # a batch's mean: the Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        plan: Plan | str = "full",
        student_dropout: bool = False,
        tokens_per_batch: int | None = None,
        teacher_dtype: torch.dtype | None = None,
        cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        """Arguments besides these are `transformers.Trainer`'s.

        Args:
            model: the student, as `makd.factorize` makes it; or one with fewer layers or of another width: see
                `Term.teacher_layers` and `Projections`.
            teacher: the model to mimic.
            plan: a `Plan`, or a preset's name.
            student_dropout: whether the student's dropout is on in training. Off by default: the teacher's states,
                which the student is fitted to, have none.
            tokens_per_batch: tokens of a training batch on each device, padding counted, in the place of a number of
                rows: see `makd.data.token_batches`. None leaves batches to the Trainer.
            teacher_dtype: of the teacher's products in training and evaluation, by autocast; None: as the student's.
            cache: what the teacher says about the rows of `train_dataset`, so that training steps do not ask it.
                Evaluation does, on rows that are not in there.
            kwargs: `args`, `train_dataset`, `eval_dataset`, `data_collator`, `callbacks`, … of the Trainer.

        Raises:
            SettingError: the student learns in float16, teacher and student do not line up, or the plan does not fit
                the model.
            CacheError: the cache is of other rows, or lacks something that the plan compares with.
            UnknownNameError: the plan has no such name.
            UnsupportedModelError: a model's linears cannot be told apart, or it does not read token ids.
        """
        plan = Plan(preset=plan) if isinstance(plan, str) else fit(plan, Plan, "plan of a DistillTrainer")
        for side, given in (("model", model), ("teacher", teacher)):
            check_plain(fit(given, nn.Module, f"{side} of a DistillTrainer"))
        check_precision(model)
        self.anatomy: Anatomy = examine(model)
        self.teacher_anatomy: Anatomy = examine(teacher)
        check_pair(self.anatomy, self.teacher_anatomy)
        self.plan: ActivePlan = activate(plan, self.anatomy, self.teacher_anatomy)
        report_off(self.plan, self.anatomy, self.teacher_anatomy)
        self.student_dropout = student_dropout
        self.tokens_per_batch = tokens_per_batch
        self.teacher_dtype = teacher_dtype
        self._sums: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._counts: dict[bool, dict[str, int]] = {True: defaultdict(int), False: defaultdict(int)}
        self.cache = cache
        if cache is not None:
            _check_cache(cache, self.plan, model, kwargs.get("train_dataset"))
            kwargs["train_dataset"] = number_rows(kwargs["train_dataset"])
        with cache_setting_kept(model):
            super().__init__(model=model, **kwargs)
        self.add_callback(StopWhereBroken())
        if cache is not None:
            self.data_collator = RowCollator(self.data_collator)
            self._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            columns.append(ROW)  # where unused columns are removed, this one stays
        _check_stream(tokens_per_batch, self.train_dataset)
        _check_checkpointing(self.args)
        self.rollouts: Rollouts | None = None
        if self.plan.completions.written:
            check_writers(model, self.args, self.train_dataset, cache is not None)
            check_replay(self.plan.completions, self.args, tokens_per_batch, self.train_dataset)
            if self.plan.completions.adaptive:
                evaluate_for_share_(self.args, self.eval_dataset is not None)
            self.rollouts = Rollouts(self.plan.completions, self.args.seed)
        nn.Module.to(teacher, self.args.device)
        self.teacher = teacher.eval()
        self.projections: Projections | None = make_projections(
            self.plan, model, teacher, self.anatomy, self.teacher_anatomy, self.args.seed
        )
        if self.projections is not None:
            _check_processes(self.args)
            nn.Module.to(self.projections, self.args.device)
            self.add_callback(ForgetGradients(self.projections))
        self.shift: int | None = withheld_shift(model, teacher, self.plan)
        if cache is not None:
            _check_predictions(model, self.plan, self.shift)
        # labels are optional: without this the Trainer would not report a loss on batches that have none
        self.can_return_loss = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.tokens_per_batch is None:
            return super()._get_train_sampler(rows)
        lengths = row_lengths(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        share = padding_share(lengths, token_batches(lengths, self.tokens_per_batch))
        sampler = TokenBatchSampler(
            lengths, self.tokens_per_batch, seed, self.args.process_index, max(1, self.args.world_size)
        )
        _logger.info(
            "%d rows in batches of at most %d tokens: %d an epoch, %.1f %% of the tokens padding",
            len(lengths),
            self.tokens_per_batch,
            sampler.count,
            100 * share,
        )
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The Trainer's batches of an optimizer step, with completions written anew where the plan says so."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rollouts is None or not batches:
            return batches, items
        step = self.state.global_step
        student: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with self.accelerator.autocast():  # around all steps of a generation: weights are rounded once
            written = self.rollouts.rewrite(batches, step, step / self.state.max_steps, student, self.teacher)
        return written, self._get_num_items_in_batch(written, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; an adaptive share of the student's completions follows the loss."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.rollouts is not None and "eval_loss" in metrics:
            self.rollouts.note(metrics["eval_loss"])
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's: loss and backward of one batch."""
        with training_step(model, inputs, self.args, self.student_dropout):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The plan's weighted sum on one batch. The Trainer calls it, in training and in evaluation."""
        training = model.training
        if training and not self.student_dropout:
            switch_dropout_off_(model)
        student = self.accelerator.unwrap_model(model)
        rows, inputs = inputs.get(ROW), {name: value for name, value in inputs.items() if name != ROW}
        theirs, teacher_output, teacher_head = self._teach(inputs, rows)
        layers = LayerLosses(self.anatomy, inputs, theirs, self.plan, self.projections)
        with (
            capture(student, self.anatomy, self.plan.taps, layers.receive),
            self._withhold(student) as head,
            without_cache(student),
        ):
            output = model(**(inputs if head is None else self._questions(student, inputs)))
        losses = aspect_losses(self.plan, self.anatomy, inputs, layers, teacher_output, output, head is None)
        predicted = None
        if head is not None:
            predicted, alone = prediction_losses(
                self.plan, self.anatomy, inputs, teacher_head, head, shift=self.shift or 0
            )
            losses |= alone
            if return_outputs:
                output["logits"] = head.logits()
        total = weighted_sum(self.plan, losses, predicted)
        self._note(training, losses)
        return (total, output) if return_outputs else total

    @torch.inference_mode()
    def _teach(
        self, inputs: dict[str, Any], rows: Tensor | None
    ) -> tuple[Recording, Any, HeadCall | KeptPredictions | None]:
        """The teacher's forward on the batch, without labels: its own loss is of no use. Or what a cache has of it."""
        if self.cache is not None and rows is not None:
            return self.cache.recall(rows.tolist(), self.plan, self.teacher_anatomy, inputs)
        if not self.plan.needs_teacher:
            return Recording(), None, None
        with (
            self._teacher_precision(),
            capture(self.teacher, self.teacher_anatomy, self.plan.teacher_taps) as recording,
            self._withhold(self.teacher) as head,
            without_cache(self.teacher),
        ):
            output = self.teacher(**self._questions(self.teacher, inputs))
        return recording, output, head

    def _teacher_precision(self) -> AbstractContextManager[Any]:
        if self.teacher_dtype is None:
            own: AbstractContextManager[Any] = self.accelerator.autocast()
            return own
        reduced = self.teacher_dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.args.device.type, self.teacher_dtype if reduced else None, enabled=reduced)

    def _withhold(self, model: PreTrainedModel) -> AbstractContextManager[HeadCall | None]:
        """A forward inside makes no logits of a whole batch, if it need not."""
        return nullcontext() if self.shift is None else withhold_logits(model)

    def _questions(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        return without_labels(model, inputs, {"labels", *self.label_names})

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, which learns the projections too."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.projections is not None:
            optimizer.add_param_group({"params": list(self.projections.parameters()), "weight_decay": 0.0})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.projections is not None and self.args.should_save:
            self.projections.save(output_dir)
        if self.rollouts is not None and self.args.should_save:
            self.rollouts.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.projections is not None and checkpoint is not None:
            self.projections.load(checkpoint)
        if self.rollouts is not None and checkpoint is not None:
            self.rollouts.load(checkpoint)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The plan's loss on an evaluation batch, with or without labels, and the student's logits for metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), output.get("logits"), inputs.get("labels")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each aspect's mean loss since the last log."""
        if "loss" in logs:
            logs.update(self._means(training=True))
        if any(name.endswith("_loss") for name in logs):
            prefix = next(name for name in logs if name.endswith("_loss")).removesuffix("loss")
            logs.update({prefix + name: value for name, value in self._means(training=False).items()})
        super().log(logs, start_time)

    def _note(self, training: bool, losses: dict[str, Tensor]) -> None:
        """Add up on the device: reading a value would make an accelerator wait."""
        sums, counts = self._sums[training], self._counts[training]
        for name, loss in losses.items():
            sums[name] = loss.detach().float() + sums.get(name, 0.0)
            counts[name] += 1

    def _means(self, training: bool) -> dict[str, float]:
        sums, counts = self._sums[training], self._counts[training]
        means = {name: float(total) / counts[name] for name, total in sums.items()}
        sums.clear()
        counts.clear()
        return means


def _check_processes(args: Any) -> None:
    if args.world_size > 1:
        raise SettingError(
            f"The plan needs projections, since widths differ, and they learn in one process; this run has "
            f"{args.world_size}. Compare by the aspect 'relation', which needs none, or run in one process."
        )


def _check_stream(tokens_per_batch: int | None, rows: Any) -> None:
    if tokens_per_batch is not None and rows is not None and not hasattr(rows, "__len__"):
        raise SettingError(
            f"tokens_per_batch = {tokens_per_batch} puts rows of like length together, and {type(rows).__name__} is a "
            "stream, whose lengths nobody knows. Give per_device_train_batch_size in `args` instead."
        )


def _check_checkpointing(args: Any) -> None:
    settings = args.activation_checkpointing_kwargs or {}
    if args.activation_checkpointing and settings.get("use_reentrant"):
        raise SettingError(
            "activation_checkpointing_kwargs has use_reentrant=True: captured tensors carry no gradient there, and "
            "every aspect but logits would be lost. Set it to False."
        )


def _check_cache(cache: TeacherCache, plan: ActivePlan, student: PreTrainedModel, rows: Any) -> None:
    cache.check_plan(plan, student)
    if hasattr(rows, "__len__") and len(rows) != len(cache):
        raise CacheError(
            f"The cache {cache.folder} is of {len(cache)} rows, the training data has {len(rows)}. Make the cache anew "
            "with `makd cache`."
        )


def _check_predictions(student: PreTrainedModel, plan: ActivePlan, shift: int | None) -> None:
    if shift is None and has_vocabulary_head(student) and any(term.term.aspect == "logits" for term in plan.terms):
        raise SettingError(
            f"{type(student).__name__} has to make its logits itself with this plan, and a cache holds no whole "
            "logits over a vocabulary. Take 'task' or 'logits' out of the plan, or train without a cache."
        )
