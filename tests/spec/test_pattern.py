"""Patterns: which weights stay, and which supports are allowed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamslr.errors import InputError
from streamslr.spec.pattern import NofM, Unstructured, UnstructuredRows, parse_pattern
from tests import reference

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "1:2", "3:5", "7:8", "5:32", "50%", "12.5%", "90%", "50%/row", "30%/row"]


@st.composite
def scored(draw: st.DrawFn) -> tuple[str, torch.Tensor]:
    """Draw a pattern and scores [o, d] that fit it, of small whole numbers, so that many magnitudes tie."""
    text = draw(st.sampled_from(PATTERNS))
    group = int(text.split(":")[1]) if ":" in text else 1
    o, groups = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    d = group * groups if group > 1 else 4 * groups
    values = draw(st.lists(st.integers(-3, 3), min_size=o * d, max_size=o * d))
    return text, torch.tensor(values, dtype=torch.float32).view(o, d)


@settings(max_examples=150, deadline=None)
@given(scored())
def test_project_keeps_exactly_as_many_as_allowed_and_none_smaller_than_a_dropped_one(
    case: tuple[str, torch.Tensor],
) -> None:
    text, scores = case
    pattern = parse_pattern(text)
    mask = pattern.project(scores)
    assert pattern.check(mask) is None
    magnitudes = scores.abs()
    if isinstance(pattern, NofM):
        mask_groups, groups = mask.view(-1, pattern.m), magnitudes.view(-1, pattern.m)
        assert (mask_groups.sum(1) == pattern.n).all()
    elif text.endswith("/row"):
        mask_groups, groups = mask, magnitudes
        assert (mask_groups.sum(1) == round(scores.shape[1] * pattern.density)).all()
    else:
        mask_groups, groups = mask.view(1, -1), magnitudes.view(1, -1)
        assert mask.sum() == round(scores.numel() * pattern.density)
    smallest_kept = torch.where(mask_groups, groups, torch.inf).amin(1)
    largest_dropped = torch.where(mask_groups, -torch.inf, groups).amax(1)
    assert (smallest_kept >= largest_dropped).all()
    for row in range(len(groups)):  # ties: the lower index stays
        tied = groups[row] == smallest_kept[row]
        order = mask_groups[row][tied].int()
        assert (order.diff() <= 0).all()


@settings(max_examples=60, deadline=None)
@given(scored())
def test_project_is_the_same_for_every_layout_and_a_fixed_point(case: tuple[str, torch.Tensor]) -> None:
    text, scores = case
    pattern = parse_pattern(text)
    mask = pattern.project(scores)
    column_major = scores.t().contiguous().t()
    assert torch.equal(pattern.project(column_major), mask)
    assert torch.equal(pattern.project(scores * mask)[scores * mask != 0], mask[scores * mask != 0])


@pytest.mark.parametrize("text", PATTERNS)
def test_project_and_marker_agree_with_topk_without_ties(text: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 160)
    pattern = parse_pattern(text)
    expected = reference.project(scores, text)
    assert torch.equal(pattern.project(scores), expected)
    marker = pattern.marker(scores)
    assert torch.equal(marker.mark_(scores.abs()).bool(), expected)


@pytest.mark.parametrize("text", ["2:4", "5:32", "50%", "30%/row"])
def test_ties_leave_from_the_end_also_where_they_are_looked_at_piece_by_piece(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (400, 320), generator=generator).float()
    pattern = parse_pattern(text)
    size = {"2:4": 4, "5:32": 32, "50%": 400 * 320, "30%/row": 320}[text]
    groups = scores.abs().view(-1, size)
    order = groups.sort(dim=1, descending=True, stable=True).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : round(size * pattern.density)], True)
    assert torch.equal(pattern.project(scores), mask.view_as(scores))


@pytest.mark.parametrize("text", ["70%", "90%"])
def test_the_unstructured_marker_follows_the_density_as_scores_change(text: str) -> None:
    torch.manual_seed(0)
    pattern = parse_pattern(text)
    scores = torch.randn(64, 64)
    marker = pattern.marker(scores)
    for _ in range(12):
        marked = marker.mark_((5 * scores).abs())
        marker.end_pass()
    assert abs(marked.mean().item() - pattern.density) < 0.005


def test_the_marker_of_rows_follows_the_density_of_each_in_tiles_of_rows_and_columns() -> None:
    torch.manual_seed(0)
    pattern = parse_pattern("75%/row")
    before, after = torch.randn(8, 64), torch.randn(8, 64) * torch.logspace(-3, 3, 8)[:, None]
    before[2] = 0  # a row that is zero at first has no level to start from
    marker = pattern.marker(before)
    tiles = [(rows, columns) for rows in (slice(0, 3), slice(3, 8)) for columns in (slice(0, 40), slice(40, 64))]
    for _ in range(40):
        marked = torch.zeros(8, 64)
        for rows, columns in tiles:
            marked[rows, columns] = marker.mark_(after[rows, columns].abs(), rows)
        marker.end_pass()
    assert ((marked.sum(1) - 16).abs() <= 2).all()


@pytest.mark.parametrize(
    ("text", "support", "says"),
    [
        ("2:4", [[1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 0, 0]], "row 0, columns 0 to 3, which keeps 3"),
        ("1:4", [[0, 0, 0, 1, 1, 0, 1, 0]], "1 of 2 groups"),
        ("50%", [[1, 1, 1, 0]], "keeps 3 of 4 weights; 50% allows 2"),
        ("50%/row", [[1, 1, 0, 0], [1, 1, 1, 0]], "row 1 keeps 3 of 4 weights; 50%/row allows 2 (1 of 2 rows)"),
        ("2:4", [[1, 1, 0, 0, 1, 0]], "6 columns are not a multiple of 4"),
    ],
)
def test_check_says_what_is_wrong(text: str, support: list[list[int]], says: str) -> None:
    assert says in (parse_pattern(text).check(torch.tensor(support, dtype=torch.bool)) or "")


@pytest.mark.parametrize("text", PATTERNS)
def test_fewer_than_allowed_is_fine(text: str) -> None:
    assert parse_pattern(text).check(torch.zeros(4, 160, dtype=torch.bool)) is None


@given(st.integers(1, 64), st.integers(1, 64))
def test_n_of_m_text_round_trips(n: int, m: int) -> None:
    if n < m:
        assert str(parse_pattern(f"{n}:{m}")) == f"{n}:{m}"
        assert parse_pattern(f" {n}:{m} ") == NofM(n, m)
        assert parse_pattern(f"{n}:{m}").density == n / m
    else:
        with pytest.raises(InputError, match=f"{n}:{m}"):
            parse_pattern(f"{n}:{m}")


@given(st.integers(1, 9999))
def test_percent_text_round_trips(hundredths: int) -> None:
    text = f"{hundredths / 100:g}%"
    pattern = parse_pattern(text)
    assert str(pattern) == text
    assert parse_pattern(str(pattern)) == pattern
    rows = parse_pattern(f"{text} / row")
    assert (str(rows), rows.density, rows.by_row) == (f"{text}/row", pattern.density, True)
    assert parse_pattern(str(rows)) == rows != pattern


@pytest.mark.parametrize("unit", ["%", "%/row"])
@given(st.floats(0.001, 0.999))
def test_a_pattern_of_another_density_survives_its_text(unit: str, density: float) -> None:
    pattern = parse_pattern(f"50{unit}").with_density(density)
    assert parse_pattern(str(pattern)) == pattern
    assert str(pattern).endswith(unit)
    assert pattern.density == pytest.approx(density, abs=5e-6)


def test_groups_take_the_nearest_density_there_is() -> None:
    assert NofM(2, 4).with_density(0.3) == NofM(1, 4)
    assert NofM(4, 8).with_density(0.63) == NofM(5, 8)
    for pattern in (NofM(2, 4), Unstructured(0.5), UnstructuredRows(0.5)):
        with pytest.raises(InputError):
            pattern.with_density(1.0)


@pytest.mark.parametrize(
    ("text", "short"),
    [("2:4", "2:4"), ("64.0%", "64%"), ("74.7073%", "74.71%"), ("74.7073%/row", "74.71%/row"), ("8.16%", "8.16%")],
)
def test_short_text_has_four_digits_at_most(text: str, short: str) -> None:
    assert parse_pattern(text).short_text() == short


@pytest.mark.parametrize(
    "text", ["", "24", "2:4:8", "0:4", "4:4", "-1:4", "50", "0%", "100%", "120%", "x%", "2/4", "0%/row", "50%/column"]
)
def test_what_is_no_pattern_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError):
        parse_pattern(text)


def test_a_width_that_m_does_not_divide_is_refused_by_name_of_the_linear() -> None:
    with pytest.raises(InputError, match=r"layers\.3\.q_proj.*2:4.*multiple of 4.*8×10"):
        parse_pattern("2:4").require_fits("layers.3.q_proj", (8, 10))
    parse_pattern("2:4").require_fits("q", (8, 12))
    parse_pattern("50%").require_fits("q", (7, 9))
    with pytest.raises(InputError, match="keeps none"):
        parse_pattern("99%").require_fits("tiny", (2, 4))
    with pytest.raises(InputError, match="99%/row keeps none of a row's 8 weights"):
        parse_pattern("99%/row").require_fits("narrow", (500, 8))
