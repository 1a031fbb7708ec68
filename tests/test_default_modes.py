"""Public functions and trainers inside somebody's autocast or inference mode: the same as outside."""

import ast
import inspect
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import makd
from makd.default_modes import default_modes
from makd.tasks.task import Task
from tests.models import batch, tiny

HALF = makd.Budget(keep_linears=0.5)
HIDDEN = makd.Plan(terms=[makd.Term(aspect="hidden")])


@contextmanager
def autocast_in_inference_mode():
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode())
        modes.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast in inference mode": autocast_in_inference_mode,
}


def batches(model):
    return [batch(model, seed=seed) for seed in range(3)]


def factorized(name):
    model = tiny(name)
    given = batches(model)
    return lambda: makd.fingerprint(makd.factorize(model, HALF, calibration=given))


def trained():
    teacher = tiny("bert")
    rows = [{name: value[row] for name, value in batch(teacher).items()} for row in range(4)]
    settings = TrainingArguments(
        "unused", max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )

    def work():
        student = makd.factorize(teacher, HALF, solver="svd")
        trainer = makd.DistillTrainer(student, teacher, "full", args=settings, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer.predict(rows).metrics["test_loss"], makd.fingerprint(student)

    return work


def taught():
    teacher = tiny("bert")
    given = batches(teacher)

    def work():
        student = makd.factorize(teacher, HALF, solver="svd")
        makd.teach_layers_(student, teacher, HIDDEN, given, makd.LayerwiseConfig(steps=2))
        return makd.fingerprint(student)

    return work


def measured():
    teacher = tiny("llama", "causal_lm")
    student, given = makd.factorize(teacher, HALF, solver="svd"), batches(teacher)
    return lambda: (makd.fidelity(student, teacher, given), makd.perplexity(student, given), makd.inspect(student))


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "prepare",
    [lambda: factorized("bert"), lambda: factorized("llama"), trained, taught, measured],
    ids=["an encoder's student", "a decoder's student", "a training", "layers that are taught", "measurements"],
)
def test_inside_the_callers_modes_all_is_as_outside(prepare, modes):
    outside, work = prepare()(), prepare()  # models anew: what a trial found is kept with them
    with modes():
        assert work() == outside


@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
def test_the_callers_modes_are_on_again_afterwards(modes):
    def now():
        return torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with modes():
        before = now()
        makd.fingerprint(tiny("bert"))
        assert now() == before
        with pytest.raises(makd.MakdError):
            makd.perplexity(tiny("llama", "causal_lm"), [])
        assert now() == before


def test_a_student_made_in_inference_mode_learns_outside_of_it():
    teacher = tiny("bert")
    with torch.inference_mode():
        student = makd.factorize(teacher, HALF, solver="svd")
    student(**batch(teacher))[0].sum().backward()


def test_batches_made_in_inference_mode_can_be_calibrated_with():
    teacher = tiny("bert")
    with torch.inference_mode():
        given = batches(teacher)
        assert given[0]["input_ids"].is_inference()
    outside = makd.factorize(teacher, HALF, calibration=batches(teacher))
    assert makd.fingerprint(makd.factorize(teacher, HALF, calibration=given)) == makd.fingerprint(outside)


def test_every_public_function_and_method_that_computes_is_run_so():
    functions = [value for name in makd.__all__ if inspect.isfunction(value := getattr(makd, name))]
    methods = [getattr(makd.DistillTrainer, name) for name in ("__init__", "train", "evaluate", "predict")]
    plain = [one for one in (*functions, *methods, Task.evaluate) if not hasattr(one, "__wrapped__")]
    assert plain == [makd.resolve]  # which reads names alone


def test_torch_is_not_imported_for_it():
    code = "import sys, makd.default_modes as one\nwith one.default_modes(): assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_are_on_inside():
    with torch.no_grad(), default_modes():
        assert torch.is_grad_enabled()


def test_every_draw_says_on_which_device_and_in_which_dtype():
    """A generator of the CPU's draws nothing on another default device; and of another dtype, other numbers."""
    wrong = []
    for path in Path(makd.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            told = {keyword.arg for keyword in call.keywords}
            needed = {"randn": {"device", "dtype"}, "rand": {"device", "dtype"}, "randint": {"device"}}
            needed["randperm"] = {"device"}
            if "generator" in told and needed.get(call.func.attr, set()) - told:
                wrong.append(f"{path.name}:{call.lineno}")
    assert wrong == []
