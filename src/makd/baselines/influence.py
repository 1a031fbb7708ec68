"""Baselines: which layers of a teacher change their input most, by one forward of some text."""

import torch
from transformers import PreTrainedModel

from makd.anatomy.batches import model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token, layer_tokens
from makd.aspects import cosine_distance
from makd.baselines.method import Batches
from makd.capture import Tap, capture, examine


@torch.no_grad()
def by_influence(teacher: PreTrainedModel, calibration: Batches) -> list[int]:
    """The layers in the order in which to keep them: the first one, then those of the largest block influence.

    Influence is 1 - cosine of a layer's input and output, a mean over real tokens: ShortGPT (arXiv 2403.03853),
    equation 1. Nothing is said of the first layer, whose input is no layer's output; no method drops it.

    Args:
        teacher: of one stack.
        calibration: its inputs.

    Raises:
        UnsupportedModelError: what its layers give cannot be told apart.
    """
    anatomy = examine(teacher)
    taps = tuple(Tap(layer.index, "hidden") for layer in anatomy.layers)
    sums, count = [0.0] * len(taps), 0
    with in_eval(teacher), without_cache(teacher):
        for batch in calibration:
            inputs = model_inputs(batch, teacher.device)
            real = layer_tokens(anatomy, anatomy.layers[0], inputs)
            with capture(teacher, anatomy, taps) as recording:
                teacher(**inputs)
            states = [by_token(recording.tensors[tap], real, f"What layer {tap.layer} gives") for tap in taps]
            tokens = int(real.sum())
            for at in range(1, len(taps)):
                sums[at] += float(cosine_distance(states[at], states[at - 1], real)) * tokens
            count += tokens
    return sorted(range(len(taps)), key=lambda at: (at > 0, -sums[at] / max(count, 1)))
