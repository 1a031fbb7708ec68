"""The whole HTML file: styles, the charts' library, contents and sections. Nothing in it leads out of it."""

import importlib.util
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata, resources
from pathlib import Path

from makd.errors import SettingError
from makd.report.elements import Markup, element, join
from makd.report.target import MARK

POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
"""What the browser is held to: no request leaves the file. Vega makes functions out of its own expressions."""


def check_extra() -> None:
    """Refuse to make a page where the charts' library is not installed.

    Raises:
        SettingError: vl-convert is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise SettingError(
            "A report's charts need vl-convert-python, which is not installed. `pip install 'makd[report]'` brings it."
        )


@cache
def _library() -> Markup:
    """Vega, Vega-Lite and vega-embed, as one script."""
    import vl_convert

    return Markup(vl_convert.javascript_bundle(None).replace("</script", "<\\/script"))  # type: ignore[arg-type]  # its stubs ask for a snippet


def _own(name: str) -> Markup:
    return Markup((resources.files("makd") / "report" / name).read_text(encoding="utf-8"))


def whole_page(title: str, subtitle: Markup, parts: Sequence[tuple[str, str, Markup]], command: str) -> str:
    """A page as text.

    Args:
        title: of the page.
        subtitle: a line below it.
        parts: id, name in the contents (empty: not listed), and markup of each part.
        command: what wrote it.
    """
    version = metadata.version("makd")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in parts if name]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(MARK),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _own("report.css")),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("p", subtitle)),
        element("nav", element("ul", links), aria_label="Contents"),
        element(
            "main",
            element(
                "noscript",
                element("p", "Charts need JavaScript; every number is in the tables below each.", class_="missing"),
            ),
            [part for _, _, part in parts],
            id="content",
        ),
        element(
            "footer", "Written by ", element("code", command), f", makd {version}, {when}. This file needs no network."
        ),
        element("script", _library()),
        element("script", _own("report.js")),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def listed(parts: Sequence[tuple[str, str, Markup]]) -> Markup:
    """The parts below each other."""
    return join([part for _, _, part in parts])


def short_name_of(teacher: str) -> str:
    """What a person calls a teacher: the last part of its name, or the package that it comes with."""
    package = teacher.removeprefix("package:")
    return package.split("/")[0] if package != teacher else Path(teacher).name or teacher
