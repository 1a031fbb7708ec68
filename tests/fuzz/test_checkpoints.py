"""Weights that were cut, flipped, renamed, dropped or swapped on their way."""

import json
import shutil

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fuzz.oracle import generated

FILE = "model.safetensors"
CHANGES = {
    "renamed": lambda tensor: {"nobody.knows": tensor},
    "dropped": lambda tensor: {},
    "another shape": lambda tensor: {None: tensor.flatten()[:-1].clone()},
    "transposed": lambda tensor: {None: tensor.mT.contiguous() if tensor.dim() == 2 else tensor[:1].clone()},
    "whole numbers": lambda tensor: {None: tensor.to(torch.int32)},
    "not finite": lambda tensor: {None: torch.full(tensor.shape, float("nan"))},
    "infinite": lambda tensor: {None: torch.full(tensor.shape, float("inf"), dtype=torch.float16)},
    "empty": lambda tensor: {None: tensor[:0].clone()},
}


def damage(folder, place, change):
    """Change one of the tensors. Gives its name, and whether what is there now could as well be what was learned.

    Other numbers of the same type and shape are that: a model that a user trained on is no damaged one.
    """
    tensors = load_file(folder / FILE)
    name = sorted(tensors)[place % len(tensors)]
    tensor = tensors.pop(name)
    tensors |= {new or name: made for new, made in CHANGES[change](tensor).items()}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    now = tensors.get(name)
    same = now is not None and (now.dtype, now.shape) == (tensor.dtype, tensor.shape)
    if not tensor.is_floating_point():  # the identity, which is nothing that is learned
        return name, same and torch.equal(now, tensor)
    return name, same and bool(now.isfinite().all())


def test_a_tensor_of_a_teacher(workspace, cases, copied):
    """The pooler's alone may be missing: no text needs it, and transformers' checkpoints often have none."""
    absent = ("renamed", "dropped")

    @generated(60)
    @given(place=st.integers(0, 100), change=st.sampled_from(sorted(CHANGES)), stream=st.booleans())
    def case(place, change, stream):
        folder = copied(workspace.teacher)
        name, is_sound = damage(folder, place, change)
        words = ["factorize", *workspace.flags(teacher=folder), *(["--stream"] if stream else [])]
        cases.command(f"{name} {change} {'streamed' if stream else ''}", words, [folder], workspace.output)
        shutil.rmtree(
            workspace.output.with_name(".output.makd"), ignore_errors=True
        )  # kept, for a stream to go on with
        if cases.last == "fine" and not (is_sound or (name.startswith("pooler") and change in absent)):
            cases.note(f"{name} {change}", "fine", "taken for a sound teacher")

    case()
    cases.settle()


def test_a_tensor_of_a_student(workspace, cases, copied):
    @generated(60)
    @given(place=st.integers(0, 100), change=st.sampled_from(sorted(CHANGES)))
    def case(place, change):
        folder = copied(workspace.student)
        name, is_sound = damage(folder, place, change)
        words = workspace.evaluation(folder)
        cases.command(f"{name} {change}", words, [folder, workspace.teacher])
        if cases.last == "fine" and not is_sound:
            cases.note(f"{name} {change}", "fine", "taken for a sound student")

    case()
    cases.settle()


def test_bytes_of_a_file(workspace, cases, copied):
    """Flipped in the header, or cut anywhere; a flipped bit of a number is another number."""
    header = int.from_bytes((workspace.teacher / FILE).read_bytes()[:8], "little") + 8

    @generated(40)
    @given(place=st.integers(0, header - 1), bit=st.integers(0, 7), cut=st.booleans(), share=st.floats(0, 0.999))
    def case(place, bit, cut, share):
        folder = copied(workspace.teacher)
        content = bytearray((folder / FILE).read_bytes())
        content[place] ^= 1 << bit
        (folder / FILE).write_bytes(content[: int(share * len(content))] if cut else content)
        words = ["factorize", *workspace.flags(teacher=folder)]
        cases.command(f"byte {place} bit {bit} cut {share if cut else None}", words, [folder], workspace.output)

    case()
    cases.settle()


def test_an_index_of_shards(workspace, cases, copied):
    index = {"metadata": {}, "weight_map": {name: FILE for name in load_file(workspace.teacher / FILE)}}
    name = sorted(index["weight_map"])[0]
    for content in (
        None, [], 3, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, {"metadata": {}},
        {"weight_map": {name: "gone.safetensors"}}, {"weight_map": {name: "../../outside.safetensors"}},
        {"weight_map": {name: 3}}, {"weight_map": {**index["weight_map"], "nobody.knows": FILE}},
    ):  # fmt: skip
        folder = copied(workspace.teacher)
        (folder / "part.safetensors").write_bytes((folder / FILE).read_bytes())
        (folder / FILE).unlink()
        (folder / f"{FILE}.index.json").write_text(json.dumps(content))
        cases.command(f"{content!r:.80}", ["factorize", *workspace.flags(teacher=folder)], [folder], workspace.output)
    cases.settle()
