"""Station 7: a student taught layer by layer: on the way of a factorization, or one that is finished already."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Layer, SkippedLayer
from makd.anatomy.batches import check_batches
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.sizes import hidden_width
from makd.aspects import Plan, activate
from makd.calibration.replay import Calls
from makd.calibration.source import ModelSource
from makd.calibration.store import choose_store
from makd.calibration.walk import Walk, state_bytes
from makd.capture import examine
from makd.distill.layerwise.settings import LayerwiseConfig
from makd.distill.layerwise.training import check_teachable, teach_layer_
from makd.distill.losses.projections import check_layer_map
from makd.errors import SettingError
from makd.factorization.layers import begin_, enter, make_layers_, student_states
from makd.kinds import takes
from makd.progress import OnProgress, Progress, nobody


class LayerTeacher:
    """Teaches each layer when it is made: what `makd.factorize` takes as `teach`."""

    def __init__(
        self, plan: Plan, settings: LayerwiseConfig, seed: int = 0, calls: Sequence[Calls] | None = None
    ) -> None:
        """Nothing is taught yet.

        Args:
            plan: of which each layer takes the part that is inside it: see `inside_layer`.
            settings: how long and how fast each layer learns.
            seed: of the order of the batches.
            calls: what the student's layers are called with; None where that is what the teacher's are.
        """
        self.plan, self.settings, self.seed, self.calls = plan, settings, seed, calls

    def __call__(self, walk: Walk, student: PreTrainedModel, layer: Layer) -> Mapping[str, float | int] | None:
        """Teach `layer` of `student`, in place; what it learned, None where nothing was to be."""
        if isinstance(student.get_submodule(layer.module), SkippedLayer):
            return None
        result = teach_layer_(
            student,
            walk.model,
            walk.anatomy,
            layer,
            activate(self.plan, walk.anatomy),
            walk.calls,
            lambda batch: walk.states(layer.index, batch),
            lambda batch: student_states(walk, layer.index, batch),
            self.settings,
            self.seed,
            student_calls=self.calls,
            teacher_outputs=lambda batch: walk.states(layer.index + 1, batch),
        )
        return None if result is None else asdict(result)


@takes
def teach_layers_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    settings: LayerwiseConfig,
    seed: int = 0,
    store: str = "auto",
    on_progress: OnProgress = nobody,
) -> dict[int, Mapping[str, float | int]]:
    """Teach each layer of `student`, in place, what the same layer of `teacher` does, in forward order.

    Each layer learns on what the layers before it, already taught, give it.

    Args:
        student: as `makd.factorize` makes it: with the teacher's layers and widths.
        teacher: what is mimicked.
        plan: of which each layer takes the part that is inside it: see `inside_layer`.
        batches: what to learn from, and be judged by.
        settings: how long and how fast each layer learns.
        seed: of the order of the batches.
        store: where hidden states are kept meanwhile: see `makd.FactorizeConfig`.
        on_progress: called with a `Progress` after each batch that the teacher has read, and each layer that is taught.

    Returns:
        Layer -> what it learned; layers that the student has dropped are left out.

    Raises:
        SettingError: the layers cannot be taught one by one, or the models do not line up.
        DataError: fewer than two batches are given.
        NumericsError: a loss is NaN or infinite.
    """
    anatomy, ours, given = examine(teacher), examine(student), list(check_batches(batches, student))
    for one in (anatomy, ours):
        check_teachable(one, given)
    check_layer_map(ours, anatomy)
    widths = [hidden_width(model, one.layers[0]) for model, one in ((student, ours), (teacher, anatomy))]
    if len(ours.layers) != len(anatomy.layers) or widths[0] != widths[1]:
        raise SettingError(
            "Layers are taught one by one to be what the same layer of the teacher is; the student has "
            f"{len(ours.layers)} of width {widths[0]}, the teacher {len(anatomy.layers)} of width {widths[1]}. Teach "
            "the student as a whole: leave layerwise out of the recipe."
        )
    with in_eval(student, teacher):
        kept = choose_store(store, (len(anatomy.layers) + 3) * state_bytes(given, teacher))
        walk = Walk(ModelSource(teacher), anatomy, given, kept)
        for _ in walk.up(on_progress):
            pass
        calls = enter(student, given)
        begin_(walk, calls)
        of = len(anatomy.layers)
        on_progress(Progress("teach layers", 0, of, "layers"))
        made = make_layers_(
            walk, ModelSource(student), lambda layer: {}, LayerTeacher(plan, settings, seed, calls),
            lambda layer: on_progress(Progress("teach layers", layer.index + 1, of, "layers")), calls,
        )  # fmt: skip
    return dict(made.lessons)
