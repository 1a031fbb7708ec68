"""Types of settings, as people call them, and whether a value is of one. Stands below every station."""

import typing

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "settings with names",
    "NoneType": "null",
}
"""Python's name of a type -> what people call it, who write YAML and flags."""


def is_of(value: object, kind: typing.Any) -> bool:
    """Whether `value` is of a type: one of those in `KINDS`, a union of them, or a `Literal`. A number may be whole."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    kinds = typing.get_args(kind) or (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return any(isinstance(value, (float, int) if one is float else one) for one in kinds)


def name_kind(kind: typing.Any) -> str:
    """What people call a type that `is_of` takes."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return " or ".join(KINDS[one.__name__] for one in typing.get_args(kind) or (kind,))
