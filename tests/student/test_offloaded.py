"""Students whose weights wait in memory or on disk, as `device_map="auto"` leaves them, and come by a call."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

import makd
from makd.anatomy import StandIn
from makd.errors import ModelLoadError
from tests.models import batch, tiny

STUDENTS = {
    "factored linears": ("llama", {}),
    "factored linears with one A": ("llama", {"share_input": "always"}),
    "a factored vocabulary": ("llama", {"vocabulary": "factored"}),
    "a factored vocabulary and a tied head": ("gpt2", {"vocabulary": "factored"}),
    "embeddings in bands": ("llama", {"vocabulary": "factored", "solver": "whitened", "ranks": "global"}),
    "factored experts": ("mixtral", {"experts": "factored"}),
    "a dropped layer": ("llama", {"depth": 1}),
}


def make_student(name):
    teacher, settings = STUDENTS[name]
    model = tiny(teacher, "causal_lm", **({"vocab_size": 640} if name == "embeddings in bands" else {}))
    settings = {"solver": "svd", "calibration": [batch(model)], **settings}
    return makd.factorize(model, makd.Budget(keep_linears=0.5), **settings).eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_an_offloaded_student_gives_what_it_gives_in_memory(name):
    student = make_student(name)
    inputs = batch(student)
    offloaded = cpu_offload(copy.deepcopy(student), torch.device("cpu"), offload_buffers=True)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs)[0], student(**inputs)[0])


def test_no_kind_of_stand_in_is_left_out():
    found = {type(module) for name in STUDENTS for module in make_student(name).modules()}

    def kinds(cls):
        return {cls, *(kind for below in cls.__subclasses__() for kind in kinds(below))}

    assert {kind for kind in kinds(StandIn) if kind.__module__.startswith("makd.")} - {StandIn} <= found


@pytest.mark.parametrize("name", ["a factored vocabulary", "embeddings in bands", "factored experts"])
def test_a_student_whose_parts_are_on_disk_gives_what_it_gives_in_memory(name, tmp_path):
    make_student(name).save_pretrained(tmp_path / "student")
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | dict.fromkeys(("model.embed_tokens", "model.layers.0"), "disk")
    placed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert placed.get_input_embeddings().weight.is_meta
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    inputs = batch(plain)
    with torch.no_grad():
        assert torch.equal(placed(**inputs)[0], plain(**inputs)[0])


def test_an_offloaded_student_is_not_folded():
    offloaded = cpu_offload(make_student("factored linears"), torch.device("cpu"))
    with pytest.raises(ModelLoadError, match="not in memory"):
        makd.fold(offloaded)
