"""Station 9: a student's speed as the table that a person reads, in its card, and beside it in bench.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from makd.evaluation.formats import FormatRow
from makd.evaluation.speed import Speed
from makd.evaluation.verdict import verdicts
from makd.run_folder.formats import formats_markdown
from makd.run_folder.record import to_json
from makd.run_folder.text_table import markdown_table, plain_table
from makd.whole_files import write_whole

BEGIN, END = "<!-- makd bench: begin -->", "<!-- makd bench: end -->"
"""What stands around the section in a card; what is between them is replaced by the next bench."""
BENCH_FILE = "bench.json"
COLUMNS = ("tokens", "mode", "model", "ms", "ratio", "parameters", "bytes")
DECODING = ("prompt + new", "model", "prompt tokens/s", "time", "new tokens/s", "time")
MODELS = {"teacher": "teacher", "factored": "student", "folded": "all folded", "best": "best"}
"""Model -> its name for a person."""


def speed_rows(speed: Speed) -> list[tuple[str, ...]]:
    """The timed forwards, as texts under `COLUMNS`."""
    sizes = {size.name: size for size in speed.models}
    return [
        (
            f"{row.batch} x {row.length}",
            "compiled" if row.compiled else "eager",
            MODELS[row.model],
            f"{row.timing.milliseconds:.1f}",
            f"{row.timing.ratio:.2f}x",
            f"{sizes[row.model].parameters:,}",
            f"{sizes[row.model].bytes:,}",
        )
        for row in speed.forwards
    ]


def speed_table(speed: Speed, title: str) -> Table:
    """The timed forwards, for the terminal."""
    return plain_table(title, COLUMNS, speed_rows(speed), left=3)


def decoding_rows(speed: Speed) -> list[tuple[str, ...]]:
    """Generation, as texts under `DECODING`."""
    return [
        (
            f"{row.batch} x ({row.length} + {row.new_tokens})",
            MODELS[row.model],
            f"{row.read_per_second:,.0f}",
            f"{row.prompt.ratio:.2f}x",
            f"{row.written_per_second:,.1f}",
            f"{row.writing.ratio:.2f}x",
        )
        for row in speed.decoding
    ]


def decoding_table(speed: Speed, title: str) -> Table:
    """Generation, for the terminal."""
    return plain_table(title, DECODING, decoding_rows(speed), left=2)


def linears_table(speed: Speed, title: str) -> Table:
    """Factored against dense, by shape and rank of the linears."""
    columns = ("linear", "like it", "rank", "factored ms", "dense ms", "ratio", "faster")
    rows = [
        (
            f"{row.out_features} x {row.in_features}" + (f", {row.members} with one A" if row.members > 1 else ""),
            str(len(row.linears)),
            str(row.rank),
            f"{row.factored.milliseconds:.3f}",
            f"{row.dense.milliseconds:.3f}",
            f"{row.factored.ratio:.2f}x",
            "dense" if row.fold else "factored",
        )
        for row in sorted(speed.linears, key=lambda row: row.factored.ratio)
    ]
    return plain_table(title, columns, rows, left=1)


def fold_line(speed: Speed, point: tuple[int, int]) -> str:
    """What `best` is, in a sentence."""
    place = f"at {point[0]} x {point[1]} tokens"
    total = sum(len(row.linears) for row in speed.linears)
    slower = sum(len(row.linears) for row in speed.linears if row.fold)
    if slower and not speed.fold:
        return (
            f"{slower} of {total} factored linears are slower than dense {place}, but with these dense the whole "
            "forward is no faster: best is the student as it is."
        )
    if not speed.fold:
        return f"No factored linear of {total} is slower than dense {place}: best is the student as it is."
    return (
        f"Best: {len(speed.fold)} of {total} factored linears dense again, because {place} factors are slower; that "
        f"adds {speed.added_parameters:,} parameters."
    )


def speed_content(
    speed: Speed, formats: Sequence[FormatRow], settings: Any, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, as files hold it."""
    found = {"settings": settings, "speed": speed, "environment": environment}
    return {**found, "formats": formats, "verdicts": verdicts(formats)} if formats else found


def write_speed(
    folder: Path, speed: Speed, formats: Sequence[FormatRow], settings: Any, environment: Mapping[str, Any]
) -> None:
    """Put the table into the card of the student in `folder`, and everything that was measured into its bench.json.

    An older table is replaced and the rest of the card stays. Each file is whole at any moment.
    """
    content = speed_content(speed, formats, settings, environment)
    write_whole(folder / BENCH_FILE, to_json(content, indent=2) + "\n")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    write_whole(card, with_section(text, _section(speed, formats, settings.fold_point, environment)))


def with_section(card: str, section: str) -> str:
    """`card` with `section` in the place of the one that it has, or at its end. A mark without its other stays text."""
    whole = f"{BEGIN}\n{section}{END}\n"
    found = re.search(f"{re.escape(BEGIN)}\n(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}\n?", card, re.DOTALL)
    if found is not None:
        return card[: found.start()] + whole + card[found.end() :]
    return f"{card.rstrip()}\n\n{whole}" if card.strip() else whole


def _section(speed: Speed, formats: Sequence[FormatRow], point: tuple[int, int], environment: Mapping[str, Any]) -> str:
    compiling = [row.compile_seconds for row in speed.forwards if row.compile_seconds is not None]
    generation = f"\n\n{markdown_table(DECODING, decoding_rows(speed), left=2)}" if speed.decoding else ""
    compiled = f" Compiling took {min(compiling):.0f} to {max(compiling):.0f} s a model." if compiling else ""
    served = f"\n\n{formats_markdown(formats)}" if formats else ""
    return (
        f"\n## Speed\n\n{markdown_table(COLUMNS, speed_rows(speed), left=3)}{generation}"
        f"\n\n{fold_line(speed, point)}{compiled} Tokens: batch x length. Medians of forwards that took turns; the "
        "ratio is to the teacher's eager forward in the same turn. Measured on "
        f"{environment['device_name']} with {environment['threads']} threads in {environment['dtype']} by `makd "
        f"bench`; all of it is in `{BENCH_FILE}`.{served}\n\n"
    )
