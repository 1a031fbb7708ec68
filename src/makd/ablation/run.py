"""Station 10: runs the cells of an ablation: one start a seed, taught once for each variation of the plan.

A cell that is done is a line of `results.jsonl`, so that a run that was stopped goes on with what is missing.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makd.ablation.table import ablation_table
from makd.ablation.variations import variations
from makd.capture import examine
from makd.comparison.cells import hash_settings
from makd.comparison.results import append_line, read_lines
from makd.comparison.sources import check_sources
from makd.config import Recipe, check_seed
from makd.errors import SettingError
from makd.kinds import takes
from makd.loading import check_dtype, take_model
from makd.pipeline import distill, factorize_only
from makd.preparation import Data, is_labelled, names_of
from makd.processes.started import check_alone
from makd.progress import OnProgress
from makd.provenance import anatomy_of, extensions_of
from makd.random_state import keeping_random_state
from makd.ranks.budget import Budget
from makd.run_folder import describe_environment, plain

TABLE = "table.md"
"""File that the table is written to."""


@dataclass(frozen=True)
class Ablation:
    """What an ablation found."""

    folder: Path
    lines: tuple[dict[str, Any], ...]
    """One a cell: `variation`, `seed`, `metrics` as in a run's `metrics.json`, `environment`."""


@takes
@keeping_random_state()
def ablate(
    teacher: str,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/ablation",
    *,
    seeds: Sequence[int] = (1, 2, 3),
    tokenizer: str | None = None,
    on_progress: OnProgress | None = None,
) -> Ablation:
    """What each aspect of a run is good for: the run for each seed, with one aspect of its plan off at a time.

    The cells of a seed share one start, which `factorize_only` makes; each is `distill` with its own plan, and is
    measured as every run is. Students are removed when they are measured.

    Args:
        teacher: as `compress` takes it, by name.
        data: as `compress` takes it.
        budget: of the students.
        recipe: whose plan is taken apart; its own seed is not used.
        output: folder of `results.jsonl`, of the starts, and of the table. What is done there is not done again.
        seeds: each gives a start and a cell of each variation.
        tokenizer: where the tokenizer is, if not with the teacher.
        on_progress: as of `compress`.

    Raises:
        SettingError: no seed is given, or the plan cannot be taken apart.
        OutputError: teacher or text are not what they were when the folder's first cells were made.
        MakdError: as `compress` does.
    """
    check_alone("An ablation", "Start it without torchrun or accelerate launch.")
    recipe, folder = recipe or Recipe(), Path(output)
    if not seeds or len(set(seeds)) < len(seeds):
        raise SettingError(f"seeds are one or more different numbers; got {[*seeds]}.")
    for seed in seeds:
        check_seed("seeds", seed)
    if recipe.cache is not None:
        raise SettingError(
            f"recipe.cache is {recipe.cache}, and a cache is of the rows that one seed takes, while an ablation takes "
            "those of each of its own seeds. Leave it out."
        )
    check_sources(folder, [teacher, tokenizer], {name: name for name in names_of(data) if name is not None})
    run = _AblationRun(teacher, data, budget, tokenizer, folder, on_progress)
    model = take_model(teacher, recipe.head, check_dtype(recipe.dtype), recipe.find_device())
    anatomy = examine(model)
    labelled = anatomy.head is None or is_labelled(data, model)  # without a head there is no task in any case
    del model  # each run loads its own
    found = variations(recipe, anatomy, labelled=labelled)
    lines: list[dict[str, Any]] = []
    for seed in seeds:
        begun = dataclasses.replace(recipe, seed=seed)
        own = {name: dataclasses.replace(variation, seed=seed) for name, variation in found.items()}
        lines += _run_seed(run, begun, own)
    (folder / TABLE).write_text(f"{ablation_table(lines).markdown}\n", encoding="utf-8")
    return Ablation(folder, tuple(lines))


@dataclass(frozen=True)
class _AblationRun:
    """What all cells of an ablation share."""

    teacher: str
    data: Data
    budget: Budget
    tokenizer: str | None
    folder: Path
    on_progress: OnProgress | None

    def hash(self, *recipes: Recipe) -> str:
        """Says whether work is of these settings, and of the users' packages that they and the teacher name."""
        own = extensions_of(plain(recipes), anatomy_of(self.teacher))
        return hash_settings([self.teacher, self.data, self.budget, self.tokenizer, *recipes, own])


def _run_seed(run: _AblationRun, begun: Recipe, own: Mapping[str, Recipe]) -> list[dict[str, Any]]:
    """The cells of one seed, in order; those that are done are read."""
    results, start = run.folder / "results.jsonl", run.folder / f"start_{run.hash(begun)}"
    lines, known = [], read_lines(results)
    for name, recipe in own.items():
        cell = {"variation": name, "seed": recipe.seed, "settings": run.hash(begun, recipe)}
        done = next((line for line in known if cell.items() <= line.items()), None)
        if done is None:
            if not start.exists():
                factorize_only(
                    run.teacher, run.data, run.budget, begun, start,
                    tokenizer=run.tokenizer, on_progress=run.on_progress,
                )  # fmt: skip
            taught = run.folder / "student"
            metrics = distill(
                str(start), run.teacher, run.data, recipe, taught,
                tokenizer=run.tokenizer, overwrite=True, on_progress=run.on_progress,
            ).metrics  # fmt: skip
            done = {**cell, "metrics": metrics, "environment": describe_environment(recipe.find_device(), recipe.seed)}
            append_line(results, done)
            shutil.rmtree(taught)
        lines.append(done)
    if start.exists():
        shutil.rmtree(start)
    return lines
