"""Station 6: a teacher's outputs on the training rows, on disk, so that later epochs need no teacher."""

from makd.cache.identity import hash_teacher, hash_tokenizer, identify
from makd.cache.parts import check_top_k, needs
from makd.cache.read import CachedTeacherOutput, TeacherCache
from makd.cache.rows import ROW, RowCollator, number_rows
from makd.cache.settings import CacheConfig
from makd.cache.write import take_up, write_cache

__all__ = [
    "ROW",
    "CacheConfig",
    "CachedTeacherOutput",
    "RowCollator",
    "TeacherCache",
    "check_top_k",
    "hash_teacher",
    "hash_tokenizer",
    "identify",
    "needs",
    "number_rows",
    "take_up",
    "write_cache",
]
