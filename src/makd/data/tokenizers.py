"""Station 2: which tokenizer reads the text, and whether teacher, student and setting have the same one.

Tokenizers are compared by what they do, not by names or files: which token an id stands for, which tokens are special,
and how a text is read. A model that is given another one's ids answers to another text, and nothing fails.
"""

import copy
import logging
from collections.abc import Iterable

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from makd.errors import DataError, ModelLoadError, SettingError
from makd.loading import folder_or_name, load_tokenizer, may_have_tokenizer, with_padding
from makd.sentence_encoder import as_in_folder
from makd.source_names import name_of

logger = logging.getLogger(__name__)

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Not the padding token: what stands in the padding never counts, and a tokenizer without one is given one."""
PROBE = "The naïve Café-owner didn't pay  $3.14 for <b>IT</b>;\tyear 2024,\n東京 ünïcode_word (x != y)"


def choose_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase | None, model: str | PreTrainedModel
) -> PreTrainedTokenizerBase:
    """The `tokenizer` of a setting, loaded if it is a name; or that of `model` if it is None. It has a padding token.

    Of a model that is given by name, its own is compared with the setting's: other ids are refused, the same ids read
    otherwise (with `add_prefix_space`, say) are taken, and told. A model in hand may differ from where it came from.

    Raises:
        ModelLoadError: the tokenizer cannot be loaded, or has neither a padding nor an end-of-text token.
        SettingError: some id stands for another token than in the model's own.
    """
    name = name_of(model)
    words = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else load_tokenizer(tokenizer or name)
    words = as_in_folder(with_padding(words, name), folder_or_name(name))
    own = None if tokenizer is None else own_tokenizer(model)
    if own is None:
        return words
    other = different_ids(words, own)
    if other is not None:
        raise SettingError(
            f"The setting `tokenizer` is not the tokenizer of {model}: {other}. Leave it out, or give the one that the "
            "model was trained with."
        )
    other = different_reading(words, own)
    if other is not None:
        logger.warning("The setting `tokenizer` is taken, though it is not as the one of %s: %s", model, other)
    return words


def check_student_tokenizer(
    student: str | PreTrainedModel, words: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """Refuse a saved `student` whose tokenizer does not read as `words` does; gives it, None if there is none.

    Raises:
        SettingError: the student's tokenizer reads some text otherwise.
    """
    own = own_tokenizer(student)
    if own is None:
        return None
    other = different_ids(own, words) or different_reading(own, words)
    if other is not None:
        raise SettingError(
            f"The tokenizer of the student {student} is not the teacher's: {other}. Give the teacher that the student "
            "was made from, and with `tokenizer` the one that both were trained with."
        )
    return own


def own_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model that is given by name; None for one in hand, and where none can be loaded."""
    if not isinstance(model, str):
        return None
    if not may_have_tokenizer(model):
        logger.info("No tokenizer beside %s to compare with", model)
        return None
    try:
        return as_in_folder(load_tokenizer(model), folder_or_name(model))
    except ModelLoadError as error:
        logger.info("No tokenizer of %s to compare with: %s", model, error)
        return None


def different_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first id that stands for two tokens, in words; None if there is none. Tokens of one side only are none."""
    ours, theirs = ({number: token for token, number in side.get_vocab().items()} for side in (one, other))
    number = next((number for number in sorted(ours.keys() & theirs.keys()) if ours[number] != theirs[number]), None)
    if number is None:
        return None
    count = sum(ours[place] != theirs[place] for place in ours.keys() & theirs.keys())
    more = f" ({count - 1:,} more differ)" if count > 1 else ""
    return f"token {number} is {ours[number]!r} in the one and {theirs[number]!r} in the other{more}"


def different_reading(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """What differs in special tokens or in how a text is read, in words; None if nothing does."""
    for name in SPECIAL:
        ours, theirs = getattr(one, name, None), getattr(other, name, None)
        if ours != theirs:
            return f"the {name} is {ours!r} in the one and {theirs!r} in the other"
    sides = [copy.deepcopy(side) for side in (one, other)]  # encoding leaves its settings in them
    ours, theirs = (side.convert_ids_to_tokens(side(PROBE)["input_ids"]) for side in sides)
    if ours == theirs:
        return None
    place = next((place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(ours), len(theirs)) if place is None else place
    found = " and ".join(repr(side[max(0, place - 1) : place + 3]) for side in (ours, theirs))
    return f"a text is read as … {found} …"


def check_vocabulary(ids: Iterable[int], vocabulary: int) -> None:
    """Refuse `ids` for which a model with embeddings for `vocabulary` tokens has none.

    Raises:
        DataError: the highest of `ids` is not below `vocabulary`.
    """
    highest = max(ids, default=0)
    if highest >= vocabulary:
        raise DataError(
            f"The tokenizer gives token {highest}, but the model has embeddings for {vocabulary:,} tokens, from 0. "
            "Give the tokenizer that this model was trained with."
        )


def check_padding_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a decoder that would not find the ends of the texts that it classifies: before its own padding token.

    Raises:
        DataError: the model has no padding token, or another one than the tokenizer pads with.
    """
    kind, padding = model.config.model_type, model.config.get_text_config().pad_token_id
    one_sided = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    reads_last = one_sided and type(model).__name__.endswith("ForSequenceClassification")
    if reads_last and padding != tokenizer.pad_token_id:
        raise DataError(
            f"{type(model).__name__} reads the last token before its padding token, which is {padding} (pad_token_id "
            f"of its config), but the tokenizer pads with {tokenizer.pad_token_id}: it would read the padding. Set "
            f"pad_token_id to {tokenizer.pad_token_id} in its config.json, if it was trained so, or give the tokenizer "
            "that it was trained with."
        )
