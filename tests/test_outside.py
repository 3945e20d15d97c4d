"""Files from outside: only regular files of a sane size are opened, and JSON is strict."""

import os
from pathlib import Path

import pytest

from streamslr.errors import InputError
from streamslr.outside import open_regular, parse_json, parse_loose_json, read_bounded


def test_a_file_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    assert read_bounded(tmp_path / "link") == b"content"
    assert read_bounded(tmp_path / "a", limit=7) == b"content"
    with pytest.raises(InputError, match=r"a has more than 6 bytes"):
        read_bounded(tmp_path / "a", limit=6)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(InputError, match=r"it is no regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(InputError, match=r"nothing: No such file"):
        open_regular(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"null byte"):
        open_regular(Path("a\0b"))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"a": 1, "a": 1}', "'a' twice"),
        (b'{"a": "\\ud83d"}', "JSON is malformed|surrogate|truncated"),
        (b'{"a": NaN}', "malformed"),
        (b"[" * 100_000, "nested too deeply|object"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff", "malformed|decode"),
        (b"[]", "Expected `object`, got `array`"),
    ],
)
def test_json_that_is_not_strict_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(raw, dict[str, object])


def test_a_config_may_hold_infinity_but_no_half_of_a_surrogate_pair() -> None:
    assert parse_loose_json(b'{"a": [0, Infinity], "a": 2}') == {"a": 2}
    for raw in (b'{"a": "\\ud83d"}', b"[]", b'{"a":' * 100_000, b"9" * 5000):
        with pytest.raises(ValueError, match=r"surrogate|no object|nested too deeply|digits"):
            parse_loose_json(raw)
