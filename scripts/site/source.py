"""What the documentation site is built from: the repository's own pages in their own places, so that links stay true.

A page is written for the repository's view (GitHub's Markdown). The site's source is the same tree: every page, every
file that a page links to, and nothing else. Three things are put as the site's Markdown wants them: lists are indented
by four, a block that begins right under a paragraph gets an empty line before it, and a mermaid diagram is the SVG
that was made of it (`diagrams.py`), because pages load nothing from elsewhere. Two things are made: the navigation,
which is the index in docs/README.md, and the pages of the API, which are the docstrings of the names in
docs/reference/python.md.

    python scripts/site/source.py build/site     # then: zensical build --strict -f build/site/mkdocs.yml
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DIAGRAMS = ROOT / "docs" / "diagrams"
FRONT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
"""Pages that do not lie in docs/."""
EMBEDDED = """[Open it alone](report.html)

<iframe src="report.html" title="The report of the demo" style="width: 100%; height: 80vh"></iframe>"""
NOT_EMBEDDED = "This copy of the site was built where there was no report of the demo."
INDENT = 4
PYTHON, API = "docs/reference/python.md", "docs/reference/api"
IN_MODULES = {"makd.resolve": "makd.anatomy.resolve.resolve"}
"""Functions that are called like the module that they are in, which would be described in their place."""
REPORT, REPORT_MARK = ROOT / "runs" / "demo" / "report.html", "<!-- report of runs/demo -->"
"""The report of the demo, where there is one, and the line of a page that it is put in the place of."""
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
        path = f"{up}{found.relative_to(ROOT)}"
        labels = (label.replace("<br/>", " ") for label in re.findall(r"\[\"?(.*?)\"?\]", code))
        return f"{indent}[![Diagram: {'; '.join(labels)}]({path})]({path})"

    text = FENCE.sub(drawn, text)
    if page == ROOT / PYTHON:
        text = re.sub(r"^\| (`makd\..*?) \| ", lambda row: _linked(row.group()), text, flags=re.MULTILINE)
    if REPORT_MARK in text:
        text = text.replace(REPORT_MARK, EMBEDDED if REPORT.is_file() else NOT_EMBEDDED)
    return _reindented(text)


def _linked(cell: str) -> str:
    """Names of a table that lead to their docstrings."""
    return re.sub(r"`(makd\.[\w.]+)`", lambda name: f"[{name[0]}][{IN_MODULES.get(name[1], name[1])}]", cell)


def _reindented(text: str) -> str:
    """Lists with `INDENT` spaces a level, and an empty line before each block that follows a paragraph at once."""
    lines = text.splitlines()
    levels: list[list[tuple[int, int]]] = [[] for _ in lines]  # of each line: what its items had, and where they begin
    starts: set[int] = set()
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.map is None:
            continue
        first, end = token.map
        if token.type in ("bullet_list_open", "ordered_list_open", "table_open", "heading_open"):
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


def api_pages() -> dict[str, str]:
    """Section of docs/reference/python.md -> the docstrings of the names in its table, in its order."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", (ROOT / PYTHON).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title = section.splitlines()[0]
        cells = re.findall(r"^\| (`makd\..*?) \| ", section, re.MULTILINE)
        names = [name for cell in cells for name in re.findall(r"`(makd\.[\w.]+)`", cell)]
        if names:
            found[title] = f"# {title}\n\n" + "".join(map(_directive, names))
    return found


def _directive(name: str) -> str:
    """What mkdocstrings puts a name's docstring in the place of."""
    if name not in IN_MODULES:
        return f"::: {name}\n\n"
    lines = (f"::: {IN_MODULES[name]}", f"    options: {{heading: {name}, toc_label: {name}}}")
    return "\n".join((*lines, "", ""))


def navigation() -> list[Any]:
    """What docs/README.md lists, in its order, between the front pages."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    parts: list[Any] = [{"makd": ["README.md", {"All pages": "docs/README.md"}]}]
    for title, text in re.findall(r"^\*\*([\w-]+)\*\*.*?\n(.*?)(?=^\*\*|\Z)", index, re.MULTILINE | re.DOTALL):
        entries: list[Any] = [
            {name: f"docs/{path}"} for name, path in re.findall(r"^- \[(.*?)\]\((\w[^)#]*)\)", text, re.MULTILINE)
        ]
        if title == "Reference":
            entries.append({"Docstrings": [{name: api_path(name)} for name in api_pages()]})
        parts.append({title: entries})
    more = {"Examples": "examples/README.md", "Changelog": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md",
            "Security": "SECURITY.md"}  # fmt: skip
    parts.append({"Project": [{name: path} for name, path in more.items()]})
    return parts


def api_path(section: str) -> str:
    """Where the docstrings of a section of docs/reference/python.md are."""
    return f"{API}/{section.lower().replace(' ', '-')}.md"


def gather(folder: Path) -> None:
    """Make the site's source in `folder`, which is replaced: `pages` and `mkdocs.yml`."""
    shutil.rmtree(folder, ignore_errors=True)
    there = folder / "pages"
    files = {path for page in pages() for path in linked_files(page)} | set(DIAGRAMS.glob("*.svg"))
    for path in (*pages(), *files):
        place = there / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            place.write_text(for_site(path.read_text(encoding="utf-8"), path), encoding="utf-8")
        else:
            shutil.copyfile(path, place)
    for title, text in api_pages().items():
        place = there / api_path(title)
        place.parent.mkdir(exist_ok=True)
        place.write_text(text, encoding="utf-8")
    if REPORT.is_file():
        shutil.copyfile(REPORT, there / "docs" / "results" / "report.html")
    shutil.copyfile(HERE / "site.css", there / "site.css")
    settings = (HERE / "site.yml").read_text(encoding="utf-8")
    nav = yaml.safe_dump({"nav": navigation()}, sort_keys=False, allow_unicode=True)
    (folder / "mkdocs.yml").write_text(settings + nav, encoding="utf-8")


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
