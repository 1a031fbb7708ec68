"""A tiny comparison: two tasks, two methods, two seeds, and what runs it."""

import makd
from makd.comparison.search import known_settings, run_trials, searched_at
from tests.tasks.test_tasks import PAIRS

SIMILAR = [{**row, "label": float(place % 5)} for place, row in enumerate(PAIRS)]
TRAINING = makd.TrainingConfig(steps=2, batch_size=4)


def quiet(_):
    """No bars."""


def search_all(experiment, cells, setup):
    """Run all trials that the cells need, on one setup; what was found, by the cells' text."""
    for cell in {str(cell): cell for cell in (searched_at(experiment, cell) for cell in cells)}.values():
        run_trials(experiment, cell, setup, quiet)
    return known_settings(experiment, cells)


def make(data, encoder_folder, output, **settings):
    return makd.Experiment(
        **{
            "teacher": str(encoder_folder),
            "tasks": tuple(makd.TaskConfig(name=f"glue/{name}", path=name, max_length=32) for name in ("mrpc", "stsb")),
            "methods": (makd.MethodConfig(name="low_rank_svd"), makd.MethodConfig(name="makd_paper")),
            "budgets": (makd.Budget(keep_linears=0.6),),
            "seeds": (1, 2),
            "training": TRAINING,
            "finetune": makd.FinetuneRecipe(training=TRAINING),
            "calibration": makd.CalibrationConfig(rows=8),
            "data": str(data),
            "latency": False,
            "device": "cpu",
            "output": str(output),
            **settings,
        }
    )
