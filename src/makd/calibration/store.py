"""Station 3: where a walk keeps what does not fit beside a layer: hidden states of all batches, moments, spectra.

In memory while it is little, else on disk. Both give back the same numbers, and an entry is there when it is whole.
"""

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from makd.calibration.entries import Entry, mark_of
from makd.errors import SettingError
from makd.weights.files import Source, StoredTensor, read_header, write_tensors
from makd.whole_files import sync_file

STORE_CHOICES = ("auto", "memory", "disk")
MEMORY_LIMIT = 2**30
"""Bytes up to which `auto` keeps them in memory. What was written to a disk lately is in the system's memory anyway,
as long as nobody else wants that."""


class Store(ABC):
    """Named tensors in entries, which `entries` names: `teacher/0003/00000`."""

    lasting = False
    """Whether another process may go on with it, after a power cut too."""

    @abstractmethod
    def write(self, entry: Entry, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        """Keep an entry, in the place of one of that name. Its tensors may not be changed afterwards."""

    @abstractmethod
    def read(self, entry: Entry, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """All tensors of an entry; not to be changed.

        Raises:
            KeyError: the store has no such entry.
        """

    @abstractmethod
    def notes(self, entry: Entry) -> Mapping[str, str]:
        """What was noted with an entry."""

    @abstractmethod
    def __contains__(self, entry: Entry) -> bool:
        """Whether the entry is there."""

    @abstractmethod
    def remove(self, folder: Entry) -> None:
        """Forget all entries below `folder`, and an entry of that name."""

    def mark(self, entry: Entry) -> None:
        """Note that something is done; what was written before that is there when the mark is."""
        self.write(mark_of(entry), {"done": torch.ones(1)})

    def is_marked(self, entry: Entry) -> bool:
        """Whether that was noted."""
        return mark_of(entry) in self

    def unmark(self, entry: Entry) -> None:
        """Take a mark back."""
        self.remove(mark_of(entry))


class MemoryStore(Store):
    """Entries in the host's memory, wherever their tensors were made: a device has less of it."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._entries: dict[Entry, tuple[dict[str, Tensor], Mapping[str, str]]] = {}

    def write(self, entry: Entry, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        """See `Store`."""
        self._entries[entry] = ({name: tensor.detach().to("cpu") for name, tensor in tensors.items()}, notes or {})

    def read(self, entry: Entry, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See `Store`."""
        return {name: tensor.to(device) for name, tensor in self._entries[entry][0].items()}

    def notes(self, entry: Entry) -> Mapping[str, str]:
        """See `Store`."""
        return self._entries[entry][1]

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._entries

    def remove(self, folder: Entry) -> None:
        """See `Store`."""
        for entry in [name for name in self._entries if name == folder or name.startswith(f"{folder}/")]:
            del self._entries[entry]


class DiskStore(Store):
    """A safetensors file for each entry. What a process that was killed has left can be gone on with.

    After a power cut only what was written before a mark is to be trusted: to sync each file by itself would take as
    long as a walk through a small model, and together they are quick.
    """

    def __init__(self, path: Path, *, lasting: bool = True) -> None:
        """The store in a folder, which is made if need be.

        Args:
            path: of the folder.
            lasting: see `Store`.
        """
        self.path, self.lasting = path, lasting
        self._unsynced: list[Path] = []
        path.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def temporary() -> "DiskStore":
        """One that goes when nobody has it any more."""
        store = DiskStore(Path(tempfile.mkdtemp(prefix="makd-")), lasting=False)
        weakref.finalize(store, shutil.rmtree, store.path, ignore_errors=True)
        return store

    def write(self, entry: Entry, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
        """See `Store`."""
        path = self._file(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {name: Source.of(tensor) for name, tensor in tensors.items()}, notes, durable=False)
        if self.lasting:
            self._unsynced.append(path)

    def mark(self, entry: Entry) -> None:
        """See `Store`."""
        self._sync()
        super().mark(entry)
        self._sync()

    def _sync(self) -> None:
        for path in dict.fromkeys(self._unsynced):
            with suppress(FileNotFoundError):  # some are gone again
                sync_file(path)
        self._unsynced.clear()

    def read(self, entry: Entry, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """See `Store`."""
        return {name: tensor.read().to(device) for name, tensor in self.stored(entry).items()}

    def stored(self, entry: Entry) -> dict[str, StoredTensor]:
        """Where the tensors of an entry lie, to read them piece by piece.

        Raises:
            KeyError: the store has no such entry.
        """
        path = self._file(entry)
        if not path.is_file():
            raise KeyError(entry)
        return read_header(path)[0]

    def notes(self, entry: Entry) -> Mapping[str, str]:
        """See `Store`."""
        return read_header(self._file(entry))[1]

    def __contains__(self, entry: Entry) -> bool:
        return self._file(entry).is_file()

    def remove(self, folder: Entry) -> None:
        """See `Store`."""
        shutil.rmtree(self.path / folder, ignore_errors=True)
        self._file(folder).unlink(missing_ok=True)

    def _file(self, entry: Entry) -> Path:
        return self.path / f"{entry}.safetensors"


def check_choice(choice: str) -> None:
    """Refuse a `choice` of store that is none of `STORE_CHOICES`.

    Raises:
        SettingError: `choice` is none of them.
    """
    if choice not in STORE_CHOICES:
        raise SettingError(f"factorize.store is one of {', '.join(STORE_CHOICES)}; got {choice!r}.")


def choose_store(choice: str, needed: int, on_disk: Callable[[], DiskStore] = DiskStore.temporary) -> Store:
    """The store for a walk that will keep about `needed` bytes.

    Args:
        choice: one of `STORE_CHOICES`.
        needed: bytes.
        on_disk: makes one on disk.

    Raises:
        SettingError: `choice` is none of `STORE_CHOICES`.
    """
    check_choice(choice)
    return MemoryStore() if choice == "memory" or (choice == "auto" and needed <= MEMORY_LIMIT) else on_disk()
