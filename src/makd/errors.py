"""What can go wrong, as types. Stands below every station.

`MakdError` is for what the user can mend: the command line prints its text and exits with 2, without a traceback.
A plain `ValueError` from a leaf function is a bug of its caller.
"""


class MakdError(Exception):
    """Something that the user can mend. Its text says what was met, what is allowed and what to do next."""


class SettingError(MakdError, ValueError):
    """A setting has a value that is not allowed."""


class UnknownNameError(MakdError, KeyError):
    """A name that no registry knows. Its text offers the nearest ones."""

    def __str__(self) -> str:  # KeyError would print the repr of the text
        return str(self.args[0])


class BudgetError(MakdError, ValueError):
    """A budget that no student can meet."""


class UnsupportedModelError(MakdError, TypeError):
    """A model whose linears could not be told apart, or of whose head nobody knows what it predicts."""


class DataError(MakdError, ValueError):
    """Data that is empty, unreadable, or without the columns that were asked for."""


class NumericsError(MakdError, ArithmeticError):
    """NaN or infinity in weights, activations or statistics."""


class ModelLoadError(MakdError, OSError):
    """A teacher, student or tokenizer that cannot be loaded, or is not what its config says."""


class OutputError(MakdError, OSError):
    """An output folder that may not be written to."""


class RoomError(MakdError, MemoryError):
    """A run that needs more memory or disk than there is."""


class LostProcessError(MakdError, RuntimeError):
    """Another process of the run has ended, or cannot be reached any more."""


class CacheError(MakdError, ValueError):
    """A teacher cache that is not there, not finished, of something else, or without what a plan asks for."""


class ExportError(MakdError, RuntimeError):
    """A model that cannot be written in another format, or whose file does not compute what it computes."""


class ExtensionError(MakdError, ImportError):
    """A solver, aspect or anatomy of a user's package that cannot be loaded, is none, or fails."""
