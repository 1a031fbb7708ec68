"""The command `makd compare`: reads `experiment.yaml`, runs its cells or shows them, and writes its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse

from makd import comparison
from makd.cli.outcome import Outcome
from makd.cli.parsing import PARSING_ERRORS, SYNTAX, check_maps, explain
from makd.comparison import Cell, Experiment
from makd.comparison.forecast import forecast_seconds, own_seconds
from makd.errors import MakdError, SettingError
from makd.plain_yaml import read_yaml
from makd.progress import OnProgress
from makd.shell import command


def compare(
    on_progress: OnProgress,
    experiment: str,
    only: str | None = None,
    limit: int | None = None,
    workers: int = 1,
    table: str | None = None,
    report: str | None = None,
    data: str | None = None,
    output: str | None = None,
    dry_run: bool = False,
) -> Outcome:
    """Run the cells of an experiment that are not done yet, or write what is known as a page.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        experiment: YAML file with the experiment.
        only: cells to keep to, as task=mrpc,method=makd,seed=1,budget=keep_linears=0.5; a key twice allows both.
        limit: at most so many cells are run now.
        workers: processes that run cells beside each other, on the same device.
        table: markdown file to write the results to, instead of running cells.
        report: HTML file to write them to, for looking at; instead of running cells.
        data: folder that the tasks' relative paths are in, instead of the experiment's or of MAKD_DATA.
        output: folder of the results, instead of the experiment's.
        dry_run: print the cells, which are done, and about how long the others will take; run nothing.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"--limit is at least 1 cell; got {limit}.")
    loaded = load_experiment(experiment, data=data, output=output)
    if table is not None or report is not None:
        if dry_run or only is not None or limit is not None:
            raise SettingError(
                "--table and --report write what is known and run nothing: leave out --only, --limit and --dry_run."
            )
        pages = []
        if table is not None:
            pages.append(comparison.write_page(loaded, table, experiment))
        if report is not None:
            pages.append(comparison.write_comparison_report(loaded, report, experiment))
        return Outcome({"pages": pages}, [f"written: {page}" for page in pages])
    chosen = comparison.select(comparison.all_cells(loaded), only)
    done = comparison.done_lines(loaded, chosen)
    if dry_run:
        shown = [f"{'done' if str(cell) in done else 'open'}  {cell}" for cell in chosen]
        shown.append(f"{len(done)} of {len(chosen)} cells are done, in {loaded.output}{_spent(chosen, done)}")
        cells = [{"cell": str(cell), "done": str(cell) in done} for cell in chosen]
        return Outcome({"output": loaded.output, "cells": cells}, shown)
    lines = comparison.compare(loaded, only=only, limit=limit, workers=workers, on_progress=on_progress)
    shown = []
    for line in lines:
        names = "  ".join(str(value) for value in line["cell"].values())
        shown.append(f"{names}  score {line['score']:.4f}  teacher {line['teacher']['score']:.4f}")
    shown.append(f"{len(lines)} of {len(chosen)} cells are done, in {loaded.output}")
    as_page = command("compare", experiment, table=f"{Path(experiment).stem}.md", data=data, output=output)
    return Outcome({"output": loaded.output, "cells": lines}, shown, [f"{as_page}   # the results as a page"])


def _spent(chosen: Sequence[Cell], done: Mapping[str, Mapping[str, Any]]) -> str:
    """What cells took and will take, without teachers and caches."""
    if not done:
        return ""
    lines, others = list(done.values()), [cell for cell in chosen if str(cell) not in done]
    told = f": {sum(map(own_seconds, lines)) / 3600:.1f} hours of one process"
    if not others:
        return told
    return f"{told}; the others will take about {forecast_seconds(others, lines) / 3600:.1f}, by these"


def load_experiment(path: str | Path, **changes: Any) -> Experiment:
    """The experiment in a YAML file, with those of `changes` that are not None.

    Raises:
        SettingError: there is no such file, or it is not an experiment.
    """
    content = read_yaml(Path(path))
    if not isinstance(content, dict):
        raise SettingError(f"{path} is no experiment. Give a YAML file such as examples/encoder/experiment.yaml.")
    of_a_run = [name for name in ("budget", "recipe") if name in content]
    if of_a_run and "methods" not in content:
        raise SettingError(
            f"{path} is the file of one run: it has {' and '.join(of_a_run)}. Give it to `makd compress "
            f"--config {path}`; an experiment has methods, budgets and tasks, as examples/encoder/experiment.yaml."
        )
    check_maps(content, get_type_hints(Experiment), f"{path}: ")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=SYNTAX)
    parser.add_class_arguments(Experiment, nested_key=None)
    try:
        settings = parser.parse_object(content, defaults=True)
        for name, value in changes.items():
            if value is not None:
                settings[name] = value
        known = parser.instantiate(settings)
        return Experiment(**{name: known[name] for name in Experiment.__dataclass_fields__})
    except MakdError:
        raise
    except PARSING_ERRORS as error:
        raise SettingError(f"{path}: {explain(error, parser.get_defaults().keys())}") from error
