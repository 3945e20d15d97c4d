"""A comparison on a tiny model: its rows, also after a kill; its table and plot from rows that are made up."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_results import Row, best_of, draw, lines, markdown
from compare_rounding import write_rounded
from safetensors.torch import load_file

from streamslr.io.packed_layout import packed_linears, stored_parts
from streamslr.io.packing import unpack
from streamslr.io.safetensors_file import shard_header
from streamslr.spec.values import Int8
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
    assert f"| dense |  |  |  | {dense['perplexity']:.3f} |" in table
    assert f"| wanda | stored | 2:4 + 0 | no | {wanda['perplexity']:.3f} | 12.500 |" in table
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


@pytest.mark.slow
def test_values_and_roundings_are_rows_with_their_bits(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    line = ["--methods", "3basil", "--patterns", "2:4+4,dense+4", "--match", "off"]
    done = compare(inputs, out, *line, "--values", "stored,int4/16", "--rounding", "solved,after")
    assert done.returncode == 0, done.stderr
    bits = {(row["pattern"], row["values"], row["rounding"]): row["bits"] for row in rows(out)[1:]}
    assert list(bits) == [
        ("2:4", "stored", None),
        ("2:4", "int4/16", "solved"),
        ("2:4", "int4/16", "after"),
        ("dense", "int4/16", "solved"),
    ]
    assert bits["2:4", "int4/16", "after"] == bits["2:4", "int4/16", "solved"]
    assert bits["2:4", "int4/16", "solved"] < bits["2:4", "stored", None]
    assert "- 3basil dense + 4, seed 0: " in out.with_suffix(".md").read_text()
    assert not out.with_name("tiny.work").exists()


@pytest.mark.slow
def test_a_rounded_folder_has_the_nearest_numbers_and_the_same_factors(inputs: dict[str, Path], tmp_path: Path) -> None:
    settings = {"samples": 4, "seq_len": 16, "match": False, "rank": 4, "device": "cpu", "out": tmp_path / "run"}
    assert compress_in_child(settings | inputs) == 0
    linear_bytes = write_rounded(tmp_path / "run", Int8(group=16), tmp_path / "rounded")
    found = 0
    for before, after in zip(
        *(sorted((tmp_path / name).glob("model-block*")) for name in ("run", "rounded")), strict=True
    ):
        old, new = load_file(before), load_file(after)
        for name, (pattern, shape) in packed_linears(shard_header(after).metadata).items():
            parts = [stored_parts(name, tensors) for tensors in (old, new)]
            S, rounded = (
                unpack({part: tensors[key] for part, key in of.items()}, pattern, shape).double()
                for of, tensors in zip(parts, (old, new), strict=True)
            )
            step = new[f"{name}.scales"].double().repeat_interleave(16, dim=1)[:, : shape[1]]
            codes = (S / step).round().clamp(-127, 127)
            torch.testing.assert_close(rounded, codes * step, rtol=1e-6, atol=0)
            assert torch.equal(old[f"{name}.U"], new[f"{name}.U"])
            assert torch.equal(old[f"{name}.V"], new[f"{name}.V"])
            found += sum(new[key].nbytes for key in parts[1].values())
    assert found == linear_bytes > 0


def made(values: str, pattern: str, rank: int, perplexity: float, bits: float, rounding: str | None = None) -> Row:
    """Return a row of 1000 weights."""
    return {
        **{"method": "3basil", "pattern": pattern, "rank": rank, "matched": False, "seed": 0},
        **{"values": values, "rounding": rounding, "perplexity": perplexity, "bits": bits},
        **{"linear_bytes": round(bits * 125), "dense_linear_bytes": 2000, "linear_error": 0.1, "cpu_seconds": 9.0},
        **{"phase_seconds": {"solve": 1.0}, "host_peak_bytes": 1000},
    }


def record(*of_runs: Row) -> dict[str, Any]:
    settings = {"samples": 1, "seq_len": 1, "eval_windows": 1, "threads": 1, "device": "cpu"}
    dense = {"method": "dense", "perplexity": 10.0}
    told = {"model": "made", "command": "", "reference": None, "skipped": {}, "settings": settings}
    return {"rows": [dense, *of_runs], **told}


INT4 = made("int4/128", "2:4", 16, 12.0, 4.5, "solved")


def test_lines_go_by_values_pattern_and_rank() -> None:
    stored = [made("stored", "2:4", rank, 11.0, 10.0) for rank in (16, 0)]
    dense = made("int4/128", "dense", 0, 11.0, 4.2, "solved")
    ordered = lines(record(stored[0], INT4, dense, stored[1]))
    assert [(line.of.values, line.pattern) for line in ordered] == [
        ("stored", "2:4 + 0"),
        ("stored", "2:4 + 16"),
        ("int4/128", "2:4 + 16"),
        ("int4/128", "dense + 0"),
    ]


def test_only_lines_that_no_smaller_one_beats_are_best() -> None:
    worse = made("int8/128", "2:4", 16, 12.5, 6.5, "solved")
    better = made("stored", "2:4", 16, 11.0, 10.0)
    assert [line.perplexity for line in best_of(lines(record(better, worse, INT4)))] == [12.0, 11.0]


def test_a_record_from_before_values_has_rows_as_stored_in_16_bits() -> None:
    file = COMPARE.parent / "results" / "compare-llama-8m-2-4.json"
    table = markdown(json.loads(file.read_text()))
    assert "| dense |  |  |  | 45.304 | 45.304 | 16.00 |" in table
    assert "| 3basil | stored | 2:4 + 16 | yes | 45.599 | 45.770 | 10.31 | 7.6 MB |" in table


def test_a_ruined_row_does_not_stretch_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: seen.extend(figure.axes))
    rows = made("stored", "2:4", 16, 11.0, 10.0), INT4, made("int4/128", "1:4", 0, 1e5, 2.0, "solved")
    draw(record(*rows), tmp_path / "plot.svg")
    assert seen[0].get_ylim()[1] < 14
    assert "above 24" in seen[0].get_ylabel()
    assert "↑ 1e+05" in [text.get_text() for text in seen[0].texts]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--values", "int5"], "values 'int5' are not known"),
        (["--values", "int4", "--rounding", "up"], "--rounding up is not known; there are solved, nearest, after"),
        (["--rounding", "nearest"], "--rounding nearest has no effect: --values has only stored"),
    ],
)
def test_values_and_roundings_that_cannot_be_run_are_refused_before_any_work(
    inputs: dict[str, Path], tmp_path: Path, options: list[str], said: str
) -> None:
    refused = compare(inputs, tmp_path / "tiny", *options)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert not any(tmp_path.iterdir())


def test_other_settings_do_not_go_into_the_same_table(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    out.with_suffix(".json").write_text(json.dumps({"settings": {"samples": 64}, "rows": []}))
    refused = compare(inputs, out)
    assert refused.returncode == 4
    assert "samples: 64 there, 6 now" in refused.stderr


@pytest.mark.parametrize("change", ["nonsense=3", "match_epochs=many", "seed=4", "group=64"])
def test_settings_that_no_run_would_take_end_it_before_any_work(
    inputs: dict[str, Path], tmp_path: Path, change: str
) -> None:
    refused = compare(inputs, tmp_path / "tiny", "--set", change)
    assert refused.returncode == 2
    assert f"--{change.partition('=')[0].replace('_', '-')}" in refused.stderr
    assert not any(tmp_path.iterdir())
