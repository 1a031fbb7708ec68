"""Station 7: a student without dropout, also where its layers have to believe that they are training.

The teacher's states, and those of earlier steps, have none: a student with dropout would mimic through noise.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def switch_dropout_off_(model: nn.Module) -> None:
    """Eval mode, but for the layers that checkpoint only while training. The Trainer's next step undoes it.

    It must outlast the loss: gradient checkpointing computes the layers again in the backward, and the same way.
    """
    for module in model.modules():
        module.training = _checkpoints(module)


@contextmanager
def silent_checkpoints(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers that checkpoint are in eval mode while they run: once forward, once in the backward.

    Most have dropout in modules, which `switch_dropout_off_` reaches. BART's relatives and OPT draw it in the layer's
    own forward, whenever the layer is training, as it has to be in order to checkpoint.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if _checkpoints(module):
                stack.callback(module.register_forward_pre_hook(_enter).remove)
                stack.callback(module.register_forward_hook(_leave, always_call=True).remove)
        yield


def _checkpoints(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and bool(module.gradient_checkpointing)


def _enter(layer: nn.Module, _inputs: Any) -> None:
    layer.training = False


def _leave(layer: nn.Module, _inputs: Any, _output: Any) -> None:
    layer.training = True
