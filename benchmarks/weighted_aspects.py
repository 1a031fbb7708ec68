"""Would the errors inside layers teach more if they were weighed by what they do to the outputs, or if they faded out?

    python benchmarks/weighted_aspects.py run --data DATA --task cola --seed 3
    python benchmarks/weighted_aspects.py table

A tenth of the whole model, as the row `makd_labels` of examples/encoder/ablation-tenth.yaml learns it: teachers, rows,
start, steps and batches are that experiment's, and are made once for all variants, each of which is taught in turn:

- plain: as makd does it, every channel of an output alike.
- full: `matrix` and `hidden` are of M^½ (z_s - z_t) in the place of z_s - z_t, in units of the teacher's variance
  there. M = (1 - λ) G d / tr G + λ I, λ = 0.1; G are the second moments of the teacher's gradients at that output (d
  channels), of `makd.calibration.gradients`: the Gauss-Newton metric of the predictions.
- diagonal: the same with G's diagonal.
- falling: as plain, and the weights of all aspects inside layers fall linearly to 0 over the training.

A line in benchmarks/results/weighted_aspects.jsonl says the score of the teacher and of each student, and the seconds
that it was taught.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float
from result_lines import add, read
from torch import Tensor
from transformers import PreTrainedModel

from makd.aspects import ActivePlan, Comparison, normalised_mse
from makd.calibration.gradients import collect_gradient_moments
from makd.capture import Recording, Tap, examine
from makd.cli.compare import load_experiment
from makd.comparison.cells import all_cells
from makd.comparison.setup import prepare_setup
from makd.comparison.teach import count_steps, teach
from makd.data import Batch
from makd.distill import distillation_forward, weighted_sum
from makd.distill.losses.layers import LayerLosses
from makd.distill.losses.teacher_variances import TeacherVariances
from makd.progress import nobody

EXPERIMENT = Path(__file__).parents[1] / "examples" / "encoder" / "ablation-tenth.yaml"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "weighted_aspects.jsonl"
DAMPING = 0.1
"""λ: share of the weight that all directions have alike."""
VARIANTS = ("plain", "full", "diagonal", "falling")

Weights = Mapping[Tap, Tensor]
"""Of a layer's output, or of a linear's: a matrix, or a number for each channel."""


def weigh(model: PreTrainedModel, batches: Sequence[Batch], *, diagonal: bool) -> dict[Tap, Tensor]:
    """M^½ for each linear and each layer of `model`."""
    anatomy = examine(model)
    # a layer's output is what the norm after its last linear gives
    layers = {layer.module: layer.index for layer in anatomy.layers}
    moments = collect_gradient_moments(model, anatomy, batches, 0, dict.fromkeys(layers, model.config.hidden_size))
    found = {Tap(index, "hidden"): moments[name].gram for name, index in layers.items()}
    for layer in anatomy.layers:
        found |= {Tap(layer.index, "linear", role): moments[one.module].gram for role, one in layer.roles.items()}
    return {tap: _root(gram, diagonal) for tap, gram in found.items()}


def _root(gram: Float[Tensor, "channels channels"], diagonal: bool) -> Tensor:
    scaled = gram * (len(gram) / gram.trace())
    if diagonal:
        return ((1 - DAMPING) * scaled.diagonal() + DAMPING).sqrt().float()
    values, vectors = torch.linalg.eigh((1 - DAMPING) * scaled + DAMPING * torch.eye(len(gram), dtype=gram.dtype))
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.T
    return root.float()


@contextmanager
def weighed(weights: Weights) -> Iterator[None]:
    """Inside the block, `matrix` and `hidden` compare weighed states."""

    def of(tap: Tap, states: Tensor) -> Tensor:
        return states.float() * weights[tap] if weights[tap].dim() == 1 else states.float() @ weights[tap]

    class WeighedLosses(LayerLosses):
        def _states(self, comparison: Comparison, ours: Tensor, theirs: Tensor, counted: Tensor | None) -> Tensor:
            if comparison.measure != "mse":
                return super()._states(comparison, ours, theirs, counted)
            # what stands in the padding may be anything, and must not reach the products
            sides = [side if counted is None else side.masked_fill(~counted[..., None], 0) for side in (ours, theirs)]
            student, teacher = (of(comparison.tap, side) for side in sides)
            return normalised_mse(student, teacher, counted, self._units.get(comparison))

    measure = TeacherVariances.measure

    def measure_weighed(self: TeacherVariances, batches: Any, anatomy: Any, asked: Any, device: Any) -> None:
        def asked_weighed(batch: Mapping[str, Tensor]) -> Recording:
            recording: Recording = asked(batch)
            for tap, states in recording.tensors.items():
                recording.tensors[tap] = of(tap, states.nan_to_num())
            return recording

        measure(self, batches, anatomy, asked_weighed, device)

    with (
        patch.object(distillation_forward, "LayerLosses", WeighedLosses),
        patch.object(TeacherVariances, "measure", measure_weighed),
    ):
        yield


@contextmanager
def falling(steps: int) -> Iterator[None]:
    """Inside the block, weights of aspects inside layers fall linearly to 0 over so many optimizer steps."""
    done = 0

    def faded(plan: ActivePlan, terms: Mapping[str, Tensor], predicted: Any) -> Tensor:
        nonlocal done
        share = max(0.0, 1 - done / steps)
        done += torch.is_grad_enabled()
        inside = {active.name for active in plan.terms if active.comparisons}
        return weighted_sum(
            plan, {name: one * share if name in inside else one for name, one in terms.items()}, predicted
        )

    with patch.object(distillation_forward, "weighted_sum", faded):
        yield


def run(words: argparse.Namespace) -> None:
    """See the module's docstring."""
    experiment = load_experiment(str(EXPERIMENT), output=str(words.output), data=str(words.data))
    (cell,) = [
        cell
        for cell in all_cells(experiment)
        if (cell.names["task"], cell.names["method"], cell.seed) == (words.task, "makd_labels", words.seed)
    ]
    setup = prepare_setup(experiment, cell.task, cell.seed, nobody)
    method: Any = cell.method.build()
    scores, seconds = {"teacher": setup.teacher_scores["score"]}, {}
    for variant in words.variants:
        print(variant, flush=True)
        if variant == "plain":
            taught = teach(setup, method, cell.budget, experiment.training, cell.seed, nobody)
        elif variant == "falling":
            with falling(count_steps(setup.task, experiment.training)):
                taught = teach(setup, method, cell.budget, experiment.training, cell.seed, nobody)
        else:
            with weighed(weigh(setup.teacher, setup.calibration, diagonal=variant == "diagonal")):
                taught = teach(setup, method, cell.budget, experiment.training, cell.seed, nobody)
        scores[variant], seconds[variant] = taught.scores["score"], taught.seconds["train"]
    add(RESULTS, {"task": words.task, "seed": words.seed, "damping": DAMPING, "scores": scores, "seconds": seconds})


def table() -> str:
    """Markdown of all results: scores x 100."""
    head = ["task", "seed", "teacher", *VARIANTS]
    told = [f"| {' | '.join(head)} |", f"| --- | {' | '.join('---:' for _ in head[1:])} |"]
    for row in read(RESULTS):
        figures = [f"{100 * row['scores'][name]:.1f}" if name in row["scores"] else "" for name in head[2:]]
        told.append(f"| {' | '.join([row['task'], str(row['seed']), *figures])} |")
    return "\n".join(told)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    parser.add_argument("--output", type=Path, default=Path("runs/weighted-aspects"), help="where teachers are kept")
    parser.add_argument("--task", choices=("cola", "mrpc", "stsb", "sst2"), default="cola")
    parser.add_argument("--seed", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    words = parser.parse_args()
    if words.command == "table":
        print(table())
        return
    if words.data is None:
        parser.error("the data is needed: --data FOLDER, or MAKD_DATA in the environment")
    run(words)


if __name__ == "__main__":
    main()
