"""Merged factored linears give what the linears give one by one, whole or split over processes."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from makd.errors import UnsupportedModelError
from makd.serving.merged import Block, MergedLinear, Shard, find_merged
from makd.student.config import StudentConfig

ROOT = Path(__file__).parents[2]
INPUTS, BATCH = 12, 5
OUTPUTS = {"q": 8, "k": 4, "v": 4}
LAYOUTS = {
    "an A for each": {"q": (6, "q"), "k": (3, "k"), "v": (2, "v")},
    "one A for all": {"q": (6, "q"), "k": (6, "q"), "v": (6, "q")},
    "one A for two that stand apart": {"q": (6, "q"), "k": (3, "k"), "v": (6, "q")},
    "a dense one between": {"q": (6, "q"), "k": None, "v": (6, "q")},
    "two dense ones": {"q": None, "k": None, "v": (2, "v")},
}


class Linears:
    """Random weights of queries, keys and values, in float64, with a layout of `LAYOUTS`."""

    def __init__(self, layout):
        random = torch.Generator().manual_seed(0)

        def matrix(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.merged = MergedLinear(
            tuple(Shard(name) if entry is None else Shard(name, *entry) for name, entry in layout.items())
        )
        self.inputs = matrix(BATCH, INPUTS)
        self.reduces = {name: matrix(entry[0], INPUTS) for name, entry in layout.items() if entry and entry[1] == name}
        self.expands = {name: matrix(OUTPUTS[name], entry[0] if entry else INPUTS) for name, entry in layout.items()}
        self.biases = {name: matrix(OUTPUTS[name]) for name in layout}
        self.dense = {
            name: self.expands[name] @ self.reduces[entry[1]] if entry else self.expands[name]
            for name, entry in layout.items()
        }

    def stacked_reduce(self):
        return torch.cat([self.reduces[self.merged.shards[index].name] for index in self.merged.leaders])

    def expand(self, block, rows=slice(None)):
        names = [shard.name for shard in self.merged.shards[block.first : block.first + block.count]]
        weight = torch.cat([self.expands[name][rows] for name in names])
        bias = torch.cat([self.biases[name][rows] for name in names])
        return lambda product: torch.nn.functional.linear(product, weight, bias)

    def expected(self, rows=slice(None)):
        return torch.cat(
            [self.inputs @ self.dense[name][rows].T + self.biases[name][rows] for name in self.dense], dim=-1
        )


@pytest.fixture(params=LAYOUTS)
def linears(request):
    return Linears(LAYOUTS[request.param])


def test_the_outputs_are_those_of_the_dense_linears_one_after_the_other(linears):
    weight = linears.stacked_reduce()
    found = linears.merged.multiply(
        linears.inputs, lambda x: x @ weight.T, [linears.expand(block) for block in linears.merged.blocks]
    )
    torch.testing.assert_close(found, linears.expected(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_with_half_of_the_outputs_needs_all_of_a_and_its_rows_of_b(process):
    linears = Linears(LAYOUTS["an A for each"])
    rows = slice(process, None, 2)
    weight = linears.stacked_reduce()
    found = linears.merged.multiply(
        linears.inputs, lambda x: x @ weight.T, [linears.expand(block, rows) for block in linears.merged.blocks]
    )
    torch.testing.assert_close(found, linears.expected(rows), rtol=1e-12, atol=1e-12)


def test_processes_with_parts_of_the_inputs_may_add_their_products_before_b():
    linears = Linears({"q": (6, "q")})
    halves = [slice(0, INPUTS // 2), slice(INPUTS // 2, INPUTS)]
    weight = linears.stacked_reduce()
    found = linears.merged.multiply(
        linears.inputs,
        lambda x: sum(x[:, half] @ weight[:, half].T for half in halves),
        [linears.expand(block) for block in linears.merged.blocks],
    )
    torch.testing.assert_close(found, linears.expected(), rtol=1e-12, atol=1e-12)


def test_linears_that_share_an_a_and_stand_together_are_multiplied_together():
    assert Linears(LAYOUTS["one A for all"]).merged.blocks == (Block(0, 3, 0),)
    assert Linears(LAYOUTS["an A for each"]).merged.blocks == (Block(0, 1, 0), Block(1, 1, 1), Block(2, 1, 2))
    assert Linears(LAYOUTS["a dense one between"]).merged.blocks == (Block(0, 1, 0), Block(1, 1, None), Block(2, 1, 0))


def student(ranks, shared=None):
    counts = {"total": 1, "factored": 1, "vocabulary": 1}
    return StudentConfig(ranks, counts, "LlamaForCausalLM", shared=shared, identity="0" * 16)


def found(module, parts, config):
    return find_merged(module, parts, config, {name: name for name in config.ranks})


class TestFinding:
    def test_a_linear_of_its_own(self):
        config = student({"model.layers.0.o_proj": 7})
        assert found("model.layers.0.o_proj", (), config) == MergedLinear(
            (Shard("model.layers.0.o_proj", 7, "model.layers.0.o_proj"),)
        )

    def test_parts_of_a_merged_one_with_their_ranks_and_leaders(self):
        config = student({"a.q": 3, "a.k": 3, "a.v": 2}, {"a.q": ["a.k"]})
        assert found("a.qkv", ("q", "k", "v"), config) == MergedLinear(
            (Shard("a.q", 3, "a.q"), Shard("a.k", 3, "a.q"), Shard("a.v", 2, "a.v"))
        )

    def test_parts_that_stayed_dense(self):
        assert found("a.gate_up", ("gate", "up"), student({"a.up": 3})) == MergedLinear(
            (Shard("a.gate"), Shard("a.up", 3, "a.up"))
        )

    def test_one_that_is_merged_in_the_student_too(self):
        assert found("a.gate_up", ("gate", "up"), student({"a.gate_up": 3})) == MergedLinear(
            (Shard("a.gate_up", 3, "a.gate_up"),)
        )

    def test_nothing_where_nothing_is_factored(self):
        assert found("b.qkv", ("q", "k", "v"), student({"a.q": 3})) is None

    @pytest.mark.parametrize(
        ("server", "own"), [("model.layers.0.q", "layers.0.q"), ("layers.0.q", "model.layers.0.q")]
    )
    def test_a_base_models_prefix_may_be_on_one_side_only(self, server, own):
        assert found(server, (), student({own: 3})).shards[0].name == own

    def test_berts_queries_which_vllm_takes_for_part_of_the_output(self):
        config = student({"encoder.layer.0.attention.self.query": 3, "encoder.layer.1.attention.self.query": 4})
        merged = found("model.encoder.layer.1.attention.output.qkv_proj", ("query", "key", "value"), config)
        query = "encoder.layer.1.attention.self.query"
        assert merged.shards[0] == Shard(query, 4, query)
        assert [shard.rank for shard in merged.shards] == [4, None, None]

    def test_no_linear_is_taken_for_another_of_the_same_last_name(self):
        assert found("encoder.layer.0.output.dense", (), student({"encoder.layer.0.intermediate.dense": 3})) is None

    def test_an_a_that_stands_in_another_linear_is_refused(self):
        config = student({"a.q": 3, "a.up": 3}, {"a.q": ["a.up"]})
        with pytest.raises(UnsupportedModelError, match=r"'a\.up' shares its A with 'a\.q'.*makd export"):
            found("a.gate_up", ("gate", "up"), config)


def test_vllm_finds_the_plugin_by_its_entry_point():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(
        r'^\[project\.entry-points\."vllm\.general_plugins"\]\nmakd = "([\w.:]+)"', text, re.MULTILINE
    )
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_where_there_is_no_vllm_nothing_asks_for_it():
    code = "import sys, makd, makd.serving.merged, makd.serving.vllm_plugin; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
