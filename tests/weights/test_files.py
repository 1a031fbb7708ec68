"""Files of tensors, read and written piece by piece, are those of the safetensors library."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from makd.errors import ModelLoadError
from makd.weights import files
from makd.weights.files import Source, read_header, write_tensors

TENSORS = {
    "weight": torch.randn(7, 5),
    "half": torch.randn(3, 4, 2).to(torch.bfloat16),
    "bias": torch.randn(4).to(torch.float16),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "count": torch.tensor(5),
    "mask": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 3),
}


def test_what_is_written_is_read_by_the_library(tmp_path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {name: Source.of(tensor) for name, tensor in TENSORS.items()}, {"fallback": "none"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt", "fallback": "none"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_the_library_wrote_is_read_whole_and_in_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 48)
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name].read(), tensor)
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in found[name].pieces()]), tensor.reshape(-1))
    assert torch.equal(found["weight"].rows(2, 5), TENSORS["weight"][2:5])
    assert len(list(found["weight"].pieces())) == 4  # of two rows, of 20 bytes each


def test_a_file_is_the_same_byte_for_byte_as_the_librarys(tmp_path):
    tensors = {name: TENSORS[name] for name in ("weight", "half", "double")}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", {name: Source.of(tensor) for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_that_comes_otherwise_than_announced_leaves_no_file(tmp_path):
    wrong = Source(torch.float32, (4, 2), lambda: [torch.zeros(3, 2)])
    with pytest.raises(ValueError, match="announced with shape"):
        write_tensors(tmp_path / "model.safetensors", {"weight": wrong})
    assert not (tmp_path / "model.safetensors").exists()


def test_quantized_dtypes_are_refused_by_name(tmp_path):
    save_file({"weight": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="stored as F8_E4M3"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"[" * 100_000,
        b'{"a": 3}',
        b'{"__metadata__": 3, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelLoadError, match=r"damaged header|not a safetensors file|cannot be read as safetensors"):
        read_header(path)
