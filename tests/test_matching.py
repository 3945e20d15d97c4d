"""Refining a block: what it changes, what it must never change, and that it minimises what it says."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from streamslr import linear_masters
from streamslr.calibration.hidden_states import Span
from streamslr.io.packed_check import check_packed
from streamslr.io.packing import merge, pack, pack_on_grid, stored_columns, unpack, unpack_codes
from streamslr.linear_masters import LinearMasters, master_shapes
from streamslr.masters import BlockWeights, MatchSettings, Optimizer, flats
from streamslr.matching import CompressedBlock
from streamslr.ranks import ALONE
from streamslr.solvers import parse_pattern
from streamslr.spec.values import group_columns, group_count, spread
from tests import reference
from tests.support.live_blocks import live_block
from tests.support.packed_linears import form_of

SETTINGS = MatchSettings(epochs=4, batch=3, lr=0.1)
WINDOWS, TOKENS, WIDTH = 7, 4, 16


class GatedBlock(nn.Module):
    """A norm, two linears that share its output, one with a bias, and a third after their product; residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, 24, bias=False)
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out


class TwoLinears(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH, bias=False))


@dataclass
class Case:
    """A block that was compressed to `weights`, and windows that it should map to `targets` [windows, T, h]."""

    block: nn.Module
    pattern: str
    weights: BlockWeights
    inputs: Tensor
    targets: Tensor
    served: list[Span] = field(default_factory=list)

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y

    def batches(self, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        self.served += spans
        for start, stop in spans:
            yield self.inputs[start:stop], self.targets[start:stop]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.block.named_modules() if isinstance(module, nn.Linear)}

    @torch.no_grad()
    def refine(
        self,
        settings: MatchSettings = SETTINGS,
        micro_batch: int = 3,
        run: Callable[[Tensor], Tensor] | None = None,
        batches: Callable[[Sequence[Span]], Iterator[tuple[Tensor, Tensor]]] | None = None,
    ) -> tuple[BlockWeights, tuple[float, ...]]:
        """Refine the block as `Passes.match` does."""
        weights, curve, _ = self.refine_held_out(0, settings, micro_batch, run, batches)
        return weights, curve

    @torch.no_grad()
    def refine_held_out(
        self,
        held_out: int,
        settings: MatchSettings = SETTINGS,
        micro_batch: int = 3,
        run: Callable[[Tensor], Tensor] | None = None,
        batches: Callable[[Sequence[Span]], Iterator[tuple[Tensor, Tensor]]] | None = None,
    ) -> tuple[BlockWeights, tuple[float, ...], tuple[float, ...]]:
        """Refine the block with the last windows held out."""
        block, windows = self.compressed(run), len(self.inputs)
        return block.refine(self.weights, settings, batches or self.batches, windows, micro_batch, held_out)

    def compressed(self, run: Callable[[Tensor], Tensor] | None = None) -> CompressedBlock:
        parameters = dict(self.block.named_parameters())
        block = live_block(0, "block", self.linears, {}, lambda: parameters, run or self.run)
        return CompressedBlock(block, dict.fromkeys(self.linears, parse_pattern(self.pattern)))

    def sparse(self, weights: BlockWeights, name: str) -> Tensor:
        """Return S [o, d] of a linear."""
        o, d = self.linears[name].weight.shape
        return unpack(weights.packed[name], parse_pattern(self.pattern), (o, d))


def made_case(
    pattern: str = "2:4",
    rank: int = 2,
    block: Callable[[], nn.Module] = GatedBlock,
    compute: torch.dtype = torch.float32,
    linears: torch.dtype = torch.float32,
    vectors: torch.dtype = torch.float32,
    off: float = 0.3,
    windows: int = WINDOWS,
) -> Case:
    """Return a block of random weights whose S has groups that are not full, and targets that matching can reach.

    Args:
        pattern: Sparsity pattern of every linear.
        rank: Rank of every linear.
        block: Makes the block.
        compute: Dtype of the live block.
        linears: Dtype that S, U and V are stored in.
        vectors: Dtype that norms and biases are stored in.
        off: Relative distance of the kept values, factors, norms and biases of the block that gives the targets.
        windows: Number of windows.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    live, teacher = block().requires_grad_(False), block().requires_grad_(False)
    sparsity = parse_pattern(pattern)
    packed, others = {}, {}
    for name, module in live.named_modules():
        if isinstance(module, nn.Linear):
            o, d = module.weight.shape
            dense = normal(o, d)
            S = dense * sparsity.project(dense) * (normal(o, d).abs() > 0.3) / d**0.5
            U, V = (normal(o, rank) / d**0.5).to(linears), (0.5 * normal(rank, d)).to(linears)
            packed[name] = pack(S, sparsity, linears) | ({"U": U, "V": V} if rank else {})
            moved = S.to(linears).float() * (1 + off * normal(o, d))
            moved += (U.float() * (1 + off * normal(o, rank))) @ (V.float() * (1 + off * normal(rank, d)))
            teacher.get_parameter(f"{name}.weight").copy_(moved)
    for name, parameter in live.named_parameters():
        if parameter.dim() == 1:
            others[name] = (float("norm.weight" in name) + 0.1 * normal(len(parameter))).to(vectors)
            teacher.get_parameter(name).copy_(others[name].float() + 0.1 * off * normal(len(parameter)))
    inputs = normal(windows, TOKENS, WIDTH)
    targets = teacher(inputs)
    return Case(live.to(compute), pattern, BlockWeights(packed, others), inputs.to(compute), targets.to(compute))


def every_tensor(weights: BlockWeights) -> dict[str, Tensor]:
    parts = {f"{name}.{part}": t for name, parts in weights.packed.items() for part, t in parts.items()}
    return parts | dict(weights.other_tensors)


def assert_same(one: BlockWeights, other: BlockWeights, tolerance: float = 0.0) -> None:
    """Assert equality of every tensor; `tolerance` is relative to its largest number."""
    a, b = every_tensor(one), every_tensor(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert (a[name].double() - b[name].double()).abs().max() <= tolerance * b[name].double().abs().max(), name


def assert_at_rest(case: Case) -> None:
    """Assert that nothing of the training is left in the live block."""
    for name, parameter in case.block.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert not parameter._post_accumulate_grad_hooks, name
    for name, linear in case.linears.items():
        assert "forward" not in vars(linear), name


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_refining_is_the_documented_optimisation(pattern: str, rank: int) -> None:
    case = made_case(pattern, rank, off=1.0)
    weights, curve = case.refine()
    steps = [slice(*span) for span in case.served[3:]]  # as drawn; the first epoch only measured
    start = made_case(pattern, rank, off=1.0)
    start.compressed().load(start.weights)
    factors = {
        name: (
            start.sparse(start.weights, name),
            parts.get("U", torch.zeros(start.linears[name].out_features, 0)),
            parts.get("V", torch.zeros(0, start.linears[name].in_features)),
        )
        for name, parts in start.weights.packed.items()
    }
    expected, expected_curve = reference.match(
        start.block,
        factors,
        case.inputs,
        case.targets,
        [steps[:3], steps[3:6], steps[6:]],
        0.1 * curve[0] ** 0.5,
        0.3,
        1 / 120,
        0.2,
    )
    assert curve == pytest.approx(expected_curve, rel=1e-5)
    found = {f"{name}.S": case.sparse(weights, name) for name in case.linears} | every_tensor(weights)
    for name, tensor in expected.items():
        if name.endswith(".S"):
            tensor = tensor * (factors[name.removesuffix(".S")][0] != 0)
        if tensor.numel():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("tile", [1 << 24, 40])
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%", "50%/row"])
def test_what_was_pruned_stays_zero_and_everything_else_moves(
    monkeypatch: pytest.MonkeyPatch, pattern: str, rank: int, tile: int
) -> None:
    monkeypatch.setattr(linear_masters, "TILE", tile)
    case = made_case(pattern, rank)
    weights, _ = case.refine()
    for name in case.linears:
        before, after = case.sparse(case.weights, name), case.sparse(weights, name)
        assert (before == 0).float().mean() > 0.5  # groups that are not full, so slots at value 0, are among them
        assert not after[before == 0].any()
        assert (after != before)[before != 0].all()
        assert case.weights.packed[name].keys() == weights.packed[name].keys()
        for part in weights.packed[name].keys() - {"values"}:
            moved = weights.packed[name][part] != case.weights.packed[name][part]
            assert moved.all() if part in ("U", "V") else not moved.any()
    for name, vector in weights.other_tensors.items():
        assert (vector != case.weights.other_tensors[name]).all()


@pytest.mark.parametrize(
    ("compute", "linears", "vectors"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_block_computes_with_what_is_stored_in_the_dtypes_it_was_stored_in(
    compute: torch.dtype, linears: torch.dtype, vectors: torch.dtype
) -> None:
    case = made_case(compute=compute, linears=linears, vectors=vectors)
    table = {"rotary.table": torch.arange(3)}  # a buffer: nothing to train
    case.weights = replace(case.weights, other_tensors={**case.weights.other_tensors, **table})
    weights, _ = case.refine()
    for name, linear in case.linears.items():
        shape = (linear.out_features, linear.in_features)
        assert torch.equal(linear.weight, merge(weights.packed[name], parse_pattern("2:4"), shape, compute))
        assert {weights.packed[name][part].dtype for part in ("values", "U", "V")} == {linears}
    for name in ("norm.weight", "norm.bias", "up.bias"):
        assert weights.other_tensors[name].dtype == vectors
        assert torch.equal(case.block.get_parameter(name), weights.other_tensors[name].to(compute))
    assert torch.equal(weights.other_tensors["rotary.table"], torch.arange(3))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_without_steps_what_was_given_comes_back(compute: torch.dtype) -> None:
    case = made_case(compute=compute)
    weights, curve = case.refine(replace(SETTINGS, epochs=1))
    assert len(curve) == 1
    assert_same(weights, case.weights)


def mean_error(case: Case, windows: slice) -> float:
    """Return the mean over the tokens of some windows of the block's squared error, relative to the target's size."""
    error, target = case.block(case.inputs[windows]) - case.targets[windows], case.targets[windows]
    return float((error.square().sum(-1) / target.square().sum(-1)).mean())


def test_a_few_huge_tokens_do_not_hide_the_others() -> None:
    case = made_case()
    case.targets[:, 0] *= 1000
    case.compressed().load(case.weights)
    others = slice(None), slice(1, None)

    def error() -> float:
        return float((case.block(case.inputs)[others] - case.targets[others]).square().mean())

    before = error()
    case.refine(replace(SETTINGS, epochs=30))
    assert error() < 0.5 * before


def test_the_curve_starts_at_the_relative_loss_and_falls() -> None:
    case = made_case()
    case.compressed().load(case.weights)
    before = mean_error(case, slice(None))
    _, curve = case.refine(replace(SETTINGS, epochs=30))
    after = mean_error(case, slice(None))
    assert curve[0] == pytest.approx(before, rel=1e-5)
    assert len(curve) == 30
    assert after < curve[-1] < 0.2 * curve[0]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_micro_batch_changes_rounding_alone(micro_batch: int) -> None:
    pieces, pieces_curve = made_case().refine(micro_batch=micro_batch)
    whole, whole_curve = made_case().refine(micro_batch=3)
    assert_same(pieces, whole, tolerance=1e-4)
    assert pieces_curve == pytest.approx(whole_curve, rel=1e-5)


@pytest.mark.parametrize("batch", [2, 7, 100])
def test_an_epoch_takes_every_window_once_at_any_batch(batch: int) -> None:
    case = made_case()
    case.refine(replace(SETTINGS, batch=batch), micro_batch=min(batch, 3))
    epochs = [window for span in case.served for window in range(*span)]
    for start in range(0, 4 * WINDOWS, WINDOWS):
        assert sorted(epochs[start : start + WINDOWS]) == list(range(WINDOWS))


def test_a_seed_decides_the_order_and_every_byte() -> None:
    case, again, other = made_case(windows=12), made_case(windows=12), made_case(windows=12)
    weights, curve = case.refine()
    weights_again, curve_again = again.refine()
    other.refine(replace(SETTINGS, seed=1))
    assert_same(weights, weights_again)
    assert curve == curve_again
    assert case.served == again.served != other.served
    assert case.served[4:8] != case.served[8:12]  # and each epoch has its own


def test_losses_are_read_once_an_epoch() -> None:
    """On a GPU each reading of a number waits for all work before it."""
    readings = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal readings
            readings += operator is torch.ops.aten._local_scalar_dense.default
            return operator(*args, **(kwargs or {}))

    counts = []
    for windows in (3, 12):
        case, readings = made_case(windows=windows), 0
        with Count():
            case.refine(batches=case.batches)
        counts.append(readings)
    assert counts[0] == counts[1]


def test_held_out_windows_change_no_weight() -> None:
    case, other = made_case(), made_case()
    other.inputs[5:], other.targets[5:] = other.inputs[:2], other.targets[:2]
    weights, curve, held_out = case.refine_held_out(2)
    other_weights, other_curve, other_held_out = other.refine_held_out(2)
    assert_same(weights, other_weights)
    assert curve == other_curve
    assert held_out != other_held_out


def test_held_out_losses_are_those_of_the_weights_before_and_after() -> None:
    case = made_case()
    case.compressed().load(case.weights)
    before = mean_error(case, slice(5, None))
    _, curve, held_out = case.refine_held_out(2)
    assert len(held_out) == len(curve) == 4
    assert held_out[0] == pytest.approx(before, rel=1e-5)
    assert held_out[-1] == pytest.approx(mean_error(case, slice(5, None)), rel=1e-5)
    assert held_out[-1] < held_out[0]


def test_rows_in_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = made_case().refine()
    monkeypatch.setattr(linear_masters, "TILE", 5 * WIDTH)  # 5 rows of 24, then 3 of 16
    tiled, _ = made_case().refine()
    assert_same(tiled, whole, tolerance=1e-4)


def test_dense_weights_never_have_a_gradient() -> None:
    case = made_case()
    passes = 0

    def run(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        for linear in case.linears.values():
            assert linear.weight.grad is None
            assert not linear.weight.requires_grad
        return case.run(x)

    case.refine(run=run)
    assert passes == 4 * 3
    assert_at_rest(case)


def test_no_tensor_of_a_dense_weights_size_is_made_by_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, moments and master copies exist for the kept values, U and V alone."""
    monkeypatch.setattr(linear_masters, "TILE", 4 * WIDTH)
    case = made_case()
    weights = [linear.weight for linear in case.linears.values()]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = operator(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and all(tensor.data_ptr() != w.data_ptr() for w in weights):
                    largest = max(largest, tensor.numel())
            return result

    def batches(spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop in spans:
            with Watch():  # until the next batch is asked for: forward, backward and step
                yield case.inputs[start:stop], case.targets[start:stop]

    case.refine(replace(SETTINGS, batch=1), micro_batch=1, batches=batches)
    assert largest == WIDTH * 24 // 2  # what 2:4 keeps


@pytest.mark.parametrize(
    ("number", "backward"),
    [(3, False), (12, False), (12, True)],
    ids=["while measuring", "in a forward pass", "in a backward pass"],
)
def test_after_an_error_a_rerun_starts_from_what_was_given(number: int, backward: bool) -> None:
    undisturbed, curve = made_case().refine(micro_batch=2)
    case, passes = made_case(), 0

    def fail(*_: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    def run(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == number:
            if not backward:
                fail()
            x = x.clone().requires_grad_()
            x.register_hook(fail)
        return case.run(x)

    before = {name: tensor.clone() for name, tensor in every_tensor(case.weights).items()}
    with pytest.raises(torch.OutOfMemoryError):
        case.refine(micro_batch=2, run=run)
    assert_at_rest(case)
    assert all(torch.equal(tensor, before[name]) for name, tensor in every_tensor(case.weights).items())
    again, curve_again = case.refine(micro_batch=2)
    assert_same(again, undisturbed)
    assert curve_again == curve
    assert_at_rest(case)


def test_a_bf16_block_learns_steps_below_the_resolution_of_bf16() -> None:
    case = made_case(compute=torch.bfloat16, linears=torch.bfloat16, vectors=torch.bfloat16)
    _, curve = case.refine(replace(SETTINGS, epochs=30, lr=0.02))
    assert curve[-1] < 0.6 * curve[0]


def test_a_block_of_linears_alone_learns() -> None:
    case = made_case(block=TwoLinears, off=0.3)
    weights, curve = case.refine(replace(SETTINGS, epochs=20))
    assert curve[-1] < 0.5 * curve[0]
    assert not weights.other_tensors


def test_values_of_dead_inputs_stay() -> None:
    case = made_case(block=TwoLinears)
    case.inputs[..., 3] = 0
    weights, _ = case.refine()
    before, after = case.weights.packed["0"], weights.packed["0"]
    assert case.sparse(case.weights, "0")[:, 3].any()
    assert torch.equal(case.sparse(weights, "0")[:, 3], case.sparse(case.weights, "0")[:, 3])
    assert torch.equal(after["V"][:, 3], before["V"][:, 3])
    assert not torch.equal(after["V"], before["V"])


def on_grid(case: Case, values: str, scales: torch.dtype = torch.bfloat16) -> Case:
    """Return a case whose linears have values on a grid, each group with its largest value as the largest code."""
    form, pattern = form_of(values), parse_pattern(case.pattern)
    packed = {}
    for name, linear in case.linears.items():
        S, d = case.sparse(case.weights, name).float(), linear.in_features
        size = group_columns(d, group_count(d, form.group))
        largest = torch.stack([part.abs().amax(1) for part in S.split(size, 1)], 1)
        fitted = (largest / form.largest).clamp_min(1e-3).to(scales).float()
        parts = pack_on_grid(form.nearest(S / spread(fitted, d)), fitted, pattern, scales, form)
        factors = {part: case.weights.packed[name][part].to(scales) for part in ("U", "V")}
        packed[name] = parts | factors
    return replace(case, weights=replace(case.weights, packed=packed))


def densely(case: Case, name: str) -> dict[str, Tensor]:
    """Return a linear of the case with S packed as a dense pattern."""
    S, parts = case.sparse(case.weights, name), case.weights.packed[name]
    return pack(S, parse_pattern("dense"), S.dtype) | {part: parts[part] for part in ("U", "V")}


@pytest.mark.parametrize("tile", [1 << 24, 40])
@pytest.mark.parametrize("values", ["int4/8", "int8/16", "fp8/5"])
@pytest.mark.parametrize("pattern", ["2:4", "50%", "dense"])
def test_values_on_a_grid_move_with_their_scales_and_stay_on_it(
    monkeypatch: pytest.MonkeyPatch, pattern: str, values: str, tile: int
) -> None:
    monkeypatch.setattr(linear_masters, "TILE", tile)
    if pattern == "dense":
        case = made_case("50%", off=1.0)
        case.weights = replace(case.weights, packed={name: densely(case, name) for name in case.linears})
        case = on_grid(replace(case, pattern="dense"), values)
    else:
        case = on_grid(made_case(pattern), values)
    weights, curve = case.refine(replace(SETTINGS, epochs=20, lr=0.3))
    assert curve[-1] < 0.6 * curve[0]
    for name, linear in case.linears.items():
        before, after, shape = case.weights.packed[name], weights.packed[name], linear.weight.shape
        assert check_packed(after, parse_pattern(case.pattern), (shape[0], shape[1])) == []
        assert {part: tensor.dtype for part, tensor in after.items()} == {p: t.dtype for p, t in before.items()}
        assert torch.equal(after["meta"], before["meta"])
        for part in ("values", "scales", "U", "V"):
            assert not torch.equal(after[part].float(), before[part].float()), part
        merged = merge(after, parse_pattern(case.pattern), (shape[0], shape[1]), torch.float32)
        assert torch.equal(linear.weight, merged)


def test_without_steps_values_on_a_grid_come_back() -> None:
    case = on_grid(made_case(), "int4/8")
    weights, _ = case.refine(replace(SETTINGS, epochs=1))
    assert_same(weights, case.weights)


def test_gradients_of_values_and_scales_on_a_grid_are_those_of_autograd() -> None:
    """One step of Adam moves a number by its rate, whatever its gradient: so compare the gradients themselves."""
    case = on_grid(made_case(), "int4/8", torch.float32)
    name, linear = "down", case.linears["down"]
    shape = (linear.out_features, linear.in_features)
    parts = case.weights.packed[name]
    codes = unpack_codes(parts, parse_pattern("2:4"), shape).double()
    (flat,) = flats([master_shapes(parts, parse_pattern("2:4"), shape)], linear.weight.device, ALONE)
    trained = LinearMasters(linear, parts, parse_pattern("2:4"), flat)
    own, gradients = flat.bundle.own, flat.bundle.own_gradients
    trained.write_to_block(flat.views(own))
    x, grad = torch.randn(9, shape[1]), torch.randn(9, shape[0])
    with torch.no_grad():
        trained.add_gradients(grad, x, flat.views(gradients))
    scales = parts["scales"].double().requires_grad_()
    S = codes.requires_grad_() * spread(scales, shape[1])
    (x.double() @ S.t() * grad.double()).sum().backward()
    of_values, _, _, of_scales = flat.views(gradients)
    assert scales.grad is not None
    assert codes.grad is not None
    torch.testing.assert_close(of_scales.double(), scales.grad, rtol=1e-4, atol=1e-5)
    kept = stored_columns(parts["meta"], parse_pattern("2:4"), shape[1])
    expected = (codes.grad / spread(scales.detach(), shape[1]))[kept]  # of S, where the pattern keeps it
    torch.testing.assert_close(of_values.double(), expected, rtol=1e-4, atol=1e-5)


def test_codes_stay_once_an_epochs_loss_rises_and_the_rest_is_trained_on() -> None:
    """Far from the codes' best rate a code flips back and forth; here all are flung away from where they were."""
    case = on_grid(made_case(off=0.05), "int4/8")
    held: list[int] = []
    original = Optimizer.hold_codes

    def hold(self: Optimizer) -> None:
        held.append(1)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "hold_codes", hold)
        _, curve = case.refine(replace(SETTINGS, epochs=12, lr=3.0))
    rises = [epoch for epoch in range(2, len(curve)) if curve[epoch] > curve[epoch - 1]]
    assert rises
    assert len(held) == len(rises)
    assert curve[-1] < max(curve)
