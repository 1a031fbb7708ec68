"""A checkpoint counts when it is whole."""

import json

import pytest

from makd.distill.resuming.checkpoints import LIST, checkpoint_folders, find_fault, list_files, newest_step


@pytest.fixture
def checkpoints(tmp_path):
    """Two whole ones."""
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).write_text(f"{name} {step}" * 10)
        list_files(folder)
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(bytes(content))


def test_whole_ones_have_no_fault(checkpoints):
    assert [find_fault(folder) for folder in checkpoint_folders(checkpoints)] == [None, None]
    assert newest_step(checkpoints) == "step 10"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    ("damage", "told"), [(cut, "is damaged"), (flip, "is damaged"), (lambda path: path.unlink(), "is missing")]
)
def test_a_file_that_is_cut_changed_or_gone_is_named(checkpoints, name, damage, told):
    damage(checkpoints / "checkpoint-10" / name)
    assert find_fault(checkpoints / "checkpoint-10") == f"{name} {told}"
    assert newest_step(checkpoints) == "step 5"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", json.dumps({"model.safetensors": 5})])
def test_a_damaged_list_is_a_fault(checkpoints, content):
    (checkpoints / "checkpoint-10" / LIST).write_text(content)
    assert find_fault(checkpoints / "checkpoint-10") is not None


def test_one_without_a_list_was_not_written_to_its_end(checkpoints):
    (checkpoints / "checkpoint-10" / LIST).unlink()
    assert find_fault(checkpoints / "checkpoint-10") == "it was not written to its end"


def test_numbers_are_compared_as_numbers(checkpoints):
    (checkpoints / "checkpoint-100").mkdir()
    (checkpoints / "checkpoint-best").mkdir()
    assert [folder.name for folder in checkpoint_folders(checkpoints)] == [
        "checkpoint-100", "checkpoint-10", "checkpoint-5",
    ]  # fmt: skip


def test_the_newest_of_the_last_stage_is_told(checkpoints):
    for stage in (2, 10):
        folder = checkpoints / f"stage_{stage}" / "checkpoint-3"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("weights")
        list_files(folder)
    assert newest_step(checkpoints) == "step 3 of stage_10"
    assert newest_step(checkpoints / "nowhere") is None
