"""Rows of text as files hold them: null, nested, of other types, empty, in other encodings, huge."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.oracle import generated

CELLS = st.one_of(
    st.none(), st.just(""), st.just("  \n"), st.text(max_size=30), st.just("word " * 20), st.just("x" * 200_000),
    st.just("\0"), st.just("\u202e\ufeff"), st.integers(-3, 10**30), st.floats(), st.booleans(),
    st.lists(st.text(max_size=3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)  # fmt: skip
ROWS = st.lists(CELLS, max_size=12)
COLUMNS = st.sampled_from(["text", "sentence", "", "id", "a,b", "text\n", "label"])


def write(path, column, rows, encoding):
    if path.suffix == ".txt":
        path.write_bytes("\n".join(map(str, rows)).encode(encoding, "replace"))
    elif path.suffix == ".jsonl":
        lines = [json.dumps({column: row, "other": 1}) for row in rows]
        path.write_bytes("\n".join(lines).encode(encoding, "replace"))
    elif path.suffix == ".csv":
        with path.open("w", encoding=encoding, errors="replace", newline="") as file:
            csv.writer(file).writerows([[column, "other"], *([row, 1] for row in rows)])
    else:
        table = {column: [row if isinstance(row, str) or row is None else json.dumps(row, default=str) for row in rows]}
        pyarrow.parquet.write_table(pyarrow.table(table), path)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
def test_rows(workspace, cases, ending):
    @generated(25)
    @given(rows=ROWS, column=COLUMNS, encoding=st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-8-sig"]))
    def case(rows, column, encoding):
        file = workspace.folder / f"rows.{ending}"
        write(file, column, rows, encoding)
        words = ["factorize", *workspace.flags(text=file)]
        cases.command(
            f"{ending} {column!r} {encoding} {rows!r:.120}", words, [file, workspace.teacher], workspace.output
        )

    case()
    cases.settle()


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet", "json"])
def test_bytes(workspace, cases, ending):
    @generated(8)
    @given(content=st.binary(max_size=300))
    def case(content):
        file = workspace.folder / f"rows.{ending}"
        file.write_bytes(content)
        words = ["factorize", *workspace.flags(text=file)]
        cases.command(f"{ending} {content[:40]!r}", words, [file, workspace.teacher], workspace.output)

    case()
    cases.settle()
