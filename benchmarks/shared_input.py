"""Would one shared first factor for linears that read the same input (Q, K, V; gate, up) lose less, at an equal budget?

    python benchmarks/shared_input.py minilm
    python benchmarks/shared_input.py smollm2

Compares predicted errors (those of `two_sided`, so in units of the model's outputs) of students whose ranks are shared
out over linears apart, over groups with one A, and over what is better in each group: what `share_input` never, always
and auto do. Texts and data are those of benchmarks/factorization.py. One JSON line a budget, on stdout.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from factorization import Subject, calibrate, minilm, smollm2

from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.ranks.planning import RankProblem, plan_ranks
from makd.ranks.sharing import find_groups, plan_error
from makd.solvers import decompose_two_sided
from makd.solvers.factors import Spectrum
from makd.student.linear import dense_weight

RANK_MULTIPLE = 8


def spectra_of(subject: Subject, wanted: dict[str, tuple[str, ...]]) -> dict[str, Spectrum]:
    """Spectra of linears, and of groups of them as one."""
    found = {}
    for name, linears in wanted.items():
        weight = torch.cat([dense_weight(subject.teacher.get_submodule(linear)) for linear in linears])
        grams = [subject.gradients[linear] for linear in linears]
        found[name] = decompose_two_sided(weight, subject.inputs[linears[0]], grams).spectrum
    return found


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
    anatomy = resolve(subject.teacher)
    sizes = linear_sizes(subject.teacher, anatomy)
    groups = find_groups(anatomy, sizes)
    known = spectra_of(
        subject, {**{size.name: (size.name,) for size in sizes}, **{group.name: group.linears for group in groups}}
    )
    spectra = {name: one.singular_values for name, one in known.items()}
    dense = sum(size.parameters(None) for size in sizes)
    for keep in (0.8, 0.6, 0.5, 0.3):
        row: dict[str, object] = {"model": words.model, "keep": keep}
        for choice in ("never", "always", "auto"):
            problem = RankProblem(sizes, int(keep * dense), "global", RANK_MULTIPLE, {}, choice, {})
            used = () if choice == "never" else groups
            planned = plan_ranks(problem, used, lambda wanted: {name: known[name] for name in wanted})
            error = plan_error(planned.items, spectra, problem.sensitivities)
            row[choice] = {"error": error, "groups sharing": len(planned.groups)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
