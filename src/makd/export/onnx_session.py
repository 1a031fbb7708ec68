"""An ONNX file that runs: torch tensors in and out by name, on the CPU, by ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from makd.errors import SettingError
from makd.export.tracing import check_packages

PAST = "past_key_values."
"""How optimum's names of keys and values begin."""


class OnnxSession:
    """A session of ONNX Runtime for one file."""

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        """Opens the file.

        Args:
            path: of the `.onnx` file.
            threads: that an operation may use; None takes as many as torch has.

        Raises:
            SettingError: ONNX Runtime is not installed.
        """
        check_packages("Running an ONNX file", ("onnxruntime",))
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        # no thread waits in a loop for the next call: it would take its core from whatever is timed beside
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(item.name for item in self._session.get_inputs())
        self.outputs = tuple(item.name for item in self._session.get_outputs())

    def __call__(self, **inputs: Tensor | np.ndarray) -> dict[str, Tensor]:
        """The outputs by name; inputs that the file does not take are left out."""
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
        """The outputs by name, for inputs whose names may be no Python words (`past_key_values.0.key`).

        Raises:
            SettingError: an input that the file takes is not given.
        """
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise SettingError(f"The ONNX file takes {', '.join(self.inputs)}; got no {', '.join(missing)}.")
        feed = {name: np.asarray(inputs[name]) for name in self.inputs}
        found = self._session.run(None, feed)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}

    def empty_past(self, rows: int) -> dict[str, Tensor]:
        """Keys and values before the first token: of as many heads and numbers as the file fixes, and of 0 tokens."""
        shapes = {item.name: item.shape for item in self._session.get_inputs() if item.name.startswith(PAST)}
        return {
            name: torch.zeros(rows, *(size if isinstance(size, int) else 0 for size in shape[1:]))
            for name, shape in shapes.items()
        }
