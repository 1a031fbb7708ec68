"""Station 3: from calibration batches to the moments of every linear's inputs, streamed.

Hooks hand each linear's inputs, real tokens only, to its `InputMoments` and keep nothing: memory is one Gram matrix a
distinct input, whatever the amount of text. Linears that read the same tensor (Q, K and V; gate and up) share one.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Role, linear_shape
from makd.anatomy.batches import model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token, is_by_token, role_tokens
from makd.calibration.experts import ExpertMoments, ExpertWatcher, check_experts_reached
from makd.calibration.moments import InputMoments
from makd.errors import DataError, NumericsError

logger = logging.getLogger(__name__)

Batches = Iterable[Mapping[str, Tensor]]


@torch.no_grad()
def collect_input_moments(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Batches,
    head: str | None = None,
    experts: dict[str, ExpertMoments] | None = None,
) -> dict[str, InputMoments]:
    """Second moments of the inputs of every factorizable linear over the real tokens of `batches`.

    Args:
        model: run in eval mode, on its own device.
        anatomy: of `model`.
        batches: model inputs; labels are not looked at.
        head: a linear after the last layer that is wanted too.
        experts: moments of what experts read are put into it, by stack, if it is given.

    Returns:
        Name of the linear -> its moments. Linears with the same input tensor share one object.

    Raises:
        DataError: there are no batches, or one is all padding.
        NumericsError: activations hold NaN or infinity; the text names the first linear that met them.
        UnsupportedModelError: a linear reads something that is not laid out by tokens.
    """
    moments: dict[str, InputMoments] = {}
    watcher = InputWatcher(model, anatomy, moments)
    stacks = () if experts is None else anatomy.stacks
    expert_watcher = ExpertWatcher(model, anatomy, {} if experts is None else experts)
    linears = anatomy.linears if head is None else (*anatomy.linears, head)
    seen = 0
    with ExitStack() as hooks:
        hooks.enter_context(without_cache(model))
        hooks.enter_context(in_eval(model))
        for name in linears:
            handle = model.get_submodule(name).register_forward_hook(watcher.hook(name))
            hooks.callback(handle.remove)
        hooks.enter_context(expert_watcher.watching(stacks))
        for batch in batches:
            inputs = model_inputs(batch, model.device)
            watcher.start(batch)
            expert_watcher.start(batch)
            model(**inputs)
            seen += 1
    if seen == 0:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    check_reached(linears, moments)
    check_experts_reached(stacks, expert_watcher.moments)
    return moments


def check_reached(linears: Sequence[str], moments: Mapping[str, InputMoments]) -> None:
    """Refuse to go on where one of these linears has read nothing.

    Raises:
        DataError: a linear has read nothing.
    """
    never = [name for name in linears if name not in moments]
    if never:
        raise DataError(
            f"{never[0]} (and {len(never) - 1} others) saw no input during calibration: the batches do not reach it. "
            "An encoder-decoder needs decoder_input_ids or labels."
        )


class InputWatcher:
    """The hooks, and what they must know of each other: the last input, to see when two linears share it."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, moments: dict[str, InputMoments]) -> None:
        """Moments of linears of `model` will be put into `moments`."""
        self.model = model
        self.anatomy = anatomy
        self.moments = moments
        self.batch: Mapping[str, Tensor] = {}
        self.last_input: Tensor | None = None
        self.last_name = ""
        self.called: set[str] = set()
        self.places = {linear.module: (layer, role) for layer in anatomy.layers for role, linear in layer.roles.items()}

    def start(self, batch: Mapping[str, Tensor]) -> None:
        """A new batch begins."""
        self.batch, self.last_input = batch, None
        self.called.clear()

    def hook(self, name: str) -> Callable[..., None]:
        """The forward hook of the linear called `name`."""
        return partial(self._keep, name)

    def _keep(self, name: str, module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        tensor: Tensor = inputs[0]
        again = name in self.called
        self.called.add(name)
        if tensor is self.last_input:
            shared = self.moments[self.last_name]
            if self.moments.setdefault(name, shared) is shared:
                return
        if name not in self.moments:
            self.moments[name] = InputMoments(linear_shape(module)[1], tensor.device)
        self.last_input, self.last_name = tensor, name
        try:
            self.moments[name].update(self._rows(name, tensor, again))
        except NumericsError as error:
            raise NumericsError(
                f"The input of {name} holds NaN or infinity during calibration. The teacher's weights or the data "
                "make it overflow: use bfloat16 or float32 instead of float16, and check the teacher's outputs."
            ) from error

    def _rows(self, name: str, tensor: Tensor, again: bool) -> Tensor:
        """The inputs of real tokens, one a row; in a later call all that is read, where it is no tokens of the text.

        Such are DeBERTa's relative positions, and LongT5's global tokens.
        """
        layer, role = self.places.get(name, (self.anatomy.layers[-1], Role.DOWN))  # a head reads what layers end with
        real = role_tokens(self.anatomy, layer, Role(role), self.batch).to(tensor.device)
        if again and not is_by_token(tensor, real):
            return tensor.reshape(-1, tensor.shape[-1])
        return by_token(tensor, real, f"The input of {name}")[real]
