"""The committed pages of comparisons are what their committed lines say, by the code that there is now."""

import shutil
from pathlib import Path

import pytest

from makd import comparison
from makd.cli.compare import load_experiment

ROOT = Path(__file__).parents[1]
LINES, PAGES = ROOT / "benchmarks/results", ROOT / "docs/results"


@pytest.mark.parametrize(
    ("experiment", "lines", "page"),
    [
        ("encoder/experiment", "encoder", "encoder"),
        ("encoder/ablation", "encoder", "encoder-ablation"),
        ("encoder/longer-teachers", "encoder_longer_teachers", "encoder-longer-teachers"),
        ("encoder/two-cores", "encoder_two_cores", "encoder-two-cores"),
        ("encoder/ablation-tenth", "encoder_ablation_tenth", "encoder-ablation-tenth"),
        ("encoder/squad", "encoder_squad", "encoder-squad"),
        ("decoder/experiment", "decoder", "decoder"),
    ],
)
def test_a_page_is_made_of_its_lines(experiment, lines, page, tmp_path):
    for kind in ("results", "search", "latency"):
        name = f"{lines}_{kind}.jsonl" if lines == "encoder" else f"{lines}.jsonl"
        if (LINES / name).is_file() and (lines == "encoder" or kind == "results"):
            shutil.copy(LINES / name, tmp_path / f"{kind}.jsonl")
    name = f"examples/{experiment}.yaml"
    known = load_experiment(str(ROOT / name), output=str(tmp_path))
    made = comparison.write_page(known, tmp_path / f"{page}.md", name).read_text(encoding="utf-8")
    assert made == (PAGES / f"{page}.md").read_text(encoding="utf-8")
