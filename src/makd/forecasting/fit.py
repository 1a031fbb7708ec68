"""Before the flow: whether what a run needs fits on this machine."""

import logging
from collections.abc import Sequence

from makd.errors import RoomError
from makd.factorization.room import Available, Room
from makd.forecasting.memory import Memory
from makd.forecasting.student import Forecast

logger = logging.getLogger(__name__)


def check_fits(forecast: Forecast, available: Available, others: Sequence[Memory] = ()) -> None:
    """Refuse what clearly cannot be done here; warn of what others leave no room for now.

    Args:
        forecast: what is needed to make the student.
        available: what there is.
        others: memory of phases that come after that.

    Raises:
        RoomError: it needs more memory or disk than there is at all.
    """
    stored = forecast.store_bytes if forecast.store == "memory" else 0
    check_memory(forecast.memory, stored, available)
    for phase in others:
        check_memory(phase, 0, available)
    _check(
        forecast.disk, available.disk, "disk",
        "Make room, or name an output on another disk.",
    )  # fmt: skip


def check_memory(phase: Memory, stored: int, available: Available) -> None:
    """Refuse a phase that needs more memory than there is. Of an accelerator's own, all is asked for but the store.

    Args:
        phase: what is held.
        stored: bytes of the store that are in memory, which are part of the phase.
        available: what there is.

    Raises:
        RoomError: it does.
    """
    parts = f"memory in its phase {phase.when!r} ({parts_of(phase)})"
    if available.device is None:
        _check(phase.total, available.memory, parts, _advice(phase))
    else:
        _check(phase.total - stored, available.device, parts, _advice(phase))
        _check(stored, available.memory, "memory for hidden states", _advice(phase))


def _check(needed: int, room: Room, what: str, advice: str) -> None:
    if room.size is not None and needed > room.size:
        raise RoomError(
            f"The run needs about {gigabytes(needed)} of {what}, and {room.whose} has {gigabytes(room.size)}. {advice} "
            "Nothing was begun."
        )
    if room.free is not None and needed > room.free:
        told = gigabytes(needed), what, room.whose, gigabytes(room.free)
        logger.warning("the run needs about %s of %s; of what %s has, %s are free now", *told)


def parts_of(phase: Memory) -> str:
    """What a phase holds, the largest first."""
    sizes = {
        "weights": phase.weights,
        "hidden states": phase.states,
        "moments": phase.moments,
        "decompositions": phase.decompositions,
        "activations": phase.activations,
    }
    known = sorted(((size, name) for name, size in sizes.items() if size >= 0.01 * phase.total), reverse=True)
    return ", ".join(f"{name} {gigabytes(size)}" for size, name in known)


def _advice(phase: Memory) -> str:
    """What to do about the largest part."""
    if phase.when == "training":
        return (
            "Take smaller batches (recipe.training.batch_size) with recipe.training.gradient_checkpointing, a smaller "
            "budget, or a teacher's cache (recipe.cache); or only factorize."
        )
    ways = {
        "Take --stream, which has one layer at a time in memory, or recipe.dtype bfloat16.": phase.weights,
        "Give fewer rows (recipe.calibration.rows), or the solver whitened (recipe.factorize.solver).": phase.states,
        "Give a solver that needs less (recipe.factorize.solver): whitened, or svd.": phase.moments
        + phase.decompositions,
        "Give smaller batches (recipe.calibration.batch_size) or shorter rows (data.max_length).": phase.activations,
    }
    return max(ways, key=lambda way: ways[way])


def gigabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
