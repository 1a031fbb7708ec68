"""Layers that a student does without."""

from contextlib import ExitStack

import pytest
import torch

import makd
from makd.anatomy import SkippedLayer, resolve
from makd.aspects import activate
from makd.distill import LayerTeacher, LayerwiseConfig, teach_layers_
from makd.factorization.depth import droppable_layers, greedy_drops, layer_outputs, skipping
from makd.factorization.drift import choose_probes, drift
from tests.models import CONFIGS, TINY, batch, tiny

FOUR = {"num_hidden_layers": 4}


def make_student(name="llama", head="causal_lm", depth=3, solver="two_sided", **settings):
    teacher = tiny(name, head, **settings)
    budget = makd.Budget(keep_linears=0.5)
    return makd.factorize(teacher, budget, solver=solver, calibration=[batch(teacher)], depth=depth)


def test_the_next_to_go_is_always_the_layer_whose_absence_changes_the_outputs_least():
    teacher = tiny("bert", "sequence_classification", **FOUR)
    anatomy, batches = resolve(teacher), [batch(teacher), batch(teacher, seed=3)]
    layers, _ = droppable_layers(teacher, anatomy)
    first, second, third = greedy_drops(teacher, anatomy, layers, batches)
    alone = {}
    for name in layers:
        changed = tiny("bert", "sequence_classification", **FOUR)
        changed.set_submodule(name, SkippedLayer())
        alone[name] = drift(changed, teacher, anatomy, batches)
    assert first.layer == min(alone, key=alone.get)
    assert first.drift == pytest.approx(alone[first.layer], rel=1e-4)
    assert {first.layer, second.layer, third.layer} == set(layers)


def test_skipping_ends_with_the_block_also_after_an_error():
    model = tiny("llama", **FOUR)
    before = makd.fingerprint(model)
    with skipping(model, ["layers.1"]):
        assert makd.fingerprint(model) != before
    assert makd.fingerprint(model) == before
    with pytest.raises(RuntimeError, match="stop"), skipping(model, ["layers.1"]):
        raise RuntimeError("stop")
    assert makd.fingerprint(model) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_drops_layers_or_says_why_not(name):
    changes = {} if "num_hidden_layers" not in CONFIGS[name][1] else FOUR
    teacher = tiny(name, **changes)
    anatomy = resolve(teacher)
    layers, reason = droppable_layers(teacher, anatomy)
    if name in ("albert", "t5", "t5_gated", "bart"):
        assert not layers
        assert reason is not None
        return
    assert anatomy.layers[0].module not in layers
    outputs = layer_outputs(teacher, anatomy, batch(teacher))
    with skipping(teacher, layers[-1:], outputs):
        skipped = resolve(teacher)
        assert [layer.module for layer in skipped.layers if layer.is_skipped] == layers[-1:]
        assert any("dropped" in note for note in skipped.notes)
        teacher(**batch(teacher))


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("bert", "masked_lm"), ("llama", "causal_lm"),
                                            ("bert", "sequence_classification"), ("deberta_v2", "base"),
                                            ("mistral", "causal_lm")])  # fmt: skip
def test_a_student_without_some_layers_reloads_bit_for_bit(name, head, tmp_path):
    student = make_student(name, head, **FOUR)
    assert len(student.factorization.dropped) == 1
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert makd.fingerprint(again) == makd.fingerprint(student)
    assert resolve(again) == resolve(student)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_generation_with_a_cache_says_what_it_says_without(name):
    changes = {"n_layer": 4} if name == "gpt2" else FOUR
    student = make_student(name, depth=3, **changes)
    prompt = torch.tensor([[5, 9, 11, 7]])
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompt),
    }
    with torch.no_grad():
        cached = student.generate(prompt, use_cache=True, **options)
        plain = student.generate(prompt, use_cache=False, **options)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("solver", ["svd", "whitened", "regression", "two_sided_regression"])
def test_every_solver_works_around_dropped_layers(solver):
    student = make_student("bert", "base", depth=2, solver=solver, **FOUR)
    assert sum(layer.is_skipped for layer in resolve(student).layers) == 2


def leaving(model, inputs):
    """Hidden states that leave each layer, at real tokens."""
    found = {}
    with ExitStack() as hooks, torch.no_grad():
        for layer in resolve(model).layers:

            def note(_module, _inputs, output, index=layer.index):
                found[index] = output[0] if isinstance(output, tuple) else output

            hooks.callback(model.get_submodule(layer.module).register_forward_hook(note).remove)
        model(**inputs)
    return {index: states[inputs["attention_mask"].bool()] for index, states in found.items()}


@pytest.mark.parametrize("solver", ["two_sided", "two_sided_regression"])
@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_layers_are_fitted_and_taught_to_what_the_teacher_with_all_its_layers_gives(name, head, solver):
    teacher = tiny(name, head, **FOUR)
    batches, seen = [batch(teacher, seed=seed) for seed in range(2)], {}

    def look(walk, _student, layer):
        seen[layer.index] = walk.states(layer.index + 1, 1)[batches[1]["attention_mask"].bool()]

    makd.factorize(teacher, makd.Budget(keep_linears=0.3), solver=solver, calibration=batches, depth=2, teach=look)
    torch.testing.assert_close(seen, leaving(teacher, batches[1]))


def test_a_student_without_some_layers_is_taught_the_same_on_the_way_as_afterwards():
    teacher = tiny("bert", **FOUR)
    batches = [batch(teacher, seed=seed) for seed in range(4)]
    plan, few = makd.Plan(preset="full"), LayerwiseConfig(steps=3, held_out_every=2, evaluate_every=3)
    settings = {"solver": "two_sided", "calibration": batches, "depth": 2}
    budget = makd.Budget(keep_linears=0.3)
    on_the_way = makd.factorize(teacher, budget, teach=LayerTeacher(plan, few), **settings)
    afterwards = makd.factorize(teacher, budget, **settings)
    lessons = teach_layers_(afterwards, teacher, plan, batches, few)
    assert len(lessons) == 2
    assert dict(on_the_way.factorization.lessons) == lessons
    assert makd.fingerprint(on_the_way) == makd.fingerprint(afterwards)


def test_plans_leave_dropped_layers_out_and_say_when_nothing_is_left():
    student = make_student("bert", "base", depth=2, **FOUR)
    anatomy = resolve(student)
    kept = {layer.index for layer in anatomy.layers if not layer.is_skipped}
    assert {tap.layer for tap in activate(makd.Plan(preset="full"), anatomy).taps} == kept
    gone = next(layer.index for layer in anatomy.layers if layer.is_skipped)
    terms = (makd.Term(aspect="hidden", layers=[gone]), makd.Term(aspect="matrix"))
    assert "dropped" in activate(makd.Plan(terms=terms), anatomy).off["hidden"]


@pytest.mark.parametrize("depth", [0, 5, True, "some"])
def test_a_depth_that_is_none_is_refused_with_what_is_allowed(depth):
    with pytest.raises(
        makd.MakdError,
        match=r"depth (of factorize )?is .*(at least 1|from 1 to 4|a whole number)",
    ):
        make_student("bert", "base", depth=depth, **FOUR)


def test_dropping_layers_needs_text_to_measure_it_on():
    with pytest.raises(makd.MakdError, match="measured on calibration text"):
        makd.factorize(tiny("bert", **FOUR), makd.Budget(keep=0.5), solver="svd", depth=2)


def test_probes_are_spread_over_the_batches():
    batches = [{"input_ids": torch.full((1, 10), index)} for index in range(10)]
    assert [int(probe["input_ids"][0, 0]) for probe in choose_probes(batches, 50)] == [0, 2, 4, 6, 8]
    assert len(choose_probes(batches, 1)) == 1


def test_families_read_from_their_structure_keep_their_reading():
    model = TINY["bert"]()
    model.config.model_type = "never heard of"
    assert resolve(model).family == "resolved from structure"
    with skipping(model, ["encoder.layer.1"]):
        assert [layer.is_skipped for layer in resolve(model).layers] == [False, True]


def test_a_model_whose_code_looks_for_parts_of_its_layers_is_refused_by_what_it_looks_for():
    teacher = tiny("llama", "causal_lm", **FOUR)

    def look(model, _inputs):
        for layer in model.layers:
            assert layer.self_attn.layer_idx >= 0

    teacher.model.register_forward_pre_hook(look)
    budget, calibration = makd.Budget(keep_linears=0.5), [batch(teacher)]
    with pytest.raises(makd.MakdError, match=r"does not run without model\.layers\.1 .*self_attn.*depth to all"):
        makd.factorize(teacher, budget, solver="svd", depth=3, calibration=calibration)
    assert not any(isinstance(layer, SkippedLayer) for layer in teacher.model.layers)


def test_a_layer_that_does_nothing_takes_what_it_is_told():
    class Layer(torch.nn.Linear):
        def set_attention_type(self, value, layer_idx):
            self.attention_type = value

    skipped = SkippedLayer.in_place_of(Layer(2, 2), 0)
    assert skipped.set_attention_type("original_full", layer_idx=3) is None
