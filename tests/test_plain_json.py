"""JSON that others may have changed: what it has to hold, or one message."""

import pytest

from makd.errors import CacheError, ModelLoadError
from makd.plain_json import read_json


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file or directory. Copy it."),
        (b"", "is damaged: it is not JSON"),
        (b"\xff{}", "is damaged: it is not JSON"),
        (b'{"a": 1', "is damaged: it is not JSON"),
        (b"[" * 100_000, "is damaged: it is not JSON"),
        (b"null", "holds an object, {...}; this one is null. Copy it."),
        (b"[1]", "holds an object, {...}; this one is list. Copy it."),
    ],
)
def test_what_is_no_object_is_one_message(tmp_path, content, told):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CacheError) as error:
        read_json(file, dict, CacheError, "Copy it.")
    assert str(error.value).startswith(str(file))
    assert told in str(error.value)


def test_what_it_holds_is_what_json_says(tmp_path):
    (tmp_path / "a.json").write_text('{"é": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", dict, ModelLoadError, "") == {"é": [1, 2.5, None]}
