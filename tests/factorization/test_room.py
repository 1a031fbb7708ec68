"""How much memory and disk a run has: what the machine has, or less where this process is limited."""

import resource
from pathlib import Path

import pytest
import torch

from makd.factorization import room
from makd.factorization.room import find_available

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def files(monkeypatch):
    """What stands in /proc and /sys; nothing else is there."""
    there = {}
    monkeypatch.setattr(room, "_read", lambda path: there.get(str(path), ""))
    return there


def test_this_machine_has_memory_and_disk(tmp_path):
    found = find_available(CPU, tmp_path / "not" / "there" / "yet")
    assert found.memory.size > 2**28
    assert found.memory.free is None or 0 < found.memory.free <= found.memory.size
    assert found.disk.free > 0
    assert found.device is None


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/user/box", "/sys/fs/cgroup/user/box/memory.max"),
        ("0::/user/box", "/sys/fs/cgroup/user/memory.max"),
        ("7:cpu,memory:/box", "/sys/fs/cgroup/memory/box/memory.limit_in_bytes"),
    ],
    ids=["its own group", "one above", "version 1"],
)
def test_a_container_has_what_its_control_group_may_use(files, tmp_path, line, file):
    files["/proc/self/cgroup"] = f"3:pids:/other\n{line}\n"
    files[file] = f"{GIB // 4}\n"
    found = find_available(CPU, tmp_path)
    assert found.memory.size == GIB // 4
    assert "container" in found.memory.whose


def test_a_group_without_a_limit_is_none(files, tmp_path):
    files["/proc/self/cgroup"] = "0::/box\n"
    files["/sys/fs/cgroup/box/memory.max"] = "max\n"
    assert find_available(CPU, tmp_path).memory.whose == "this machine"


def test_of_a_limited_address_space_the_libraries_took_their_share(files, monkeypatch, tmp_path):
    page = resource.getpagesize()
    files["/proc/self/statm"] = f"{GIB // 4 // page} 1 1 1"
    monkeypatch.setattr(resource, "getrlimit", lambda what: (GIB, GIB))
    found = find_available(CPU, tmp_path, held=1000)
    assert found.memory.size == GIB - GIB // 4 + 1000
    assert "ulimit -v" in found.memory.whose


def test_what_is_held_already_is_part_of_what_is_free(files, tmp_path):
    files["/proc/meminfo"] = "MemTotal: 1 kB\nMemAvailable:  1000 kB\n"
    assert find_available(CPU, tmp_path, held=24).memory.free == 1000 * 1024 + 24


def test_files_that_are_not_there_say_nothing():
    assert room._read(Path("/nowhere/at/all")) == ""
