"""Station 1: how many tokens a model reads at once. Data, tasks, evaluation and bench all ask here."""

from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions that a model has, counted from 0; None where the architecture sets no bound."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:  # of a model of several parts, the one that reads text says it
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit >= 1 else None


def token_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a row may have; None where the architecture sets no bound.

    RoBERTa and its relatives count positions from the one after padding's: of 514 positions 512 are for tokens.
    """
    limit = position_limit(model)
    if limit is None:
        return None
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    paddings = (getattr(table, "padding_idx", None) for table in tables)
    return limit - next((padding + 1 for padding in paddings if padding is not None), 0)
