"""The documentation site builds without a warning; its links lead somewhere, and it loads nothing from elsewhere."""

import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from scripts.site import source

ROOT = Path(__file__).parents[1]
PLACES = {"a": "href", "img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
"""Element -> where it says what it leads to or loads."""


class Page(HTMLParser):
    """What a page links to and loads, and which places in it have a name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.names, self.headings = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.names |= {known[name] for name in ("id", "name") if known.get(name)}
        target = known.get(PLACES.get(tag, ""))
        if target and (tag != "link" or "stylesheet" in known.get("rel", "")):
            (self.links if tag == "a" else self.loads).append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    source.gather(folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(folder / "mkdocs.yml")]
    built = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def read():
    """Read a page once."""
    return cache(Page)


def test_every_page_of_the_repository_is_built_and_in_the_navigation(site):
    listed = str(source.navigation())
    for page in source.pages():
        name = page.relative_to(ROOT)
        built = name.parent / ("index.html" if name.name == "README.md" else f"{name.stem}.html")
        assert (site / built).is_file(), name
        assert f"'{name}'" in listed, name


def test_no_link_is_dead(site, read):
    for page in site.rglob("*.html"):
        for target in read(page).links:
            parts = urlsplit(target)
            if parts.scheme or page.name == "404.html":
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            file = path / "index.html" if path.is_dir() else path
            assert file.is_file(), f"{page.relative_to(site)}: {target}"
            if parts.fragment and file.suffix == ".html":
                assert unquote(parts.fragment) in read(file).names, f"{page.relative_to(site)}: {target}"


def test_a_page_loads_nothing_from_elsewhere(site, read):
    for page in site.rglob("*.html"):
        for target in read(page).loads:
            assert not urlsplit(target).netloc, f"{page.relative_to(site)}: {target}"


def test_names_of_the_python_reference_lead_to_their_docstrings(site, read):
    table = read(site / "docs" / "reference" / "python.html")
    assert "api/functions.html#makd.compress" in table.links
    assert "api/settings.html#makd.Recipe" in table.links
    for page in (site / "docs" / "reference" / "api").glob("*.html"):
        assert "doc-module" not in page.read_text(encoding="utf-8"), "a module was taken for a function of its name"


def test_lists_keep_their_code_on_the_site():
    text = source.for_site("Text\n- one:\n\n  ```sh\n  ls\n  ```\n  1. two\n     more\n", ROOT / "README.md")
    assert text == "Text\n\n- one:\n\n    ```sh\n    ls\n    ```\n\n    1. two\n        more\n"


def test_a_diagram_that_was_changed_and_not_drawn_again_is_told():
    with pytest.raises(SystemExit, match="draw"):
        source.for_site("```mermaid\nflowchart LR\n  A --> B\n```\n", ROOT / "README.md")


def test_the_report_of_the_demo_is_embedded_where_there_is_one(monkeypatch, tmp_path):
    page = ROOT / "docs" / "results" / "demo-report.md"
    monkeypatch.setattr(source, "REPORT", tmp_path / "report.html")
    assert "<iframe" not in source.for_site(page.read_text(encoding="utf-8"), page)
    source.REPORT.write_text("<!doctype html><title>A report</title>")
    assert '<iframe src="report.html"' in source.for_site(page.read_text(encoding="utf-8"), page)
    source.gather(tmp_path / "site")
    assert (tmp_path / "site" / "pages" / "docs" / "results" / "report.html").is_file()
