"""The report's page: its data are the journal's, and in a real browser every figure draws, with nothing fetched."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

import streamslr
from streamslr.cli import main
from streamslr.errors import InputError
from streamslr.results.inspect import block_summary, block_table, read_run, run_table
from streamslr.results.report.figures import draw_figures
from streamslr.results.report.page import render_page, write_report
from streamslr.results.verify import verify
from streamslr.run.journal import JournalState
from tests.support.browser import CHROMIUM
from tests.support.tiny_models import tiny_checkpoint

SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 16, "device": "cpu", "host_mem": "4GB"}
ALWAYS = {"errors", "block-errors", "cosines", "time", "host-memory", "sizes"}
MATCHED = {"matching", "curves"}
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'<b>$title"


@pytest.fixture
def state(matched: Path) -> JournalState:
    return read_run(matched)


@pytest.fixture(scope="module")
def unmatched(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one block of pure sparsity, not matched."""
    folder = tmp_path_factory.mktemp("unmatched")
    model = tiny_checkpoint(folder / "one-block", blocks=1)
    streamslr.compress(model, folder / "out", calibration=text, rank=0, match=False, **SETTINGS)
    return folder / "out"


def deep(state: JournalState) -> JournalState:
    """Return a run of 80 blocks on a GPU, with hostile names and warnings, one of them not helped by matching."""
    blocks = []
    for i in range(80):
        block = state.blocks[i % 2]
        name = f"{HOSTILE}.{i}"
        linears = [
            dataclasses.replace(a, name=a.name.replace(block.name, name), warnings=(f"damping {HOSTILE}",))
            for a in block.linears
        ]
        assert block.matching
        matching = dataclasses.replace(block.matching, applied=i != 3, loss_after=None if i == 3 else 0.001)
        on_gpu = {"gpu_peak_bytes": 3 * 10**9, "gpu_planned_bytes": 4 * 10**9, "gpu_budget_bytes": 5 * 10**9}
        measured = {phase: {**reading, **on_gpu} for phase, reading in block.measured.items()}
        blocks.append(
            dataclasses.replace(
                block,
                index=i,
                name=name,
                shard=dataclasses.replace(block.shard, file=f"model-block-{i:05d}.safetensors"),
                linears=tuple(linears),
                matching=matching,
                measured=measured,
            )
        )
    return dataclasses.replace(state, blocks=tuple(blocks), blocks_total=80, model=HOSTILE, calibration=HOSTILE)


def test_the_figures_hold_what_the_journal_says(state: JournalState) -> None:
    drawn = draw_figures(state)
    assert drawn.keys() == ALWAYS | MATCHED
    (errors,) = drawn["errors"]["data"]
    for column, block in enumerate(state.blocks):
        for linear in block.linears:
            row = errors["y"].index(linear.name.removeprefix(f"{block.name}."))
            assert errors["z"][row][column] == math.log10(linear.error)
            for told in (linear.name, f"{linear.error:.3g}", f"{linear.wanda_error:.3g}", f"{linear.iterations} "):
                assert told in errors["hovertext"][row][column]
    for block, curve in zip(state.blocks, drawn["curves"]["data"], strict=False):
        assert block.matching
        losses = [loss for loss in block.matching.curve if loss is not None]
        assert tuple(curve["customdata"]) == block.matching.curve == tuple(losses)
        assert curve["y"] == [loss / losses[0] for loss in losses]
    lines = [(block.matching.loss_before, block.matching.loss_after) for block in state.blocks if block.matching]
    drawn_lines = iter(drawn["matching"]["data"][0]["y"])
    assert [(next(drawn_lines), next(drawn_lines), next(drawn_lines)) for _ in lines] == [
        (*ends, None) for ends in lines
    ]


def test_the_check_is_shown_with_its_figures(matched: Path, state: JournalState) -> None:
    assert state.quality
    (line,) = draw_figures(state)["cosines"]["data"]
    assert line["y"] == [block.check and block.check.cosine for block in state.blocks]
    page = render_page(matched, state)
    assert f"perplexity {state.quality.perplexity_dense:.4g} dense, {state.quality.perplexity:.4g} compressed" in page
    suspect = dataclasses.replace(state.quality, verdict="suspect", reason="its predictions are far off")
    page = render_page(matched, dataclasses.replace(state, quality=suspect))
    assert "<li>the result is suspect: its predictions are far off</li>" in page


def test_the_work_of_ranks_is_shown_where_ranks_shared_it_out(state: JournalState) -> None:
    first, *others = state.blocks
    shared = dataclasses.replace(first, seconds_by_rank={"solve": (5.0, 2.0), "grams": (1.0, 1.5)})
    state = dataclasses.replace(state, blocks=(shared, *others))
    drawn = draw_figures(state)["ranks"]["data"]
    assert [(line["name"], line["y"]) for line in drawn] == [
        ("rank 0", [6.0, *[None] * len(others)]),
        ("rank 1", [3.5, *[None] * len(others)]),
    ]
    said = "work of 2 ranks on 1 block, without waiting: rank 0 6.0 s, rank 1 3.5 s"
    for table in (run_table(Path("slr"), state), block_table(Path("slr"), shared)):
        assert said in str(table.caption).splitlines()
    by_phase = block_summary(Path("slr"), shared)["seconds_by_rank"]
    assert list(by_phase.items()) == [("grams", (1.0, 1.5)), ("solve", (5.0, 2.0))]


def test_time_and_memory_are_those_of_each_phase_in_the_order_of_the_run(state: JournalState) -> None:
    drawn = draw_figures(state)
    names = [trace["name"].split()[0] for trace in drawn["time"]["data"]]
    assert names == ["load", "grams", "solve", "match", "propagate", "check", "commit"]
    solve = drawn["time"]["data"][2]
    assert solve["y"] == [block.measured["solve"]["seconds"] for block in state.blocks]
    traces = {trace["name"]: trace for trace in drawn["host-memory"]["data"]}
    unit = 1e9 if drawn["host-memory"]["layout"]["yaxis"]["title"]["text"] == "host, GB" else 1e6
    assert traces["solve"]["y"] == [block.measured["solve"]["host_peak_bytes"] / unit for block in state.blocks]
    assert state.blocks[0].measured["solve"]["host_planned_bytes"] / unit in traces["planned"]["y"]
    assert state.blocks[0].measured["solve"]["host_budget_bytes"] == 4 * 10**9
    starts = [x for trace in traces.values() if trace["type"] == "bar" for x in trace["x"]]
    parts = [state.measured, *(block.measured for block in state.blocks)]
    whole = sum(reading["seconds"] for part in parts for reading in part.values())
    assert max(starts) <= whole
    assert traces["non_block"]["x"] == [0], "what comes before block 0 comes first"
    assert traces["compare"]["x"] == [max(starts)], "what comes behind the last block comes last"


def test_sizes_are_those_of_the_shards(state: JournalState) -> None:
    parts = {trace["name"]: trace["x"][0] * 1e6 for trace in draw_figures(state)["sizes"]["data"]}
    assert parts["S"] + parts["U·V"] + parts["everything else"] == pytest.approx(sum(s.nbytes for s in state.shards))
    assert parts["U·V"] == sum(
        2 * linear.rank * sum(linear.shape) for block in state.blocks for linear in block.linears
    ), "bf16"


def test_every_figure_is_one_that_plotly_knows(state: JournalState) -> None:
    for variant in (state, dataclasses.replace(state, blocks=state.blocks[:1]), deep(state)):
        for figure in draw_figures(variant).values():
            go.Figure(figure)  # raises ValueError for a property that is misspelt


def test_the_page_says_what_was_compressed_and_how(matched: Path, state: JournalState) -> None:
    text = html.unescape(re.sub("<[^>]*>", " ", render_page(matched, state).split("<script>")[0]))
    what = "tiny-llama, 3basil at 2:4 + rank 4"
    for told in (what, "LlamaForCausalLM", state.fingerprint["model"], "Finished: 2 blocks."):
        assert told in text
    for told in ("4 windows of 16 tokens of text.txt", "3 epochs", streamslr.__version__, state.made_with["torch"]):
        assert told in text
    assert "at most, 4.0 GB allowed" in text


def test_an_unfinished_run_says_so(matched: Path, state: JournalState) -> None:
    text = render_page(matched, dataclasses.replace(state, blocks=state.blocks[:1]))
    assert "Unfinished: 1 of 2 blocks are done" in text
    assert "No block is finished yet." in render_page(matched, dataclasses.replace(state, blocks=()))


def test_every_warning_is_listed(matched: Path, state: JournalState) -> None:
    text = render_page(matched, deep(state)).split("<h2>Warnings", 1)[1].split("</ul>")[0]
    linears = sum(len(block.linears) for block in state.blocks)
    assert text.count("<li>") == 40 * linears + 1 + 78, "of the linears, of matching, of shards that are missing"
    assert text.count("matching did not lower the loss") == 1


def test_the_page_lies_in_the_folder_and_troubles_nobody(
    matched: Path, llama: Path, text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(matched, tmp_path / "out")
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0
    assert Path(result.output.strip()) == folder / "report.html"
    assert verify(folder).problems == ()
    settings = {"calibration": text, "rank": 4, "match_epochs": 3, "match_batch": 2, **SETTINGS}
    assert streamslr.compress(llama, folder, **settings).complete, "the same line again"
    assert (folder / "report.html").is_file()


def test_the_page_goes_where_it_is_asked_to(matched: Path, tmp_path: Path) -> None:
    assert write_report(matched, tmp_path / "page.html") == tmp_path / "page.html"
    assert not (matched / "report.html").exists()
    with pytest.raises(InputError, match="is no folder"):
        write_report(matched, tmp_path / "nowhere" / "page.html")
    with pytest.raises(InputError, match="not an output folder"):
        write_report(tmp_path)


# In a browser. The first script notes whatever goes wrong; the last hovers over a cell and writes down what it sees.
_WATCH = """<script>
window.problems = [];
addEventListener("error", event => problems.push("error: " + event.message), true);
addEventListener("unhandledrejection", event => problems.push("rejected: " + event.reason));
addEventListener("securitypolicyviolation", event => problems.push("request: " + event.blockedURI));
window.alert = text => problems.push("alert " + text);
</script>"""
_LOOK = """<script>
const errors = document.getElementById("errors");
if (errors) Plotly.Fx.hover(errors, {xval: 0, yval: 1}, "xy");
const count = selector => document.querySelectorAll(selector).length;
const seen = {
  problems,
  requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
  drawn: [...document.querySelectorAll(".figure")].filter(f => f.querySelector(".main-svg")).map(f => f.id),
  cells: count("#errors .hm image"),
  bars: count("#time .bars path"),
  memory: count("#host-memory .bars path"),
  lines: count("#curves .js-line"),
  hover: [...document.querySelectorAll("#errors .hovertext")].map(e => e.textContent).join(),
  wider: document.documentElement.scrollWidth - innerWidth,
  title: document.querySelector("h1").textContent,
};
const answer = document.createElement("pre");
answer.id = "seen";
answer.textContent = JSON.stringify(seen);
document.body.append(answer);
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def look(text: str, width: int = 1000) -> dict[str, Any]:
        """Open the page in a browser and return what it draws."""
        start, _, end = text.rpartition("</body>")
        path = tmp_path / "page.html"
        path.write_text(start.replace("<head>", f"<head>{_WATCH}", 1) + _LOOK + "</body>" + end)
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=5000"
        command = [
            str(CHROMIUM),
            *flags.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
        ]
        dumped = subprocess.run(
            [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        found = re.search(r'<pre id="seen">(.*?)</pre>', dumped.stdout, re.DOTALL)
        assert found, f"the page's scripts did not end: {dumped.stderr[-2000:]}"
        return dict(json.loads(html.unescape(found[1])))

    return look


Browse = Callable[..., dict[str, Any]]


@pytest.mark.browser
def test_a_browser_draws_every_figure_and_fetches_nothing(browse: Browse, matched: Path, state: JournalState) -> None:
    seen = browse(render_page(matched, state))
    assert seen["problems"] == []
    assert seen["requests"] == []
    assert set(seen["drawn"]) == ALWAYS | MATCHED
    assert seen["cells"] == 1
    assert seen["bars"] == 2 * 7, "seven phases of two blocks"
    assert seen["memory"] == 2 * 7 + 3, "with those beside the blocks"
    assert seen["lines"] == 2
    linear = state.blocks[0].linears[0]
    assert f"{linear.name}error {linear.error:.3g}, pruning alone {linear.wanda_error:.3g}" in seen["hover"]


@pytest.mark.slow
@pytest.mark.browser
def test_one_block_of_pure_sparsity_on_a_phone(browse: Browse, unmatched: Path) -> None:
    text = render_page(unmatched, read_run(unmatched))
    assert "not matched (--no-match)" in text
    seen = browse(text, width=500)
    assert seen["problems"] == []
    assert set(seen["drawn"]) == ALWAYS
    assert seen["wider"] <= 0, "nothing sticks out to the side"


@pytest.mark.browser
def test_eighty_blocks_of_hostile_names(browse: Browse, matched: Path, state: JournalState) -> None:
    seen = browse(render_page(matched, deep(state)))
    assert seen["problems"] == []
    assert set(seen["drawn"]) == ALWAYS | MATCHED | {"gpu-memory"}
    assert seen["title"] == f"{HOSTILE}, 3basil at 2:4 + rank 4"
    assert HOSTILE in seen["hover"]
    assert seen["bars"] == 80 * 7


@pytest.mark.slow
@pytest.mark.browser
def test_a_request_would_have_been_seen(browse: Browse, matched: Path, state: JournalState) -> None:
    text = render_page(matched, state).replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>')
    assert browse(text)["problems"][0] == "request: http://127.0.0.1:9/x.png"
