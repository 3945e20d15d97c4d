"""Settings: sizes as people write them, and what is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamslr.config import RunConfig, format_bytes, parse_bytes
from streamslr.errors import InputError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("45GB", 45 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5g", 1_500_000_000),
        ("700 MB", 700 * 10**6),
        ("4096", 4096),
        ("2T", 2 * 10**12),
        ("0.5kb", 500),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3G", "45 apples", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="45GB"):
        parse_bytes(text)


@given(st.integers(0, 10**15))
def test_a_formatted_size_reads_back_within_its_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.06)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"samples": 0}, "--samples is 0"),
        ({"seq_len": 1}, "--seq-len is 1"),
        ({"rank": -1}, "--rank is -1"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"match_epochs": 1}, "--match-epochs is 1"),
        ({"match_batch": 0}, "--match-batch is 0"),
        ({"match_lr": 0.0}, "--match-lr is 0.0"),
        ({"match_lr": float("nan")}, "--match-lr is nan"),
        ({"match_recover": 1.5}, "--match-recover is 1.5"),
        ({"rank_ratio": 1.0}, "--rank-ratio is 1.0"),
        ({"owl": 0.0}, "--owl is 0.0"),
        ({"owl": 0.1, "owl_outlier": 0.0}, "--owl-outlier is 0.0"),
        ({"owl_outlier": 5.0}, "--owl-outlier 5 says how --owl counts; give --owl too"),
        ({"compression": "50%"}, "--compression 50% needs --rank-ratio"),
        ({"compression": "50%", "pattern": "2:4"}, "--compression 50% and --pattern 2:4 decide the same"),
        ({"compression": "50%", "rank": 64}, "--compression 50% and --rank 64 decide the same"),
        ({"rank_ratio": 0.25, "rank": 64}, "--rank-ratio 0.25 and --rank 64 decide the same"),
        ({"rank_ratio": 0.25, "ranks": "q=1"}, "--rank-ratio 0.25 and --ranks q=1 decide the same"),
        ({"owl": 0.08, "allocation": Path("a.json")}, "--owl 0.08 and --allocation a.json decide the same"),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunConfig(model="m", out=Path("o"), **setting)
