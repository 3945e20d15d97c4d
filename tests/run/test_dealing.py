"""Who solves which linear: shares of the work, linears split by rows, Grams that ranks need."""

from dataclasses import replace

import pytest

from streamslr.run.dealing import Deal, deal_linears
from streamslr.solvers import find_method
from streamslr.spec.allocation import LinearSpec
from streamslr.spec.pattern import parse_pattern

Groups = list[tuple[str, ...]]
Shapes = dict[str, tuple[int, int]]


def llama_70b() -> tuple[Groups, Shapes]:
    h, ffn, kv = 8192, 28672, 1024
    shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (ffn, h), "up": (ffn, h), "down": (h, ffn)}
    return [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)], shapes


def mixture(experts: int) -> tuple[Groups, Shapes]:
    groups: Groups = []
    shapes: Shapes = {}
    for number in range(experts):
        gate, up, down = (f"{number}.{name}" for name in ("gate", "up", "down"))
        shapes |= {gate: (768, 2048), up: (768, 2048), down: (2048, 768)}
        groups += [(gate, up), (down,)]
    return groups, shapes


def deal(groups: Groups, shapes: Shapes, world: int, by_rows: bool = True, pattern: str = "2:4") -> Deal:
    allocation = dict.fromkeys(shapes, LinearSpec(parse_pattern(pattern), 64))
    method = replace(find_method("3basil"), by_rows=by_rows)
    return deal_linears(groups, shapes, allocation, method, world, gpu=True)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_linear_is_solved_by_one_rank_or_by_all(world: int) -> None:
    for groups, shapes in (llama_70b(), mixture(64)):
        dealt = deal(groups, shapes, world)
        assert dealt.owners.keys() | dealt.by_rows == shapes.keys()
        assert not dealt.owners.keys() & dealt.by_rows
        assert set(dealt.owners.values()) <= set(range(world))


def test_a_linear_that_dwarfs_the_rest_is_split_where_method_and_pattern_can() -> None:
    assert "down" in deal(*llama_70b(), world=4).by_rows
    assert not deal(*llama_70b(), world=4, by_rows=False).by_rows
    assert not deal(*llama_70b(), world=4, pattern="50%").by_rows
    assert not deal(*llama_70b(), world=1).by_rows


def test_narrow_linears_are_dealt_by_their_weights_too() -> None:
    """Passes over the weights take longer there than products, so FLOPs alone would give one rank two thirds of all."""
    h, ffn = 256, 704
    shapes = dict.fromkeys("qkvo", (h, h)) | {"gate": (ffn, h), "up": (ffn, h), "down": (h, ffn)}
    dealt = deal([("q", "k", "v"), ("o",), ("gate", "up"), ("down",)], shapes, world=2)
    whole = sum(o * d for o, d in shapes.values())
    share = sum(o * d for name, (o, d) in shapes.items() if dealt.owners[name] == 0) / whole
    assert 0.4 < share < 0.6


def test_a_series_of_inverses_that_ranks_share_is_each_ones_part() -> None:
    groups: Groups = [("down",)]
    shapes: Shapes = {"down": (8192, 28672)}
    one, four = (deal(groups, shapes, world).loads[0] for world in (1, 4))
    factored = 2 * 7 / 3 * 28672**3  # the metric's and the first stage's, which each rank does whole
    assert four - factored == pytest.approx((one - factored) / 4, rel=0.02)


def test_experts_are_dealt_evenly_and_not_split() -> None:
    dealt = deal(*mixture(64), world=8)
    assert not dealt.by_rows
    assert max(dealt.loads) <= 1.05 * sum(dealt.loads) / 8


def test_linears_of_one_expert_that_share_a_gram_stay_together() -> None:
    dealt = deal(*mixture(128), world=8)
    assert all(dealt.owners[f"{n}.gate"] == dealt.owners[f"{n}.up"] for n in range(128))


def test_a_gram_is_needed_by_the_ranks_that_solve_with_it() -> None:
    dealt = Deal([("a",), ("b", "c")], {"a": 2, "b": 0}, frozenset({"c"}), (1.0, 1.0, 1.0))
    assert dealt.needs(["a"], 3) == {2}
    assert dealt.needs(["a", "b"], 3) == {0, 2}
    assert dealt.needs(["b", "c"], 3) == {0, 1, 2}
