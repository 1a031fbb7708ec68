"""Draw the pages' mermaid diagrams as SVG, for the site (`source.py`). Only after one was changed.

mermaid is a program of 5 MB for browsers, which the site would load from elsewhere to draw a few boxes. It is asked
once, here; what it drew is committed.

    npm pack mermaid@12.3.0 && tar xzf mermaid-12.3.0.tgz
    python scripts/site/diagrams.py package/dist/mermaid.min.js
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from source import DIAGRAMS, FENCE, diagram, pages

CHROMIUM = "/usr/bin/chromium"


def draw(mermaid: Path) -> None:
    """Write the SVG of every diagram, and remove those of which the text is gone."""
    blocks = (match for page in pages() for match in FENCE.findall(page.read_text(encoding="utf-8")))
    wanted = {diagram(code): code for _, language, code in blocks if language == "mermaid"}
    DIAGRAMS.mkdir(exist_ok=True)
    for old in set(DIAGRAMS.glob("*.svg")) - set(wanted):
        old.unlink()
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_content("<html><body></body></html>")
        page.add_script_tag(path=str(mermaid))
        settings = "{startOnLoad: false, theme: 'neutral', htmlLabels: false, flowchart: {htmlLabels: false}}"
        page.evaluate(f"mermaid.initialize({settings})")
        for path, code in wanted.items():
            # the name of an id is part of the SVG: the same for the same diagram
            svg = page.evaluate(
                "([name, code]) => mermaid.render(name, code).then(it => it.svg)", [f"d{path.stem}", code]
            )
            path.write_text(svg + "\n", encoding="utf-8")
        browser.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
