"""Rows that are made of rows are found again by a run of the same code alone."""

import re
from pathlib import Path

from datasets.fingerprint import Hasher

from makd import mapped

SOURCE = Path(mapped.__file__).parent


def test_rows_of_other_code_are_other_rows():
    same, other = (Hasher.hash(mapped._VersionedFunction(len, code)) for code in ("a", "b"))
    assert same == Hasher.hash(mapped._VersionedFunction(len, "a"))
    assert same != other


def test_the_code_is_makds_own_and_that_of_what_reads_texts(monkeypatch):
    def digest():
        mapped.code_digest.cache_clear()
        return mapped.code_digest()

    first = digest()
    assert digest() == first
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "version", lambda name: "0.0" if name == "tokenizers" else "1.0")
        assert digest() != first
    read = Path.read_bytes
    with monkeypatch.context() as patch:
        changed = SOURCE / "data" / "completions.py"
        patch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path == changed else b""))
        assert digest() != first
    assert digest() == first


def test_nothing_makes_rows_of_rows_without_saying_by_which_code():
    calls = re.compile(r"^(?!.*(pool|executor)).*\b\w+\.(map|filter)\(", re.MULTILINE)
    found = {path.name for path in SOURCE.rglob("*.py") if calls.search(path.read_text())}
    assert found == {"mapped.py"}
