"""Operations that ONNX Runtime is slow at are exchanged for faster ones, which compute the same."""

import onnx
import onnx_ir as ir
import pytest
import torch

import makd
from makd.errors import ExportError
from makd.export import OnnxSession, save_onnx
from makd.export.onnx_kernels import choose_kernels_
from makd.export.onnx_model import run_by
from tests.models import batch, tiny


def make_student(name, head):
    return makd.factorize(tiny(name, head), makd.Budget(keep_linears=0.5), solver="svd").eval()


def operations(folder):
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


@pytest.mark.parametrize(
    ("name", "head", "quantize", "gone"),
    [
        ("bert", "sequence_classification", "int8", {"SkipLayerNormalization", "Where", "BiasGelu"}),
        ("gpt2", "causal_lm", "none", {"SkipLayerNormalization"}),  # whose norms hand on the sum besides
    ],
)
def test_the_slow_operations_are_gone(name, head, quantize, gone, tmp_path):
    save_onnx(make_student(name, head), tmp_path, quantize=quantize)  # compares float files with the student
    assert not gone & operations(tmp_path)
    assert "LayerNormalization" in operations(tmp_path)


def where(values):
    """A graph of one Where, whose zeros stand where a token attends to none."""
    graph = onnx.helper.make_graph(
        [*values, onnx.helper.make_node("Where", ["none", "zero", "values"], ["out"])],
        "g",
        [
            onnx.helper.make_tensor_value_info("none", onnx.TensorProto.BOOL, [2, 1]),
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2]),
        ],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [2, 2])],
        [onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])],
    )
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))


def test_zeros_for_what_may_be_infinite_are_chosen_and_no_product():
    program = where([onnx.helper.make_node("Log", ["x"], ["values"])])
    choose_kernels_(program, biases_into_products=False)
    assert [node.op_type for node in program.graph] == ["Log", "Where"]


def test_zeros_for_a_mean_that_attention_made_are_a_product(tmp_path):
    program = where(
        [
            onnx.helper.make_node("Softmax", ["x"], ["weights"]),
            onnx.helper.make_node("MatMul", ["weights", "x"], ["values"]),
        ]
    )
    choose_kernels_(program, biases_into_products=False)
    ir.save(program, tmp_path / "model.onnx")
    assert "Where" not in operations(tmp_path)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    found = OnnxSession(tmp_path / "model.onnx")(none=torch.tensor([[True], [False]]), x=x)["out"]
    expected = x.softmax(-1) @ x
    expected[0] = 0
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_file_stands_behind_the_class_of_its_model(tmp_path):
    student = make_student("bert", "token_classification")
    save_onnx(student, tmp_path)
    found = run_by(student, OnnxSession(tmp_path / "model.onnx"))
    inputs = batch(student)
    kept = inputs["attention_mask"].bool()
    assert type(found) is type(student)
    torch.testing.assert_close(found(**inputs).logits[kept], student(**inputs).logits[kept], atol=1e-4, rtol=0)


def test_what_the_file_does_not_take_is_no_input(tmp_path):
    student = make_student("bert", "token_classification")
    save_onnx(student, tmp_path)
    found = run_by(student, OnnxSession(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="cannot be given position_ids"):
        found(**batch(student), position_ids=torch.zeros(1, 4, dtype=torch.long))
