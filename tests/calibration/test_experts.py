"""What each expert reads and what comes back to it, against a reference that goes token by token in float64."""

import copy

import pytest
import torch

from makd.anatomy import resolve
from makd.calibration.experts import ExpertMoments, ExpertWatcher
from makd.calibration.gradients import collect_gradient_moments
from makd.calibration.source import ModelSource
from makd.calibration.statistics import collect_input_moments
from makd.calibration.store import MemoryStore
from makd.calibration.walk import Walk
from makd.errors import DataError
from tests.models import batch, tiny

NAMES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4"]


def collected(model, batches):
    experts = {}
    collect_input_moments(model, resolve(model), batches, experts=experts)
    return experts


def reference(model, inputs):
    """Stack -> expert -> rows that it reads, token by token; from what the experts' module is called with."""
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # grouped products know no float64
    calls = {}
    for stack in resolve(wide).stacks:
        module = wide.get_submodule(stack.module)
        if stack.module not in calls:
            module.register_forward_pre_hook(lambda _m, given, at=stack.module: calls.__setitem__(at, given))
            calls[stack.module] = None
    with torch.no_grad():
        wide(**inputs)
    real = inputs["attention_mask"].flatten().bool()
    found = {}
    for stack in resolve(wide).stacks:
        module, given = wide.get_submodule(stack.module), calls[stack.module]
        rows = found.setdefault(stack.name, [[] for _ in range(stack.experts)])
        for token in range(len(real)):
            if not real[token]:
                continue
            if len(given) == 1:
                routed = given[0].view(stack.experts, len(real), -1)[:, token]
                chosen = [(expert, routed[expert]) for expert in range(stack.experts) if routed[expert].abs().sum() > 0]
            else:
                chosen = [(int(expert), given[0][token]) for expert in given[1][token]]
            for expert, read in chosen:
                if stack.leaf == "down_proj":
                    weight, bias = module.gate_up_proj[expert], getattr(module, "gate_up_proj_bias", None)
                    first = read @ (weight if getattr(module, "is_transposed", True) else weight.T)
                    first = first if bias is None else first + bias[expert]
                    if hasattr(module, "_apply_gate"):
                        read = module._apply_gate(first)
                    else:
                        gate, up = first.chunk(2)
                        read = module.act_fn(gate) * up
                rows[expert].append(read.detach())
    return found


@pytest.mark.parametrize("name", NAMES)
class TestEveryMixture:
    def test_moments_of_each_expert_are_those_of_the_real_tokens_that_it_gets(self, name):
        model = tiny(name)
        inputs = batch(model)
        found, expected = collected(model, [inputs]), reference(model, inputs)
        assert found.keys() == expected.keys()
        for stack, experts in expected.items():
            assert found[stack].tokens == int(inputs["attention_mask"].sum())
            for one, rows in zip(found[stack].of_experts, experts, strict=True):
                assert one.rows == len(rows)
                if rows:
                    read = torch.stack(rows)
                    torch.testing.assert_close(one.gram, read.T @ read / len(rows), rtol=1e-3, atol=1e-5)

    def test_a_model_that_is_watched_gives_what_it_gives_otherwise(self, name):
        model = tiny(name)
        inputs = batch(model)
        anatomy = resolve(model)
        watcher = ExpertWatcher(model, anatomy, {})
        watcher.start(inputs)
        with torch.no_grad():
            expected = model(**inputs)[0]
            with watcher.watching(anatomy.stacks):
                found = model(**inputs)[0]
            assert torch.equal(model(**inputs)[0], expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_at_what_experts_give_are_those_of_their_weights(self, name):
        """The gradient of a weight is the sum of g xᵀ: with one token that one product."""
        model = tiny(name)
        anatomy = resolve(model)
        stack = anatomy.stacks[-1]
        inputs = {key: value[:1, :1] for key, value in batch(model, padded=False).items()}
        outputs = []
        watcher = ExpertWatcher(model, anatomy, {})
        watcher.start(inputs)

        def keep(name, output, _counted):
            if name == stack.name:
                output.retain_grad()
                outputs.append(output)

        with watcher.watching(anatomy.stacks, False, keep):
            model(**inputs)[0].square().sum().backward()
        module, read = model.get_submodule(stack.module), reference(model, inputs)[stack.name]
        weights = module.get_parameter(stack.leaf).grad
        chosen = [expert for expert in range(stack.experts) if read[expert]]
        for expert, output in zip(chosen, outputs, strict=True):
            expected = torch.outer(output.grad[0].double(), read[expert][0])
            found = weights[expert].T if getattr(module, "is_transposed", True) else weights[expert]
            size = float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * size)

    def test_a_walk_finds_what_the_whole_model_shows(self, name):
        model = tiny(name)
        anatomy, inputs = resolve(model), batch(model)
        walk = Walk(ModelSource(model.requires_grad_(False)), anatomy, [inputs], MemoryStore())
        for _ in walk.up(lambda *_: None):
            pass
        whole, gradients = collected(model, [inputs]), collect_gradient_moments(model, anatomy, [inputs])
        for moments in walk.down(lambda *_: None):
            assert {stack.name for stack in moments.stacks} == moments.experts.keys()
            for stack, found in moments.experts.items():
                torch.testing.assert_close(found.layer_gram, whole[stack].layer_gram, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(moments.gradients[stack].gram, gradients[stack].gram, rtol=1e-2, atol=1e-6)


class TestPulledMoments:
    def moments(self, rows):
        stack = resolve(tiny("mixtral")).stacks[0]
        found = ExpertMoments(stack)
        for one, count in zip(found.of_experts, rows, strict=True):
            if count:
                one.update(torch.randn(count, stack.in_features, generator=torch.Generator().manual_seed(count)))
        found.tokens = sum(rows)
        return found

    def test_an_expert_without_tokens_has_the_layers(self):
        found = self.moments([3, 0, 50, 7])
        assert torch.equal(found.pulled(1, found.layer_gram), found.layer_gram)

    def test_with_as_many_tokens_as_features_both_count_alike(self):
        found = self.moments([32, 0, 50, 7])
        expected = (found.of_experts[0].gram + found.layer_gram) / 2
        torch.testing.assert_close(found.pulled(0, found.layer_gram), expected)

    def test_many_tokens_are_hardly_pulled(self):
        found = self.moments([32000, 0, 50, 7])
        pulled, own = found.pulled(0, found.layer_gram), found.of_experts[0].gram
        assert float((pulled - own).abs().max()) < 2e-3 * float(own.max())

    def test_shares_count_one_token_more_for_each(self):
        found = self.moments([3, 0, 50, 7])
        torch.testing.assert_close(found.shares, torch.tensor([4, 1, 51, 8], dtype=torch.float64) / 64)


def test_text_that_reaches_no_expert_is_an_error():
    model = tiny("mixtral")
    with pytest.raises(DataError):
        collected(model, [])
