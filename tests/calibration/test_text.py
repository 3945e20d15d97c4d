"""Text files: every spelling of a text gives the same documents, and what is no text is refused with place and fix."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest

from streamslr.calibration.text import read_documents
from streamslr.errors import InputError

TEXT = "naïve café\n中文 and an emoji 😀\nlast line\n"


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a", "a.md"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_spelling_of_a_text_reads_alike(
    tmp_path: Path, name: str, encoding: str, ends: str, packed: bool
) -> None:
    content = TEXT.replace("\n", ends).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(read_documents(path)) == [TEXT]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.jsonl.gz", "a.JsonL.GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
def test_every_spelling_of_a_jsonl_file_reads_alike(tmp_path: Path, name: str, encoding: str, ends: str) -> None:
    lines = [json.dumps({"url": "x", "text": TEXT}), json.dumps({"text": TEXT[:5]}, ensure_ascii=False)]
    content = ends.join(lines).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert list(read_documents(path)) == [TEXT, TEXT[:5]]


def test_lone_surrogates_are_replaced_and_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "half \\ud83d and \\ude00"}\n{"text": "whole \\ud83d\\ude00"}\n')
    with caplog.at_level(logging.WARNING, "streamslr"):
        assert list(read_documents(path)) == ["one", "half \ufffd and \ufffd", "whole 😀"]
        list(read_documents(path, again=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 lone surrogates, the first in line 2, are read as U+FFFD"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"one\ntwo\nna\xefve",
            r"line 3 is not UTF-8 \(byte 0xef\); convert it .*iconv -f WINDOWS-1252",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a.jsonl line 2 is not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n' * 2000 + b'{"text": "\xe9"}', "line 2001 is not UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "line 1 has a NUL character: .* UTF-16 without a byte order mark"),
        ("a.txt", "one".encode("utf-16")[:-1], "is not UTF-16"),
        ("a.txt", b"PAR1\x00\x00", "line 1 has a NUL character: it is no text"),
        ("a.txt", b"\xed\xa0\xbd", "line 1 is not UTF-8"),
        ("a.txt.gz", b"not gzip", "cannot be read: Not a gzipped file .*; .* unpack it"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl", b'{"text": "w1"}\n{"body": 1}\n', 'line 2 is not a JSON object with a "text" field'),
        ("a.jsonl", b'{"text": "w1"}\n{"te', "line 2 is not a JSON object"),
        ("a.jsonl", b'[{"text": "w1"}]', "line 1 is not a JSON object .*; write one a line"),
        ("a.jsonl", b'{"text": null}', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "w1", "deep": ' + b"[" * 100_000, "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "w1", "n": ' + b"9" * 5000 + b"}", "line 1 is not a JSON object"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(path))


def test_what_is_no_regular_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x cannot be read: File name too long"):
        list(read_documents(tmp_path / ("x" * 300)))
    with pytest.raises(InputError, match=r"nowhere.txt does not exist"):
        list(read_documents(tmp_path / "nowhere.txt"))
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(InputError, match="is no regular file"):
            list(read_documents(path))
