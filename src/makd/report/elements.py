"""HTML out of elements: every text is escaped where it is put in, so that no model and no data can write markup.

Only what `element` gives is markup (`Markup`); whatever else stands in a page is a text, by its type.
"""

import html
import json
from typing import Any

_VOID = {"meta", "input", "br", "col", "link"}


class Markup(str):
    """HTML that `element` made."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element with its children: markup, texts (escaped), numbers, lists of these; None is nothing.

    Attributes that are None or False are left out, True has no value; `class_` is `class`, `data_x` is `data-x`.
    """
    told = ""
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        if value is True:
            told += f" {label}"
        elif value is not None and value is not False:
            told += f' {label}="{html.escape(str(value))}"'
    return Markup(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{join(*children)}</{name}>")


def join(*children: Any) -> Markup:
    """Children without an element around them."""
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(Markup(html.escape(str(child))))
    return Markup("".join(parts))


def embedded_json(content: Any, **attributes: Any) -> Markup:
    """A script element of data: nothing in it can end it, or be taken for markup."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return element("script", Markup(text), type="application/json", **attributes)


def table(head: list[Any], rows: list[list[Any]], caption: str, left: int = 1, class_: str | None = None) -> Markup:
    """A table that scrolls by itself where it is wider than the page; the first `left` columns are texts."""
    columns = [element("th", cell, scope="col", class_=None if at < left else "number") for at, cell in enumerate(head)]
    lines = [
        element(
            "tr",
            [
                element("th", cell, scope="row")
                if at == 0
                else element("td", cell, class_=None if at < left else "number")
                for at, cell in enumerate(row)
            ],
        )
        for row in rows
    ]
    return scrolled(
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", columns)),
            element("tbody", lines),
            class_=class_,
        ),
        caption,
    )


def scrolled(inside: Markup, label: str) -> Markup:
    """Something wide, in a box that scrolls; the keyboard reaches it."""
    return element("div", inside, class_="scrolled", tabindex="0", role="region", aria_label=label)


def section(name: str, title: str, *children: Any) -> Markup:
    """A part of the page that its contents can lead to."""
    return element(
        "section", element("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title"
    )


def missing(why: str, how: str | None = None) -> Markup:
    """A line where something is not there: why, and how to get it."""
    told = why[:1].upper() + why[1:]
    return element(
        "p", told if told.endswith(".") else f"{told}.", None if how is None else f" {how}", class_="missing"
    )
