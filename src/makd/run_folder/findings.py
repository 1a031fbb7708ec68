"""Station 9: what a run keeps beside its student for `makd report`: where the error is, and how it came about.

Small JSON files in `report/`, which `makd.run_files` names. What does not apply says why, and is never left blank.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from makd.anatomy import resolve
from makd.errors import OutputError
from makd.evaluation.inside import LayerErrors
from makd.factorization.outcome import FactorizeReport
from makd.plain_json import read_json
from makd.run_files import ABOUT, FOLDER, FORMAT, LAYERS, LINEARS, SAMPLES, SPECTRA, TRAINING, WARNINGS
from makd.run_folder.linears import linear_rows
from makd.run_folder.noted import Warnings
from makd.run_folder.record import plain, write_json

DIGITS = 5
"""Of every number but counts: more than a picture shows."""
NOT_TRAINED = "the student was not trained in this run"


@dataclass
class Findings:
    """What one run found out for its report, while it went on."""

    warnings: Warnings
    made: FactorizeReport | None = None
    """None where the run began with a student."""
    inside: dict[str, LayerErrors] = field(default_factory=dict)
    """`before` and `after` the training -> what was measured then."""
    trainings: list[dict[str, Any]] = field(default_factory=list)
    samples: Mapping[str, Any] = field(default_factory=dict)
    origin: Path | None = None
    """Folder of the student that the run began with."""
    unmeasured: str | None = None
    """Why student and teacher were not compared, if they were not."""

    def note_training(
        self, weights: Mapping[str, float], off: Mapping[str, str], history: list[dict[str, Any]]
    ) -> None:
        """Keep the log of a training, as the Trainer's state has it.

        Args:
            weights: aspect, as it is logged -> its weight in the loss.
            off: aspects that are left out -> why.
            history: `TrainerState.log_history`.
        """
        told = [entry for entry in history if "loss" in entry or any(key.startswith("eval_") for key in entry)]
        self.trainings.append({"weights": dict(weights), "off": dict(off), "log": [dict(entry) for entry in told]})

    def write(self, folder: Path, student: PreTrainedModel) -> None:
        """Write all files into `report/` of a student's folder.

        Args:
            folder: of the student.
            student: perhaps empty.

        Raises:
            NumericsError: a number is NaN or infinite.
        """
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, content in {
            LINEARS: self._linears(student),
            SPECTRA: self._spectra(),
            TRAINING: {"trainings": self.trainings} if self.trainings else {"missing": NOT_TRAINED},
            LAYERS: self._layers(),
            SAMPLES: self.samples or {"missing": self.unmeasured or "none were taken"},
            WARNINGS: {"rows": self.warnings.rows()},
        }.items():
            known = {"format": FORMAT, "about": ABOUT[name], **_rounded(plain(content))}
            write_json(folder / FOLDER / name, known)

    def _linears(self, student: PreTrainedModel) -> dict[str, Any]:
        rows = linear_rows(student, resolve(student), self.made, self.inside)
        made, earlier = self.made, self._earlier(LINEARS)
        if made is None:
            _take_over_(rows, earlier)
        parts = {
            "vocabulary": [] if made is None else [
                {"name": name, "rank": rank, "predicted_error": made.errors.get(name)}
                for name, rank in made.vocabulary.items()
            ],
            "dropped": {} if made is None else dict(made.dropped),
            "dense_besides": {} if made is None else {
                name: why for name, why in made.dense.items() if name not in {row["name"] for row in rows}
            },
            "trials": {} if made is None else dict(made.trials),
            "shared_inputs": [] if made is None else [asdict(group) for group in made.shared_inputs],
            "lessons": {} if made is None else {layer: dict(lesson) for layer, lesson in made.lessons.items()},
        }  # fmt: skip
        if made is None:
            parts |= {key: earlier[key] for key in parts if key in earlier}
        unmeasured = self.unmeasured or next((one.missing["matrix"] for one in self.inside.values()
                                              if "matrix" in one.missing), None)  # fmt: skip
        return {"linears": rows, **parts, **({} if unmeasured is None else {"not_measured": unmeasured})}

    def _spectra(self) -> dict[str, Any]:
        if self.made is None:
            return self._earlier(SPECTRA) or {"missing": "this run began with a student, whose folder has no spectra"}
        if not self.made.spectra:
            return {"missing": "no spectra were looked at: the ranks follow from the budget alone"}
        return {"curves": [asdict(curve) for curve in self.made.spectra]}

    def _layers(self) -> dict[str, Any]:
        if not self.inside:
            return {"missing": self.unmeasured or "nothing was measured"}
        return {
            when: {"rows": one.rows, "tokens": one.tokens, "missing": dict(one.missing),
                   "layers": [{"layer": index, **scores} for index, scores in one.layers.items()]}
            for when, one in self.inside.items()
        }  # fmt: skip

    def _earlier(self, name: str) -> dict[str, Any]:
        """What the student that the run began with has of a file; nothing where there is none that can be read."""
        if self.origin is None:
            return {}
        try:
            found = read_json(self.origin / FOLDER / name, dict, OutputError, "")
        except OutputError:
            return {}
        known = {key: value for key, value in found.items() if key not in ("format", "about")}
        return known if found.get("format") == FORMAT else {}


def _take_over_(rows: list[dict[str, Any]], earlier: Mapping[str, Any]) -> None:
    """What was said of a linear when it was made, which this run did not."""
    known = {row.get("name"): row for row in earlier.get("linears", [])}
    for row in rows:
        other = known.get(row["name"], {})
        if other.get("rank") == row["rank"]:
            for key in ("predicted_error", "fallback", "why_dense"):
                row[key] = other.get(key, row[key])


def _rounded(content: Any) -> Any:
    """`content` with `DIGITS` digits of every fraction."""
    if isinstance(content, float):
        return float(f"{content:.{DIGITS}g}")
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list) else content
