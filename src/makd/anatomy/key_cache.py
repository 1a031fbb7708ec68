"""Station 1: forwards that make nothing besides what is looked at.

Every forward that makd makes of whole texts keeps no keys and values.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from transformers import PreTrainedModel


@contextmanager
def without_cache(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, `config.use_cache` of these models and their parts is False; afterwards it is what it was.

    It changes more than memory: with a cache, transformers does not see that `position_ids` begin anew in a row of
    several packed texts, and lets each read the ones before. A teacher and a student of which one has a cache
    would read different contexts.
    """
    with _off("use_cache", models):
        yield


@contextmanager
def without_router_logits(*models: PreTrainedModel) -> Iterator[None]:
    """Inside, `config.output_router_logits` of these models and their parts is False; afterwards it is what it was.

    A mixture of experts with it makes a loss of its routers' logits in every forward, and fails in one whose layers,
    and so routers, are not run.
    """
    with _off("output_router_logits", models):
        yield


@contextmanager
def _off(setting: str, models: Iterable[PreTrainedModel]) -> Iterator[None]:
    configs = {id(part.config): part.config for model in models for part in model.modules()
               if isinstance(part, PreTrainedModel)}  # fmt: skip
    with ExitStack() as stack:
        for config in configs.values():
            if getattr(config, setting, False):
                stack.callback(setattr, config, setting, getattr(config, setting))
                setattr(config, setting, False)
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
