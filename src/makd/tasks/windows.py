"""Station 2, for tasks: whether each question leaves room for its context in a window."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from makd.errors import DataError
from makd.tasks.settings import TaskConfig


def check_questions(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    numbers: Sequence[int],
) -> None:
    """Refuse questions so long that windows over their context, with the question in each, would not move on.

    The tokenizers library panics there, with what no `except Exception` catches.

    Args:
        config: says how long windows are, and by how much they overlap.
        tokenizer: whose own tokens take room too.
        questions: as they will be tokenized.
        contexts: of each.
        numbers: of the rows, for the error.

    Raises:
        DataError: one question leaves no more than the overlap to a context that does not fit whole.
    """
    marks = tokenizer.num_special_tokens_to_add(pair=True)
    sizes = _lengths(tokenizer, questions)
    for place, size in enumerate(sizes):
        room = config.length - marks - size
        if room > config.stride or _lengths(tokenizer, [contexts[place]])[0] <= room:
            continue
        raise DataError(
            f"The question of row {numbers[place]} has {size} tokens ({questions[place][:60]!r}): of a window of "
            f"task.max_length = {config.length} it leaves {max(0, room)} to its context, and windows overlap by "
            f"task.stride = {config.stride}. Raise max_length, lower stride, or leave the row out."
        )


def _lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
