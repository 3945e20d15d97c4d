"""Models whose blocks differ: each kind of blocks is planned as a model that has no others, and totals are sums."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import BudgetError
from streamslr.model.shape import BlockShape, ModelShape
from streamslr.results.plan_table import plan_table
from streamslr.run.context import open_run
from streamslr.run.costs import PhaseCost
from streamslr.run.plan import Plan
from tests.run.test_plan import GB, deepseek_v3, llama_70b, plan
from tests.support import families
from tests.support.markers import slow

WHOLE = ("embed", "compare")
"""Phases of the whole model, which are the same for all kinds."""


def block(linears: dict[str, tuple[int, int]], groups: Sequence[tuple[str, ...]], h: int) -> BlockShape:
    parameters = sum(o * d for o, d in linears.values()) + h
    return BlockShape(linears, tuple(groups), parameters, 2 * parameters)


def nemotron_h() -> ModelShape:
    """Return a part of the shape of Nemotron-H 56B: 12 blocks of Mamba-2, 12 of a plain FFN, 2 of attention."""
    h, ffn, inner = 8192, 32768, 16384
    kinds = {
        "M": block({"in": (2 * inner + 2 * 8 * 256 + 256, h), "out": (h, inner)}, [("in",), ("out",)], h),
        "-": block({"up": (ffn, h), "down": (h, ffn)}, [("up",), ("down",)], h),
        "*": block({"q": (h, h), "k": (1024, h), "v": (1024, h), "o": (h, h)}, [("q", "k", "v"), ("o",)], h),
    }
    blocks = tuple(kinds[kind] for kind in nemotron_pattern())
    return ModelShape(blocks, h, 2 * 131072 * h, 4 * 131072 * h, 2)


def nemotron_pattern() -> str:
    return "M-M-M-M-M*-" * 2 + "M-M-"


def deepseek_with_dense_blocks() -> ModelShape:
    """Return two of the first blocks of DeepSeek-V3, which have no experts, and two others."""
    model = deepseek_v3()
    of_attention = dict(list(model.blocks[0].linears.items())[:5])
    h, ffn = 7168, 18432
    linears = of_attention | {"gate": (ffn, h), "up": (ffn, h), "down": (h, ffn)}
    dense = block(linears, [("qa", "kva"), ("qb",), ("kvb",), ("o",), ("gate", "up"), ("down",)], h)
    return replace(model, blocks=(dense,) * 2 + model.blocks)


def numbers(pattern: str, kind: str) -> tuple[int, ...]:
    return tuple(i for i, of_block in enumerate(pattern) if of_block == kind)


HYBRIDS = {"nemotron-h": (nemotron_h(), nemotron_pattern()), "deepseek": (deepseek_with_dense_blocks(), "ddmm")}
"""Shapes of a model, and the kind of each block as a letter."""


@pytest.fixture(params=HYBRIDS)
def hybrid(request: pytest.FixtureRequest) -> tuple[ModelShape, list[tuple[int, ...]]]:
    """Return a model, and the numbers of the blocks of each kind."""
    model, pattern = HYBRIDS[request.param]
    return model, [numbers(pattern, kind) for kind in dict.fromkeys(pattern)]


def alone(model: ModelShape, blocks: Sequence[int]) -> ModelShape:
    return replace(model, blocks=tuple(model.blocks[i] for i in blocks))


def of_blocks(phases: Sequence[PhaseCost]) -> tuple[PhaseCost, ...]:
    return tuple(phase for phase in phases if phase.name not in WHOLE)


SETTINGS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {"device": "cpu", "seq_len": 64},
    "ranks": {"world": 8},
    "survey": {"pattern": "50%", "owl": 0.08, "match": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_kind_is_planned_as_a_model_that_has_no_other_blocks(
    hybrid: tuple[ModelShape, list[tuple[int, ...]]], settings: dict[str, Any]
) -> None:
    model, kinds = hybrid
    made = plan(model, **settings)
    each = [plan(alone(model, blocks), **settings) for blocks in kinds]
    assert [kind.blocks for kind in made.kinds] == kinds
    assert [kind.phases for kind in made.kinds] == [of_blocks(one.phases) for one in each]
    for blocks, one in zip(kinds, each, strict=True):
        for i in blocks:
            assert made.memory(i) == {name: of for name, of in one.memory().items() if name not in WHOLE}
    assert [phase.host_bytes for phase in made.phases] == most(each, "host_bytes")
    assert [phase.gpu_bytes for phase in made.phases] == most(each, "gpu_bytes")
    if settings.get("device") == "cpu":
        assert len({kind.phases for kind in made.kinds}) == len(kinds)


def most(plans: Sequence[Plan], field: str) -> list[int]:
    return [max(getattr(phase, field) for phase in same) for same in zip(*(p.phases for p in plans), strict=True)]


@pytest.mark.parametrize("world", [1, 8])
def test_totals_are_those_of_all_kinds_together(hybrid: tuple[ModelShape, list[tuple[int, ...]]], world: int) -> None:
    model, kinds = hybrid
    made = plan(model, world=world)
    each = [plan(alone(model, blocks), world=world) for blocks in kinds]
    assert made.flops == pytest.approx(sum(one.flops for one in each))
    for phase, *parts in zip(made.phases, *(one.phases for one in each), strict=True):
        assert phase.flops == pytest.approx(sum(part.flops for part in parts)), phase.name
    others = model.non_block_bytes
    assert made.output_bytes - others == sum(one.output_bytes - others for one in each)
    assert made.source_bytes - others == sum(one.source_bytes - others for one in each)
    sent = [len(blocks) * one.sent_bytes for blocks, one in zip(kinds, each, strict=True)]
    assert made.sent_bytes_in_all == sum(sent)
    assert made.sent_bytes == max(one.sent_bytes for one in each)
    assert made.scratch_bytes == max(one.scratch_bytes for one in each)


def test_blocks_that_differ_in_names_alone_are_of_one_kind() -> None:
    first = deepseek_v3().blocks[0]
    named = {f"layers.{i}": renamed(first, f"layers.{i}") for i in range(2)}
    model = replace(deepseek_v3(), blocks=(first, *named.values()))
    assert model.block_kinds == ((0, 1, 2),)
    assert plan(model).kinds[0].phases == of_blocks(plan(replace(model, blocks=(first,) * 3)).phases)


def renamed(block: BlockShape, prefix: str) -> BlockShape:
    return replace(
        block,
        linears={f"{prefix}.{name}": shape for name, shape in block.linears.items()},
        groups=tuple(tuple(f"{prefix}.{name}" for name in group) for group in block.groups),
        routing={f"{prefix}.{name}": experts for name, experts in block.routing.items()},
        expert_of={f"{prefix}.{name}": (f"{prefix}.{module}", i) for name, (module, i) in block.expert_of.items()},
    )


@pytest.mark.parametrize(
    "change",
    [
        {"groups": (("up",), ("gate",), ("down",))},
        {"parameters": 10**6},
        {"source_bytes": 10**6},
        {"routing": {"up": (1, 4)}},
        {"routing": {"up": (1, 4)}, "expert_of": {"up": ("experts", 0)}},
        {"linears": {"gate": (64, 32), "up": (64, 32), "down": (64, 32)}},
    ],
)
def test_blocks_that_differ_in_anything_else_are_not(change: dict[str, Any]) -> None:
    one = block({"gate": (64, 32), "up": (64, 32), "down": (32, 64)}, [("gate", "up"), ("down",)], 32)
    assert one.kind == replace(one).kind != replace(one, **change).kind


def fits(model: ModelShape, gpu: int, **settings: Any) -> bool:
    try:
        plan(model, gpu=gpu * GB, **settings).require_memory()
    except BudgetError:
        return False
    return True


def test_a_card_is_large_enough_if_it_is_for_each_kind_alone() -> None:
    model = nemotron_h()
    kinds = [alone(model, numbers(nemotron_pattern(), kind)) for kind in "M-*"]
    mamba, ffn, attention = (next(gpu for gpu in (6, 8, 10, 22, 23) if fits(one, gpu, match=False)) for one in kinds)
    assert (mamba, ffn, attention) == (10, 23, 6)
    assert not fits(model, 22, match=False)
    assert fits(model, 23, match=False)


@pytest.mark.parametrize("gpu", [16, 23, 24])
def test_the_most_demanding_kind_decides_for_all(gpu: int) -> None:
    model = nemotron_h()
    made = plan(model, gpu=gpu * GB, match_batch=8)
    kinds = [alone(model, numbers(nemotron_pattern(), kind)) for kind in "M-*"]
    each = [plan(kind, gpu=gpu * GB, match_batch=8) for kind in kinds]
    tiers = ("device", "host", "disk")
    assert made.grams_at == max((one.grams_at for one in each), key=tiers.index)
    assert made.micro_batch == min(one.micro_batch for one in each)
    assert made.resident_windows == min(one.resident_windows for one in each)
    workspaces = [one.solver_workspace for one in each if one.solver_workspace is not None]
    assert made.solver_workspace == min(workspaces, default=None)


def test_inputs_of_experts_and_their_groups_are_those_of_blocks_with_experts_alone() -> None:
    model = deepseek_with_dense_blocks()
    made = plan(model, gpu=80 * GB, host_mem=100 * GB, match=False)
    mixtures = plan(alone(model, range(2, 4)), gpu=80 * GB, host_mem=100 * GB, match=False)
    assert [kind.expert_gram_groups for kind in made.kinds] == [0, 8]
    assert made.expert_gram_bytes_at_once == mixtures.expert_gram_bytes_at_once
    assert made.expert_grams_in_words == mixtures.expert_grams_in_words
    assert "expert_gram_groups" not in made.memory(1)["grams"]
    assert made.memory(2)["grams"]["expert_gram_groups"] == 8
    dense, other = (kind.phases[1].gpu_bytes for kind in made.kinds)
    assert dense < other / 2


# What people see of it


def shown(made: Plan) -> str:
    text = io.StringIO()
    Console(file=text, width=120).print(plan_table(made))
    return text.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_the_table_has_a_row_for_each_kind_with_the_number_of_its_blocks() -> None:
    made = plan(nemotron_h(), world=2)
    text = shown(made)
    assert "26 blocks of 3 kinds on cuda" in " ".join(text.split())
    assert "each rank sends" in " ".join(text.split())
    *phases, mamba, ffn, attention, peak = rows(text)
    assert [row[0] for row in phases] == [phase.name for phase in made.phases]
    assert mamba[0] == "12 blocks: 0, 2, 4, 6, …"
    assert ffn[0] == "12 blocks: 1, 3, 5, 7, …"
    assert attention[0] == "2 blocks: 9, 20"
    assert [row[3] for row in (mamba, ffn, attention)] == [f"{kind.flops:.2e}" for kind in made.kinds]
    assert max(float(row[2].split()[0]) for row in (mamba, ffn, attention)) == float(peak[2].split()[0])
    assert len({row[4] for row in (mamba, ffn, attention)}) == 3


def test_a_range_of_blocks_is_shown_by_its_ends() -> None:
    texts = [row[0] for row in rows(shown(plan(deepseek_with_dense_blocks())))]
    assert texts[-3:] == ["2 blocks: 0–1", "2 blocks: 2–3", "peak"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_table_of_blocks_that_are_alike_has_no_rows_of_kinds(world: int) -> None:
    made = plan(llama_70b(), world=world)
    text = shown(made)
    assert "80 blocks on cuda" in " ".join(text.split())
    assert [row[0] for row in rows(text)] == [*(phase.name for phase in made.phases), "peak"]
    assert "each rank sends" not in text


def test_a_plan_of_several_kinds_can_be_written_as_json() -> None:
    made = json.loads(json.dumps(plan(nemotron_h(), world=2).as_dict()))
    assert [len(kind["blocks"]) for kind in made["kinds"]] == [12, 12, 2]
    names = [phase["name"] for phase in made["phases"] if phase["name"] not in WHOLE]
    assert [[phase["name"] for phase in kind["phases"]] for kind in made["kinds"]] == [names] * 3


# Checkpoints and runs


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("nemotron_h", [(0,), (1, 3), (2,)]),
        *slow(
            ("jamba", [(0,), (1, 3), (2,)]),
            ("nemotron_3_nano", [(0,), (1, 3), (2,)]),
            ("deepseek_v3", [(0,), (1, 2)]),
            ("granite_4_small", [(0, 2), (1,)]),
            ("gemma_4_26b_a4b", [(0, 2), (1, 3)]),
            ("falcon_h1", [(0, 1)]),
        ),
    ],
)
def test_kinds_of_blocks_are_found_in_checkpoints(
    family: str, kinds: list[tuple[int, ...]], text: Path, tmp_path: Path
) -> None:
    config = tiny_config(family, text, tmp_path)
    assert [kind.blocks for kind in open_run(config).plan.kinds] == kinds


def tiny_config(family: str, text: Path, folder: Path, **settings: Any) -> RunConfig:
    getattr(families, family)().write(folder / "hub", folder / "twin")
    settings = {"samples": 4, "seq_len": 32, "rank": 4, "device": "cpu", "method": "eora-wanda"} | settings
    return RunConfig.of(model=folder / "hub", out=folder / "out", calibration=text, host_mem="4GB", **settings)


RUNS = [
    ("nemotron_h", {"pattern": "50%", "owl": 0.08}),
    *slow(("jamba", {"pattern": "1:4", "match_epochs": 2}), ("deepseek_v3", {"pattern": "1:4", "match": False})),
]


@pytest.mark.parametrize(("family", "settings"), RUNS)
def test_the_journal_has_for_each_block_what_is_planned_of_its_kind(
    family: str, settings: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    config = tiny_config(family, text, tmp_path, **settings)
    planned = open_run(config).plan
    state = streamslr.compress(**config.__dict__)
    # A plan counts the bytes that its process holds before any work, here of another moment of this process.
    before = state.blocks[0].measured["load"]["host_planned_bytes"] - planned.memory(0)["load"]["host_planned_bytes"]
    for i, record in enumerate(state.blocks):
        for phase, figures in planned.memory(i).items():
            if phase != "survey":
                assert record.measured[phase]["host_planned_bytes"] - before == figures["host_planned_bytes"], phase
    if config.owl:
        most_of_all = planned.memory()["survey"]["host_planned_bytes"]
        assert state.measured["survey"]["host_planned_bytes"] - before == most_of_all
    solves = {record.measured["solve"]["host_planned_bytes"] for record in state.blocks}
    assert len(solves) == len(planned.kinds)
