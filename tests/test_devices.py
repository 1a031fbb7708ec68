"""Devices without float64, as Apple's and some of Intel's are: what makd factorizes in is never put there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import makd
from makd.config import find_device
from makd.devices import has_float64, widest_dtype
from makd.errors import SettingError
from makd.evaluation.inside import look_inside
from makd.processes.started import check_device
from tests.distill.test_trainer import make_arguments, make_rows
from tests.models import batch, tiny

CPU = torch.device("cpu")


class NoFloat64(TorchDispatchMode):
    """Inside, no tensor is made in float64, as on Apple's GPUs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in tree_flatten(output)[0]):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return output


@pytest.fixture
def narrow():
    """Within a test, the CPU has no float64."""
    has_float64.cache_clear()
    with NoFloat64():
        yield
    has_float64.cache_clear()


def test_a_cpu_has_float64():
    assert widest_dtype(CPU) == torch.float64


@pytest.mark.usefixtures("narrow")
def test_a_device_without_float64_is_known_by_trying():
    assert widest_dtype(CPU) == torch.float32


def test_auto_leaves_an_accelerator_without_float64_alone_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert makd.Recipe().find_device() == CPU
    assert "mps, has no float64, which moments and factors are computed in: the CPU is used instead" in caplog.text


def test_auto_takes_it_where_nothing_is_factorized(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert makd.FinetuneRecipe().find_device() == torch.device("mps")


@pytest.mark.usefixtures("narrow")
def test_one_that_is_named_is_refused():
    with pytest.raises(SettingError, match=r"device cpu has no float64, .* Take device cpu, or cuda"):
        find_device("cpu")


def test_so_is_a_teacher_in_hand_that_is_on_one(request):
    teacher = tiny("bert")
    request.getfixturevalue("narrow")
    with pytest.raises(SettingError, match="device cpu has no float64"):
        makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def test_a_student_is_taught_and_looked_into_on_one(request, tmp_path):
    teacher = tiny("bert")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    expected = look_inside(student, teacher, [batch(teacher)])
    request.getfixturevalue("narrow")
    found = look_inside(student, teacher, [batch(teacher)])
    assert found.linears == pytest.approx(expected.linears, rel=1e-4)
    trainer = makd.DistillTrainer(student, teacher, "feature", args=make_arguments(tmp_path), train_dataset=make_rows())
    trainer.train()
    assert all(unit > 0 for unit in trainer.teacher_variances.values())


def test_another_than_the_first_accelerator_is_refused_in_one_process():
    with pytest.raises(SettingError, match="Set CUDA_VISIBLE_DEVICES=1 and take device cuda"):
        check_device(torch.device("cuda:1"))


def test_the_first_accelerator_is_what_a_training_takes():
    check_device(torch.device("cuda"))
    check_device(torch.device("cuda:0"))


def test_of_the_accelerators_that_are_visible_the_one_that_is_meant_is_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(SettingError, match="Set CUDA_VISIBLE_DEVICES=5 and take device cuda"):
        check_device(torch.device("cuda:1"))
