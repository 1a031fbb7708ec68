"""Station 1: forwards that keep no keys and values. Every forward that makd makes of whole texts is one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel


@contextmanager
def without_cache(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, `config.use_cache` of these models and their parts is False; afterwards it is what it was.

    It changes more than memory: with a cache, transformers does not see that `position_ids` begin anew in a row of
    several packed texts, and lets each read the ones before. A teacher and a student of which one has a cache
    would read different contexts.
    """
    configs = {id(part.config): part.config for model in models for part in model.modules()
               if isinstance(part, PreTrainedModel)}  # fmt: skip
    with ExitStack() as stack:
        for config in configs.values():
            if getattr(config, "use_cache", False):
                stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        yield


@contextmanager
def cache_setting_kept(model: PreTrainedModel) -> Iterator[None]:
    """Inside, something may set `config.use_cache`, as transformers' Trainer does; afterwards it is what it was."""
    has_one = hasattr(model.config, "use_cache")
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if has_one:
            model.config.use_cache = before
        elif hasattr(model.config, "use_cache"):
            del model.config.use_cache
