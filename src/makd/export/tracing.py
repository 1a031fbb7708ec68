"""What exporters need around them: packages, silence, a model in eval mode."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from transformers import PreTrainedModel

from makd.errors import ExportError, MakdError, SettingError

REASON = 300
"""Characters of an exporter's error that are told."""


def check_packages(what: str, packages: Sequence[str], extra: str = "export") -> None:
    """Refuse early what a package is missing for, which makd's `extra` brings.

    Raises:
        SettingError: one of `packages` is not installed.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SettingError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f'pip install "makd[{extra}]".'
        )


@contextmanager
def exporting(what: str) -> Iterator[None]:
    """Keeps exporters' reports of their steps off the terminal, and tells of a failure in one line.

    Raises:
        ExportError: the exporter gave up; it holds the first line of the reason.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MakdError:
        raise
    except Exception as error:  # whatever a tracer, a converter or a runtime stumbles over
        reason = " ".join(str(error).split())[:REASON]
        raise ExportError(
            f"{what} is not possible for this model: {type(error).__name__}: {reason}. `makd export --to dense` works "
            "for every student without dropped layers."
        ) from error
    finally:
        logging.disable(before)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """`model` in eval mode, and as it was after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
