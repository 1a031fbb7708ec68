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
    check_memory([*forecast.phases, *others], stored, available)
    _refuse(forecast.disk, "disk", available.disk, "Make room, or name an output on another disk.")
    _warn(forecast.disk, "disk", available.disk)


def check_memory(phases: Sequence[Memory], stored: int, available: Available) -> None:
    """Refuse what needs more memory than there is. Of an accelerator's own, all is asked for but the store.

    Args:
        phases: what is held, one after the other.
        stored: bytes of the store that are in memory, which are part of the phases' states.
        available: what there is.

    Raises:
        RoomError: the phase that needs most needs more than there is.
    """
    apart = 0 if available.device is None else stored
    room = available.memory if available.device is None else available.device
    for phase in phases:
        named = f"memory in its phase {phase.when!r} ({parts_of(phase)})"
        _refuse(phase.least - min(apart, phase.states), named, room, _advice(phase))
    largest = max(phases, key=lambda phase: phase.total - min(apart, phase.states))
    _warn(largest.total - min(apart, largest.states), f"memory ({parts_of(largest)})", room)
    if apart:
        _refuse(stored, "memory for hidden states", available.memory, _advice(Memory("store", states=1)))
        _warn(stored, "memory for hidden states", available.memory)


def _refuse(least: int, what: str, room: Room, advice: str) -> None:
    if room.size is not None and least > room.size:
        raise RoomError(
            f"The run needs at least {gigabytes(least)} of {what}, and {room.whose} has {gigabytes(room.size)}. "
            f"{advice} Nothing was begun."
        )


def _warn(needed: int, what: str, room: Room) -> None:
    if room.free is not None and needed > room.free:
        told = gigabytes(needed), what, room.whose, gigabytes(room.free)
        logger.warning(
            "The run needs about %s of %s; of what %s has, %s are free now. Free some before it gets there, or give "
            "smaller batches or less text",
            *told,
        )


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
    if phase.when == "writing" and phase.activations > phase.weights:
        return (
            "Take smaller batches (recipe.training.batch_size, or tokens_per_batch), fewer of them in a step "
            "(recipe.training.accumulate), or shorter completions (recipe.plan.completions.max_new_tokens); or only "
            "factorize."
        )
    if phase.when in ("training", "writing"):
        if phase.activations > phase.weights:
            return (
                "Take smaller batches (recipe.training.batch_size, or tokens_per_batch), "
                "recipe.training.gradient_checkpointing, or recipe.training.precision bfloat16; or only factorize."
            )
        return (
            "Take recipe.training.trainable adapters or linears, a smaller budget, or FSDP over several GPUs, with "
            "recipe.training.shard_teacher; or only factorize."
        )
    other = (
        "recipe.factorize.store disk" if phase.when == "lessons" else "the solver whitened (recipe.factorize.solver)"
    )
    ways = {
        "Take --stream, which has one layer at a time in memory, or recipe.dtype bfloat16.": phase.weights,
        f"Give fewer rows (recipe.calibration.rows), or {other}.": phase.states,
        "Give a solver that needs less (recipe.factorize.solver): whitened, or svd.": phase.moments
        + phase.decompositions,
        "Give smaller batches (recipe.calibration.batch_size) or shorter rows (data.max_length).": phase.activations,
    }
    return max(ways, key=lambda way: ways[way])


def gigabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
