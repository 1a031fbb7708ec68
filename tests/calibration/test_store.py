"""Memory and disk keep the same, and an entry is there when it is whole."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from makd.calibration.store import MEMORY_LIMIT, DiskStore, MemoryStore, choose_store
from makd.errors import SettingError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
    is_turned=st.booleans(),
)
def test_what_is_read_is_what_was_written_bit_for_bit(store, shape, dtype, seed, is_turned):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    tensor = tensor.T if is_turned and tensor.ndim == 2 else tensor
    store.write("a/0001", {"one": tensor, "two": torch.arange(3)}, {"why": "é"})
    found = store.read("a/0001")
    assert found.keys() == {"one", "two"}
    assert found["one"].dtype == dtype
    assert torch.equal(found["one"], tensor)
    assert store.notes("a/0001")["why"] == "é"


def test_what_a_device_made_is_kept_in_the_hosts_memory():
    store = MemoryStore()
    with FakeTensorMode():
        store.write("a", {"one": torch.ones(2, device="cuda")})
        assert store.read("a", "cpu")["one"] is store.read("a", "cpu")["one"]  # nothing is left to be brought


def test_an_entry_takes_the_place_of_one_of_its_name(store):
    store.write("a", {"one": torch.zeros(2)})
    store.write("a", {"two": torch.ones(3)})
    assert store.read("a").keys() == {"two"}


def test_what_was_never_written_is_not_there(store):
    assert "a" not in store
    with pytest.raises(KeyError, match="a"):
        store.read("a")


def test_a_folder_is_removed_with_all_below_it_and_nothing_beside(store):
    for entry in ("a", "a/0", "a/0/1", "ab/0", "b"):
        store.write(entry, {"one": torch.zeros(1)})
    store.remove("a")
    assert [entry for entry in ("a", "a/0", "a/0/1", "ab/0", "b") if entry in store] == ["ab/0", "b"]
    store.remove("never written")


def test_a_mark_is_no_entry_and_is_taken_back_alone(store):
    store.mark("a/0001")
    store.mark("a/0002")
    assert store.is_marked("a/0001")
    assert "a/0001" not in store
    store.unmark("a/0001")
    assert [store.is_marked(name) for name in ("a/0001", "a/0002")] == [False, True]


def test_what_is_kept_asks_for_no_gradients(store):
    store.write("a", {"one": torch.ones(2, requires_grad=True)})
    assert not store.read("a")["one"].requires_grad


def test_an_entry_that_was_half_written_is_not_there(tmp_path, monkeypatch):
    store = DiskStore(tmp_path)

    def stopped(_self, _target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.write("a/0", {"one": torch.ones(2)})
    assert "a/0" not in store
    assert list(tmp_path.rglob("*.part")), "its beginning lies there under another name"


def test_what_was_half_written_over_an_entry_leaves_that_as_it_was(tmp_path, monkeypatch):
    store = DiskStore(tmp_path)
    store.write("a", {"one": torch.ones(2)})

    def stopped(_self, _target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.write("a", {"one": torch.zeros(2)})
    assert torch.equal(store.read("a")["one"], torch.ones(2))


def test_a_mark_is_there_when_what_was_written_before_it_is_on_disk_also_after_a_power_cut(tmp_path, monkeypatch):
    store, synced, sync = DiskStore(tmp_path), [], os.fsync

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path).as_posix())
        assert synced[-1] == "done/a.safetensors" or not store.is_marked("a")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    store.write("a/0", {"one": torch.ones(2)})
    store.write("a/1", {"one": torch.ones(2)})
    store.write("gone", {"one": torch.ones(2)})
    store.remove("gone")
    assert synced == [], "one by one they would take longer"
    store.mark("a")
    assert synced == ["a/0.safetensors", "a/1.safetensors", "done/a.safetensors"]
    DiskStore(tmp_path / "temporary", lasting=False).mark("b")
    assert len(synced) == 3


def test_another_process_finds_what_is_on_disk(tmp_path):
    DiskStore(tmp_path).write("a/0", {"one": torch.ones(2)})
    DiskStore(tmp_path).mark("a")
    again = DiskStore(tmp_path)
    assert torch.equal(again.read("a/0")["one"], torch.ones(2))
    assert again.is_marked("a")


def test_a_temporary_store_goes_when_nobody_has_it():
    store = DiskStore.temporary()
    store.write("a", {"one": torch.ones(2)})
    path = store.path
    assert path.is_dir()
    del store
    assert not path.exists()


@pytest.mark.parametrize(
    ("choice", "needed", "kind"),
    [
        ("auto", MEMORY_LIMIT, MemoryStore),
        ("auto", MEMORY_LIMIT + 1, DiskStore),
        ("memory", 100 * MEMORY_LIMIT, MemoryStore),
        ("disk", 0, DiskStore),
    ],
)
def test_auto_goes_by_size(choice, needed, kind):
    assert type(choose_store(choice, needed)) is kind


def test_what_is_on_disk_is_where_it_is_asked_for_and_in_memory_nothing_is_made(tmp_path):
    store = choose_store("disk", 0, lambda: DiskStore(tmp_path / "work"))
    assert isinstance(store, DiskStore)
    assert (store.path, store.lasting) == (tmp_path / "work", True)
    assert not choose_store("auto", 0, lambda: DiskStore(tmp_path / "other")).lasting
    assert not (tmp_path / "other").exists()


def test_another_choice_is_refused():
    with pytest.raises(SettingError, match="auto, memory, disk; got 'ram'"):
        choose_store("ram", 0)
