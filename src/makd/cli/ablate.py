"""The command `makd ablate`: a run's file, and the run again with one aspect off at a time."""

from makd.ablation import TABLE, ablation_table
from makd.ablation import ablate as run_ablation
from makd.cli.main import read_command
from makd.cli.outcome import Outcome
from makd.progress import OnProgress


def ablate(
    on_progress: OnProgress,
    run: str,
    output: str = "runs/ablation",
    seeds: tuple[int, ...] = (1, 2, 3),
) -> Outcome:
    """Make a run again without each aspect of its plan, and tell what each brings.

    Args:
        on_progress: told as the work goes on.
        run: YAML file of a run, as `makd compress --config` takes it; or a student's recipe.yaml.
        output: folder of the results and their table; what is done there is not done again.
        seeds: each is a start, and a student of each variation.
    """
    asked = read_command("compress", ["--config", run, "--output", output])
    data = asked["data"] if asked["task"] is None else asked["task"]
    found = run_ablation(
        asked["teacher"], data, asked["budget"], asked["recipe"], output,
        seeds=seeds, tokenizer=asked["tokenizer"], on_progress=on_progress,
    )  # fmt: skip
    title = f"{run}: what each aspect brings, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    shown = [ablation_table(found.lines, title), f"written: {found.folder / TABLE}"]
    return Outcome({"folder": found.folder, "lines": found.lines}, shown)
