"""A comparison on a tiny model: its rows, also after a kill."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.forkserver import python_script
from tests.support.killing import compress_in_child

COMPARE = Path(__file__).parents[2] / "tools" / "compare.py"
SIZES = ["--samples", "6", "--seq-len", "16", "--eval-windows", "4", "--set", "match_epochs=2"]
WANDA = {"method": "wanda", "pattern": "2:4", "rank": 0, "matched": False, "seed": 0}


@pytest.fixture(scope="module")
def inputs(llama: Path, text: Path) -> dict[str, Path]:
    return {"model": llama, "calibration": text}


def compare(inputs: dict[str, Path], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line: list[str | Path] = ["--model", inputs["model"], "--calibration", inputs["calibration"]]
    line += ["--text", inputs["calibration"], *SIZES, "--out", out, *more]
    return python_script(COMPARE, *line)


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out.with_suffix(".json").read_text())["rows"]
    return found


@pytest.fixture(scope="module")
def compared(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a comparison whose reference has a figure for wanda, and whose 3:7 no width of the model allows."""
    out = tmp_path_factory.mktemp("compared") / "tiny"
    reference = out.with_name("official.json")
    reference.write_text(json.dumps({"source": "a paper", "rows": [WANDA | {"perplexity": 12.5, "seconds": 3}]}))
    line = ("--methods", "wanda", "--patterns", "2:4+4,3:7", "--match", "off", "--reference", str(reference))
    done = compare(inputs, out, *line)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_combination_is_a_row_of_the_table_or_named_as_skipped(compared: Path) -> None:
    dense, wanda = rows(compared)[:2]
    assert dense["method"] == "dense"
    assert wanda.items() >= WANDA.items(), "no U·V, so rank 0"
    assert wanda["linear_bytes"] < wanda["dense_linear_bytes"]
    assert wanda["cpu_seconds"] > wanda["phase_seconds"]["solve"] > 0
    table = compared.with_suffix(".md").read_text()
    assert f"| dense |  |  | {dense['perplexity']:.3f} |" in table
    assert f"| wanda | 2:4 + 0 | no | {wanda['perplexity']:.3f} | 12.500 |" in table
    assert "wanda 3:7 + 0, seed 0: model.layers.0.self_attn.q_proj: pattern 3:7 needs an input width" in table
    assert "<svg" in compared.with_suffix(".svg").read_text()
    assert not compared.with_name("tiny.work").exists()


@pytest.mark.slow
def test_after_a_kill_finished_rows_stay_and_the_run_under_way_resumes(
    compared: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """A kill while oats is compressed leaves the row of wanda, and an unfinished run in the work folder."""
    out, run = tmp_path / "tiny", tmp_path / "tiny.work" / "oats_2_4_4_matched_seed_0"
    before = rows(compared)
    shutil.copy(compared.with_suffix(".json"), out.with_suffix(".json"))
    settings = {"samples": 6, "seq_len": 16, "match_epochs": 2, "method": "oats", "rank": 4, "device": "cpu"}
    assert compress_in_child(settings | inputs | {"out": run}, die_at=13) == -9
    done = compare(inputs, out, "--methods", "oats", "--patterns", "2:4+4", "--match", "on")
    assert done.returncode == 0, done.stderr
    *others, oats = rows(out)
    assert others == before
    assert (oats["method"], oats["rank"], oats["matched"], len(oats["block_losses"])) == ("oats", 4, True, 2)
    assert oats["cpu_seconds"] is None, "what the first start took is not known"
    assert not run.exists()


def test_other_settings_do_not_go_into_the_same_table(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    out.with_suffix(".json").write_text(json.dumps({"settings": {"samples": 64}, "rows": []}))
    refused = compare(inputs, out)
    assert refused.returncode == 4
    assert "samples: 64 there, 6 now" in refused.stderr


@pytest.mark.parametrize("change", ["nonsense=3", "match_epochs=many", "seed=4"])
def test_settings_that_no_run_would_take_end_it_before_any_work(
    inputs: dict[str, Path], tmp_path: Path, change: str
) -> None:
    refused = compare(inputs, tmp_path / "tiny", "--set", change)
    assert refused.returncode == 2
    assert f"--{change.partition('=')[0].replace('_', '-')}" in refused.stderr
    assert not any(tmp_path.iterdir())
