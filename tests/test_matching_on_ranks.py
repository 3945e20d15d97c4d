"""Refining a block on two and three ranks: what one process does, on each rank, and memory that runs out on one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamslr import masters
from streamslr import ranks as exchanges
from streamslr.calibration.hidden_states import Span
from streamslr.linear_masters import LinearMasters
from streamslr.masters import MatchSettings, flats
from streamslr.ranks import ALONE, Ranks
from tests.support.markers import long
from tests.support.started_ranks import StartedRanks
from tests.test_matching import SETTINGS, WIDTH, WINDOWS, Case, GatedBlock, every_tensor, made_case

Refined = tuple[dict[str, Tensor], tuple[float, ...], tuple[float, ...]]
"""Every tensor of the refined block, and the losses of its epochs on all windows and on those held out."""


class TwoExperts(nn.Module):
    """Two linears in turn, of which a window takes the first where its first number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y, first = self.norm(x), x[:, 0, 0] > 0
        out = x.clone()
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            if chosen.any():
                out[chosen] += expert(y[chosen])
        return out


@dataclass(frozen=True)
class Way:
    """A way to refine a block of seven windows."""

    settings: MatchSettings = SETTINGS
    micro_batch: int = 3
    held_out: int = 0
    block: Callable[[], nn.Module] = GatedBlock
    dtype: torch.dtype = torch.float32
    bundled: int = masters.BUNDLED


WAYS = {
    "uneven windows": Way(),
    "fewer held-out windows than ranks": Way(held_out=1),
    "several micro-batches a step": Way(replace(SETTINGS, batch=7), micro_batch=1),
    "fewer windows in a step than ranks": Way(replace(SETTINGS, batch=1)),
    "experts that no window of a rank reaches": Way(block=TwoExperts),
    "bfloat16": Way(dtype=torch.bfloat16),
    "a bundle for each linear": Way(bundled=0),
}


def case_of(way: Way) -> Case:
    case = made_case(block=way.block, compute=way.dtype, linears=way.dtype, vectors=way.dtype)
    if way.block is TwoExperts:
        case.inputs[:, 0, 0] = torch.tensor([1.0] + [-1.0] * (WINDOWS - 1))
    return case


@torch.no_grad()
def refine(way: Way, ranks: Ranks, case: Case, run: Callable[[Tensor], Tensor] | None = None) -> Refined:
    """Refine the block on this rank's windows, dealt as `Passes` deals them."""
    fitted = WINDOWS - way.held_out
    windows = [*range(ranks.rank, fitted, ranks.world), *range(fitted + ranks.rank, WINDOWS, ranks.world)]

    def batches(spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in spans:
            yield case.inputs[windows[start:stop]], case.targets[windows[start:stop]]

    block, sizes = case.compressed(run), (WINDOWS, way.micro_batch, way.held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masters, "BUNDLED", way.bundled)
        weights, curve, held_out = block.refine(case.weights, way.settings, batches, *sizes, ranks)
    return every_tensor(weights), curve, held_out


FAILURES = ["while measuring", "in a forward pass", "in a backward pass", "while gradients are made", "in a step"]


def refine_after_a_failure(ranks: Ranks, where: str) -> tuple[str, Refined]:
    """Let the last rank lack memory once; return what the first try raised, and what a second one returns."""
    way = replace(WAYS["a bundle for each linear"], micro_batch=1)
    case, passes, last = case_of(way), 0, ranks.rank == ranks.world - 1

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    def run(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if last and where == "while measuring":
            fail()
        if last and passes == 6 and where == "in a forward pass":
            fail()
        if last and passes == 6 and where == "in a backward pass":
            x = x.clone().requires_grad_()
            x.register_hook(fail)
        return case.run(x)

    failing = {"while gradients are made": "add_gradients", "in a step": "write_to_block"}
    with pytest.MonkeyPatch.context() as patch:
        if last and where in failing:
            patch.setattr(LinearMasters, failing[where], fail)
        with pytest.raises(MemoryError) as raised:
            refine(way, ranks, case, run)
    return str(raised.value), refine(way, ranks, case)


def exchanges_in_six_steps(ranks: Ranks) -> int:
    """Return how many more exchanges three steps an epoch take than one, in three epochs."""
    counts = []
    for batch in (WINDOWS, 3):
        count = 0

        def counted(exchange: Callable[..., Any]) -> Callable[..., Any]:
            def begin(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                return exchange(*args, **kwargs)

            return begin

        with pytest.MonkeyPatch.context() as patch:
            for module, name in ((exchanges, "_reduce_scatter"), (exchanges, "_all_gather"), (dist, "all_reduce")):
                patch.setattr(module, name, counted(getattr(module, name)))
            way = Way(replace(SETTINGS, epochs=4, batch=batch), micro_batch=WINDOWS)
            refine(way, ranks, case_of(way))
        counts.append(count)
    return counts[1] - counts[0]


Results = tuple[dict[str, Refined], dict[str, tuple[str, Refined]], int]


def work_of_a_rank(ranks: Ranks) -> Results:
    refined = {name: refine(way, ranks, case_of(way)) for name, way in WAYS.items()}
    failed = {where: refine_after_a_failure(ranks, where) for where in FAILURES}
    return refined, failed, exchanges_in_six_steps(ranks)


@pytest.fixture(scope="module", params=[2, *long(3)])
def of_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return StartedRanks(request.param, tmp_path_factory.mktemp("matching"), work_of_a_rank).results()


def assert_same_bits(one: Refined, other: Refined) -> None:
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(tensor, other[0][name]) for name, tensor in one[0].items())


@pytest.mark.parametrize("name", WAYS)
def test_all_ranks_have_the_same_bits(of_ranks: list[Results], name: str) -> None:
    for refined, _, _ in of_ranks[1:]:
        assert_same_bits(refined[name], of_ranks[0][0][name])


@pytest.mark.parametrize("name", WAYS)
def test_ranks_refine_to_what_one_process_does(of_ranks: list[Results], name: str) -> None:
    tensors, curve, held_out = of_ranks[0][0][name]
    expected, expected_curve, expected_held_out = refine(WAYS[name], ALONE, case_of(WAYS[name]))
    rounding = 1e-4 if WAYS[name].dtype == torch.float32 else 2e-2
    assert tensors.keys() == expected.keys()
    for part, tensor in expected.items():
        worst = (tensors[part].double() - tensor.double()).abs().max()
        assert worst <= rounding * tensor.double().abs().max(), part
    assert curve == pytest.approx(expected_curve, rel=rounding)
    assert held_out == pytest.approx(expected_held_out, rel=rounding)


@pytest.mark.parametrize("where", FAILURES)
def test_memory_that_runs_out_on_one_rank_is_raised_on_all(of_ranks: list[Results], where: str) -> None:
    last = len(of_ranks) - 1
    assert [failed[where][0] for _, failed, _ in of_ranks] == [f"rank {last}: no room"] * len(of_ranks)


@pytest.mark.parametrize("where", FAILURES)
def test_a_second_try_gives_the_same_bits(of_ranks: list[Results], where: str) -> None:
    undisturbed = of_ranks[0][1]["while measuring"][1]
    for _, failed, _ in of_ranks:
        assert_same_bits(failed[where][1], undisturbed)


def test_a_step_exchanges_the_gradients_of_all_small_linears_at_once_and_then_their_masters(
    of_ranks: list[Results],
) -> None:
    assert [count for _, _, count in of_ranks] == [6 * 2] * len(of_ranks)


SHAPES: list[list[tuple[int, ...]]] = [
    [(40,), (7,)],
    [(300,), (20, 4), (4, 30)],
    [(1000,), (20, 9), (9, 30)],
    [(600,), (20, 9), (9, 30)],
    [(5,)],
]
"""Shapes of masters, of which those of the third linear have most numbers."""


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_all_ranks_together_are_the_masters(world: int) -> None:
    sources = [[torch.randn(shape) for shape in of_one] for of_one in SHAPES]
    of_ranks = [list(flats(SHAPES, torch.device("cpu"), Ranks(rank, world))) for rank in range(world)]
    for flat_of_ranks, of_one in zip(zip(*of_ranks, strict=True), sources, strict=True):
        numbers = torch.zeros(flat_of_ranks[0].bundle.length)
        for flat in flat_of_ranks:
            flat.fill(of_one)
            flat.bundle.put_own(numbers)
        assert all(map(torch.equal, flat_of_ranks[0].views(numbers), of_one))


def bundle_lengths(bundled: int, world: int) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masters, "BUNDLED", bundled)
        made = {flat.bundle: None for flat in flats(SHAPES, torch.device("cpu"), Ranks(0, world))}
    return [bundle.length for bundle in made]


def test_bundles_are_no_longer_than_the_longest_linear() -> None:
    lengths = bundle_lengths(bundled=0, world=2)
    assert len(lengths) == 3, "the first two, the longest, the last two"
    assert max(lengths) == lengths[1]


def test_all_linears_are_one_bundle_where_they_are_small() -> None:
    assert len(bundle_lengths(bundled=10_000, world=2)) == 1


def test_a_process_alone_bundles_nothing() -> None:
    assert len(bundle_lengths(bundled=10_000, world=1)) == len(SHAPES)
