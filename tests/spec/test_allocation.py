"""Allocation: the papers' arithmetic, linears by name, and what is refused."""

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.spec.allocation import (
    LinearSpec,
    SpecEntry,
    allocate,
    as_json,
    from_json,
    in_words,
    parameter_fraction,
)
from streamslr.spec.owl import outlier_fraction, vary_by_outliers
from streamslr.spec.pattern import NofM, Unstructured, parse_pattern
from tests import reference

BLOCK = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
BLOCKS = [{f"model.layers.{i}.{name}": shape for name, shape in BLOCK.items()} for i in range(3)]


def allocated(blocks: Sequence[dict[str, tuple[int, int]]] = BLOCKS, **settings: Any) -> dict[str, LinearSpec]:
    return allocate(RunConfig(model="m", out=Path("o"), **settings), blocks)


def test_by_itself_every_linear_is_2_4_and_64() -> None:
    assert set(allocated().values()) == {LinearSpec(NofM(2, 4), 64)}
    assert set(allocated(pattern="30%", rank=3).values()) == {LinearSpec(Unstructured(0.3), 3)}


@pytest.mark.parametrize(
    ("shape", "compression", "ratio", "pattern", "rank"),
    [
        ((4096, 4096), "50%", 0.25, "62.5%", 256),  # r = 0.25 · 0.5 · 4096 / 2
        ((14336, 4096), "50%", 0.25, "62.5%", 398),  # ⌊398.2⌋
        ((5120, 5120), "30%", 0.3, "51%", 537),  # ⌊537.6⌋; 0.3 + 0.3 - 0.09
        ((256, 256), "60%", 0.0, "60%", 0),
        ((100, 100), "60%", 0.4, "76%", 8),  # exactly 8, where floating point says 8.000000000000002 or 7.99…
    ],
)
def test_fractions_of_parameters_are_those_of_oats(
    shape: tuple[int, int], compression: str, ratio: float, pattern: str, rank: int
) -> None:
    (spec,) = set(allocated([{"a": shape}], compression=compression, rank_ratio=ratio).values())
    assert spec == LinearSpec(parse_pattern(pattern), rank)


@given(st.integers(16, 4096), st.integers(16, 4096), st.integers(5, 95), st.integers(0, 90))
def test_s_u_and_v_together_keep_what_is_asked_for(o: int, d: int, compression: int, ratio: int) -> None:
    (spec,) = allocated([{"a": (o, d)}], compression=f"{compression}%", rank_ratio=ratio / 100).values()
    wanted = (1 - compression / 100) * o * d
    assert wanted - (o + d) - 1 < spec.num_parameters((o, d)) <= wanted + 1, "a rank is whole"
    exact = Fraction(ratio, 100) * Fraction(100 - compression, 100) * Fraction(o * d, o + d)
    assert spec.rank == floor(exact)


def test_compression_and_outliers_can_be_of_each_row() -> None:
    (spec,) = set(allocated([{"a": (256, 256)}], compression="60%/row", rank_ratio=0.25).values())
    assert spec == LinearSpec(parse_pattern("70%/row"), 12)
    patterns = vary_by_outliers(parse_pattern("70%/row"), 0.08, [0.05, 0.01, 0.03], [1, 1, 1])
    assert [str(pattern) for pattern in patterns] == ["62%/row", "78%/row", "70%/row"]


def test_a_rank_ratio_goes_with_any_pattern() -> None:
    (spec,) = set(allocated([{"a": (256, 256)}], pattern="2:4", rank_ratio=0.2).values())
    assert spec == LinearSpec(
        NofM(2, 4), 16
    )  # S keeps 32,768 of 65,536; a fifth of all that is kept is 8192 = 16 · 512


# By outliers


@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 10**9)), min_size=1, max_size=40),
    st.integers(10, 90),
    st.floats(0.01, 0.09),
)
def test_densities_stay_within_lambda_and_keep_the_mean(
    blocks: list[tuple[float, int]], percent: int, spread: float
) -> None:
    outliers, sizes = [ratio for ratio, _ in blocks], [size for _, size in blocks]
    mean = Unstructured(percent / 100)
    densities = [pattern.density for pattern in vary_by_outliers(mean, spread, outliers, sizes)]
    assert all(abs(density - mean.density) <= spread + 1e-6 for density in densities)
    kept = sum(size * density for size, density in zip(sizes, densities, strict=True))
    assert kept == pytest.approx(mean.density * sum(sizes), rel=1e-5)
    by_share = [density for _, density in sorted(zip(outliers, densities, strict=True))]
    assert by_share == sorted(by_share), "more outliers, denser"


def test_the_block_farthest_from_the_mean_is_lambda_away() -> None:
    patterns = vary_by_outliers(Unstructured(0.7), 0.08, [0.05, 0.01, 0.03], [1, 1, 1])
    assert [str(pattern) for pattern in patterns] == ["62%", "78%", "70%"]
    assert {str(p) for p in vary_by_outliers(Unstructured(0.7), 0.08, [0.02] * 3, [1] * 3)} == {"70%"}


@given(
    st.lists(st.floats(0, 0.1), min_size=1, max_size=40), st.sampled_from([(4, 8, 0.13), (8, 16, 0.2), (2, 4, 0.25)])
)
def test_of_n_m_it_is_n_that_varies_and_the_sum_that_stays(outliers: list[float], of: tuple[int, int, float]) -> None:
    n, m, spread = of
    patterns = vary_by_outliers(NofM(n, m), spread, outliers, [7] * len(outliers))
    counts = [pattern.n for pattern in patterns if isinstance(pattern, NofM) and pattern.m == m]
    assert sum(counts) == n * len(outliers)
    assert all(abs(count - n) <= spread * m for count in counts)
    by_share = [count for _, count in sorted(zip(outliers, counts, strict=True))]
    assert all(later >= earlier - 1 for earlier, later in pairwise(by_share))


@given(st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 1000)), min_size=2, max_size=40))
def test_blocks_of_different_sizes_keep_no_more_than_asked_for(blocks: list[tuple[float, int]]) -> None:
    outliers, sizes = [ratio for ratio, _ in blocks], [size for _, size in blocks]
    patterns = vary_by_outliers(NofM(4, 8), 0.25, outliers, sizes)
    kept = sum(size * pattern.n for size, pattern in zip(sizes, patterns, strict=True) if isinstance(pattern, NofM))
    assert 4 * sum(sizes) - max(sizes) <= kept <= 4 * sum(sizes)


@pytest.mark.parametrize(
    ("pattern", "owl", "named"),
    [
        ("2:4", 0.08, r"--owl 0.08 cannot vary 2:4: n goes in steps of 1/4 = 0.25"),
        ("1:4", 0.3, r"cannot vary 1:4.* between 1 and 3"),
        ("5%", 0.08, r"--owl 0.08 is too much around 5%"),
    ],
)
def test_a_pattern_without_room_to_vary_is_refused(pattern: str, owl: float, named: str) -> None:
    with pytest.raises(InputError, match=named):
        allocated(pattern=pattern, owl=owl)


def test_until_outliers_are_known_each_block_is_at_its_densest() -> None:
    config = RunConfig(model="m", out=Path("o"), compression="60%", rank_ratio=0.25, owl=0.08)
    densest = allocate(config, BLOCKS)
    for outliers in ([0.1, 0.0, 0.0], [0.0, 0.1, 0.1], [0.02, 0.01, 0.03]):
        made = allocate(config, BLOCKS, outliers)
        shapes = {name: shape for block in BLOCKS for name, shape in block.items()}
        assert all(
            made[name].num_parameters(shape) <= densest[name].num_parameters(shape) for name, shape in shapes.items()
        )
        assert all(made[name].rank <= densest[name].rank for name in shapes)
        assert parameter_fraction(made, BLOCKS) == pytest.approx(0.4, abs=0.02), "but for ranks, which are whole"


@pytest.mark.parametrize("times", [1.5, 3.0, 5.0])
def test_outliers_are_counted_as_the_paper_defines_them(times: float) -> None:
    generator = torch.Generator().manual_seed(0)
    linears = []
    for o, d in ((1500, 48), (64, 96), (32, 48)):
        X = torch.randn(200, d, generator=generator) * torch.rand(d, generator=generator).pow(4) * 30
        X[:, 3] = 0
        linears.append((torch.randn(o, d, generator=generator) ** 3, X))
    fraction = outlier_fraction([(W, X.square().sum(0)) for W, X in linears], times)
    assert 0 < fraction < 0.5
    assert fraction == pytest.approx(reference.outlier_ratio(linears, times), abs=2e-5)  # one or two of 80,000 weights


# By name


def test_ranks_by_name_go_over_the_rank_of_all() -> None:
    specs = allocated(ranks="q_proj=8, mlp.*=16,model.layers.2.mlp.up_proj=0", rank=4)
    assert {name: spec.rank for name, spec in specs.items()} == {
        **{f"model.layers.{i}.self_attn.q_proj": 8 for i in range(3)},
        **{f"model.layers.{i}.mlp.{part}_proj": 16 for i in range(3) for part in ("up", "down")},
        "model.layers.2.mlp.up_proj": 0,
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_says_pattern_rank_or_both_and_later_names_win(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.json",
        {"*.mlp.*": {"pattern": "4:8"}, "layers.1.*": {"pattern": "40%", "rank": 2}, "down_proj": {"rank": 7}},
    )
    specs = allocated(allocation=file, rank=4)
    assert str(specs["model.layers.0.self_attn.q_proj"].pattern) == "2:4"
    assert specs["model.layers.0.mlp.up_proj"] == LinearSpec(NofM(4, 8), 4)
    assert specs["model.layers.1.mlp.up_proj"] == LinearSpec(Unstructured(0.4), 2)
    assert specs["model.layers.1.mlp.down_proj"] == LinearSpec(Unstructured(0.4), 7)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = RunConfig(model="m", out=Path("o"), compression="61%", rank_ratio=0.3, owl=0.08)
    specs = allocate(config, BLOCKS, [0.01, 0.034, 0.02])
    assert from_json(json.loads(json.dumps(as_json(specs))), BLOCKS) == specs
    assert allocated(allocation=write(tmp_path / "a.json", as_json(specs))) == specs
    alike = allocated()
    assert as_json(alike) == {"*": {"pattern": "2:4", "rank": 64}}
    assert from_json(as_json(alike), BLOCKS) == alike


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"r_proj": {"rank": 1}}, r"no linear is named 'r_proj'; there are down_proj, q_proj, up_proj.*"),
        ({"q_proj": {"rank": -1}}, r"says {'rank': -1} of q_proj .Expected `int` >= 0 .*; write it like"),
        ({"q_proj": {"rnk": 1}}, r"says {'rnk': 1} of q_proj"),
        ({"q_proj": {}}, r"says {} of q_proj"),
        ({"q_proj": {"pattern": 3}}, r"of q_proj"),
        ({"q_proj": {"pattern": "3:2:1"}}, r"pattern '3:2:1' is not known"),
        ({"up_proj": {"pattern": "3:7"}}, r"model.layers.0.mlp.up_proj: pattern 3:7 needs an input width"),
        ({"q_proj": {"rank": 2**40}}, r"of q_proj .Expected `int` <= 2147483647"),
        ({"q_proj": {"rank": 4.0}}, r"of q_proj .Expected `int`, got `float`"),
        (["q_proj"], r"cannot be read .Expected `object`"),
        ("{", r"cannot be read .*; write it like"),
        ('{"q_proj": {"rank": 1}, "q_proj": {"rank": 2}}', r"holds 'q_proj' twice"),
        ('{"q_proj":' * 100_000, r"nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        allocated(allocation=write(tmp_path / "a.json", content))


@pytest.mark.parametrize("ranks", ["q_proj", "q_proj=", "=3", "q_proj=-1", "q_proj=1,,", ""])
def test_ranks_that_cannot_be_read_are_refused(ranks: str) -> None:
    with pytest.raises(InputError, match=r"--ranks is .* write it like q_proj=32,down_proj=128"):
        allocated(ranks=ranks)


def test_a_group_pattern_is_no_fraction_of_parameters() -> None:
    with pytest.raises(InputError, match=r"--compression is 2:4; give the percentage to leave out, like 50%"):
        allocated(compression="2:4", rank_ratio=0.25)


def test_words() -> None:
    assert in_words([LinearSpec(NofM(2, 4), 64)] * 2) == "2:4 + rank 64"
    mixed = [
        LinearSpec(Unstructured(0.747073), 7),
        LinearSpec(Unstructured(0.64), 22),
        LinearSpec(Unstructured(0.7), 10),
    ]
    assert in_words(mixed) == "64%–74.71% + rank 7–22"


def test_an_allocation_of_another_model_in_a_journal_is_refused() -> None:
    entry: SpecEntry = {"pattern": "2:4", "rank": 4}
    with pytest.raises(InputError, match=r"has no entry for b\.up: it is of another model"):
        from_json({"a.up": entry}, [{"b.up": (8, 8)}])
    with pytest.raises(InputError, match=r"b.up: pattern 2:4 needs an input width that is a multiple of 4"):
        from_json({"*": entry}, [{"b.up": (8, 6)}])
