"""Results of a benchmark: a file of JSON lines, one a measurement, that is only added to."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def read(results: Path) -> list[dict[str, Any]]:
    """All lines; none where there is no file."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def add(results: Path, row: dict[str, Any], **more: Any) -> None:
    """One more line, with where and when it was found, and `more` of that."""
    where = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "makd": version("makd"), **more, "date": date.today().isoformat(),
    }  # fmt: skip
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **where}) + "\n")
    print(json.dumps(row), flush=True)
