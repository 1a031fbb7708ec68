"""Station 7: one layer of a student learns to do what the teacher's does, with no other layer in memory.

The teacher's layer reads the teacher's states, the student's layer the student's own, so that it learns to take back
what the layers before it did. Nothing is backpropagated beyond the layer: its weights, gradients and optimizer are all
that is held, whatever the depth of the model.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, get_scheduler

from makd.anatomy import Anatomy, Layer
from makd.anatomy.eval_mode import in_eval
from makd.aspects import ActivePlan
from makd.calibration.replay import Calls, run_layer
from makd.capture import Recording, capture
from makd.distill.apart import check_apart
from makd.distill.layerwise.settings import LEAST_BATCHES, LayerwiseConfig
from makd.distill.layerwise.targets import inside_layer
from makd.distill.losses.layers import LayerLosses
from makd.distill.losses.objective import aspect_losses, weighted_sum
from makd.distill.precision import NARROW, float32_weights
from makd.errors import DataError, NumericsError, SettingError

logger = logging.getLogger(__name__)

States = Callable[[int], Float[Tensor, "batch tokens hidden"]]
"""Number of a calibration batch -> hidden states, read when they are asked for."""


@dataclass(frozen=True)
class LayerTrainingResult:
    """What training a layer did: held-out loss before and after, steps and tokens."""

    layer: int
    before: float
    """Loss on the held-out batches as the layer came."""
    after: float
    """Loss on the held-out batches as the layer leaves: not above `before`."""
    steps: int
    """That were taken."""
    kept: int
    """The step whose weights were kept; 0 for those that it came with."""
    tokens: int
    """Real tokens that the steps learned from, each as often as it was seen."""


def check_teachable(anatomy: Anatomy, batches: Sized) -> None:
    """Refuse models whose layers cannot be run, and so taught, one by one.

    Args:
        anatomy: of the model.
        batches: what they would learn from.

    Raises:
        SettingError: the model has two stacks, its layers share weights, or they cannot be run in forward order.
        DataError: fewer than two batches are given.
    """
    reason = anatomy.solvers_off.get("in_forward_order")
    if anatomy.is_encoder_decoder:
        reason = "it has two stacks"
    elif any(layer.call > 0 for layer in anatomy.layers):
        reason = "its layers share their weights"
    if reason is not None:
        raise SettingError(
            f"The layers of this model cannot be taught one by one: {reason}. Leave layerwise out of the recipe, and "
            "teach the model as a whole."
        )
    if len(batches) < LEAST_BATCHES:
        raise DataError(
            f"Teaching a layer takes at least {LEAST_BATCHES} calibration batches, one of them to judge by; got "
            f"{len(batches)}. Give more calibration rows, or smaller batches (calibration.batch_size)."
        )


def teach_layer_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    layer: Layer,
    plan: ActivePlan,
    calls: Sequence[Calls],
    teacher_states: States,
    student_states: States,
    settings: LayerwiseConfig,
    seed: int,
    *,
    student_calls: Sequence[Calls] | None = None,
    teacher_outputs: States | None = None,
) -> LayerTrainingResult | None:
    """Teach `layer` of `student`, in place, what the same layer of `teacher` does.

    Nothing else of either model is run or needs its weights: they may be on the meta device. The weights that did best
    on the held-out batches are kept, as they are stored; those that the layer came with are among them. Everything in
    the layer learns: factors, biases, norms.

    Args:
        student: whose layer learns, without dropout.
        teacher: with the same layers.
        anatomy: of the student; the teacher's has the same names.
        layer: which one.
        plan: what is compared, of which `inside_layer` takes its part.
        calls: what the layers are called with, one for each calibration batch; their hidden states are not looked at.
        teacher_states: that enter the layer in the teacher.
        student_states: that enter the layer in the student.
        settings: how long and how fast.
        seed: of the order of the batches. Other layers have other orders, and none depends on the layers before.
        student_calls: what the student's layers are called with, where that is something else.
        teacher_outputs: that leave the layer in the teacher, where they are at hand: where a plan compares nothing
            else, the teacher's layer need not be run.

    Returns:
        What was learned; None where nothing is to be: by a layer that the student has dropped, or in no steps.

    Raises:
        SettingError: the layers of the model cannot be run one by one, or the student's is the teacher's.
        DataError: fewer than two batches are given.
        NumericsError: a loss is NaN or infinite.
    """
    check_teachable(anatomy, calls)
    if layer.is_skipped or settings.steps == 0:
        return None
    module, theirs = (model.get_submodule(layer.module) for model in (student, teacher))
    dtypes = {parameter: parameter.dtype for parameter in module.parameters()}
    with in_eval(module, theirs), float32_weights(module), _learning(module), torch.enable_grad():
        check_apart(module, theirs)
        training = _LayerTraining(
            student, teacher, anatomy, layer, inside_layer(plan, layer), calls, student_calls or calls,
            teacher_states, student_states, teacher_outputs, settings,
        )  # fmt: skip
        try:
            learned = _teach(training, dtypes, seed)
        except NumericsError as error:
            raise NumericsError(
                f"Layer {layer.index} cannot be taught at layerwise.learning_rate {settings.learning_rate}: {error}"
            ) from error
    logger.info(
        "layer %d: held-out loss %.4g, %.4g after step %d of %d", layer.index, learned.before, learned.after,
        learned.kept, learned.steps,
    )  # fmt: skip
    return learned


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """Inside the block, all parameters of a layer learn."""
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, learns in wanted.items():
            parameter.requires_grad_(learns)
            parameter.grad = None


@dataclass
class _LayerTraining:
    """One layer on both sides, and the batches that it reads."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    anatomy: Anatomy
    layer: Layer
    plan: ActivePlan
    calls: Sequence[Calls]
    student_calls: Sequence[Calls]
    teacher_states: States
    student_states: States
    teacher_outputs: States | None
    settings: LayerwiseConfig
    tokens: list[int] = field(init=False)
    """Real tokens of each batch."""

    def __post_init__(self) -> None:
        self.tokens = [int(call.real.sum()) for call in self.calls]

    def loss(self, number: int) -> Float[Tensor, ""]:
        """The plan's weighted sum on batch `number`.

        Raises:
            NumericsError: the sum is not finite.
        """
        real = self.calls[number].real
        inputs = {"input_ids": real, "attention_mask": real}  # which tokens are real is all that is asked of them
        losses = LayerLosses(self.anatomy, inputs, self._teach(number), self.plan)
        call, states = _widened(self.student_calls[number], self.student_states(number).to(real.device))
        with self._autocast(real), capture(self.student, self.anatomy, self.plan.taps, losses.receive):
            run_layer(self.student, self.layer, call, states)
        return weighted_sum(self.plan, aspect_losses(self.plan, self.anatomy, inputs, losses, None, None))

    @torch.no_grad()
    def _teach(self, number: int) -> Recording:
        """What the teacher's layer gives."""
        taps = self.plan.teacher_taps
        if self.teacher_outputs is not None and all(tap.kind == "hidden" for tap in taps):
            outputs = self.teacher_outputs(number).to(self.calls[number].real.device)
            return Recording({tap: outputs for tap in taps})
        call = self.calls[number]
        with self._autocast(call.real), capture(self.teacher, self.anatomy, taps) as recording:
            run_layer(self.teacher, self.layer, call, self.teacher_states(number).to(call.real.device))
        return recording

    def _autocast(self, like: Tensor) -> Any:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    @torch.no_grad()
    def mean_loss(self, numbers: Sequence[int]) -> float:
        """Over the real tokens of some batches."""
        weights = [self.tokens[number] for number in numbers]
        total = sum(weight * float(self.loss(number)) for weight, number in zip(weights, numbers, strict=True))
        return total / sum(weights)


def _teach(training: _LayerTraining, dtypes: Mapping[nn.Parameter, torch.dtype], seed: int) -> LayerTrainingResult:
    """Steps until the last, or until the held-out batches say so; `dtypes` are those that parameters are stored in."""
    settings, numbers = training.settings, range(len(training.calls))
    held_out = numbers[settings.held_out_every - 1 :: settings.held_out_every] or numbers[-1:]
    order = _shuffled([number for number in numbers if number not in held_out], seed + training.layer.index)
    optimizer = _optimizer(list(dtypes), settings)
    schedule = get_scheduler(settings.schedule, optimizer, round(settings.warmup * settings.steps), settings.steps)
    before = lowest = training.mean_loss(held_out)
    best = _stored(dtypes)
    step = kept = tokens = worse = 0
    try:
        while step < settings.steps and (settings.patience is None or worse < settings.patience):
            tokens += _step(training, order, optimizer, list(dtypes))
            schedule.step()
            step += 1
            if step % settings.evaluate_every == 0 or step == settings.steps:
                with _as_stored(dtypes):
                    loss = training.mean_loss(held_out)
                worse += 1
                if loss < lowest:
                    lowest, kept, best, worse = loss, step, _stored(dtypes), 0
    finally:
        _put_back_(best)
    return LayerTrainingResult(training.layer.index, before, lowest, step, kept, tokens)


def _optimizer(parameters: Sequence[nn.Parameter], settings: LayerwiseConfig) -> torch.optim.Optimizer:
    """AdamW; biases and norms do not decay, as with the Trainer."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


def _step(
    training: _LayerTraining, order: Iterator[int], optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> int:
    """One step of the optimizer, and how many real tokens it learned from."""
    numbers = [next(order)]
    tokens = training.tokens[numbers[0]]
    while tokens < (training.settings.batch_tokens or 0):
        numbers.append(next(order))
        tokens += training.tokens[numbers[-1]]
    optimizer.zero_grad()
    for number in numbers:
        (training.loss(number) * (training.tokens[number] / tokens)).backward()
    nn.utils.clip_grad_norm_(parameters, training.settings.max_grad_norm)
    optimizer.step()
    return tokens


def _shuffled(numbers: Sequence[int], seed: int) -> Iterator[int]:
    """All of them in a random order, and again in another, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (
            numbers[place] for place in torch.randperm(len(numbers), generator=generator, device="cpu").tolist()
        )


def _stored(dtypes: Mapping[nn.Parameter, torch.dtype]) -> dict[nn.Parameter, Tensor]:
    """Copies of parameters, as they would be stored."""
    return {parameter: parameter.detach().to(dtype, copy=True) for parameter, dtype in dtypes.items()}


@torch.no_grad()
def _put_back_(stored: Mapping[nn.Parameter, Tensor]) -> None:
    for parameter, value in stored.items():
        parameter.copy_(value)


@contextmanager
def _as_stored(dtypes: Mapping[nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Inside the block, parameters are rounded to what they will be stored in: that is what must be no worse."""
    exact = {parameter: parameter.detach().clone() for parameter, dtype in dtypes.items() if dtype in NARROW}
    _put_back_({parameter: value.to(dtypes[parameter]) for parameter, value in exact.items()})
    try:
        yield
    finally:
        _put_back_(exact)


def _widened(call: Calls, states: Tensor) -> tuple[Calls, Tensor]:
    """Arguments of a layer whose weights are in float32, as they are while it learns."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value

    return replace(call, arguments=tree_map(widen, call.arguments)), widen(states)
