"""How much more should later layers count when ranks are shared out for a fit in forward order?

    python benchmarks/depth_gain.py minilm --keep 0.5 --gains 0.25 1 4 14 50
    python benchmarks/depth_gain.py smollm2 --keep 0.8 --gains 1 4

Makes the student of `two_sided_regression` with each gain (`makd.factorization.fit.TEXT_DEPTH_GAIN`) and measures
it on unseen text; texts and data are those of benchmarks/factorization.py. One JSON line a student, on stdout.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from factorization import calibrate, decompose, fitted, measure, minilm, smollm2

from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.ranks.allocation import allocate


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "smollm2"))
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--gains", type=float, nargs="+", default=[0.25, 1.0, 4.0, 14.0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    words = parser.parse_args()
    if words.data is None:
        parser.error("the evaluation data is needed: --data FOLDER, or MAKD_DATA in the environment")
    torch.manual_seed(0)
    make, rows = {"minilm": (minilm, 400), "smollm2": (smollm2, 64)}[words.model]
    subject = make(Path(words.data), words.rows or rows)
    calibrate(subject)
    anatomy = resolve(subject.teacher)
    sizes = linear_sizes(subject.teacher, anatomy)
    spectra = {name: terms.singular_values for name, terms in decompose(subject, "two_sided").items()}
    allowance = int(words.keep * sum(size.parameters(None) for size in sizes))
    last = len(anatomy.layers) - 1
    for gain in words.gains:
        worth = {
            linear.module: gain ** (layer.index / last) for layer in anatomy.layers for linear in layer.roles.values()
        }
        plan = allocate(sizes, allowance, "global", spectra=spectra, sensitivities=worth)
        scores = measure(subject, fitted(subject, "two_sided_regression", plan, {}))
        row = {"model": words.model, "keep": words.keep, "gain": gain, **scores}
        print(json.dumps({**row, "torch": torch.__version__, "machine": platform.machine()}), flush=True)


if __name__ == "__main__":
    main()
