"""What to try next: commands that follow from what a run measured, the likeliest to help first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from makd.measures import worsened
from makd.report.elements import Markup, element
from makd.report.glance import latency_ratios, measured, worst_linear
from makd.report.record import Record
from makd.report.words import share
from makd.run_files import LINEARS, TRAINING
from makd.shell import command, command_on_pair

MOST = 4
"""Of suggestions: more are not read."""
STILL_FALLING = 0.02
"""By how much of itself the loss fell from one quarter of the training to the last, for more steps to be worth it."""
FEW_TOKENS = 10
"""Of the calibration text, for each input of the widest linear, below which more of it is advised."""
ANOTHER = "ANOTHER"
"""What a new output is called in a command."""


@dataclass(frozen=True)
class Suggestion:
    """One thing to try."""

    why: str
    command: str


def advise(record: Record) -> list[Suggestion]:
    """What is worth trying, from the run's own numbers."""
    return [*_suggest(record)][:MOST]


def advice(record: Record) -> Markup:
    """What is worth trying, as a list of the page."""
    found = advise(record)
    if not found:
        return element("p", "Nothing in the numbers of this run asks for another one.")
    lines = [
        element(
            "li",
            element("p", one.why),
            element("pre", element("code", one.command), tabindex="0", aria_label="command"),
        )
        for one in found
    ]
    return element("div", element("h3", "What to try next"), element("ol", lines), class_="advice")


def command_of(record: Record) -> str:
    """What made the run, from its recipe, into another folder."""
    recipe = record.recipe
    name = "distill" if "student" in recipe else "compress" if record.is_trained else "factorize"
    return command(name, config=record.folder / "recipe.yaml", output=ANOTHER)


def _tokens_read(record: Record) -> int:
    """Tokens that the run's solver read; 0 of a run that fitted no factors to any."""
    if "student" in record.recipe:  # an older makd counted the text of `distill` too, which fitted nothing
        return 0
    return int(record.metrics["tokens"].get("calibration", 0))


def _on_pair(record: Record, name: str, **flags: str) -> str:
    """A command about the student and its teacher, read as the run's recipe says."""
    recipe = record.recipe
    head = (recipe.get("recipe") or {}).get("head")
    return command_on_pair(name, record.folder, record.teacher, recipe.get("tokenizer"), head, **flags)


def _suggest(record: Record) -> Iterator[Suggestion]:
    again = command_of(record)
    settings = record.recipe.get("recipe") or {}
    in_formats = _on_pair(record, "bench", formats="[torch-bfloat16, torch-int8]")
    yield from _training(record, settings, again)
    rows = (settings.get("calibration") or {}).get("rows")
    worst = worst_linear(record)
    budget = record.recipe.get("budget") or {}
    key = next((name for name in ("keep_linears", "keep") if budget.get(name)), None)
    if key is not None and worst is not None and (measured(worst) or 0.0) > 0.1:
        more = min(1.0, round(float(budget[key]) + 0.1, 3))
        if more < 1:
            yield Suggestion(
                f"The worst linear errs by {share(measured(worst) or 0.0)} of its output's variance (layer "
                f"{worst['layer']}, {', '.join(worst['roles'])}, rank {worst['rank'] or 'full'}). A budget of "
                f"{share(more)} in the place of {share(float(budget[key]))} gives it, and its neighbours, more ranks.",
                f"{again} --budget.{key} {more:g}",
            )
    ratios = latency_ratios(record.metrics)
    if ratios and min(ratios.values()) > 0.8:
        yield Suggestion(
            "It is smaller, but hardly faster: small factors cost a processor as much as one matrix. See which linears "
            "are better dense again, and what other formats give.",
            in_formats,
        )
    widest = max((row["in_features"] for row in record.of(LINEARS).get("linears", [])), default=0)
    tokens = _tokens_read(record)
    if rows and 0 < tokens < FEW_TOKENS * widest:
        yield Suggestion(
            f"The factors were fitted to {tokens:,} tokens of text, and the widest linear reads {widest:,} numbers of "
            "each. More text makes them surer.",
            f"{again} --recipe.calibration.rows {4 * int(rows)}",
        )
    if ratios and min(ratios.values()) <= 0.8:
        yield Suggestion(
            "To serve it, see what it gains in narrower formats.",
            in_formats,
        )


def _training(record: Record, settings: Mapping[str, Any], again: str) -> Iterator[Suggestion]:
    """What the log of the training says."""
    trainings = record.of(TRAINING).get("trainings")
    if not record.is_trained:
        yield Suggestion(
            _untrained(record),
            _on_pair(record, "distill", output=ANOTHER),
        )
        return
    flag = "recipe.training" if not settings.get("stages") else None
    training = settings.get("training") or {}
    if worsened(record.metrics) and flag is not None:
        rate = float(training.get("learning_rate") or 1e-4)
        yield Suggestion(
            "Training made it worse than its start. A smaller learning rate keeps what the start has.",
            f"{again} --{flag}.learning_rate {rate / 3:.1e}",
        )
        return
    fell = falling(trainings[-1]["log"]) if trainings else None
    if fell is not None and fell > STILL_FALLING and flag is not None:
        steps = training.get("steps")
        more = (
            f"--{flag}.steps {2 * int(steps)}"
            if steps
            else f"--{flag}.epochs {2 * float(training.get('epochs') or 1):g}"
        )
        yield Suggestion(
            f"The loss was still falling at the end ({share(fell)} from the third quarter to the last): train longer.",
            f"{again} {more}",
        )


def _untrained(record: Record) -> str:
    """What is there, of a run that did not train it."""
    if "student" in record.recipe:
        return "It was not trained in this run: it is as it came."
    if record.metrics.get("layerwise"):
        return "It was not trained as a whole yet: its layers learned one by one, while they were made."
    return "It was not trained yet: what is here is the closed-form start alone."


def falling(log: list[dict[str, Any]]) -> float | None:
    """By how much of itself the mean loss fell from the third quarter of a log to the last; None of a short one."""
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    if len(losses) < 8:
        return None
    quarter = len(losses) // 4
    last, before = losses[-quarter:], losses[-2 * quarter : -quarter]
    mean = sum(before) / quarter
    return 1 - (sum(last) / quarter) / mean if mean > 0 else None
