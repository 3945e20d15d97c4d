"""Gram matrices: which linears share one, their values, and inputs that are refused."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamslr.calibration.expert_grams import ExpertSum, add_experts, blend_expert, blend_experts, warn_of_few_tokens
from streamslr.calibration.grams import (
    Gram,
    GramCollector,
    gram_groups,
    input_groups,
    offload_grams,
)
from streamslr.errors import InputError, StreamslrError
from tests.support.live_blocks import live_block
from tests.support.problems import peak_of


class Attention(nn.Module):
    """Linears like q and k share an input, one like o has another; their names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        copy = x * 1
        y: Tensor = self.c(self.a(x) + self.b(x)[..., :4] + copy)
        return y


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {f"block.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def collect_grams(
    name: str,
    linears: dict[str, nn.Linear],
    run: nn.Module,
    batches: list[tuple[int, Tensor]],
    experts: dict[str, str] | None = None,
) -> list[Gram]:
    block = live_block(7, name, linears, experts or {}, lambda: {}, run)
    with GramCollector(block) as collector:
        for first, hidden in batches:
            collector.run(range(first, first + len(hidden)), hidden)
    grams = collector.grams()
    warn_of_few_tokens(block, grams)
    return blend_experts(grams, block.experts)


def batches(hidden: Tensor, size: int) -> list[tuple[int, Tensor]]:
    return [(i, hidden[i : i + size]) for i in range(0, len(hidden), size)]


def test_linears_share_a_gram_exactly_when_they_share_an_input_tensor() -> None:
    block = Attention()
    grams = collect_grams("block", linears(block), block, batches(torch.randn(3, 5, 4), 2))
    assert [g.linears for g in grams] == [("block.a", "block.b"), ("block.c",)]


def test_groups_are_found_on_the_meta_device() -> None:
    block = Attention().to("meta")
    groups = input_groups(linears(block), lambda: block(torch.empty(1, 2, 4, device="meta")))
    assert groups == (("block.a", "block.b"), ("block.c",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_is_the_sum_over_all_rows_of_all_windows(dtype: torch.dtype) -> None:
    block, hidden = Attention().to(dtype), torch.randn(5, 7, 4).to(dtype)
    gram = collect_grams("block", linears(block), block, batches(hidden, 2))[0]
    x = hidden.double().reshape(-1, 4)
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.matrix.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_equal_inputs_in_different_tensors_are_not_shared() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x.clone()) + self.b(x.clone())[..., :4] + self.c(x)
            return y

    block = Twice()
    assert len(collect_grams("block", linears(block), block, batches(torch.randn(2, 3, 4), 1))) == 3


def test_non_finite_inputs_are_refused_naming_block_linear_and_windows() -> None:
    block, hidden = Attention(), torch.randn(6, 5, 4)
    hidden[3, 1, 2] = float("nan")
    hidden[4, 0, 0] = float("inf")
    hidden[4, 1, 0] = -float("inf")
    with pytest.raises(
        InputError,
        match=r"model.layers.7: the input of block.a .* for 3 tokens, in .*\[3, 4\]",
    ):
        collect_grams("model.layers.7", linears(block), block, batches(hidden, 2)[1:])


def test_a_linear_that_sees_some_tokens_only_is_refused() -> None:
    class Routed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) + self.b(x)[..., :4] + self.c(x[:, :2]).sum()
            return y

    block = Routed()
    with pytest.raises(InputError, match=r"block.c saw 4 inputs where 10 tokens passed block 1"):
        collect_grams("block 1", linears(block), block, batches(torch.randn(2, 5, 4), 1))


def test_hooks_are_gone_afterwards() -> None:
    block = Attention()
    collect_grams("block", linears(block), block, batches(torch.randn(2, 3, 4), 1))
    assert not any(linear._forward_pre_hooks for linear in linears(block).values())


def test_grams_are_not_written_through_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "gram-0.bin").symlink_to(other)
    (take,) = offload_grams([Gram(("a",), torch.eye(4), 1)], "disk", scratch)
    assert torch.equal(take().matrix, torch.eye(4))
    assert other.read_text() == "precious"


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_gram_on_the_disk_that_is_not_as_it_was_written_is_never_used(tmp_path: Path, damage: str) -> None:
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    sound, damaged = offload_grams([Gram(("a",), matrix, 1), Gram(("b",), matrix.clone(), 1)], "disk", tmp_path)
    assert torch.equal(sound().matrix, matrix)
    path = tmp_path / "gram-1.bin"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-4])
    else:
        content[13] ^= 1
        path.write_bytes(content)
    with pytest.raises(StreamslrError, match=r"the Gram matrix of b .*gram-1\.bin: .*start the same line again"):
        damaged()


class Routed(nn.Module):
    """Tokens go to expert 0, 1 or 2 by their first number, none to expert 3."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 6) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, 4)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            down(up(x[x[:, 0] == number]))
        return hidden


def routed_tokens() -> Tensor:
    """Return tokens [6, 40, 4], 200 of them for expert 0, 30 for expert 1, 10 for expert 2."""
    hidden = torch.randn(240, 4, generator=torch.Generator().manual_seed(0))
    hidden[:, 0] = torch.tensor([0] * 200 + [1] * 30 + [2] * 10)[
        torch.randperm(240, generator=torch.Generator().manual_seed(0))
    ]
    return hidden.view(6, 40, 4)


KINDS = {f"block.{kind}.{number}": kind for kind in ("up", "down") for number in range(4)}


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_experts_have_grams_of_their_own_tokens_blended_with_all_where_these_are_few(micro_batch: int) -> None:
    block, hidden = Routed(), routed_tokens()
    grams = collect_grams("block", linears(block), block, batches(hidden, micro_batch), KINDS)
    x = hidden.double().reshape(-1, 4)
    own = [x[x[:, 0] == number] for number in range(4)]
    inputs = {"up": own, "down": [up(rows.float()).double() for up, rows in zip(block.up, own, strict=True)]}
    by_name = {gram.linears[0]: gram for gram in grams}
    assert set(by_name) == set(KINDS)
    for kind, d in (("up", 4), ("down", 6)):
        of_all = sum(rows.T @ rows for rows in inputs[kind]) / 240
        for number, rows in enumerate(inputs[kind]):
            gram, n = by_name[f"block.{kind}.{number}"], len(rows)
            w = min(1.0, (n / (2 * d)) ** 0.5)
            wanted = w * rows.T @ rows / max(n, 1) + (1 - w) * of_all
            torch.testing.assert_close(gram.matrix.double(), wanted * (n or 240), rtol=1e-4, atol=1e-4)
            assert gram.rows == n
            assert gram.shared_fraction == pytest.approx(1 - w)
            assert bool(gram.warnings("x")) == (w < 1)
    assert by_name["block.down.2"].warnings("x") == (
        "x: 10 calibration tokens reached this expert, fewer than the 12 that are enough; 8.7% of its Gram matrix "
        "comes from all experts",
    )


def test_the_sum_over_experts_is_made_of_one_kind_at_a_time() -> None:
    experts = {f"{kind}.{number}": kind for kind in ("up", "down") for number in range(3)}
    grams = [Gram((name,), torch.eye(256), 10) for name in experts]
    peak = peak_of(lambda: blend_experts(grams, experts))
    assert peak < 1.5 * 4 * 256**2


def collect_in_groups(block: nn.Module, hidden: Tensor, groups: list[list[str]]) -> list[Gram]:
    """Collect each group in a pass of its own, its Grams waiting elsewhere; blend when all passes are done."""
    live = live_block(7, "block", linears(block), KINDS, lambda: {}, block)
    sums: dict[str, ExpertSum] = {}
    waiting: list[Gram] = []
    for group in groups:
        with GramCollector(live, only=group) as collector:
            for first, x in batches(hidden, 4):
                collector.run(range(first, first + len(x)), x)
        found = collector.grams()
        assert [gram.linears[0] for gram in found] == group
        add_experts(sums, found, KINDS)
        waiting += found
    return [blend_expert(gram, sums, KINDS) for gram in waiting]


@pytest.mark.parametrize("at_once", [None, 0, 4 * (3 * 16 + 36)])
def test_grams_collected_in_groups_are_those_of_one_pass_to_the_bit(at_once: int | None) -> None:
    block, hidden = Routed(), routed_tokens()
    whole = collect_grams("block", linears(block), block, batches(hidden, 4), KINDS)
    widths = {gram.linears[0]: len(gram.matrix) for gram in whole}
    in_groups = collect_in_groups(block, hidden, gram_groups(widths, at_once))
    assert [(g.linears, g.rows, g.shared_fraction) for g in in_groups] == [
        (g.linears, g.rows, g.shared_fraction) for g in whole
    ]
    assert all(torch.equal(mine.matrix, its.matrix) for mine, its in zip(in_groups, whole, strict=True))


def test_experts_of_two_ranks_are_blended_with_what_both_saw() -> None:
    block, hidden = Routed(), routed_tokens()
    whole = collect_grams("block", linears(block), block, batches(hidden, 6), KINDS)
    live = live_block(7, "block", linears(block), KINDS, lambda: {}, block)
    sums: dict[str, ExpertSum] = {}
    parts = []
    for rank in range(2):
        with GramCollector(live) as collector:
            collector.run(range(rank * 3, rank * 3 + 3), hidden[rank * 3 : rank * 3 + 3])
        parts.append(collector.grams())
        add_experts(sums, parts[-1], KINDS)
    for one, other, wanted in zip(*parts, whole, strict=True):
        summed = Gram(one.linears, one.matrix + other.matrix, one.rows + other.rows)
        found = blend_expert(summed, sums, KINDS)
        assert (found.rows, found.shared_fraction) == (wanted.rows, wanted.shared_fraction)
        torch.testing.assert_close(found.matrix, wanted.matrix, rtol=1e-5, atol=1e-4)


def test_groups_hold_as_many_grams_as_may_be_at_once_but_at_least_one() -> None:
    widths = {"a": 10, "b": 10, "c": 30, "d": 5}
    assert gram_groups(widths, None) == [["a", "b", "c", "d"]]
    assert gram_groups(widths, 800) == [["a", "b"], ["c"], ["d"]]
    assert gram_groups(widths, 799) == [["a"], ["b"], ["c"], ["d"]]


def test_grams_of_one_expert_are_never_parted() -> None:
    widths = {"0.up": 10, "0.down": 20, "1.up": 10, "1.down": 20, "2.up": 10, "2.down": 20}
    experts = {owner: int(owner[0]) for owner in widths}
    assert gram_groups(widths, 1, experts) == [["0.up", "0.down"], ["1.up", "1.down"], ["2.up", "2.down"]]
    assert gram_groups(widths, 4400, experts) == [["0.up", "0.down", "1.up", "1.down"], ["2.up", "2.down"]]


def test_every_group_still_checks_what_reached_the_linears() -> None:
    block, hidden = Attention(), torch.randn(2, 3, 4)
    hidden[1, 1, 2] = float("nan")
    live = live_block(7, "block", linears(block), {}, lambda: {}, block)
    with GramCollector(live, only=["block.a"]) as collector:
        collector.run([0, 1], hidden)
    with pytest.raises(InputError, match=r"the input of block.a is NaN"):
        collector.grams()
    with GramCollector(live, only=["block.b"]) as collector:
        collector.run([0, 1], torch.randn(2, 3, 4))
    with pytest.raises(InputError, match=r"block.b was to have a Gram matrix of its own, but shares its input"):
        collector.grams()


def test_grams_of_a_later_group_do_not_take_the_files_of_an_earlier_one(tmp_path: Path) -> None:
    (earlier,) = offload_grams([Gram(("a",), torch.eye(4), 1)], "disk", tmp_path)
    (later,) = offload_grams([Gram(("b",), 2 * torch.eye(4), 1)], "disk", tmp_path, first=1)
    assert torch.equal(earlier().matrix, torch.eye(4))
    assert torch.equal(later().matrix, 2 * torch.eye(4))


def test_how_many_experts_lack_tokens_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    block = Routed()
    collect_grams("block 3", linears(block), block, batches(routed_tokens(), 2), KINDS)
    assert caplog.messages == [
        "block 3: 3 of the 8 Gram matrices of its experts saw too few tokens, the fewest 0; they are blended with the "
        "Gram matrix of all experts"
    ]


def test_an_experts_non_finite_input_names_the_windows_of_its_batch() -> None:
    block, hidden = Routed(), routed_tokens()
    hidden[3, 7, 2] = float("inf")
    with pytest.raises(InputError, match=r"NaN or infinite for 1 tokens, in calibration windows \[2, 3\]"):
        collect_grams("block", linears(block), block, batches(hidden, 2), KINDS)


def test_the_collector_keeps_no_matrix_that_it_handed_over() -> None:
    """It refers to its hooks and they to it, so it lives on until a garbage collection."""
    net = nn.Sequential(nn.Linear(4, 4))
    block = live_block(0, "block", linears(net), {}, lambda: {}, net)
    gc.disable()
    try:
        with GramCollector(block) as collector:
            collector.run([0, 1], torch.randn(2, 3, 4))
        (gram,) = collector.grams()
        matrix = weakref.ref(gram.matrix)
        del gram, collector
        assert matrix() is None
    finally:
        gc.enable()


def test_a_gpu_multiplies_bf16_inputs_on_tensor_cores_without_a_copy_or_a_wait() -> None:
    width, tokens = 4096, 32
    with pytest.importorskip("pretended_gpu").PretendedGpu() as gpu:
        linear = nn.Linear(width, 2, dtype=torch.bfloat16, device="cuda")
        block = live_block(0, "block", {"a": linear}, {}, lambda: {}, linear)
        x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        on_gpu = x.cuda()
        with GramCollector(block) as collector:
            gpu.phase = "pass"
            collector.run(range(len(on_gpu)), on_gpu)
            gpu.phase = "after"
            held = gpu.allocator.peak_allocated
            (gram,) = collector.grams()
            matrix = gram.matrix.cpu()
        cost = gpu.by_phase["pass"]
    assert cost.syncs == 0
    assert "fp32" not in cost.flops
    assert 2 * tokens * width**2 / 2 < cost.flops["bf16"] < 0.8 * 2 * tokens * width**2  # panels to the diagonal
    assert held < 4 * width**2 + 2**20
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix, x[0].float().T @ x[0].float(), rtol=1e-5, atol=1e-4)


def test_experts_that_no_token_reached_are_refused_by_name() -> None:
    """Their Gram is 0, by which any weights would be as good."""
    name, kind = next(iter(KINDS.items()))
    gram = Gram((name,), torch.zeros(4, 4), 0)
    with pytest.raises(InputError, match=f"{name}: no token reached any expert of its kind"):
        blend_expert(gram, {kind: ExpertSum(torch.zeros(4, 4))}, KINDS)
