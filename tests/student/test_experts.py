"""Routed experts in factors: the module that stands in the place of the architecture's own."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import makd
from makd.anatomy import count_experts, resolve
from makd.errors import ModelLoadError
from makd.evaluation import parameter_counts
from makd.solvers.stacks import StackFactors
from makd.student.experts import FactoredExperts, FactoredStack, replace_stack_
from makd.student.folding import fold
from makd.student.hub import mark_student
from tests.models import batch, tiny

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe_mixed", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe_mixed",
            "llama4", "aria"]  # fmt: skip
SIDES = ["", "reduce", "expand"]


def factored(teacher, side="", rank=None):
    """A student whose experts have exact factors, or, where one side is shared, made-up ones."""
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    for stack in resolve(teacher).stacks:
        module = teacher.get_submodule(stack.module)
        weight = module.get_parameter(stack.leaf).detach()
        weight = weight.transpose(1, 2) if getattr(module, "is_transposed", True) else weight
        if side == "":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            factors = StackFactors(left * values[:, None], right)
        else:
            rank = min(stack.out_features, stack.in_features)
            shapes = [(stack.experts, stack.out_features, rank), (stack.experts, rank, stack.in_features)]
            parts = [torch.randn(shape, generator=generator) / 8 for shape in shapes]
            factors = StackFactors(parts[0][:1] if side == "expand" else parts[0],
                                   parts[1][:1] if side == "reduce" else parts[1])  # fmt: skip
        replace_stack_(student, stack, factors, side)
    mark_student(student)
    return student


@pytest.mark.parametrize("name", MIXTURES)
class TestEveryMixture:
    def test_at_full_rank_the_student_gives_what_its_teacher_gives(self, name):
        teacher = tiny(name)
        inputs = batch(teacher)
        real = inputs["attention_mask"].bool()
        expected, found = (model(**inputs)[0][real] for model in (teacher, factored(teacher)))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    def test_a_student_resolves_like_its_teacher_and_counts_its_factors(self, name):
        teacher = tiny(name)
        student = factored(teacher)
        assert resolve(student) == resolve(teacher)
        numbers = [p.numel() for path, p in student.named_parameters() if ".experts." in path]
        assert count_experts(student, resolve(student)) == sum(numbers)
        assert parameter_counts(student, resolve(student))["linears"] > sum(numbers)

    def test_folded_experts_are_the_architectures_own_again(self, name):
        teacher = tiny(name)
        student = factored(teacher)
        folded = fold(student)
        assert not hasattr(folded.config, "quantization_config")
        for stack in resolve(teacher).stacks:
            assert type(folded.get_submodule(stack.module)) is type(teacher.get_submodule(stack.module))
        inputs = batch(teacher)
        torch.testing.assert_close(folded(**inputs)[0], student(**inputs)[0], rtol=1e-3, atol=1e-4)
        assert folded.state_dict().keys() == teacher.state_dict().keys()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
class TestSaving:
    def test_a_saved_student_loads_bit_for_bit(self, name, side, tmp_path):
        student = factored(tiny(name, "causal_lm" if name == "mixtral" else "base"), side)
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path)
        assert again.state_dict().keys() == student.state_dict().keys()
        for key, value in student.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        assert torch.equal(again(**batch(again))[0], student(**batch(student))[0])

    def test_gradients_reach_both_sides(self, name, side, tmp_path):
        student = factored(tiny(name), side)
        student(**batch(student))[0].square().sum().backward()
        stacks = [module for module in student.modules() if isinstance(module, FactoredStack)]
        assert len(stacks) == 4
        for stack in stacks:
            assert stack.reduce.weight.grad.abs().sum() > 0
            assert stack.expand.weight.grad.abs().sum() > 0


class TestFiles:
    @pytest.mark.parametrize(("experts", "expected"), [("factored", 5), ("dense", 4)])
    def test_a_student_without_factored_experts_is_saved_as_before_there_were_any(self, tmp_path, experts, expected):
        teacher = tiny("mixtral")
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.9 + 0.05 * (experts == "dense")), solver="svd",
                                 experts=experts)  # fmt: skip
        student.save_pretrained(tmp_path)
        entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert entry["format"] == expected
        assert ("experts" in entry) == (expected == 5)

    def test_another_head_loads_the_same_experts(self, tmp_path):
        student = factored(tiny("mixtral", "causal_lm"))
        student.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
        assert isinstance(base.layers[0].mlp.experts, FactoredExperts)
        assert torch.equal(base(**batch(base))[0], student.model(**batch(base))[0])

    def test_factors_are_not_renamed_split_or_joined_on_their_way(self, tmp_path):
        student = factored(tiny("mixtral"))
        student.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors").keys()
        inside = {name.removeprefix("layers.0.mlp.experts.") for name in names if name.startswith("layers.0.mlp.exp")}
        assert inside == {f"{stack}{end}" for stack in ("gate_up_proj", "down_proj")
                          for end in ("", ".reduce.weight", ".expand.weight")}  # fmt: skip

    def test_without_makd_the_files_do_not_fit_the_architecture(self, tmp_path):
        """The identity has the name of the dense stack, and a shape that cannot be its."""
        factored(tiny("mixtral")).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        assert tensors["layers.0.mlp.experts.down_proj"].shape == (1, 1, 1, 1)

    def test_weights_of_another_student_are_refused(self, tmp_path):
        first, other = factored(tiny("mixtral")), factored(tiny("mixtral", seed=1))
        first.save_pretrained(tmp_path / "first")
        other.save_pretrained(tmp_path / "other")
        tensors = load_file(tmp_path / "other" / "model.safetensors")
        save_file(tensors, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match="different students"):
            AutoModel.from_pretrained(tmp_path / "first")

    @pytest.mark.parametrize(
        ("entry", "words"),
        [
            ({"rank": 8, "shared": "both"}, "quantization_config.experts is"),
            ({"rank": 0, "shared": ""}, "quantization_config.experts is"),
            ({"rank": 999, "shared": ""}, "rank 999"),
        ],
    )
    def test_a_config_that_was_changed_is_refused(self, tmp_path, entry, words):
        factored(tiny("mixtral")).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["experts"]["layers.0.mlp.experts.down_proj"] = entry
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=words):
            AutoModel.from_pretrained(tmp_path)

    def test_a_stack_may_stay_dense_beside_one_in_factors(self, tmp_path):
        teacher = tiny("gpt_oss")
        student = copy.deepcopy(teacher)
        stack = resolve(teacher).stacks[1]
        weight = teacher.get_submodule(stack.module).get_parameter(stack.leaf).detach().transpose(1, 2)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        replace_stack_(student, stack, StackFactors(left * values[:, None], right), "")
        mark_student(student)
        torch.testing.assert_close(student(**batch(teacher))[0], teacher(**batch(teacher))[0], rtol=1e-3, atol=1e-4)
        student.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(again(**batch(again))[0], student(**batch(student))[0])


def test_a_rank_that_experts_cannot_have_is_an_error():
    with pytest.raises(ValueError, match=r"rank is in 1\.\.4 "):
        FactoredStack(2, 4, 8, 5)
    assert FactoredStack(2, 4, 8, 5, "reduce").rank == 5  # what all look at together may be more than each makes of it


def test_printing_a_student_says_what_experts_share():
    assert "rank=4, one B" in repr(FactoredStack(2, 4, 8, 4, "expand"))
