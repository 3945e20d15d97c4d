"""The plan: bytes that follow from shapes, what is refused, and the choices a run obeys."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamslr.calibration.transfers import host_transfer_bytes, pinned_bytes
from streamslr.config import RunConfig
from streamslr.errors import BudgetError
from streamslr.gpu import GpuMemory
from streamslr.matching_costs import count_masters
from streamslr.model.shape import BlockShape, ModelShape
from streamslr.ranks import Ranks
from streamslr.results.fit import settings_that_fit
from streamslr.run.costs import PhaseCost
from streamslr.run.plan import Plan
from streamslr.run.planning import Pieces, make_plan
from streamslr.solvers import find_method
from streamslr.spec.allocation import allocate

GB = 10**9


def llama_70b() -> ModelShape:
    return llama(8192, 28672)


def llama_405b() -> ModelShape:
    return llama(16384, 53248)


def llama(h: int, ffn: int, kv: int = 1024) -> ModelShape:
    linears = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (ffn, h), "up": (ffn, h), "down": (h, ffn)}
    parameters = sum(o * d for o, d in linears.values()) + 2 * h
    block = BlockShape(linears, (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)), parameters, 2 * parameters)
    non_block = 2 * 128256 * h + h
    return ModelShape((block,) * 80, h, non_block, 2 * non_block, 2)


def deepseek_v3(can_keep: bool = True) -> ModelShape:
    """Return two of its blocks with experts: one shared by all tokens, and 256 of which a token passes 8.

    Args:
        can_keep: Whether what enters the experts can be kept, as it can.
    """
    h, ffn = 7168, 2048
    linears = {"qa": (1536, h), "kva": (576, h), "qb": (24576, 1536), "kvb": (32768, 512), "o": (h, 16384)}
    groups: list[tuple[str, ...]] = [("qa", "kva"), ("qb",), ("kvb",), ("o",)]
    routing: dict[str, tuple[int, int]] = {}
    for name in ("shared", *map(str, range(256))):
        own = {f"{name}.gate": (ffn, h), f"{name}.up": (ffn, h), f"{name}.down": (h, ffn)}
        linears |= own
        groups += [(f"{name}.gate", f"{name}.up"), (f"{name}.down",)]
        if name != "shared":
            routing |= dict.fromkeys(own, (8, 256))
    parameters = sum(o * d for o, d in linears.values()) + 256 * h
    expert_of = {name: ("experts", int(name.partition(".")[0])) for name in routing if can_keep}
    block = BlockShape(linears, tuple(groups), parameters, 2 * parameters, routing, expert_of)
    return ModelShape((block,) * 2, h, 2 * 129280 * h, 4 * 129280 * h, 2)


def plan(
    model: ModelShape,
    host_mem: int = 10**12,
    device: str = "cuda",
    gpu: int | None = None,
    world: int = 1,
    match_held_out: int = 0,
    **settings: Any,
) -> Plan:
    config = RunConfig(model="m", out=Path("out"), match_held_out=match_held_out, **settings)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    allocation = allocate(config, [block.linears for block in model.blocks])
    method = replace(find_method(config.method), by_rows=True)
    memory = GpuMemory(gpu) if gpu else None
    ranks = Ranks(world=world, local_world=world)
    return make_plan(config, model, allocation, method, torch.device(device), dtype, GB, host_mem, memory, ranks=ranks)


def phase(plan: Plan, name: str) -> PhaseCost:
    return next(p for p in plan.phases if p.name == name)


def test_the_result_of_a_70b_at_2_4_in_int4_takes_less_than_32_gb() -> None:
    config = RunConfig(model="m", out=Path("out"), pattern="2:4", values="int4", rank=64)
    (fit,) = settings_that_fit(config, llama_70b(), cache_bytes=0, card=48 * GB)
    assert 29 * GB < fit.weight_bytes < 32 * GB
    assert 2.85 < fit.bits < 3


def test_a_70b_model_fits_one_48_gb_card_and_a_modest_host() -> None:
    made = plan(llama_70b(), host_mem=24 * GB)
    replace(made, gpu_mem=45 * GB).require_memory()
    assert made.scratch_bytes == 4 * (128 + 4) * 2048 * 8192 * 2
    assert plan(llama_70b(), match=False).scratch_bytes == (2 * 128 + 4 * 4) * 2048 * 8192 * 2


def test_the_largest_terms_are_what_the_shapes_say() -> None:
    made = plan(llama_70b(), samples=1)
    block = 2 * llama_70b().blocks[0].parameters
    grams = 4 * (3 * 8192**2 + 28672**2)
    assert block + grams < phase(made, "grams").gpu_bytes < block + grams + 2 * GB
    assert made.output_bytes == pytest.approx(0.5625 * made.source_bytes, rel=0.1)


def test_depth_changes_totals_but_no_peak() -> None:
    shallow = llama_70b()
    deep = replace(shallow, blocks=shallow.blocks * 4)
    assert plan(deep).gpu_bytes == plan(shallow).gpu_bytes
    assert plan(deep).host_bytes == plan(shallow).host_bytes
    assert plan(deep).flops == pytest.approx(4 * plan(shallow).flops)


def test_hidden_states_stay_in_memory_only_where_they_fit() -> None:
    roomy, tight = plan(llama_70b(), host_mem=10**11), plan(llama_70b(), host_mem=12 * GB)
    assert roomy.in_memory
    assert not tight.in_memory
    check = 4 * 2048 * 8192 * 2  # one of the four boundaries of check windows comes after propagate
    assert phase(roomy, "propagate").host_bytes - phase(tight, "propagate").host_bytes == roomy.scratch_bytes - check
    assert phase(roomy, "check").host_bytes - phase(tight, "check").host_bytes == roomy.scratch_bytes


def test_short_windows_pass_together_and_fewer_where_memory_is_short() -> None:
    model = llama_70b()
    generous = plan(model, device="cpu", seq_len=64, samples=64)
    assert generous.micro_batch == 32
    on_disk = plan(model, host_mem=17 * GB, device="cpu", seq_len=64, samples=64)
    assert (on_disk.micro_batch, on_disk.in_memory) == (32, False)
    needed = max(phase(on_disk, name).host_bytes for name in ("embed", "grams", "match", "propagate"))
    assert plan(model, host_mem=needed - 1, device="cpu", seq_len=64, samples=64).micro_batch < 32


def test_windows_pass_a_gpu_together_by_powers_of_two_up_to_a_step_of_matching() -> None:
    assert plan(llama_70b(), gpu=80 * GB).micro_batch == RunConfig.match_batch == 4
    assert plan(llama_70b(), gpu=80 * GB, match_batch=16).micro_batch == 8
    assert plan(llama_70b(), gpu=80 * GB, match_batch=8, seq_len=4096).micro_batch == 4
    assert plan(llama_70b(), gpu=80 * GB, seq_len=256, match_batch=12).micro_batch == 8
    assert plan(llama_70b(), gpu=80 * GB, seq_len=256, match=False).micro_batch == 64
    assert plan(llama_70b(), gpu=80 * GB, seq_len=32768).micro_batch == 1


def test_fewer_windows_pass_a_small_gpu_together() -> None:
    tight = plan(llama_70b(), gpu=20 * GB, match_batch=8)
    assert tight.micro_batch < 8
    tight.require_memory()


def test_what_cuda_takes_for_itself_is_a_part_of_the_budget() -> None:
    made = plan(llama_70b(), gpu=45 * GB)
    need = made.gpu_bytes + made.gpu_context
    replace(made, gpu_mem=need).require_memory()
    with pytest.raises(BudgetError, match=r"0.6\d* GB of it for CUDA itself|629.1 MB of it for CUDA itself"):
        replace(made, gpu_mem=need - 1).require_memory()


def test_segments_of_fixed_size_leave_a_plan_less_of_the_budget() -> None:
    expandable, fixed = GpuMemory(20 * GB), GpuMemory(20 * GB, expandable=False)
    assert expandable.limit == fixed.limit == 20 * GB - expandable.context
    assert fixed.usable < expandable.usable < expandable.limit
    assert fixed.usable * 1.16 < fixed.limit  # what fragments took of a 70B block


@pytest.mark.parametrize(("host", "gpu", "flag"), [(GB // 2, None, "--host-mem"), (10**12, 4 * GB, "--gpu-mem")])
def test_what_cannot_fit_is_refused_naming_phase_bytes_and_flag(host: int, gpu: int | None, flag: str) -> None:
    with pytest.raises(BudgetError, match=rf"phase \w+.* needs \d.* GB of .* raise {flag}"):
        replace(plan(llama_70b(), host_mem=host), gpu_mem=gpu).require_memory()


def test_a_gpu_without_a_budget_is_planned_for_and_refuses_nothing() -> None:
    made = plan(llama_70b())
    made.require_memory()
    assert made.gpu_bytes > 19 * GB
    assert (made.as_dict()["host_budget_bytes"], made.as_dict()["gpu_budget_bytes"]) == (10**12, None)


def test_a_disk_without_room_is_refused_naming_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Full:
        f_bavail, f_frsize = 1000, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(BudgetError, match=rf"{tmp_path} has 4.1 MB free; output 8\d.* GB and hidden states 17.7 GB"):
        plan(llama_70b()).require_disk(tmp_path / "out" / "deep", tmp_path / "out" / "deep" / ".scratch", tmp_path)


def test_what_lies_on_the_disk_already_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Room:
        f_bavail, f_frsize = 1, 600

    block = BlockShape({"a": (16, 16)}, (("a",),), 256, 512)
    made = plan(ModelShape((block,), 16, 0, 0, 2), device="cpu", samples=2, seq_len=4, rank=0, check_windows=0)
    assert (made.scratch_bytes, made.output_bytes) == (2048, 288)
    monkeypatch.setattr(os, "statvfs", lambda path: Room)
    out, scratch = tmp_path / "out", tmp_path / "out" / ".scratch"
    scratch.mkdir(parents=True)
    with pytest.raises(BudgetError):
        made.require_disk(out, scratch, tmp_path)
    (scratch / "chunk").write_bytes(bytes(1736))
    made.require_disk(out, scratch, tmp_path)


def test_downloads_need_room_in_the_cache_and_less_when_they_are_evicted() -> None:
    model = replace(llama_70b(), download_bytes=140 * GB, largest_shard_bytes=5 * GB)
    assert plan(model).cache_bytes == 140 * GB
    assert plan(model, evict_shards=True).cache_bytes == 20 * GB


def test_attention_that_is_not_fused_is_planned_with_its_weights() -> None:
    eager = replace(llama_70b(), eager_heads=64)
    more = phase(plan(eager), "grams").gpu_bytes - phase(plan(llama_70b()), "grams").gpu_bytes
    assert more >= 2 * 64 * 2048**2 * 4


def test_a_70b_block_fits_24_gb_with_matching() -> None:
    made = plan(llama_70b(), host_mem=24 * GB, gpu=24 * GB)
    made.require_memory()
    assert "match" in {p.name for p in made.phases}


def test_a_tight_budget_moves_grams_away_first_and_then_cuts_the_solver_into_tiles() -> None:
    generous = plan(llama_70b(), samples=1, gpu=45 * GB)
    assert (generous.grams_at, generous.solver_workspace) == ("device", None)
    grams = 4 * (3 * 8192**2 + 28672**2)
    peak = phase(generous, "solve").gpu_bytes
    budget = peak + generous.gpu_context  # of which a margin stays free
    aside = plan(llama_70b(), samples=1, gpu=budget)
    assert (aside.grams_at, aside.solver_workspace) == ("host", None)
    needed = phase(aside, "solve").gpu_bytes
    assert peak - needed == grams - 4 * 28672**2
    modest = generous.host_bytes - generous.scratch_bytes
    assert plan(llama_70b(), samples=1, gpu=budget, host_mem=modest).grams_at == "disk"
    tight = needed + GB // 2
    tiled = plan(llama_70b(), samples=1, gpu=tight)
    assert tiled.solver_workspace is not None
    assert tiled.grams_at == "host"
    assert phase(tiled, "solve").gpu_bytes <= GpuMemory(tight).usable < needed


def test_a_solve_on_a_gpu_takes_less_where_its_step_is_fused() -> None:
    fused, plain = plan(llama_70b(), pattern="2:4"), plan(llama_70b(), pattern="50%")
    assert phase(plain, "solve").gpu_bytes - phase(fused, "solve").gpu_bytes >= 8 * 8192 * 28672


@pytest.mark.parametrize(("gpu", "fewest", "most"), [(None, 0, 0), (16 * GB, 1, 127), (45 * GB, 128, 128)])
def test_hidden_states_stay_on_the_gpu_while_a_block_is_matched_where_the_budget_has_room(
    gpu: int | None, fewest: int, most: int
) -> None:
    made, least = plan(llama_70b(), gpu=gpu, match_batch=1), plan(llama_70b(), match_batch=1)
    assert fewest <= made.resident_windows <= most
    kept = made.resident_windows * 2 * 2048 * 8192 * 2  # of hidden states and targets in bf16
    assert phase(made, "match").gpu_bytes == phase(least, "match").gpu_bytes + kept
    assert phase(made, "propagate").gpu_bytes == phase(least, "propagate").gpu_bytes + kept
    assert phase(made, "grams").gpu_bytes == phase(least, "grams").gpu_bytes


def test_pinned_buffers_count_against_the_host_budget() -> None:
    made, window = plan(llama_70b(), host_mem=12 * GB), 2048 * 8192 * 2
    moving = phase(made, "match").host_bytes - phase(made, "solve").host_bytes
    assert moving == host_transfer_bytes(window, reads=2)
    assert phase(made, "solve").host_bytes > pinned_bytes(window) + GB


def test_a_method_that_cannot_work_in_tiles_is_not_said_to() -> None:
    made = plan(llama_70b(), gpu=5 * GB, method="oats", match=False)
    assert made.solver_workspace is None
    with pytest.raises(BudgetError, match="phase"):
        made.require_memory()


def test_matching_is_planned_for_what_may_change_and_not_for_dense_weights() -> None:
    values = 0.5 * sum(o * d for o, d in llama_70b().blocks[0].linears.values())
    low_rank = 64 * sum(o + d for o, d in llama_70b().blocks[0].linears.values())
    more = (
        phase(plan(llama_70b(), samples=1), "match").gpu_bytes
        - phase(plan(llama_70b(), samples=1), "propagate").gpu_bytes
    )
    assert 20 * values + 16 * low_rank < more < 20 * values + 16 * low_rank + 4 * GB


def test_a_run_that_goes_on_keeps_the_pieces_it_began_with() -> None:
    config = RunConfig(model="m", out=Path("out"), seq_len=64)
    allocation, device = allocate(config, [llama_70b().blocks[0].linears]), torch.device("cpu")
    method = find_method("3basil")
    made = make_plan(config, llama_70b(), allocation, method, device, torch.float32, GB, 10**12, None, Pieces(4, 10**9))
    assert (made.micro_batch, made.solver_workspace) == (4, 10**9)


def test_each_linear_counts_with_its_own_rank_and_pattern() -> None:
    same, more = plan(llama_70b()), plan(llama_70b(), ranks="down=128")
    assert more.output_bytes - same.output_bytes == 80 * 64 * (8192 + 28672) * 2
    assert more.linears == "2:4 + rank 64–128"
    shares = plan(llama_70b(), compression="50%", rank_ratio=0.25)
    assert shares.parameter_fraction == pytest.approx(0.5, abs=1e-4)
    assert phase(shares, "match").gpu_bytes < phase(same, "match").gpu_bytes


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(10**8, 10**11), st.integers(10**8, 10**11))
def test_more_memory_never_cuts_smaller(low: int, more: int) -> None:
    tight, roomy = (plan(llama_70b(), device="cpu", host_mem=b, seq_len=128) for b in (low, low + more))
    assert tight.micro_batch <= roomy.micro_batch
    assert roomy.solver_workspace is None or (
        tight.solver_workspace is not None and tight.solver_workspace <= roomy.solver_workspace
    )


def test_a_rank_passes_and_stores_its_windows_only() -> None:
    one, four = plan(llama_70b()), plan(llama_70b(), world=4)
    assert four.scratch_bytes == one.scratch_bytes / 4
    for name in ("grams", "match", "propagate"):
        assert phase(four, name).flops == pytest.approx(phase(one, name).flops / 4)
    eight = phase(plan(llama_70b(), world=8), "match")
    assert eight.flops > 0.9 * phase(four, "match").flops, "a step has 4 windows, so 4 of 8 ranks wait"
    uneven = plan(llama_70b(), world=8, samples=121, match_held_out=9)  # 16 fitted ones for the fullest rank
    assert uneven.scratch_bytes == one.scratch_bytes * (16 + 2 + 1) / (128 + 4), "and one check window of four"


@pytest.mark.parametrize(("world", "most"), [(2, 0.55), (4, 0.30)])
def test_the_busiest_rank_does_little_more_than_its_share_of_the_work(world: int, most: float) -> None:
    one, shared = plan(llama_70b()), plan(llama_70b(), world=world)
    assert one.flops / world <= shared.flops <= most * one.flops


def test_a_rank_keeps_masters_gradients_and_moments_of_its_share_alone() -> None:
    two, eight = (plan(llama_70b(), world=world, match_batch=1) for world in (2, 8))
    block = llama_70b().blocks[0]
    masters = count_masters(block, allocate(RunConfig(model="m", out=Path("out")), [block.linears]))
    saved = 16 * masters * (1 / 2 - 1 / 8)
    assert phase(two, "match").gpu_bytes - phase(eight, "match").gpu_bytes == pytest.approx(saved, abs=16)


def test_solved_linears_go_to_the_host_where_a_block_could_not_be_matched_beside_them() -> None:
    roomy, tight = (plan(deepseek_v3(), host_mem=100 * GB, gpu=gpu * GB, world=8) for gpu in (140, 80))
    assert (roomy.solved_at, tight.solved_at) == ("device", "host")
    assert phase(tight, "match").gpu_bytes < 80 * GB < phase(roomy, "match").gpu_bytes
    packed = (tight.output_bytes - 4 * 129280 * 7168) / 2
    more = phase(tight, "match").host_bytes - phase(roomy, "match").host_bytes
    assert more == pytest.approx(2 * packed, rel=0.01)


def test_only_the_grams_of_a_ranks_own_linears_wait_to_be_solved() -> None:
    one, eight = (plan(deepseek_v3(), world=world, samples=8, gpu=200 * GB, match=False) for world in (1, 8))
    assert (one.grams_at, one.gram_bytes_at_once) == (eight.grams_at, eight.gram_bytes_at_once) == ("device", None)
    grams = 4 * sum(d * d for d in deepseek_v3().blocks[0].grams.values())
    sums = 4 * (7168**2 + 2048**2)  # of experts, which eight ranks blend as they solve
    kept = grams - (phase(one, "solve").gpu_bytes - phase(eight, "solve").gpu_bytes + sums)
    assert grams / 8 <= kept <= 1.25 * grams / 8


def test_what_a_rank_sends_is_what_the_guide_says() -> None:
    made = plan(llama_70b(), world=2, match_batch=8)
    h, ffn = 8192, 28672
    assert made.deal is not None
    assert made.deal.by_rows == {"down"}
    assert made.deal.owners == {"q": 0, "k": 0, "v": 1, "o": 1, "gate": 0, "up": 1}
    grams = 4 * (h**2 * (2 + 1 + 2) + 2 * ffn**2)  # that of o goes to one rank, all others to both
    packed = (made.output_bytes - 2 * (2 * 128256 * h + h)) / 80 - 2 * 2 * h
    block = llama_70b().blocks[0]
    masters = count_masters(block, allocate(RunConfig(model="m", out=Path("out")), [block.linears]))
    steps = (RunConfig.of(model="m").epochs - 1) * 128 // 8
    micro_batches = steps * 4 // min(4, made.micro_batch)
    sent = {p.name: p.sent_bytes for p in made.phases if p.sent_bytes}
    matching = (micro_batches + steps + 1) * 4 * masters
    assert sent == pytest.approx({"grams": grams / 2, "solve": packed / 2, "match": matching / 2}, rel=1e-6)
    assert made.sent_bytes == sum(sent.values())


def test_a_process_alone_sends_nothing_and_deals_nothing() -> None:
    alone = plan(llama_70b())
    assert (alone.sent_bytes, alone.deal) == (0, None)


def test_a_plan_for_ranks_can_be_written_as_json() -> None:
    made = json.loads(json.dumps(plan(llama_70b(), world=8).as_dict()))
    assert made["deal"]["owners"].keys() | set(made["deal"]["by_rows"]) == llama_70b().blocks[0].linears.keys()
    assert len(made["deal"]["loads"]) == made["world"] == 8


def test_the_disk_must_hold_the_hidden_states_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Full:
        f_bavail, f_frsize = 1000, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(BudgetError, match=r"hidden states 17.2 GB"):
        plan(llama_70b(), world=8, check_windows=0).require_disk(
            tmp_path / "out", tmp_path / "out" / ".scratch", tmp_path
        )


def test_eight_cards_of_80_gb_fit_a_block_of_405b() -> None:
    made = plan(llama_405b(), world=8, gpu=80 * GB, host_mem=60 * GB)
    made.require_memory()
    assert made.gram_bytes_at_once is None


@pytest.mark.parametrize("world", [1, 8])
def test_grams_that_do_not_fit_beside_the_block_are_collected_in_groups(world: int) -> None:
    made = plan(deepseek_v3(can_keep=False), world=world, gpu=80 * GB, host_mem=100 * GB, samples=128, match=False)
    made.require_memory()
    assert made.grams_at == "host"
    assert made.gram_bytes_at_once is not None
    roomy = plan(deepseek_v3(can_keep=False), world=world, gpu=200 * GB, host_mem=100 * GB, samples=128, match=False)
    again = phase(made, "grams").flops - phase(roomy, "grams").flops
    assert again == pytest.approx(phase(made, "propagate").flops)  # a second pass of the block
    poor = plan(
        deepseek_v3(can_keep=False), world=world, gpu=80 * GB, host_mem=35 * GB // world, samples=128, match=False
    )
    assert poor.grams_at == "disk"
    assert poor.scratch_bytes > made.scratch_bytes


def test_no_more_is_collected_at_once_than_the_budget_leaves() -> None:
    tight, roomy = (plan(deepseek_v3(can_keep=False), gpu=gpu * GB, samples=8, match=False) for gpu in (40, 60))
    assert tight.gram_bytes_at_once is not None
    assert roomy.gram_bytes_at_once is not None
    assert tight.gram_bytes_at_once < roomy.gram_bytes_at_once
    for made, gpu in ((tight, 40), (roomy, 60)):
        assert 0.98 * GpuMemory(gpu * GB).usable < phase(made, "grams").gpu_bytes <= GpuMemory(gpu * GB).usable


def test_grams_are_collected_in_groups_on_a_cpu_too() -> None:
    made = plan(deepseek_v3(can_keep=False), device="cpu", host_mem=80 * GB, samples=8, seq_len=64, match=False)
    made.require_memory()
    assert (made.gram_bytes_at_once is not None, made.grams_at) == (True, "disk")


@pytest.mark.parametrize(("gpu", "world"), [(40, 1), (45, 1), (80, 1), (80, 8)])
def test_grams_of_experts_are_never_more_than_8_gb_at_a_time(gpu: int, world: int) -> None:
    made = plan(deepseek_v3(), gpu=gpu * GB, host_mem=100 * GB, world=world, match=False)
    made.require_memory()
    of_experts = 4 * 256 * (7168**2 + 2048**2)
    assert made.expert_gram_bytes_at_once is not None
    assert made.expert_gram_bytes_at_once <= 8 * GB
    assert made.expert_gram_groups == -(-of_experts // made.expert_gram_bytes_at_once)
    assert made.gram_bytes_at_once is None, "all others are collected in one pass"
    block = 2 * deepseek_v3().blocks[0].parameters
    assert phase(made, "grams").gpu_bytes < block + 30 * GB < block + of_experts


def test_kept_inputs_of_experts_take_disk_and_every_gram_is_made_twice() -> None:
    budgets: dict[str, Any] = {"host_mem": 100 * GB, "samples": 128, "match": False}
    made, roomy = (plan(deepseek_v3(), gpu=gpu * GB, **budgets) for gpu in (80, 200))
    assert (roomy.expert_gram_bytes_at_once, roomy.expert_gram_groups) == (None, 0)
    tokens = 128 * 2048
    assert made.scratch_bytes - roomy.scratch_bytes == 2 * tokens * 7168
    experts = 2 * tokens * 8 * 3 * 2048 * 7168  # a pass of all of them
    products = 2 * tokens * 8 * (7168**2 + 2048**2)
    again = phase(made, "grams").flops - phase(roomy, "grams").flops
    assert again == pytest.approx(2 * (2 * experts + products))  # two blocks
    assert "made in 8 groups of at most 7.8 GB a block, from 3.8 GB of inputs" in made.expert_grams_in_words
    assert made.memory()["grams"]["expert_gram_groups"] == 8


def test_grams_of_experts_that_would_have_to_leave_the_gpu_are_made_in_groups() -> None:
    fits_while_collected = plan(deepseek_v3(), gpu=93 * GB, host_mem=100 * GB, samples=8, seq_len=64, match=False)
    assert fits_while_collected.expert_gram_groups == 8
    assert fits_while_collected.grams_at == "device"


def test_a_cpu_collects_grams_of_experts_in_groups_too() -> None:
    made = plan(deepseek_v3(), device="cpu", host_mem=80 * GB, samples=8, seq_len=64, match=False)
    made.require_memory()
    assert (made.expert_gram_groups, made.gram_bytes_at_once, made.grams_at) == (8, None, "device")
