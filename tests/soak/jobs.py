"""What a process of the soak does: one command of makd's, in a fork of a server that has imported it already."""

import os
import sys

PRELOADED = [
    "makd.cli.main", "makd.cli.tasks", "makd.cli.cache", "makd.cli.compare", "makd.pipeline", "makd.streaming",
    "makd.caching", "makd.finetuning", "makd.comparison", "transformers.models.bert.modeling_bert",
    "sklearn.metrics", "tests.soak.jobs",
]  # fmt: skip
"""Imports take longer than a tiny run."""


def run(words: list[str], log: str) -> None:
    """Run `makd WORDS...`; all that it prints goes to `log`, and its exit code is the process's."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from makd.cli.main import main

    sys.exit(main(words))
