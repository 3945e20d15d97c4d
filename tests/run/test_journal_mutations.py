"""A journal that was changed anywhere, by an accident or by hand: refused with a line, or valid for every reader."""

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from streamslr.errors import InputError
from streamslr.results.inspect import block_table, describe_method, run_table, summary
from streamslr.results.report.figures import draw_figures
from streamslr.results.report.page import render_page
from streamslr.run.journal import JOURNAL_FILE, FinetuneRecord, JournalState, read_journal, write_journal

FINETUNED = FinetuneRecord("text.txt", "a" * 64, 3, 1, 16, 2, 5, 0.1, 0, 2.0, 1.5)
VALUES: list[Any] = [
    *(None, True, False, "", "a", "é" * 300, "a" * 70_000, "\0", "\x1b[31m", "[/b]", "../x", "f" * 64),
    *("2:4", "0:0", "1:999999999999", "9" * 5000 + ":4", "100%", "50%/row", "model-block-00000.safetensors"),
    *(0, -1, 1, 3, 2**31, 2**62, 2**63 - 1, 2**63, 10**30, -(10**30), 10**300),
    *(0.0, -0.0, 0.5, 1e-320, 1e100, 1e300, -1e99),
    *([], [1], [[]], [0, 0], [2**40, 2**40], {}, {"a": 1}, {"seconds": 1}, {"*": {"pattern": "2:4", "rank": 1}}),
]


def refusal_by_any_command(folder: Path) -> str | None:
    """Read the journal and make of it all that inspect and report show; return the message where it is refused."""
    try:
        state = read_journal(folder)
    except InputError as error:
        return str(error)
    assert state is not None
    json.dumps(summary(folder, state), allow_nan=False)
    describe_method(state)
    console = Console(file=io.StringIO(), width=120)
    console.print(run_table(folder, state))
    for block in state.blocks:
        console.print(block_table(folder, block))
    json.dumps(draw_figures(state), allow_nan=False)
    render_page(folder, state)
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside `value`."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.fixture(scope="module")
def folder(matched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the journal of a run that was fine-tuned."""
    made = tmp_path_factory.mktemp("journal")
    state = read_journal(matched)
    assert state is not None
    write_journal(made, JournalState(**{**vars(state), "finetuned": (FINETUNED,)}))
    return made


@pytest.fixture(scope="module")
def written(folder: Path) -> str:
    return (folder / JOURNAL_FILE).read_text()


@settings(derandomize=True, max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_is_refused_or_can_be_shown(folder: Path, written: str, data: st.DataObject) -> None:
    journal = json.loads(written)
    del journal["sha256"]
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(journal))
        path = found[data.draw(st.integers(0, len(found) - 1))]
        holder = journal
        for key in path[:-1]:
            holder = holder[key]
        change = data.draw(st.sampled_from(["replace", "replace", "delete", "repeat"]))
        if change == "delete":
            del holder[path[-1]]
        elif change == "replace":
            holder[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder["another"] = copy.deepcopy(holder[path[-1]])
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    if (message := refusal_by_any_command(folder)) is not None:
        assert JOURNAL_FILE in message
        assert len(message.splitlines()) == 1
        assert len(message) < 1000


@settings(derandomize=True, max_examples=150, deadline=None)
@given(place=st.floats(0, 1), content=st.binary(max_size=4), length=st.integers(0, 40))
def test_any_bytes_in_any_place_are_refused_or_harmless(
    folder: Path, written: str, place: float, content: bytes, length: int
) -> None:
    whole = written.encode()
    start = int(place * len(whole))
    (folder / JOURNAL_FILE).write_bytes(whole[:start] + content + whole[start + length :])
    assert JOURNAL_FILE in (refusal_by_any_command(folder) or JOURNAL_FILE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b'{"format_version": 3',
        b'{"format_version": 3}',
        b'{"format_version": 2}',
        b"\xff\xfe",
        b'{"format_version": 3, "model": "\xed\xa0\x80"}',
        b'{"format_version": 3, "model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"format_version": ' + b"9" * 5_000 + b"}",
        b'{"format_version": 1e999}',
        b'{"format_version": NaN}',
        b'{"format_version": [3]}',
        b"null",
        b'"3"',
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_no_json_object_of_a_known_version_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(content)
    with pytest.raises(InputError, match=JOURNAL_FILE) as caught:
        read_journal(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_journal_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).mkdir()
    with pytest.raises(InputError, match="no regular file"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("blocks", 1, "index"), 0, r"its shard is 'model-block-00001.safetensors', not model-block-00000"),
        (("blocks", 0, "linears", 2, "shape"), [64, -64], r"Expected `int` >= 1 - at `\$\.blocks\[0\]\.linears\[2\]"),
        (("blocks", 0, "linears", 0, "pattern"), "7:5", r"pattern 7:5 keeps 7 of every 5"),
        (("blocks", 0, "linears", 0, "rank"), 10**9, r"nbytes is \d+, for shape .* at rank 1000000000"),
        (("blocks", 0, "linears", 0, "error"), "NaN", r"Expected `float`, got `str`"),
        (("blocks", 0, "measured"), {"solve": {"host_peak_bytes": 1}}, r"measured of 'solve' lacks seconds"),
        (("blocks", 0, "measured", "solve", "seconds"), -1.0, r"measured"),
        (("blocks", 0, "linears"), [], r"linears is empty"),
        (
            ("blocks", 0, "matching"),
            {"loss_before": 1.0, "loss_after": None, "applied": True, "curve": [1.0]},
            r"loss_after is null",
        ),
        (("blocks", 0, "shard", "file"), "model-block-00001.safetensors", r"its shard is 'model-block-00001"),
        (("blocks", 0, "shard", "sha256"), "f" * 63, r"matching regex"),
        (("blocks_total",), 1, r"there are 2 blocks, blocks_total is 1"),
        (("non_block",), None, r"there are blocks without non_block"),
        (("fingerprint", "rank_ratio"), "a lot", r"fingerprint: rank_ratio: Expected `float \| null`"),
        (("fingerprint", "samples"), [4], r"fingerprint: samples: Expected `int`"),
        (("auxiliary_files", "model-outside.safetensors"), "f" * 64, r"which is no auxiliary file"),
        (("auxiliary_files", "streamslr.json"), "f" * 64, r"which is no auxiliary file"),
        (("dense_shards", "../x"), {"sha256": "f" * 64, "nbytes": 1}, r"'\.\./x' is no file name"),
        (("blocks", 0, "linears", 0, "colour"), "red", r"blocks\.0\.linears\.0\.'colour' is no field of version 4"),
        (("notes",), "mine", r"'notes' is no field"),
    ],
)
def test_the_error_names_field_and_fault(
    folder: Path, written: str, path: tuple[Any, ...], value: Any, message: str
) -> None:
    journal = json.loads(written)
    del journal["sha256"]
    holder = journal
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    with pytest.raises(InputError, match=rf"{JOURNAL_FILE} is damaged: .*{message}"):
        read_journal(folder)


def test_blocks_out_of_order_are_refused(folder: Path, written: str) -> None:
    journal = json.loads(written)
    del journal["sha256"]
    journal["blocks"] = [journal["blocks"][0], journal["blocks"][0]]
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    with pytest.raises(InputError, match=r"blocks\[1\] has index 0"):
        read_journal(folder)


def test_a_changed_digit_is_told_by_the_digest(folder: Path, written: str) -> None:
    journal = json.loads(written)
    journal["blocks"][0]["linears"][0]["error"] *= 1.5
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    with pytest.raises(InputError, match=r"was changed after it was written: its content has sha256"):
        read_journal(folder)
    del journal["sha256"]
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    assert read_journal(folder), "streamslr 0.2.0 wrote no digest"


def test_a_journal_in_another_layout_is_the_same_journal(folder: Path, written: str) -> None:
    (folder / JOURNAL_FILE).write_text(json.dumps(json.loads(written), indent=1, sort_keys=False))
    assert read_journal(folder)
