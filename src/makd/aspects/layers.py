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
