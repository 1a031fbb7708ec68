"""The command `makd cache`: its flags are the parameters of `keep` below. Tells what was kept."""

from makd.cache import CacheConfig
from makd.caching import build_cache
from makd.cli.outcome import Outcome
from makd.cli.tasks import task_or_data
from makd.config import Recipe
from makd.data import DataConfig
from makd.progress import OnProgress
from makd.tasks import TaskConfig


def keep(
    on_progress: OnProgress,
    teacher: str,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Keep a teacher's outputs on the training rows, so that training needs no teacher.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        teacher: hub id, folder, .gguf file, or package:module/path.
        output: folder for the cache; give it to compress or distill as recipe.cache.
        data: text that the students will be trained on.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        recipe: of the runs that will use the cache; its plan, or those of its stages, say what is kept.
        cache: how it is kept.
        tokenizer: where the tokenizer is, if not with the teacher.
        overwrite: replace the output folder when all is done.
    """
    report = build_cache(
        teacher, task_or_data(data, task, teacher), recipe, output,
        settings=cache, tokenizer=tokenizer, overwrite=overwrite, on_progress=on_progress,
    )  # fmt: skip
    size = report.content["bytes"]
    shown = [
        f"{report.folder}: {report.rows:,} rows, {report.tokens:,} tokens, {size:,} bytes "
        f"({report.bytes_per_token:,.0f} a token), {report.seconds:.0f} s",
        f"parts: {', '.join(report.content['parts'])}",
        f"use it with --recipe.cache {report.folder}, the same data, seed and plan (or a part of the plan)",
    ]
    content = {"folder": report.folder, "rows": report.rows, "tokens": report.tokens, "seconds": report.seconds}
    return Outcome({**content, "cache": report.content}, shown)
