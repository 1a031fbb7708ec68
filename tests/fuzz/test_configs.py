"""A teacher's config.json and a student's quantization_config with something else in them."""

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.oracle import generated

VALUES = [None, True, 0, -1, 7, 10**12, 1.5, "", "x", "../..", [], [1], {}, {"a": 1}, [[None]]]
TEXTS = ["", "null", "[]", "3", '"x"', "{", "{}", "NaN", '{"model_type": 3}', "\0", "[" * 20000]


def test_of_a_teacher(workspace, cases, copied):
    known = json.loads((workspace.teacher / "config.json").read_text())

    @generated(60)
    @given(name=st.sampled_from(sorted(known)), value=st.sampled_from(VALUES))
    def case(name, value):
        folder = copied(workspace.teacher)
        (folder / "config.json").write_text(json.dumps({**known, name: value}))
        cases.command(f"{name}: {value}", ["factorize", *workspace.flags(teacher=folder)], [folder], workspace.output)

    case()
    cases.settle()


def test_of_a_student(workspace, cases, copied):
    known = json.loads((workspace.student / "config.json").read_text())
    places = [("quantization_config", name) for name in sorted(known["quantization_config"])] + [
        (name,) for name in sorted(known)
    ]

    @generated(60)
    @given(place=st.sampled_from(places), value=st.sampled_from([*VALUES, "gone"]))
    def case(place, value):
        folder = copied(workspace.student)
        tree = json.loads(json.dumps(known))
        inside = tree if len(place) == 1 else tree[place[0]]
        if value == "gone":
            del inside[place[-1]]
        else:
            inside[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(tree))
        words = workspace.evaluation(folder)
        cases.command(f"{place}: {value}", words, [folder, workspace.teacher])

    case()
    cases.settle()


def test_files_that_are_no_config(workspace, cases, copied):
    for text in TEXTS:
        folder = copied(workspace.teacher)
        (folder / "config.json").write_text(text)
        cases.command(
            f"teacher {text[:20]!r}", ["factorize", *workspace.flags(teacher=folder)], [folder], workspace.output
        )
        folder = copied(workspace.student)
        (folder / "recipe.yaml").write_text(text)
        cases.command(f"recipe {text[:20]!r}", ["evaluate", folder, "--teacher", workspace.teacher], [folder])
    cases.settle()
