"""Settings: sizes as people write them, the default folder, and what is refused or warned of before work begins."""

import inspect
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamslr
from streamslr.config import RunConfig, default_out, format_bytes, idle_settings, parse_bytes
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


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.2.3G", "45 apples", "1e9", "9" * 5000])
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
        ({"rank": 10**30}, "--rank is 10+; it must be at most 2,147,483,647"),
        ({"samples": 2**31}, "--samples is 2147483648; it must be at most"),
        ({"seq_len": 2**31}, "--seq-len is 2147483648; it must be at most"),
        ({"seed": 2**63}, "--seed is 9223372036854775808; it must be below"),
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


def test_compress_has_the_settings_of_run_config_with_their_defaults() -> None:
    parameters = inspect.signature(streamslr.compress).parameters
    assert list(parameters) == [field.name for field in fields(RunConfig)]
    for field in fields(RunConfig):
        expected = inspect.Parameter.empty if field.default is MISSING else field.default
        assert parameters[field.name].default == expected, field.name


def test_compress_takes_what_run_config_holds_and_what_people_type_for_it() -> None:
    held = get_type_hints(RunConfig)
    for name, parameter in inspect.signature(streamslr.compress).parameters.items():
        kinds = set(get_args(parameter.annotation)) or {parameter.annotation}
        expected = set(get_args(held[name])) or {held[name]}
        if Path in expected or name.endswith("_mem"):
            expected |= {str}
        if name == "model":
            expected |= {Path}
        if name == "out":
            expected |= {type(None)}
        assert kinds == expected, name


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("meta-llama/Meta-Llama-3-70B", "Meta-Llama-3-70B-slr"),
        ("gpt2", "gpt2-slr"),
        ("/models/llama/", "llama-slr"),
        ("models/llama/.", "llama-slr"),
    ],
)
def test_without_out_the_folder_is_named_after_the_model(model: str, out: str) -> None:
    assert default_out(model) == RunConfig(model=model).out == RunConfig.of(model=model, out=None).out == Path(out)


def test_a_dot_is_named_after_the_folder_that_it_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "llama")
    assert default_out(".") == default_out("./") == Path("llama-slr")
    monkeypatch.chdir("deep")
    assert default_out("..") == default_out(f"..{os.sep}") == Path("llama-slr")


@pytest.mark.parametrize(("samples", "epochs"), [(1, 10), (64, 10), (128, 10), (256, 5), (512, 3), (4096, 3)])
def test_more_windows_pass_in_fewer_epochs_unless_they_are_given(samples: int, epochs: int) -> None:
    assert RunConfig.of(model="m", samples=samples).epochs == epochs
    assert RunConfig.of(model="m", samples=samples, match_epochs=7).epochs == 7


@pytest.mark.parametrize(
    ("setting", "device", "warnings"),
    [
        ({"gpu_mem": 45 * 10**9}, "cpu", ["--gpu-mem 45.0 GB has no effect: the device is cpu"]),
        ({"gpu_mem": 45 * 10**9}, "cuda", []),
        ({"evict_shards": True}, "cpu", ["--evict-shards has no effect: . is a folder"]),
        ({"model": "org/model", "evict_shards": True}, "cpu", []),
        ({"match": False}, "cpu", []),
        ({"match": False, "match_lr": 1.2}, "cpu", []),
        ({"match": False, "match_batch": 8}, "cpu", ["--match-batch 8 has no effect with --no-match"]),
        (
            {"match": False, "match_epochs": 5, "match_lr": 0.5, "match_recover": 0.0},
            "cuda",
            [
                f"--{name} has no effect with --no-match"
                for name in ("match-epochs 5", "match-lr 0.5", "match-recover 0")
            ],
        ),
        ({"match_epochs": 5}, "cpu", []),
    ],
)
def test_a_setting_without_effect_is_named(setting: dict[str, Any], device: str, warnings: list[str]) -> None:
    settings: dict[str, Any] = {"model": ".", "out": Path("o")} | setting
    found = idle_settings(RunConfig(**settings), device)
    assert len(found) == len(warnings)
    for text, expected in zip(found, warnings, strict=True):
        assert text.startswith(expected)
