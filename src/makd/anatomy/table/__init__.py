"""Station 1: what is known of architectures, as a table. A new architecture is a new row here, and nothing else."""

from makd.anatomy.families import Family
from makd.anatomy.table.decoders import DECODERS
from makd.anatomy.table.encoder_decoders import ENCODER_DECODERS
from makd.anatomy.table.encoders import ENCODERS
from makd.anatomy.table.refused import REFUSED
from makd.extensions import Extensible

FAMILIES: tuple[Family, ...] = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)


def why_not(name: str, family: Family) -> str | None:
    """What is wrong with a user's family."""
    if name not in family.model_types:
        return f"its name is a model type of it; its model_types are {', '.join(family.model_types)}"
    return None if family.stacks else "it has no stacks of layers"


ANATOMIES: Extensible[Family] = Extensible(
    "anatomy",
    {model_type: family for family in FAMILIES for model_type in family.model_types},
    group="makd.anatomies",
    accepts=Family,
    why_not=why_not,
)
"""`config.model_type` -> its family: makd's own, and those of users' packages (entry points of the group
`makd.anatomies`)."""

__all__ = ["ANATOMIES", "FAMILIES", "REFUSED"]
