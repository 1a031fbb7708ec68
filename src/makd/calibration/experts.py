"""Station 3: what each routed expert reads, from the tokens that it gets, and the gradients at what they give.

Experts are run one after the other meanwhile, so that each one's rows are seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from makd.anatomy import Anatomy, ExpertStack
from makd.anatomy.replaced_forward import replaced_forward
from makd.anatomy.routed import dense_product, run_experts
from makd.anatomy.tokens import layer_tokens
from makd.calibration.moments import InputMoments
from makd.errors import DataError, NumericsError, UnsupportedModelError

Output = Callable[[str, Tensor, Tensor], None]
"""Stack, an expert's output, which of its rows are real tokens' -> nothing; may ask for the gradient."""


class ExpertMoments:
    """Of one stack: second moments of what each expert reads, and how often it is asked."""

    def __init__(self, stack: ExpertStack, device: torch.device | str = "cpu") -> None:
        """Nothing is seen yet."""
        self.stack = stack
        self.of_experts = [InputMoments(stack.in_features, device) for _ in range(stack.experts)]
        self.tokens = 0
        """Real tokens of the layer."""

    @property
    def layer_gram(self) -> Float[Tensor, "features features"]:
        """Mean of x xᵀ over all that any expert reads."""
        pooled = InputMoments(self.stack.in_features, self.of_experts[0]._products.device)
        for one in self.of_experts:
            pooled.merge(one)
        return pooled.gram

    def pulled(self, expert: int, layer_gram: Float[Tensor, "features features"]) -> Tensor:
        """Mean of x xᵀ of an expert, pulled towards the layer's: (n M + k M_layer) / (n + k), k the number of features.

        With as many tokens as features both count alike; an expert without any has the layer's.
        """
        one, pull = self.of_experts[expert], self.stack.in_features
        if one.rows == 0:
            return layer_gram
        return (one.rows * one.gram + pull * layer_gram) / (one.rows + pull)

    @property
    def shares(self) -> Float[Tensor, " experts"]:
        """Share of the layer's tokens that each expert gets, one token more than it did: none counts nothing."""
        rows = torch.tensor([one.rows + 1.0 for one in self.of_experts], dtype=torch.float64)
        return rows / (self.tokens + self.stack.experts)


class ExpertWatcher:
    """What is put in the place of experts' forwards, and what it must know of the batch that runs."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, moments: dict[str, ExpertMoments]) -> None:
        """Moments of stacks of `model` will be put into `moments`."""
        self.model, self.anatomy, self.moments = model, anatomy, moments
        self.batch: Mapping[str, Tensor] = {}

    def start(self, batch: Mapping[str, Tensor]) -> None:
        """A new batch begins."""
        self.batch = batch

    @contextmanager
    def watching(
        self, stacks: Sequence[ExpertStack], inputs: bool = True, on_output: Output | None = None
    ) -> Iterator[None]:
        """Inside the block the experts with these stacks are watched.

        Args:
            stacks: all of a module's, of as many modules as are wanted.
            inputs: whether what they read is noted.
            on_output: told of each expert's output.
        """
        modules: dict[str, list[ExpertStack]] = {}
        for stack in stacks:
            modules.setdefault(stack.module, []).append(stack)
        with ExitStack() as undo:
            for name, inside in modules.items():
                module = self.model.get_submodule(name)
                forward = self._forward(module, inside, inputs, on_output)
                undo.enter_context(replaced_forward(module, forward))
            yield

    def _forward(
        self, module: nn.Module, stacks: Sequence[ExpertStack], inputs: bool, on_output: Output | None
    ) -> Callable[..., Tensor]:
        by_leaf = {stack.leaf: stack for stack in stacks}

        def forward(*arguments: Any, **named: Any) -> Tensor:
            layer = self.anatomy.layers[stacks[0].layer]
            real = layer_tokens(self.anatomy, layer, self.batch).flatten().to(arguments[0].device)
            rows = len(arguments[0]) // (stacks[0].experts if len(arguments) + len(named) == 1 else 1)
            if rows != real.numel():
                raise UnsupportedModelError(
                    f"{stacks[0].module} reads {rows} rows where there are {real.numel()} tokens: which of them are "
                    "real cannot be told. Set factorize.experts to dense."
                )
            for stack in stacks:
                if inputs:
                    self.moments.setdefault(stack.name, ExpertMoments(stack, real.device)).tokens += int(real.sum())

            def multiply(leaf: str, expert: int, read: Tensor, tokens: Tensor) -> Tensor:
                stack, counted = by_leaf[leaf], real[tokens]
                if inputs and bool(counted.any()):
                    self._note(stack, expert, read[counted])
                output = dense_product(module, leaf, expert, read)
                if on_output is not None:
                    on_output(stack.name, output, counted)
                return output

            return run_experts(module, multiply, *arguments, **named)

        return forward

    def _note(self, stack: ExpertStack, expert: int, rows: Tensor) -> None:
        try:
            self.moments[stack.name].of_experts[expert].update(rows)
        except NumericsError as error:
            raise NumericsError(
                f"What expert {expert} of {stack.name} reads holds NaN or infinity during calibration. Use bfloat16 or "
                "float32 instead of float16, and check the teacher's outputs."
            ) from error


def check_experts_reached(stacks: Sequence[ExpertStack], moments: Mapping[str, ExpertMoments]) -> None:
    """Refuse to go on where no expert of one of these stacks has read anything.

    Raises:
        DataError: of one, none has.
    """
    for stack in stacks:
        found = moments.get(stack.name)
        if found is None or not any(one.rows for one in found.of_experts):
            raise DataError(f"No expert of {stack.name} saw a token during calibration: the batches do not reach it.")
