"""What `makd inspect` shows, held against plain counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from makd.anatomy import describe, resolve, to_table
from makd.anatomy.describe import break_even_rank
from makd.student.linear import LowRankLinear
from tests.models import TINY, tiny


def shown(model, width=120):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(to_table(describe(model, resolve(model))))
    return capture.get()


@given(st.integers(2, 5000), st.integers(2, 5000))
def test_the_break_even_rank_is_the_largest_that_saves_weights(out_features, in_features):
    rank = break_even_rank(out_features, in_features)
    assert rank * (out_features + in_features) < out_features * in_features
    assert (rank + 1) * (out_features + in_features) >= out_features * in_features


@pytest.mark.parametrize("name", TINY)
class TestEveryFamily:
    def test_totals_are_plain_counts(self, name):
        model = TINY[name]()
        inspection = describe(model, resolve(model))
        assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())
        inside = ("query", "key", "value", "dense", "proj", "lin", "Wqkv", "Wo", "Wi", "c_attn", "c_fc", "fc1", "fc2",
                  "fc_in", "fc_out", ".q.", ".k.", ".v.", ".o.", ".wi", ".wo.", "ffn")  # fmt: skip
        outside = ("norm", "Norm", "embed", "pooler", "mapping", "relative", "bottleneck", "ffn.0.")
        by_name = sum(
            parameter.numel()
            for key, parameter in model.named_parameters()
            if any(part in key for part in inside) and not any(part in key for part in outside)
        )
        assert inspection.linear_parameters == by_name == sum(row.parameters for row in inspection.linears)
        assert inspection.linear_share == by_name / inspection.parameters

    def test_rows_are_the_factorizable_linears(self, name):
        model = TINY[name]()
        anatomy = resolve(model)
        rows = describe(model, anatomy).linears
        assert tuple(row.module for row in rows) == anatomy.linears
        for row in rows:
            linear = model.get_submodule(row.module)
            assert row.bias == (linear.bias is not None)
            assert row.parameters == row.out_features * row.in_features + (row.out_features if row.bias else 0)


def test_a_row_of_shared_layers_names_all_of_them_and_counts_once():
    inspection = describe(tiny("albert"), resolve(tiny("albert")))
    assert len(inspection.linears) == 6
    assert {row.layers for row in inspection.linears} == {(0, 1)}


def test_a_fused_linear_is_one_row_with_its_roles():
    inspection = describe(tiny("gpt2"), resolve(tiny("gpt2")))
    (fused,) = [row for row in inspection.linears if row.module == "h.0.attn.c_attn"]
    assert fused.roles == ("q", "k", "v")
    assert (fused.out_features, fused.in_features) == (96, 32)


def test_tied_embeddings_count_once():
    model = tiny("llama", "causal_lm", tie_word_embeddings=True)
    inspection = describe(model, resolve(model))
    assert inspection.embedding_parameters == 64 * 32
    assert inspection.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_model_of_32_layers_fits_on_a_screen():
    text = shown(tiny("llama", num_hidden_layers=32))
    assert len(text.splitlines()) < 24
    assert "0-31" in text
    assert "layers.*.self_attn.q_proj" in text


@pytest.mark.parametrize("name", TINY)
def test_a_narrow_terminal_folds_names_and_loses_no_character(name):
    model = TINY[name]()
    lines = shown(model, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    header = next(line for line in lines if "out x in" in line)
    left, right = header.index("linear"), header.index("out x in")
    names = "".join(line[left:right].split("  ")[0].strip() for line in lines)
    for linear in resolve(model).linears:
        inside = linear.split(".0.", maxsplit=1)
        assert len(inside) == 1 or inside[1] in names, linear


def test_layers_that_differ_have_rows_of_their_own():
    model = tiny("llama", num_hidden_layers=4)
    model.layers[2].mlp = tiny("llama", intermediate_size=128).layers[0].mlp
    rows = [line.split(" up ")[0].strip() for line in shown(model).splitlines() if "up_proj" in line]
    assert rows == ["0-1, 3", "2"]


def test_factored_linears_of_different_rank_have_rows_of_their_own():
    model = tiny("llama", num_hidden_layers=4)
    for layer, rank in enumerate((3, 3, 5, 5)):
        model.layers[layer].mlp.up_proj = LowRankLinear(32, 64, rank, bias=False)
    rows = [line.split()[0] for line in shown(model).splitlines() if "up_proj" in line]
    assert rows == ["0-1", "2-3"]
    (first, *_) = [row for row in describe(model, resolve(model)).linears if row.module.endswith("up_proj")]
    assert (first.out_features, first.in_features, first.parameters) == (64, 32, 3 * (64 + 32))


def test_what_is_off_and_what_stays_dense_is_shown():
    text = shown(tiny("deberta_v2", share_att_key=False), width=300)
    assert "aspect attention is off" in text
    assert "pos_key_proj" in text


def test_an_inspection_prints_as_its_table():
    model = tiny("bert")
    assert str(describe(model, resolve(model))) == shown(model)
