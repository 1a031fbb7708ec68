"""Would one shared first factor for linears that read the same input (Q, K, V; gate, up) lose less, at an equal budget?

    python benchmarks/shared_input.py minilm
    python benchmarks/shared_input.py smollm2

Compares predicted errors (those of `two_sided`, so in units of the model's outputs): a linear of its own costs rank ·
(out + in), a group with a shared A rank · (sum of outs + in), and its best factors come from the stacked weighted
matrices. Ranks are those of one Lagrange multiplier for the whole model, each group as it is better at that multiplier.
Texts and data are those of benchmarks/factorization.py. One JSON line a budget, on stdout.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from factorization import Subject, calibrate, minilm, smollm2
from torch import Tensor

from makd.anatomy import resolve
from makd.lowrank.layerwise import GROUPS
from makd.lowrank.linear import dense_weight
from makd.lowrank.solvers.two_sided import OUTPUT_RIDGE
from makd.lowrank.solvers.whitened import condition, square_root

Curve = tuple[np.ndarray, np.ndarray]
"""Weights and error at every rank below break-even, and dense."""


def weighted(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Lᵀ W R, whose singular values squared are what terms are worth."""
    ridge = OUTPUT_RIDGE * gradients.diagonal().mean() * torch.eye(len(gradients), dtype=gradients.dtype)
    return square_root(gradients + ridge).T @ weight.double() @ square_root(condition(inputs)[0])


def curve(matrix: Tensor) -> Curve:
    """Cost and error of each rank of a matrix."""
    rows, columns = matrix.shape
    energies = torch.linalg.svdvals(matrix).square().numpy()
    ranks = np.arange((rows * columns - 1) // (rows + columns) + 1)
    lost = np.append(energies.sum() - np.concatenate([[0.0], energies.cumsum()])[ranks], 0.0)
    return np.append(ranks * (rows + columns), rows * columns), lost


def cheapest(curves: list[Curve], price: float) -> tuple[float, float, float]:
    """Error plus price times weights, weights and error of the best ranks at this price."""
    chosen = [(int(np.argmin(lost + price * cost)), cost, lost) for cost, lost in curves]
    cost, lost = sum(float(c[i]) for i, c, _ in chosen), sum(float(e[i]) for i, _, e in chosen)
    return lost + price * cost, cost, lost


def least_error(groups: list[tuple[list[Curve], list[Curve] | None]], budget: float, ways: str) -> tuple[float, int]:
    """Predicted error within the budget, and how many groups share; `ways` is separate, shared or better."""
    low, high = 1e-30, 1e10
    for _ in range(120):
        price = (low * high) ** 0.5
        total = error = 0.0
        sharing = 0
        for separate, shared in groups:
            options = [cheapest(separate, price)] if ways != "shared" or shared is None else []
            if shared is not None and ways != "separate":
                options.append(cheapest(shared, price))
            best = min(options)
            sharing += shared is not None and best == options[-1] and ways != "separate"
            total, error = total + best[1], error + best[2]
        low, high = (price, high) if total > budget else (low, price)
    return error, sharing


def read_groups(subject: Subject) -> list[tuple[list[Curve], list[Curve] | None]]:
    """Curves of every group of linears that read the same input: each alone, and all with a shared A."""
    groups = []
    for layer in resolve(subject.teacher).layers:
        for roles in GROUPS:
            names = dict.fromkeys(layer.roles[role].module for role in roles if role in layer.roles)
            weights = {name: dense_weight(subject.teacher.get_submodule(name)) for name in names}
            matrices = [weighted(weights[name], subject.inputs[name], subject.gradients[name]) for name in names]
            if matrices:
                shared = [curve(torch.cat(matrices))] if len(matrices) > 1 else None
                groups.append(([curve(matrix) for matrix in matrices], shared))
    return groups


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "smollm2"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    words = parser.parse_args()
    if words.data is None:
        parser.error("the evaluation data is needed: --data FOLDER, or MAKD_DATA in the environment")
    torch.manual_seed(0)
    make, rows = {"minilm": (minilm, 400), "smollm2": (smollm2, 64)}[words.model]
    subject = make(Path(words.data), rows)
    calibrate(subject)
    groups = read_groups(subject)
    dense = sum(cost[-1] for separate, _ in groups for cost, _ in separate)
    for keep in (0.8, 0.6, 0.5, 0.3):
        errors = {ways: least_error(groups, keep * dense, ways) for ways in ("separate", "shared", "better")}
        print(json.dumps({"model": words.model, "keep": keep, **errors}), flush=True)


if __name__ == "__main__":
    main()
