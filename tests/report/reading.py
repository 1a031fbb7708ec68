"""What tests read out of a report's page."""

import re
from html.parser import HTMLParser


class Found(HTMLParser):
    """Elements, texts outside of scripts and styles, and the content of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.scripts, self.ids, self._inside = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "input", "br", "link"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        if self._inside and self._inside[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def section(text, name):
    return Found(re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL).group()).text
