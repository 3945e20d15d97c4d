"""The live display on a terminal, and the timer of phases."""

import io
import logging

import torch
from rich.console import Console

from streamslr.run.costs import PhaseCost
from streamslr.run.plan import BlockKind
from streamslr.run.progress import LiveDisplay, NoDisplay, PhaseTimer, format_duration, seconds_left


def test_the_display_shows_blocks_phase_memory_eta_and_the_last_warnings() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    log = logging.getLogger("streamslr")
    with LiveDisplay(console, host_budget=16 * 10**9) as display:
        display.blocks(3, 80, eta=4000)
        display.phase(3, "solve", steps=7)
        display.step(2, host_bytes=2 * 10**9)
        for i in range(5):
            log.warning("damping of linear %d raised", i)
        with console.capture() as shown:
            console.print(display._render())
    text = shown.get()
    assert "3/80" in text
    assert "1 h 06 min left" in text
    assert "block 3: solve" in text
    assert "2/7" in text
    assert "host 2.0 GB of 16.0 GB" in text
    assert "linear 4 raised" in text
    assert "linear 1 raised" not in text, "only the last three"
    assert display not in log.handlers


def test_the_display_shows_gpu_memory_beside_its_budget() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with LiveDisplay(console, host_budget=16 * 10**9, gpu_budget=45 * 10**9) as display:
        display.phase(3, "solve", steps=7)
        display.step(2, host_bytes=2 * 10**9, gpu_bytes=21 * 10**9)
        with console.capture() as shown:
            console.print(display._render())
    assert "gpu 21.0 GB of 45.0 GB" in shown.get()


def test_what_a_second_try_did_without_is_kept_by_phase() -> None:
    with PhaseTimer(torch.device("cpu"), NoDisplay()) as phases:
        phases.note_retry("match", "half")
        phases.note_retry("match", "a quarter")
        assert phases.take_retries() == {"match": ("half", "a quarter")}
        assert phases.take_retries() == {}


def test_a_phase_that_a_block_goes_through_twice_counts_twice_beside_what_was_planned() -> None:
    with PhaseTimer(
        torch.device("cpu"), NoDisplay(), planned=lambda block: {"propagate": {"host_planned_bytes": 7}}
    ) as phases:
        with phases.phase("propagate", steps=1):
            pass
        once = phases.take()["propagate"]
        with phases.phase("propagate", steps=1):
            ballast = torch.ones(2**22)
        with phases.phase("propagate", steps=1):
            del ballast
        twice = phases.take()["propagate"]
    assert once.keys() == twice.keys() == {"seconds", "host_peak_bytes", "host_planned_bytes"}
    assert twice["host_planned_bytes"] == 7
    assert twice["host_peak_bytes"] > once["host_peak_bytes"], "the higher peak of both"


def test_a_phase_has_the_plan_of_its_own_block_and_the_most_where_it_goes_over_several() -> None:
    def planned(block: int | None) -> dict[str, dict[str, int]]:
        assert block is not None
        return {"survey": {"host_planned_bytes": [5, 9, 7][block]}}

    with PhaseTimer(torch.device("cpu"), NoDisplay(), planned=planned) as phases:
        for i in range(3):
            with phases.phase("survey", steps=1, block=i):
                pass
        assert phases.take()["survey"]["host_planned_bytes"] == 9
        with phases.phase("survey", steps=1, block=2):
            pass
        assert phases.take()["survey"]["host_planned_bytes"] == 7


def kind(flops_of_one: float, *blocks: int) -> BlockKind:
    return BlockKind(blocks, (PhaseCost("solve", 0, 0, flops_of_one * len(blocks)),), 0)


def test_blocks_that_are_alike_take_the_mean_of_those_before_them() -> None:
    assert seconds_left([kind(3.0, *range(10))], 4, {2: 5.0, 3: 7.0}) == 6 * 6.0


def test_a_kind_of_blocks_takes_its_own_time_and_a_new_one_what_its_flops_say() -> None:
    dense, mixtures = kind(2.0, 0, 1, 2), kind(30.0, *range(3, 61))
    assert seconds_left([dense, mixtures], 2, {0: 10.0, 1: 14.0}) == 12.0 + 58 * 12.0 * 30 / 2
    assert seconds_left([dense, mixtures], 5, {0: 10.0, 1: 14.0, 2: 12.0, 3: 90.0, 4: 110.0}) == 56 * 100.0
    in_turns = [kind(1.0, 0, 2, 4), kind(5.0, 1, 3, 5)]
    assert seconds_left(in_turns, 3, {1: 20.0, 2: 3.0}) == 3.0 + 2 * 20.0


def test_durations_read_as_people_say_them() -> None:
    assert [format_duration(s) for s in (3.2, 75, 4000)] == ["3 s", "1 min 15 s", "1 h 06 min"]
