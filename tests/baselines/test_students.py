"""Dense students: within the budget and at most 1 % below it, with the teacher's weights where they are copied."""

import pytest
import torch

import makd
from makd.anatomy import resolve
from makd.baselines import fewer_layers, narrower
from makd.baselines.influence import by_influence
from makd.baselines.sizes import Sizes
from tests.models import batch, tiny

BUDGETS = [makd.Budget(keep_linears=0.5), makd.Budget(keep_linears=0.3), makd.Budget(keep=0.5)]
MODELS = ["bert", "roberta", "llama"]


def make_teacher(name="bert", **settings):
    settings = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 128} | settings
    return tiny(name, head="sequence_classification", **settings)


@pytest.mark.parametrize("make", [fewer_layers, narrower])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_dense_student_fills_its_budget(name, budget, make, tmp_path):
    teacher = make_teacher(name)
    student, sizes = make(teacher, budget), Sizes(teacher, budget)
    assert 0.99 * sizes.limit <= sizes.count(student.config) <= sizes.limit
    student.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    inputs = batch(teacher)
    assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)


def test_half_of_the_layers_are_every_second_one():
    teacher = make_teacher()
    student = fewer_layers(teacher, makd.Budget(keep_linears=0.5))
    for ours, theirs in ((0, 1), (1, 3)):
        known = teacher.bert.encoder.layer[theirs].state_dict()
        found = student.bert.encoder.layer[ours].state_dict()
        assert all(torch.equal(value, known[name]) for name, value in found.items())


def test_a_student_may_begin_with_the_first_layers():
    teacher = make_teacher()
    student = fewer_layers(teacher, makd.Budget(keep_linears=0.5), start="first")
    weights = [model.bert.encoder.layer[1].output.dense.weight for model in (teacher, student)]
    assert torch.equal(*weights)


def test_a_student_may_begin_with_the_layers_of_an_order():
    teacher = make_teacher()
    student = fewer_layers(teacher, makd.Budget(keep_linears=0.5), start=[2, 0, 3, 1])
    for ours, theirs in ((0, 0), (1, 2)):
        weights = [
            model.bert.encoder.layer[at].output.dense.weight for model, at in ((student, ours), (teacher, theirs))
        ]
        assert torch.equal(*weights)


def keep_in(found):
    """A hook that keeps what a layer is given, and gives."""

    def keep(_module, given, output):
        found.append((given[0], output[0] if isinstance(output, tuple) else output))

    return keep


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_kept_by_what_they_change(name):
    """By equation 1 of ShortGPT on every token by itself, in float64."""
    teacher = make_teacher(name).double()
    batches = [batch(teacher), {key: tensor[:1] for key, tensor in batch(teacher).items()}]
    changes = torch.zeros(4, dtype=torch.float64)
    for inputs in batches:
        layers, found = resolve(teacher).layers, []
        hooks = [teacher.get_submodule(layer.module).register_forward_hook(keep_in(found)) for layer in layers]
        teacher(**inputs)
        for hook in hooks:
            hook.remove()
        for row, token in inputs["attention_mask"].nonzero().tolist():
            for at, (before, after) in enumerate(found):
                before, after = before[row, token], after[row, token]
                changes[at] += 1 - before @ after / (before.norm() * after.norm())
    assert by_influence(teacher, batches) == [0, *(1 + changes[1:].argsort(descending=True)).tolist()]


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_that_keeps_everything_is_the_teacher(name):
    teacher = make_teacher(name)
    inputs = batch(teacher)
    for make in (fewer_layers, narrower):
        student = make(teacher, makd.Budget(keep_linears=1.0))
        assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_a_cut_keeps_what_the_student_needs_when_the_rest_is_nothing():
    """Neurons that give nothing are the ones to go."""
    teacher = make_teacher()
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            layer.output.dense.weight[:, torch.arange(128) % 4 != 0] = 0
    student = narrower(teacher, makd.Budget(keep_linears=0.7), multiple=32)
    assert student.config.hidden_size == 32
    assert 32 <= student.config.intermediate_size < 128
    inputs = batch(teacher)
    torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_for_the_same_seed():
    teacher, budget = make_teacher(), makd.Budget(keep_linears=0.5)
    one, same, other = (narrower(teacher, budget, initial="random", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_heads_stay_as_many_so_that_attention_can_be_compared():
    student = narrower(make_teacher(), makd.Budget(keep_linears=0.5), depth=3)
    assert student.config.num_attention_heads == 4
    assert student.config.num_hidden_layers == 3
    assert student.config.hidden_size < 32


@pytest.mark.parametrize(
    ("name", "hint"), [("gpt2", "Conv1D|intermediate_size"), ("t5", "stack|lacks"), ("distilbert", "intermediate_size")]
)
def test_models_whose_size_is_not_said_in_the_usual_words_are_refused(name, hint):
    with pytest.raises(makd.MakdError, match=hint):
        fewer_layers(tiny(name), makd.Budget(keep_linears=0.5))


def test_fused_linears_are_not_cut():
    with pytest.raises(makd.MakdError, match="initial='random'"):
        narrower(tiny("gpt_neox"), makd.Budget(keep_linears=0.5))


def test_a_budget_below_a_layer_is_refused():
    with pytest.raises(makd.MakdError, match="below one layer"):
        fewer_layers(make_teacher(), makd.Budget(keep_linears=0.01))


@pytest.mark.parametrize("depth", [0, 5])
def test_a_depth_that_the_teacher_has_not_is_refused(depth):
    with pytest.raises(makd.MakdError, match="1 to 4 layers"):
        narrower(make_teacher(), makd.Budget(keep_linears=0.5), depth=depth)
