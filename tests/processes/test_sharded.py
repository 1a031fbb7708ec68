"""Under FSDP2 a run makes the student of one process, and leaves it whole."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import makd
from tests.processes import sharded
from tests.processes.starting import begin, end
from tests.processes.together import BUDGET, TEXTS


def test_a_sharded_run_of_two_stages_makes_the_student_of_one_process(encoder_folder, tmp_path):
    code, out, err = end(begin(Path(sharded.__file__), encoder_folder, tmp_path))
    assert code == 0, out + err
    makd.compress(str(encoder_folder), TEXTS, BUDGET, sharded.recipe(1), tmp_path / "one")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "one"))
    assert found.keys() == wanted.keys()
    for name in (name for name in wanted if not name.endswith(".identity")):  # digests of what is not equal to the bit
        value = wanted[name]
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
