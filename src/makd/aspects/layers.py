"""Station 5: the words for layers in a plan."""

from collections.abc import Iterable

from makd.errors import SettingError
from makd.registry import unknown_name


def select_layers(layers: str | Iterable[int], count: int) -> list[int]:
    """Indices of the layers that `layers` means in a model with `count` of them, ascending.

    Raises:
        SettingError: it does not follow the grammar, or names a layer that does not exist.
    """
    if not isinstance(layers, str):
        chosen = list(layers)
        wrong = [index for index in chosen if not -count <= index < count]
        if wrong:
            raise SettingError(f"Layer {wrong[0]} does not exist: the model has {count}, 0 to {count - 1}.")
        return sorted({index % count for index in chosen})
    word, _, number = layers.partition(":")
    if layers in ("all", "last"):
        return list(range(count)) if layers == "all" else [count - 1]
    if word in ("last", "every") and number.isdigit() and int(number) > 0:
        step = int(number)
        return list(range(max(0, count - step), count)) if word == "last" else list(range(count - 1, -1, -step))[::-1]
    raise unknown_name("choice of layers", layers, ("all", "last", "last:N", "every:N", "a list of indices"))


def spread_layers(student: int, teacher: int) -> list[int]:
    """The teacher's layer that each of the student's stands for: the last of as many equal parts as there are.

    Of equal counts the same, of half the layers every second one. Source: TinyBERT's uniform map, arXiv 1909.10351.

    Args:
        student: how many layers it has.
        teacher: how many it has.
    """
    return [-(-(index + 1) * teacher // student) - 1 for index in range(student)]
