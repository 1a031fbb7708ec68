"""Station 1: what is known of architectures, as a table. A new architecture is a new row here, and nothing else."""

from makd.anatomy.families import Family
from makd.anatomy.table.decoders import DECODERS
from makd.anatomy.table.encoder_decoders import ENCODER_DECODERS
from makd.anatomy.table.encoders import ENCODERS
from makd.anatomy.table.refused import REFUSED

FAMILIES: tuple[Family, ...] = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)

KNOWN: dict[str, Family] = {model_type: family for family in FAMILIES for model_type in family.model_types}
"""`config.model_type` -> its family."""

__all__ = ["FAMILIES", "KNOWN", "REFUSED"]
