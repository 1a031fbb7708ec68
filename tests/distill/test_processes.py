"""Training in several processes, started by torchrun as users start it: the update is that of one process.

What runs there is `tests/distill/processes.py`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import makd
from tests.distill import processes
from tests.distill.processes import CASES

WORKER = Path(processes.__file__)
ROOT = WORKER.parents[2]
FEW = {
    "ddp": [
        ("hidden of the first layer", "plain"),  # no gradient at most of the parameters
        ("matrix bert", "accumulated"),  # nothing of what the model puts out is compared
        ("full bert", "checkpointing"),
        ("full", "accumulated"),
        ("gkd", "accumulated"),
        ("narrower", "plain"),
    ],
    "fsdp": [
        ("hidden of the first layer", "plain"),
        ("matrix bert", "accumulated"),
        ("full", "checkpointing"),
        ("tied", "accumulated"),
        ("sharded teacher", "plain"),
        ("gkd", "plain"),
        ("gkd near the last position", "accumulated"),
        ("narrower", "plain"),
    ],
}
OTHERS = {"ddp": [("full", "begin"), ("labels", "fine-tune")], "fsdp": [("full", "begin")]}
"""What else is run there."""
UNFIT = {"ddp": ("sharded teacher",), "fsdp": ("encoder-decoder",)}
"""What an engine cannot have: see `makd.distill.engines.support`."""
ALL = {
    engine: [(name, mode) for name in CASES for mode in processes.MODES if name not in unfit]
    for engine, unfit in UNFIT.items()
}


def torchrun(count, *words, timeout=900):
    """Run the worker in `count` processes; its output where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def run_there(engine, count, cases, folder):
    torchrun(count, engine, folder, *(word for case in cases for word in case))
    return torch.load(folder / f"{engine}{count}.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of a case, each run once."""
    known = {}

    def run(name, mode):
        if (name, mode) not in known:
            known[name, mode] = processes.run(name, mode, tmp_path_factory.mktemp("alone"), 1)
        return known[name, mode]

    return run


def assert_same(found, wanted):
    """Updates to 1e-5 of each parameter's, at least; they are of float64, and in fact equal to 1e-12."""
    whole = torch.stack([value.norm() for value in wanted["update"].values()]).norm()
    assert whole > 0
    for name, value in wanted["update"].items():
        off = (found["update"][name] - value).norm()
        assert off <= 1e-8 * max(float(value.norm()), 1e-6 * float(whole)), name
    for kind in ("log", "eval"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, value in wanted[kind].items():
            assert found[kind][name] == pytest.approx(value, rel=1e-5, abs=1e-7), (kind, name)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """What two processes make of the few cases, by engine, each started once; and the folder of a run they began."""
    known = {}

    def run(engine):
        if engine not in known:
            folder = tmp_path_factory.mktemp(engine)
            known[engine] = (
                run_there(engine, 2, [*FEW[engine], *OTHERS[engine]], folder),
                folder / "run",
            )
        return known[engine]

    return run


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, cases in FEW.items() for case in cases])
def test_two_processes_learn_what_one_does(engine, case, there, alone):
    assert_same(there(engine)[0][case], alone(*case))


def test_the_loss_of_a_fine_tuning_is_evaluated_in_two_processes_as_in_one(there, tmp_path):
    assert there("ddp")[0]["labels", "fine-tune"] == pytest.approx(processes.fine_tune(tmp_path), rel=1e-6)


def assert_near(found, wanted):
    for name, value in wanted.items():
        assert (found[name] - value).double().norm() <= 1e-8 * value.double().norm(), name


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    return processes.resume("full", tmp_path_factory.mktemp("whole"), 1, 3, False, "none")


def test_a_run_of_two_processes_goes_on_in_one(there, three_steps):
    assert_near(processes.resume("full", there("ddp")[1], 1, 3, True, "none"), three_steps)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sharded_run_goes_on_sharded_and_saves_a_student_that_loads_whole(count, there, three_steps, tmp_path):
    shutil.copytree(there("fsdp")[1], tmp_path / "run")
    found = run_there("fsdp", count, [("full", "resume")], tmp_path)["full", "resume"]
    assert_near(found, three_steps)
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "saved").state_dict(), found)


def test_a_checkpoint_of_a_sharded_run_is_not_gone_on_with_whole(there):
    with pytest.raises(makd.MakdError, match="with FSDP, and this one is without"):
        processes.resume("full", there("fsdp")[1], 1, 3, True, "none")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does_of_every_aspect_and_preset(engine, alone, tmp_path):
    found = run_there(engine, 2, ALL[engine], tmp_path)
    for case in ALL[engine]:
        assert_same(found[case], alone(*case))


@pytest.mark.slow
def test_four_processes_learn_what_one_does(alone, tmp_path):
    cases = [case for case in ALL["ddp"] if case[1] == "accumulated"]
    found = run_there("ddp", 4, cases, tmp_path)
    for case in cases:
        assert_same(found[case], alone(*case))
