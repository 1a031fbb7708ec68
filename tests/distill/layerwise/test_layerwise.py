"""Layers taught one by one: what they mimic, what they leave alone, and that none leaves worse than it came."""

import copy
import functools
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import makd
from makd.aspects import activate, relation_kl
from makd.calibration.frame import Frame
from makd.calibration.replay import run_layer
from makd.calibration.source import ModelSource
from makd.capture import examine
from makd.distill import LayerwiseConfig, teach_layer_, teach_layers_
from makd.distill.layerwise.targets import inside_layer
from makd.errors import DataError, NumericsError, SettingError
from tests.models import batch, tiny

HIDDEN = makd.Plan(terms=(makd.Term(aspect="hidden"),))
FEW = LayerwiseConfig(steps=12, learning_rate=5e-3, evaluate_every=6, held_out_every=4)


@functools.cache
def made(name, head):
    """A teacher and its student."""
    teacher = tiny(name, head=head)
    return teacher, makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", depth="all")


@functools.cache
def examined(name, head):
    return examine(made(name, head)[1])


class Pair:
    """A teacher, its student, and what layer `index` is called with on four batches, of so many rows each."""

    def __init__(self, name="bert", head="base", index=1, dtype=torch.float32, plan=HIDDEN, rows=(4, 4, 4, 4)):
        self.teacher, self.student = (model.to(dtype) for model in copy.deepcopy(made(name, head)))
        self.anatomy = examined(name, head)
        self.layer = self.anatomy.layers[index]
        self.plan = activate(plan, self.anatomy)
        self.batches = [
            {key: value[:count] for key, value in batch(self.teacher, seed=seed).items()}
            for seed, count in enumerate(rows)
        ]
        with torch.no_grad():
            frame = Frame(ModelSource(self.teacher), self.anatomy)
            with frame.at_hand():
                self.calls = [frame.enter(one) for one in self.batches]
            self.theirs = self.ours = [call.entering for call in self.calls]
            for before in self.anatomy.layers[:index]:
                self.theirs, self.ours = (
                    [run_layer(model, before, call, state) for call, state in zip(self.calls, states, strict=True)]
                    for model, states in ((self.teacher, self.theirs), (self.student, self.ours))
                )

    def teach(self, settings=FEW, seed=0, **more):
        given = {"teacher_states": self.theirs.__getitem__, "student_states": self.ours.__getitem__} | more
        return teach_layer_(
            self.student, self.teacher, self.anatomy, self.layer, self.plan, self.calls, settings=settings, seed=seed,
            **given,
        )  # fmt: skip

    @torch.no_grad()
    def outputs(self, number):
        """What the layer gives in teacher and student, on one batch."""
        call = self.calls[number]
        sides = ((self.teacher, self.theirs), (self.student, self.ours))
        return [run_layer(model, self.layer, call, states[number]) for model, states in sides]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@contextmanager
def noted_steps():
    """What every optimizer steps by inside the block: (learning rate, parameter -> its gradient) of each step."""
    steps = []

    def note(optimizer, *_):
        groups = optimizer.param_groups
        gradients = {one: one.grad.clone() for group in groups for one in group["params"]}
        steps.append((groups[0]["lr"], gradients))

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


def squared(student, teacher, real):
    """Mean squared difference over real tokens, in units of the teacher's variance around each channel's mean."""
    ours, theirs = student[real], teacher[real]
    return (ours - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("name", "head"),
    [("bert", "base"), ("deberta_v2", "base"), ("modernbert", "base"), ("llama", "causal_lm"), ("gpt2", "causal_lm"),
     ("opt", "causal_lm"), ("gemma2", "causal_lm")],
)  # fmt: skip
def test_a_taught_layer_gives_more_nearly_what_the_teachers_gives(name, head):
    pair = Pair(name, head)
    real = pair.calls[3].real
    before = squared(*reversed(pair.outputs(3)), real)
    result = pair.teach()
    after = squared(*reversed(pair.outputs(3)), real)
    assert after < 0.95 * before
    assert result.before == pytest.approx(float(before), rel=1e-4)
    assert result.after == pytest.approx(float(after), rel=1e-4)


def test_only_the_layer_learns_and_all_of_it():
    pair = Pair()
    teacher, student = weights(pair.teacher), weights(pair.student)
    pair.teach()
    assert changed(teacher, pair.teacher) == set()
    inside = {
        f"{pair.layer.module}.{name}" for name, _ in pair.student.get_submodule(pair.layer.module).named_parameters()
    }
    assert changed(student, pair.student) == inside


def test_modes_and_what_may_learn_are_as_before():
    pair = Pair()
    pair.student.train().requires_grad_(False)
    pair.teach()
    assert all(module.training for module in pair.student.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in pair.student.parameters())


def test_the_layer_learns_without_dropout():
    pair, still = Pair(), Pair()
    for module in pair.student.get_submodule(pair.layer.module).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    for side in (pair.student, pair.teacher):
        side.train()
    pair.teach(), still.teach()
    assert changed(weights(still.student), pair.student) == set()


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_all_but_the_layer_may_be_without_weights(name, head):
    whole, bare = Pair(name, head, plan=makd.Plan(preset="full")), Pair(name, head, plan=makd.Plan(preset="full"))
    for model in (bare.student, bare.teacher):
        kept = model.get_submodule(bare.layer.module)
        alone = copy.deepcopy(kept)
        model.to("meta")
        model.set_submodule(bare.layer.module, alone)
    assert bare.teach() == whole.teach()
    expected = whole.student.get_submodule(whole.layer.module).state_dict()
    found = bare.student.get_submodule(bare.layer.module).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert bare.student.get_input_embeddings().get_parameter("weight").is_meta


def test_a_teachers_layer_whose_outputs_are_known_is_not_run():
    pair, known = Pair(), Pair()
    outputs = [known.outputs(number)[0] for number in range(4)]
    known.teacher.to("meta")
    assert known.teach(teacher_outputs=outputs.__getitem__) == pair.teach()
    assert changed(weights(pair.student), known.student) == set()


def test_a_plan_that_looks_inside_the_teachers_layer_runs_it_all_the_same():
    plan = makd.Plan(terms=(makd.Term(aspect="matrix"),))
    pair, known = Pair(plan=plan), Pair(plan=plan)
    outputs = [known.outputs(number)[0] for number in range(4)]
    assert known.teach(teacher_outputs=outputs.__getitem__) == pair.teach()


def test_the_same_seed_gives_the_same_bytes_and_another_one_others():
    first, again, other = Pair(), Pair(), Pair()
    first.teach(seed=3)
    torch.manual_seed(99)  # nothing is drawn from torch's own generator
    again.teach(seed=3)
    other.teach(seed=4)
    assert changed(weights(first.student), again.student) == set()
    assert changed(weights(first.student), other.student)


@pytest.mark.parametrize("patience", [1, None])
def test_a_layer_that_only_got_worse_is_what_it_was(patience):
    pair = Pair()
    before = weights(pair.student)
    settings = replace(FEW, learning_rate=1.0, schedule="constant_with_warmup", patience=patience)
    result = pair.teach(settings)
    assert changed(before, pair.student) == set()
    assert result.after == result.before
    assert result.kept == 0
    assert result.steps == (12 if patience is None else 6)


def test_the_best_weights_are_kept_not_the_last():
    """A long stay at a rate that is too high, after a first look at a good place."""
    pair = Pair()
    settings = replace(FEW, steps=60, learning_rate=0.2, warmup=0.99, evaluate_every=5, patience=None)
    result = pair.teach(settings)
    assert 0 < result.kept < 60
    ours = squared(*reversed(pair.outputs(3)), pair.calls[3].real)
    assert result.after == pytest.approx(float(ours), rel=1e-4)
    assert result.after < result.before


def test_one_step_is_adamws_on_the_plans_loss_of_all_its_tokens():
    """Against a loss written out in float64: hidden states and attention, three batches of 32, 12 and 21 tokens."""
    terms = (makd.Term(aspect="hidden", weight=2.0), makd.Term(aspect="attention", weight=3.0))
    pair = Pair(dtype=torch.float64, plan=makd.Plan(terms=terms), rows=(4, 1, 2, 4))
    reference = copy.deepcopy(pair.student)
    layer = reference.get_submodule(pair.layer.module)
    counts = [int(call.real.sum()) for call in pair.calls]
    total = 0.0
    for number in (0, 1, 2):
        call, real = pair.calls[number], pair.calls[number].real
        loss = 2 * squared(
            run_layer(reference, pair.layer, call, pair.ours[number]), pair.outputs(number)[0].detach(), real
        )
        rows = []
        for model, states in ((pair.teacher, pair.theirs), (reference, pair.ours)):
            attention = model.get_submodule(pair.layer.module).attention.self
            query, key = (
                part(states[number]).unflatten(-1, (4, 8)).transpose(1, 2) for part in (attention.query, attention.key)
            )
            scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~real[:, None, None, :], -1e30)
            rows.append(scores.log_softmax(-1).transpose(1, 2)[real])
        wanted, got = rows[0].detach(), rows[1]
        loss = loss + 3 * (wanted.exp() * (wanted - got)).sum(-1).mean()
        total = total + loss * counts[number] / sum(counts[:3])
    total.backward()
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.5) > 1.0
    settings = replace(
        FEW, steps=1, learning_rate=1e-3, warmup=0.0, batch_tokens=65, weight_decay=0.1, max_grad_norm=0.5
    )
    with noted_steps() as steps:
        result = pair.teach(settings)
    assert result.kept == 1
    assert result.tokens == sum(counts[:3]) == 65
    ((_, gradients),) = steps
    expected = dict(layer.named_parameters())
    for name, value in pair.student.get_submodule(pair.layer.module).named_parameters():
        before, slope = expected[name].detach(), expected[name].grad
        torch.testing.assert_close(gradients[value], slope, rtol=1e-6, atol=1e-9)
        decayed = before * (1 - 1e-3 * 0.1) if before.dim() > 1 else before  # biases and norms do not decay
        torch.testing.assert_close(value.detach(), decayed - 1e-3 * slope / (slope.abs() + 1e-8), rtol=0, atol=1e-9)


def test_a_held_out_loss_is_a_mean_over_the_tokens_of_its_batches():
    pair = Pair(rows=(4, 1, 4, 4))
    losses = [float(squared(*reversed(pair.outputs(number)), pair.calls[number].real)) for number in (1, 3)]
    result = pair.teach(replace(FEW, held_out_every=2))
    assert losses[0] != pytest.approx(losses[1], rel=0.05)
    assert result.before == pytest.approx((12 * losses[0] + 32 * losses[1]) / 44, rel=1e-5)


def test_the_learning_rate_rises_over_the_warmups_share_of_the_steps_and_falls_by_the_schedule():
    settings = replace(FEW, steps=10, learning_rate=8e-3, warmup=0.2, schedule="linear", patience=None)
    with noted_steps() as steps:
        Pair().teach(settings)
    assert [rate for rate, _ in steps] == pytest.approx([0, 4e-3, *(1e-3 * rate for rate in range(8, 0, -1))])


def test_each_layer_reads_the_batches_in_an_order_of_its_own():
    orders = []
    for index in (0, 1):
        pair = Pair(index=index)
        order = []
        pair.teach(teacher_states=lambda number, pair=pair, order=order: order.append(number) or pair.theirs[number])
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_a_relation_is_compared_inside_the_layer():
    term = makd.Term(aspect="relation", roles=("v",), relation_heads=4)
    pair = Pair(plan=makd.Plan(terms=(term,)))
    values, real = [], pair.calls[3].real
    for model, states in ((pair.student, pair.ours), (pair.teacher, pair.theirs)):
        with torch.no_grad():
            values.append(model.get_submodule(pair.layer.module).attention.self.value(states[3]))
    expected = relation_kl(*values, real, 4) + squared(*reversed(pair.outputs(3)), real)
    assert pair.teach().before == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_takes_the_plans_terms_that_are_inside_it():
    anatomy = examine(tiny("bert"))
    plan = activate(makd.Plan(preset="full"), anatomy)
    found = inside_layer(plan, anatomy.layers[1])
    assert [active.term.aspect for active in found.terms] == ["matrix", "hidden", "attention"]
    assert {comparison.tap.layer for comparison in found.comparisons} == {1}


@pytest.mark.parametrize(
    ("term", "weight"),
    [
        (makd.Term(aspect="embedding"), 1.0),
        (makd.Term(aspect="hidden", layers="last", weight=5.0), 5.0),
        (makd.Term(aspect="hidden", tokens="first", weight=5.0), 5.0),
        (makd.Term(aspect="hidden", layers=[0], teacher_layers=[1], weight=5.0), 5.0),
    ],
)
def test_a_layers_output_is_compared_also_where_the_plan_does_not(term, weight):
    anatomy = examine(tiny("bert"))
    found = inside_layer(activate(makd.Plan(terms=(term,)), anatomy), anatomy.layers[0])
    added = found.terms[-1]
    (comparison,) = added.comparisons
    assert added.term.weight == weight
    assert (comparison.tap.kind, comparison.tap.layer, comparison.teacher.layer) == ("hidden", 0, 0)
    assert comparison.tokens == "all"
    assert comparison.measure == "mse"


def test_a_layers_output_is_compared_once_where_the_plan_does():
    anatomy = examine(tiny("bert"))
    found = inside_layer(activate(HIDDEN, anatomy), anatomy.layers[0])
    assert len(found.comparisons) == 1


def test_a_layer_in_bfloat16_is_no_worse_as_it_is_stored():
    pair = Pair(dtype=torch.bfloat16)
    result = pair.teach(replace(FEW, learning_rate=1e-2))
    assert all(parameter.dtype == torch.bfloat16 for parameter in pair.student.parameters())
    assert result.after < result.before
    theirs = pair.outputs(3)[0].float()
    pair.student.float()  # the same numbers, in exact products
    with torch.no_grad():
        ours = run_layer(pair.student, pair.layer, pair.calls[3], pair.ours[3].float())
    assert result.after == pytest.approx(float(squared(ours, theirs, pair.calls[3].real)), rel=1e-3)


def test_products_in_bfloat16_teach_too():
    pair = Pair()
    result = pair.teach(FEW.with_products_in(torch.bfloat16))
    assert result.after < result.before
    assert all(parameter.dtype == torch.float32 for parameter in pair.student.parameters())


def test_states_are_read_one_batch_at_a_time():
    pair = Pair()
    alive = []

    def reading(states):
        def read(number):
            assert sum(reference() is not None for reference in alive) <= 1  # the other side's of the same batch
            found = states[number].clone()
            alive.append(weakref.ref(found))
            return found

        return read

    pair.teach(teacher_states=reading(pair.theirs), student_states=reading(pair.ours))
    assert len(alive) > 24


def test_two_batches_are_needed():
    pair = Pair()
    pair.calls = pair.calls[:1]
    with pytest.raises(DataError, match=r"at least 2 calibration batches.*got 1.*calibration\.batch_size"):
        pair.teach()


def test_of_few_batches_the_last_is_held_out():
    pair = Pair()
    result = pair.teach(replace(FEW, held_out_every=100))
    assert result.before == pytest.approx(float(squared(*reversed(Pair().outputs(3)), pair.calls[3].real)), rel=1e-4)


def test_states_that_are_not_numbers_are_told_with_the_layer():
    pair = Pair()
    pair.theirs[0] = torch.full_like(pair.theirs[0], float("nan"))
    with pytest.raises(NumericsError, match=r"Layer 1 cannot be taught at layerwise\.learning_rate 0\.005.*not finite"):
        pair.teach()


def test_no_steps_leave_the_layer_alone():
    pair = Pair()
    before = weights(pair.student)
    assert pair.teach(replace(FEW, steps=0)) is None
    assert changed(before, pair.student) == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "layerwise.steps is at least 0; got -1"),
        ({"learning_rate": 0.0}, "layerwise.learning_rate is above 0"),
        ({"batch_tokens": 0}, "layerwise.batch_tokens is at least 1, or null"),
        ({"warmup": 1.0}, r"layerwise.warmup is a share of the steps, in \[0, 1\)"),
        ({"held_out_every": 1}, "layerwise.held_out_every is at least 2"),
        ({"evaluate_every": 0}, "layerwise.evaluate_every is at least 1"),
        ({"patience": 0}, "layerwise.patience is at least 1, or null"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        LayerwiseConfig(**settings)


def make(name="bert", head="base", **settings):
    teacher, student = copy.deepcopy(made(name, head))
    if settings:
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", **settings)
    return teacher, student, [batch(teacher, seed=seed) for seed in range(4)]


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_a_finished_student_is_taught_layer_by_layer(name, head):
    teacher, student, batches = make(name, head)
    measure = "cosine" if head == "base" else "prediction_kl"
    before = makd.fidelity(student, teacher, batches[3:])[measure]
    done = []
    lessons = teach_layers_(student, teacher, HIDDEN, batches, FEW, on_progress=done.append)
    after = makd.fidelity(student, teacher, batches[3:])[measure]
    assert (after > before) if measure == "cosine" else (after < before)
    assert list(lessons) == [0, 1]
    assert all(result["after"] < result["before"] for result in lessons.values())
    assert [one.done for one in done if one.what == "teach layers"] == [0, 1, 2]
    assert {one.of for one in done if one.what == "teach layers"} == {2}


def test_each_layer_learns_on_what_the_taught_layers_before_it_give():
    teacher, student, batches = make()
    lessons = teach_layers_(student, teacher, HIDDEN, batches, FEW)
    with torch.no_grad():
        sides = [model(**batches[3], output_hidden_states=True).hidden_states[2] for model in (student, teacher)]
    assert lessons[1]["after"] == pytest.approx(float(squared(*sides, batches[3]["attention_mask"].bool())), rel=1e-4)


def test_a_students_own_embeddings_are_what_its_layers_read():
    teacher, student, batches = make(vocabulary="factored")
    lessons = teach_layers_(student, teacher, HIDDEN, batches, FEW)
    with torch.no_grad():
        sides = [model(**batches[3], output_hidden_states=True).hidden_states[2] for model in (student, teacher)]
    assert lessons[1]["after"] == pytest.approx(float(squared(*sides, batches[3]["attention_mask"].bool())), rel=1e-4)


def test_dropped_layers_are_passed_through():
    teacher = tiny("bert", num_hidden_layers=3)
    batches = [batch(teacher, seed=seed) for seed in range(4)]
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.3), solver="svd", depth=2, calibration=batches[:2])
    lessons = teach_layers_(student, teacher, HIDDEN, batches, FEW)
    assert len(lessons) == 2


@pytest.mark.parametrize(
    ("name", "head", "reason"), [("t5", "seq2seq_lm", "two stacks"), ("albert", "base", "share their weights")]
)
def test_models_whose_layers_cannot_be_run_alone_are_refused(name, head, reason):
    teacher, student, batches = make(name, head)
    with pytest.raises(SettingError, match=f"cannot be taught one by one.*{reason}.*Leave layerwise out"):
        teach_layers_(student, teacher, HIDDEN, batches, FEW)


def test_a_student_of_another_depth_or_width_is_refused():
    teacher, _, batches = make()
    for changes, what in (
        ({"num_hidden_layers": 1}, "has 1 of width 32, the teacher 2 of width 32"),
        ({"hidden_size": 16}, "has 2 of width 16"),
    ):
        with pytest.raises(SettingError, match=what):
            teach_layers_(tiny("bert", **changes), teacher, HIDDEN, batches, FEW)
