"""While a student is made, memory that is freed goes back to the machine."""

import subprocess
import sys

import pytest
import torch

from makd.factorization import allocator
from makd.factorization.allocator import giving_back

MIB = 2**20


HOLES = """
import resource
from pathlib import Path
import torch
from makd.factorization.allocator import giving_back

MIB = 2**20

def addresses():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def freed_between_others():
    tensors = [torch.ones(2 * MIB) for _ in range(32)]
    before = addresses()
    del tensors[::2]
    return before - addresses()

with giving_back():
    inside = freed_between_others()
print(inside // MIB, freed_between_others() // MIB)
"""
"""MiB of address space that go with every second of 32 tensors of 8 MiB: inside the block, and without it.

In a process of its own: what is free in the heaps of one that has done other work is used up first.
"""


@pytest.mark.skipif(allocator._mallopt() is None, reason="this C library has no mallopt")
def test_what_is_freed_between_others_leaves_no_holes():
    told = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True).stdout
    inside, without = map(int, told.split())
    assert inside >= 12 * 8
    assert without <= 2 * 8, "this is what happens without"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_mallopt", lambda: None)
    with giving_back():
        assert torch.ones(2).sum() == 2


def test_the_usual_threshold_is_back_after_an_error(monkeypatch):
    told = []
    monkeypatch.setattr(allocator, "_mallopt", lambda: lambda option, size: told.append((option, size)))
    with pytest.raises(ValueError, match="boom"), giving_back():
        raise ValueError("boom")
    assert told == [(-3, 4 * MIB), (-1, 8 * MIB), (-3, 32 * MIB), (-1, 64 * MIB)]
