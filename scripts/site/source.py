"""What the documentation site is built from: the repository's own pages in their own places, so that links stay true.

A page is written for the repository's view (GitHub's Markdown). The site's source is the same tree: every page, every
file that a page links to, and nothing else. Three things are put as the site's Markdown wants them: lists are indented
by four, a block that begins right under a paragraph gets an empty line before it, and a mermaid diagram is the SVG that
was made of it (`scripts/site/diagrams.py`), because pages load nothing from elsewhere.

    python scripts/site/source.py
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DIAGRAMS = ROOT / "docs" / "diagrams"
FRONT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
"""Pages that do not lie in docs/."""
INDENT = 4
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Every page of the site, in the repository."""
    return [*(ROOT / name for name in FRONT), *sorted((ROOT / "docs").rglob("*.md"))]


def linked_files(page: Path) -> Iterator[Path]:
    """Files of the repository, other than pages, that a page links to."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve()
        if "://" not in target and path.is_file() and path.suffix != ".md":
            yield path


def diagram(code: str) -> Path:
    """Where the SVG of a mermaid diagram lies: under its text's hash, so that one of an older text is not shown."""
    return DIAGRAMS / f"{hashlib.sha256(code.encode()).hexdigest()[:16]}.svg"


def for_site(text: str, page: Path) -> str:
    """A page as the site's Markdown reads it as GitHub's reads the original.

    Raises:
        SystemExit: a diagram has no SVG.
    """

    def drawn(match: re.Match[str]) -> str:
        indent, language, code = match.groups()
        if language != "mermaid":
            return match.group()
        found = diagram(code)
        if not found.is_file():
            raise SystemExit(
                f"{page.relative_to(ROOT)}: a mermaid diagram was changed and not drawn again: run "
                "`python scripts/site/diagrams.py`."
            )
        up = "../" * (len(page.relative_to(ROOT).parts) - 1)
        return f"{indent}![diagram]({up}{found.relative_to(ROOT)})"

    return _reindented(FENCE.sub(drawn, text))


def _reindented(text: str) -> str:
    """Lists with `INDENT` spaces a level, and an empty line before each block that follows a paragraph at once."""
    lines = text.splitlines()
    levels: list[list[tuple[int, int]]] = [[] for _ in lines]  # of each line: what its items had, and where they begin
    starts: set[int] = set()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.map is None:
            continue
        first, end = token.map
        if token.type in ("bullet_list_open", "ordered_list_open", "table_open"):
            starts.add(first)
        if token.type != "list_item_open":
            continue
        marker = re.match(r"^( *)([-*+]|\d+[.)])( +|$)", lines[first])
        assert marker is not None, lines[first]
        width = len(marker.group())
        for number in range(first, end):
            levels[number].append((width, first))
    done: list[str] = []
    for number, line in enumerate(lines):
        inside = [width for width, first in levels[number] if first != number]
        if number in starts and number and lines[number - 1].strip():
            done.append("")
        if inside and line.strip():
            cut = min(inside[-1], len(line) - len(line.lstrip()))  # a lazy line of a paragraph has less
            line = " " * INDENT * len(inside) + line[cut:]
        done.append(line)
    return "\n".join(done) + "\n"


def gather(folder: Path) -> None:
    """Make the site's source in `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    files = {path for page in pages() for path in linked_files(page)} | set(DIAGRAMS.glob("*.svg"))
    for path in (*pages(), *files):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(for_site(path.read_text(encoding="utf-8"), path), encoding="utf-8")
        else:
            shutil.copyfile(path, place)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
