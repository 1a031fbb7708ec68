"""Where inside a student its error is: the numbers, against sums in float64 that know nothing of makd's."""

import pytest
import torch

import makd
from makd.evaluation.inside import LONGEST, TOKENS, look_inside
from makd.student.hub import mark_student
from tests.models import batch, tiny


def outputs(model, module, inputs):
    """What a module gives in one forward, (tokens, features) of real tokens, float64."""
    kept = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _module, _inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return kept[0][inputs["attention_mask"].bool()].double()


def relative(ours, theirs):
    """Squared difference in units of the variance around each channel's mean."""
    return float((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())


@pytest.fixture(scope="module", params=["bert", "llama"])
def pair(request):
    teacher = tiny(request.param, "base" if request.param == "bert" else "causal_lm")
    batches = [batch(teacher, seed=seed) for seed in (0, 1)]
    return makd.factorize(teacher, makd.Budget(keep_linears=0.6), calibration=batches), teacher, batches


@pytest.fixture(scope="module")
def found(pair):
    return look_inside(*pair)


def test_a_linear_has_the_relative_error_of_its_output(pair, found):
    student, teacher, batches = pair
    linears = makd.resolve(teacher).linears
    assert list(found.linears) == list(linears)
    for name in linears:
        sides = [torch.cat([outputs(model, name, inputs) for inputs in batches]) for model in (student, teacher)]
        assert found.linears[name] == pytest.approx(relative(*sides), rel=1e-4, abs=1e-9)


def test_a_layer_has_the_relative_error_and_the_cosine_of_its_hidden_states(pair, found):
    student, teacher, batches = pair
    for layer in makd.resolve(teacher).layers:
        ours, theirs = (
            torch.cat([outputs(model, layer.module, inputs) for inputs in batches]) for model in (student, teacher)
        )
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        assert found.layers[layer.index]["hidden_error"] == pytest.approx(relative(ours, theirs), rel=1e-4)
        assert found.layers[layer.index]["hidden_cosine"] == pytest.approx(float(cosine), abs=1e-5)


def test_attention_has_the_mean_divergence_of_heads_and_real_queries(pair, found):
    student, teacher, batches = pair
    total, count = 0.0, 0
    for inputs in batches:
        weights = []
        for model in (student, teacher):
            model.set_attn_implementation("eager")
            with torch.no_grad():
                weights.append(model(**inputs, output_attentions=True).attentions[1].double())
            model.set_attn_implementation("sdpa")
        ours, theirs = weights
        kl = (theirs * (theirs.clamp_min(1e-30).log() - ours.clamp_min(1e-30).log())).sum(-1).mean(1)
        real = inputs["attention_mask"].bool()
        total, count = total + float(kl[real].sum()), count + int(real.sum())
    assert found.layers[1]["attention_kl"] == pytest.approx(total / count, rel=1e-3)


def test_padding_has_no_say(pair):
    student, teacher, batches = pair
    inputs = batches[0]
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in inputs.items()}
    few, many = look_inside(student, teacher, [inputs]), look_inside(student, teacher, [wider])
    assert few.tokens == many.tokens
    assert many.linears == pytest.approx(few.linears, rel=1e-3)


def test_a_copy_has_no_error(pair):
    _, teacher, batches = pair
    found = look_inside(teacher, teacher, batches)
    assert set(found.linears.values()) == {0.0}
    assert all(layer["hidden_error"] == 0 and layer["attention_kl"] < 1e-5 for layer in found.layers.values())


def test_nothing_random_is_drawn_and_the_models_are_as_they_were(pair):
    student, teacher, batches = pair
    student.train()
    before = torch.get_rng_state(), {name: value.clone() for name, value in student.state_dict().items()}
    look_inside(student, teacher, batches)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in student.state_dict().items())
    assert student.training
    student.eval()


def test_no_more_text_is_looked_at_than_takes_seconds(pair):
    student, teacher, _ = pair
    rows = [batch(teacher, padded=False, seed=seed) for seed in range(200)]
    found = look_inside(student, teacher, rows)
    assert TOKENS <= found.tokens < TOKENS + LONGEST


def test_a_layer_that_the_student_does_without_has_no_numbers():
    teacher = tiny("bert")
    batches = [batch(teacher)]
    student = makd.factorize(teacher, makd.Budget(keep=0.9), calibration=batches, depth=1)
    found = look_inside(student, teacher, batches)
    assert len(found.layers) == 1
    assert len(found.linears) == 6


def test_models_of_another_depth_say_why_they_are_not_compared():
    student, teacher = tiny("bert", num_hidden_layers=1), tiny("bert")
    mark_student(student)
    found = look_inside(student, teacher, [batch(teacher)])
    assert "1 layers and the teacher 2" in found.missing["matrix"]
    assert not found.linears


def test_an_encoder_decoder_has_both_stacks_and_cross_attention():
    teacher = tiny("t5", "seq2seq_lm")
    batches = [batch(teacher)]
    found = look_inside(makd.factorize(teacher, makd.Budget(keep_linears=0.6), calibration=batches), teacher, batches)
    assert len(found.layers) == 4
    assert "cross_attention_kl" in found.layers[3]
    assert "cross_attention_kl" not in found.layers[0]


def test_attention_of_other_heads_is_not_compared():
    teacher = tiny("bert")
    found = look_inside(tiny("bert", num_attention_heads=2), teacher, [batch(teacher)])
    assert found.missing == {"attention": "2 heads beside the teacher's 4 in layers 0, 1"}
    assert "attention_kl" not in found.layers[0]


def test_hidden_states_of_another_width_are_not_compared():
    teacher = tiny("bert")
    found = look_inside(tiny("bert", hidden_size=16), teacher, [batch(teacher)])
    assert found.missing["hidden"] == "the output is 16 wide beside the teacher's 32 in layers 0, 1"
    assert found.linears.keys() == {f"encoder.layer.{layer}.intermediate.dense" for layer in (0, 1)}
