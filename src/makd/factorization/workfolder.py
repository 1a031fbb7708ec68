"""Station 3, streamed: what is kept on disk while the work goes on, so that a killed run continues at the next matrix.

    stream.json                 what the work is of: another teacher or other settings may not continue it
    checked                     the teacher's weights were read once, and are finite
    states/0003/00000.safetensors     hidden states that enter layer 3, a file for each batch
    statistics/0003/0.safetensors     moments of a distinct input of layer 3's linears; linears.json says whose
    matrices/NAME.safetensors   a linear's spectrum, and its factors at the largest rank that it may get

Files and folders get their names when they are whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from makd.calibration.moments import InputMoments
from makd.errors import OutputError
from makd.plain_json import read_json
from makd.solvers.factors import Decomposition
from makd.weights.files import Source, StoredTensor, read_header, write_tensors

IDENTITY = "stream.json"


class WorkFolder:
    """The folder of one streamed factorization."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Begin, or go on with what a run of the same `identity` left.

        Raises:
            OutputError: the folder holds the work of another teacher, of other settings, or of something else.
        """
        self.path = path
        found = path / IDENTITY
        wanted = json.loads(json.dumps(dict(identity)))
        if found.is_file():
            _compare(path, read_json(found, dict, OutputError, f"Remove {path} to start anew."), wanted)
        elif path.is_dir() and any(path.iterdir()):
            raise OutputError(
                f"{path} holds the unfinished work of something else, not of a streamed factorization. Finish it, "
                "remove the folder, or name another output."
            )
        for name in ("states", "statistics", "matrices"):
            (path / name).mkdir(parents=True, exist_ok=True)
        _write_text(found, json.dumps(wanted, indent=2))

    @property
    def is_checked(self) -> bool:
        """Whether the teacher was found finite."""
        return (self.path / "checked").is_file()

    def note_checked(self) -> None:
        """The teacher was found finite."""
        _write_text(self.path / "checked", "")

    # states

    def has_states(self, layer: int) -> bool:
        """Whether the hidden states that enter a layer are there, of all batches."""
        return self._states(layer).is_dir()

    @contextmanager
    def write_states(self, layer: int) -> Iterator[Path]:
        """A folder for the hidden states that enter `layer`; they count as there after the block."""
        with _whole(self._states(layer)) as folder:
            yield folder

    def read_states(self, layer: int, batch: int) -> Tensor:
        """Hidden states that enter `layer`, of one batch: (batch, tokens, hidden)."""
        return read_header(self._states(layer) / f"{batch:05}.safetensors")[0]["hidden"].read()

    # statistics

    def has_statistics(self, layer: int) -> bool:
        """Whether the moments of a layer's linears are there."""
        return self._statistics(layer).is_dir()

    def write_statistics(self, layer: int, moments: Mapping[str, InputMoments]) -> None:
        """Keep the moments of the linears of a layer; those that share an object share a file."""
        distinct = list({id(moment): moment for moment in moments.values()}.values())
        places = {id(moment): index for index, moment in enumerate(distinct)}
        with _whole(self._statistics(layer)) as folder:
            for index, moment in enumerate(distinct):
                write_tensors(folder / f"{index}.safetensors", {"gram": Source.of(moment.gram)})
            linears = {name: places[id(moment)] for name, moment in moments.items()}
            (folder / "linears.json").write_text(json.dumps(linears), encoding="utf-8")

    def read_gram(self, layer: int, linear: str) -> Tensor:
        """Mean of x xᵀ of a linear's inputs, float64, (in, in)."""
        folder = self._statistics(layer)
        places = read_json(folder / "linears.json", dict, OutputError, f"Remove {self.path} to start anew.")
        return read_header(folder / f"{places[linear]}.safetensors")[0]["gram"].read()

    def finish_layer(self, layer: int) -> None:
        """All matrices of the layer are there: what they were made from can go."""
        shutil.rmtree(self._statistics(layer), ignore_errors=True)
        shutil.rmtree(self._states(layer), ignore_errors=True)

    # matrices

    def has_matrix(self, linear: str) -> bool:
        """Whether a linear was decomposed."""
        return self._matrix(linear).is_file()

    def write_matrix(self, linear: str, decomposition: Decomposition, rank: int) -> None:
        """Keep what any rank up to `rank` can be cut from; 0 keeps the spectrum only."""
        tensors = {"singular_values": decomposition.singular_values}
        if decomposition.squared_errors is not None:
            tensors["squared_errors"] = decomposition.squared_errors
        if rank:
            factors = decomposition.factors(rank)
            tensors |= {"expand": factors.expand, "reduce": factors.reduce}
        metadata = {} if decomposition.fallback is None else {"fallback": decomposition.fallback}
        write_tensors(self._matrix(linear), {name: Source.of(tensor) for name, tensor in tensors.items()}, metadata)

    def read_matrix(self, linear: str) -> "StoredMatrix":
        """What was kept of a linear."""
        return StoredMatrix(*read_header(self._matrix(linear)))

    def _states(self, layer: int) -> Path:
        return self.path / "states" / f"{layer:04}"

    def _statistics(self, layer: int) -> Path:
        return self.path / "statistics" / f"{layer:04}"

    def _matrix(self, linear: str) -> Path:
        return self.path / "matrices" / f"{linear}.safetensors"


class StoredMatrix:
    """A linear's decomposition on disk. Factors of a rank are the first terms of those of a larger one."""

    def __init__(self, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        self.fallback = metadata.get("fallback")
        """What was done because the statistics were not positive definite."""

    @property
    def singular_values(self) -> Tensor:
        """In the solver's norm, descending, float64."""
        return self.tensors["singular_values"].read()

    def relative_error(self, rank: int) -> float:
        """As `Decomposition.relative_error`."""
        errors = self.tensors["squared_errors"].read() if "squared_errors" in self.tensors else None
        values = self.singular_values
        left, right = torch.empty(0, len(values)), torch.empty(len(values), 0)  # errors are told by the spectrum alone
        return Decomposition(left, right, values, torch.float64, squared_errors=errors).relative_error(rank)

    def expand(self, rank: int) -> Source:
        """The factor that writes the output, (out, rank)."""
        stored = self.tensors["expand"]
        shape = (stored.shape[0], rank)
        return Source(stored.dtype, shape, lambda: (piece[:, :rank] for piece in stored.pieces()))

    def reduce(self, rank: int) -> Source:
        """The factor that reads the input, (rank, in)."""
        stored = self.tensors["reduce"]
        return Source(stored.dtype, (rank, stored.shape[1]), lambda: stored.pieces(rank))


def write_state(folder: Path, batch: int, hidden: Tensor) -> None:
    """Keep the hidden states of one batch in a folder that `WorkFolder.write_states` gave."""
    write_tensors(folder / f"{batch:05}.safetensors", {"hidden": Source.of(hidden)})


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder that gets its name at the end of the block."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = (name for name in (*wanted, *found) if found.get(name) != wanted.get(name))
    different = next(names, None)
    if different is not None:
        raise OutputError(
            f"{path} holds the unfinished work of another run: its {different} is {found.get(different)}, this one's "
            f"is {wanted.get(different)}. Give the settings of that run to continue it, remove the folder to start "
            "anew, or name another output."
        )
