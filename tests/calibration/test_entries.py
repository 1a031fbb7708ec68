"""The names of what a factorization keeps: folders that an earlier process left are gone on with."""

import inspect
from typing import get_type_hints

import pytest

from makd.calibration import entries
from makd.calibration.entries import Entry, mark_of, of_batch
from makd.calibration.store import DiskStore, MemoryStore, Store

NAMES = {
    of_batch(entries.teacher_states(3), 7): "teacher/0003/00007",
    of_batch(entries.gradients(3), 7): "gradients/0003/00007",
    entries.spectrum("a.b"): "spectra/a.b",
    entries.factors("a.b + a.c"): "factors/a.b + a.c",
    entries.output_gram("a.b"): "gram/a.b",
    entries.decomposed(3): "cut/0003",
    of_batch(entries.student_states(3), 7): "student/0003/00007",
    entries.layer_report(3): "made/0003",
    entries.layer_parameters(3): "learned/0003",
    entries.targets(7): "targets/00007",
    entries.known_outputs(7, "a.b"): "known/00007/a.b",
    entries.last_sum(7): "sum/00007",
    entries.MODEL_CHECKED: "whole",
    entries.FILES_CHECKED: "checked",
    mark_of(entries.student_states(3)): "done/student/0003",
}
REMOVED = (entries.OF_WALK, entries.OF_STUDENT, entries.OF_UNFINISHED, entries.OF_STUDENT_LAYER, (entries.TARGETS,))


@pytest.mark.parametrize(("made", "on_disk"), NAMES.items())
def test_an_entry_has_the_name_that_it_has_on_disk(made, on_disk):
    assert made == on_disk


@pytest.mark.parametrize("removed", [entry for group in REMOVED for entry in group])
def test_what_is_removed_is_a_folder_that_entries_are_in(removed):
    assert any(name.startswith(f"{removed}/") for name in NAMES.values())


@pytest.mark.parametrize("store", [Store, MemoryStore, DiskStore])
def test_a_store_takes_no_name_that_was_typed_where_it_is_used(store):
    for name in ("write", "read", "notes", "__contains__", "remove", "mark", "is_marked", "unmark"):
        parameter = next(one for one in inspect.signature(getattr(store, name)).parameters if one != "self")
        assert get_type_hints(getattr(store, name))[parameter] is Entry
