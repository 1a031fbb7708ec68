"""`makd cache`: a teacher's outputs on the rows that a recipe trains on, kept on disk for the runs that follow."""

import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from makd.anatomy.limits import token_limit
from makd.aspects import ActivePlan, activate
from makd.cache import CacheConfig, check_top_k, identify, take_up, write_cache
from makd.capture import examine
from makd.config import Recipe
from makd.data import choose_tokenizer, collator
from makd.distill import TrainingRows, check_same_everywhere, check_training, identify_run, warn_slow_bfloat16
from makd.kinds import takes
from makd.loading import check_dtype, modes_kept, take_model
from makd.preparation import Data, RunData, names_of, prepare
from makd.processes.first import from_first, in_turn, is_shared
from makd.processes.started import is_first
from makd.progress import OnProgress, reporting
from makd.random_state import keeping_random_state
from makd.run_folder import OutputFolder, plain
from makd.source_names import name_of, tokenizer_name


@dataclass(frozen=True)
class CacheReport:
    """What a build left on disk."""

    folder: Path
    content: dict[str, Any]
    """The content of `cache.json`."""
    rows: int
    tokens: int
    """Real tokens of the rows."""
    seconds: float
    """Of this call: less than the whole where it went on with an earlier one."""

    @property
    def bytes_per_token(self) -> float:
        """On disk."""
        return float(self.content["bytes"]) / self.tokens


@takes
@keeping_random_state()
def build_cache(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None = None,
    output: str | Path = "caches/teacher",
    *,
    settings: CacheConfig | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> CacheReport:
    """Keep what the recipe's plans need of `teacher` on the rows that `compress` and `distill` train on.

    What is done stands in a hidden folder beside the output; the same call continues there after a run that was killed.
    Several processes each read a part of the rows.

    Args:
        teacher: hub id, folder, `.gguf` file, or `package:module/path`; or a model.
        data: as the runs that use the cache are given it.
        recipe: likewise; its plan (or those of its stages), head, dtype and seed say what is kept.
        output: folder for the cache, for `recipe.cache`.
        settings: how numbers are stored.
        tokenizer: where the tokenizer is, if not with the teacher; or a tokenizer.
        overwrite: whether a folder that is not empty may be replaced.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        Where the cache is, and how large.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed.
    """
    started, recipe = time.perf_counter(), recipe or Recipe()
    named = [name_of(teacher), *names_of(data), tokenizer_name(tokenizer)]
    output_folder = OutputFolder(Path(output), overwrite=overwrite, inputs=named, kinds=("cache",))
    with modes_kept(teacher), output_folder as folder:
        with reporting("load", on_progress if is_first() else None):
            loaded = in_turn(lambda: _load(teacher, data, recipe, tokenizer, settings or CacheConfig()))
        if is_shared():
            check_same_everywhere(identify_run(plain(recipe), loaded.data.train, loaded.words, loaded.teacher))
        return _build(loaded, folder, settings or CacheConfig(), on_progress, started)


@dataclass(frozen=True)
class _CacheInputs:
    """What is asked, and what about."""

    teacher: PreTrainedModel
    words: PreTrainedTokenizerBase
    plan: ActivePlan
    data: RunData


def _load(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe,
    tokenizer: str | PreTrainedTokenizerBase | None,
    settings: CacheConfig,
) -> _CacheInputs:
    device = recipe.find_device()
    if recipe.uses_bfloat16:
        warn_slow_bfloat16(device)
    set_seed(recipe.seed)
    words = choose_tokenizer(tokenizer, teacher)
    model = take_model(teacher, recipe.head, check_dtype(recipe.dtype), device)
    anatomy = examine(model)
    plan = ActivePlan(tuple(chain.from_iterable(activate(stage.plan, anatomy).terms for stage in recipe.trainings)))
    made = prepare(data, words, model, recipe)
    _check_usable(model, recipe, made, settings)
    return _CacheInputs(model, words, plan, made)


def _check_usable(model: PreTrainedModel, recipe: Recipe, data: RunData, settings: CacheConfig) -> None:
    """Refuse to keep what no run with these plans could be taught from.

    Raises:
        MakdError: what the run would say.
    """
    anatomy, head = examine(model), model.get_output_embeddings()
    vocabulary = None if head is None else head.out_features
    for stage in recipe.trainings:
        if stage.training.steps != 0:
            plan = activate(stage.plan, anatomy)
            rows = TrainingRows.of(data.train, stage.training, plan.completions, token_limit(model), cached=True)
            check_training(plan, model, model, anatomy, anatomy, rows)
            check_top_k(plan, model, settings.top_k, vocabulary, "cache.top_k keeps")


def _build(
    loaded: _CacheInputs, folder: OutputFolder, settings: CacheConfig, on_progress: OnProgress | None, started: float
) -> CacheReport:
    model, words, rows = loaded.teacher, loaded.words, loaded.data.train
    identity = from_first(lambda: identify(model, rows, words, loaded.data.max_length))
    with folder.work() as result:
        from_first(lambda: take_up(result))
        content = write_cache(model, rows, collator(words, model), loaded.plan, result, identity, settings, on_progress)
    tokens = sum(len(ids) for ids in rows["input_ids"])
    return CacheReport(folder.path, content, len(rows), tokens, time.perf_counter() - started)
