"""Exchanges operations of an ONNX graph for others that ONNX Runtime computes faster on a CPU; outputs stay the same.

Stands behind transformers' exporter, which fuses a graph for ONNX Runtime: three of the kernels that it ends in are
slower than what they stand for (benchmarks/onnx_kernels.py measures what is won).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir
    from onnx_ir.tape import Tape

ORT = "com.microsoft"
Write = Callable[["Tape", "onnx_ir.Node"], "Sequence[onnx_ir.Value] | None"]
"""Records what stands for a node; gives its outputs, fewer where the last ones have no use, or None to leave it."""


def choose_kernels_(program: "onnx_ir.Model", *, biases_into_products: bool) -> None:
    """Rewrite the graph in place.

    Args:
        program: as transformers' exporter fuses it for the CPU.
        biases_into_products: whether biases leave GELU for the product before it, as an int8 product adds them itself.
    """
    rules: dict[tuple[str, str], Write] = {
        (ORT, "SkipLayerNormalization"): _norm_after_sum,
        ("", "Where"): _product_with_mask,
    }
    if biases_into_products:
        rules[ORT, "BiasGelu"] = _gelu_after_bias
    for node in list(program.graph):
        write = rules.get((node.domain, node.op_type))
        if write is not None:
            _exchange(node, write)


def _exchange(node: "onnx_ir.Node", write: Write) -> None:
    import onnx_ir as ir

    tape = ir.tape.Tape()
    outputs = write(tape, node)
    if outputs is None or node.graph is None:
        return
    for output in outputs:
        output.shape, output.type = output.shape or node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], tape.nodes, node.outputs[: len(outputs)], list(outputs)
    )


def _constant(tape: "Tape", values: "np.ndarray") -> "onnx_ir.Value":
    import onnx_ir as ir

    return tape.op("Constant", [], {"value": ir.tensor(values)})


def _norm_after_sum(tape: "Tape", node: "onnx_ir.Node") -> "Sequence[onnx_ir.Value] | None":
    """The norm of a sum with a residual: `LayerNormalization` is vectorized, `SkipLayerNormalization` is not.

    ONNX Runtime would fuse sum and norm again when it loads the file; a reshape between them, to the shape that is
    there already and without a copy, keeps it from that.
    """
    inputs, used = node.inputs, [bool(output.uses()) or output.is_graph_output() for output in node.outputs]
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if len(inputs) < 4 or inputs[3] is None or any(used[1:3]):
        return None
    total = inputs[0]
    if len(inputs) > 4 and inputs[4] is not None:
        total = tape.op("Add", [total, inputs[4]])
    total = tape.op("Add", [total, inputs[1]])
    apart = tape.op("Reshape", [total, _constant(tape, np.array([0, 0, -1], dtype=np.int64))])
    normed = tape.op("LayerNormalization", [apart, inputs[2], inputs[3]], {"axis": -1, "epsilon": epsilon})
    if len(used) > 3 and used[3]:
        node.outputs[3].replace_all_uses_with(total)
    return [normed]


def _product_with_mask(tape: "Tape", node: "onnx_ir.Node") -> "Sequence[onnx_ir.Value] | None":
    """What attention gives for tokens that attend to none is made zero: by a product, which is vectorized."""
    condition, zeros, values = node.inputs
    if condition is None or zeros is None or values is None or zeros.const_value is None:
        return None
    if zeros.const_value.numpy().any() or not _is_attended(values):
        return None
    kept = tape.op("Cast", [tape.op("Not", [condition])], {"to": zeros.const_value.dtype})
    return [tape.op("Mul", [values, kept])]


def _is_attended(value: "onnx_ir.Value") -> bool:
    """Whether it is a mean of values that attention weighs: finite, where a product with 0 shall be 0."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    weights = node.inputs[0] if node is not None and node.op_type == "MatMul" else None
    made = weights.producer() if weights is not None else None
    return made is not None and made.op_type == "Softmax"


def _gelu_after_bias(tape: "Tape", node: "onnx_ir.Node") -> "Sequence[onnx_ir.Value]":
    return [tape.op("Gelu", [tape.op("Add", list(node.inputs))], domain=ORT)]
