"""A run's folder without a run: a decoder of any depth, with the files and keys that a run leaves."""

import json
import math

import yaml

from makd.run_files import ABOUT, FOLDER, FORMAT, LAYERS, LINEARS, SAMPLES, SPECTRA, TRAINING, WARNINGS

ROLES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576),
         "down": (576, 1536)}  # fmt: skip
NAMES = {role: f"self_attn.{role}_proj" if len(role) == 1 else f"mlp.{role}_proj" for role in ROLES}


def name_of(layer, role):
    return f"model.layers.{layer}.{NAMES[role]}"


def error_of(layer, role, layers):
    """The worst is `down` of the last layer."""
    return 0.05 + 0.3 * (layer + 1) / layers * (1.0 if role == "down" else 0.5)


def files(layers=30, text="a text"):
    """Name of a file in `report/` -> its content."""
    linears, curves = [], []
    for layer in range(layers):
        for role, (out, inp) in ROLES.items():
            name, terms = name_of(layer, role), min(out, inp)
            rank = terms // 3
            ranks = sorted({*(round(terms ** (at / 47)) for at in range(48)), rank})
            error = error_of(layer, role, layers)
            linears.append({
                "name": name, "layer": layer, "stack": "decoder", "roles": [role], "out_features": out,
                "in_features": inp, "experts": 1, "rank": rank, "break_even": out * inp // (out + inp),
                "weights": rank * (out + inp), "weights_dense": out * inp, "why_dense": None, "shares_input_with": [],
                "predicted_error": error / 2, "measured_error": {"before": error * 1.3, "after": error},
                "fallback": None,
            })  # fmt: skip
            curves.append({
                "name": name, "terms": terms, "ranks": ranks, "singular_values": [100 / at for at in ranks],
                "errors": [round(math.exp(-4 * at / terms), 5) for at in ranks],
            })  # fmt: skip
    log = [{"loss": 2 / (1 + step / 50), "matrix": 1 / (1 + step / 50), "logits": 0.5, "step": step, "epoch": 1.0}
           for step in range(10, 210, 10)]  # fmt: skip
    by_layer = [{"layer": layer, "hidden_cosine": 0.99, "attention_kl": 0.01 * (layer + 1), "hidden_error": 0.2}
                for layer in range(layers)]  # fmt: skip
    measured = {"rows": 8, "tokens": 1024, "missing": {}, "layers": by_layer}
    contents = {
        LINEARS: {"linears": linears, "vocabulary": [], "dropped": {}, "dense_besides": {}, "trials": {},
                  "shared_inputs": [], "lessons": {}},
        SPECTRA: {"curves": curves},
        TRAINING: {"trainings": [{"weights": {"matrix": 1.0, "logits": 1.0}, "off": {"attention": text}, "log": log}]},
        LAYERS: {"before": measured, "after": measured},
        SAMPLES: {"kind": "continuations",
                  "rows": [{"prompt": text, "teacher": f"{text} one two", "student": f"{text} one three"}]},
        WARNINGS: {"rows": [{"level": "warning", "text": text, "times": 2}]},
    }  # fmt: skip
    return {name: {"format": FORMAT, "about": ABOUT[name], **content} for name, content in contents.items()}


METRICS = {
    "params": {"total": {"teacher": 134_515_008, "student": 113_281_344},
               "linears": {"teacher": 106_168_320, "student": 84_934_656}},
    "bytes": {"teacher": 538_090_408, "student": 453_165_896},
    "fidelity": {"before": {"prediction_kl": 0.2088, "top1_agreement": 0.779},
                 "after": {"prediction_kl": 0.1917, "top1_agreement": 0.786}},
    "perplexity": {"teacher": 31.22, "before": 35.51, "after": 33.94},
    "latency_ms": {"teacher": {"batch1": 344.6, "batch16": 3610.5}, "student": {"batch1": 172.3, "batch16": 1805.0}},
    "seconds": {"calibrate": 100.0, "distill": 200.0, "total": 300.0},
    "tokens": {"calibration": 50_000, "training": 100_000, "evaluation": 25_000},
}  # fmt: skip
RECIPE = {
    "teacher": "org/teacher",
    "recipe": {"calibration": {"rows": 400}, "training": {"steps": 200, "learning_rate": 1e-4}, "stages": []},
    "data": {"path": "texts.txt"},
    "budget": {"keep_linears": 0.8, "keep": None, "params": None},
    "output": "runs/student",
}
ENVIRONMENT = {
    "python": "3.12.3",
    "versions": {"makd": "0.1.0", "torch": "2.13.0"},
    "device_name": "a processor",
    "seed": 0,
}


def make_run(folder, layers=2, text="a text", metrics=METRICS, recipe=RECIPE, others=None):
    """Write all of it; `others` replace files of `report/`, by their names without `.json`; None leaves one out."""
    (folder / FOLDER).mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    for name, content in files(layers, text).items():
        content = (others or {}).get(name.removesuffix(".json"), content)
        if content is not None:
            (folder / FOLDER / name).write_text(json.dumps(content))
    return folder


def measured_as(**measured):
    """The metrics of a run where one measure is (teacher, before, after): perplexity, or a task's."""
    ((name, values),) = measured.items()
    sides = dict(zip(("teacher", "before", "after"), values, strict=True))
    without = {key: value for key, value in METRICS.items() if key != "perplexity"}
    if name == "perplexity":
        return {**without, "perplexity": sides}
    return {**without, "task": {"name": "a task", **{when: {name: value} for when, value in sides.items()}}}
