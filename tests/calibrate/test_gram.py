"""Gram matrices: which linears share one, their values, and inputs that are refused."""

import pytest
import torch
from torch import Tensor, nn

from streamslr.calibrate.gram import collect_grams, input_groups
from streamslr.errors import InputError


class Attention(nn.Module):
    """q and k share an input; o gets another; names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        copy = x * 1
        return self.c(self.a(x) + self.b(x)[..., :4] + copy)


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {f"block.{name}": m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


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
def test_a_gram_is_the_sum_over_all_rows_of_all_samples(dtype: torch.dtype) -> None:
    block, hidden = Attention().to(dtype), torch.randn(5, 7, 4).to(dtype)
    gram = collect_grams("block", linears(block), block, batches(hidden, 2))[0]
    x = hidden.double().reshape(-1, 4)
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.matrix.double(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_equal_inputs_in_different_tensors_are_not_shared() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.clone()) + self.b(x.clone())[..., :4] + self.c(x)

    block = Twice()
    assert len(collect_grams("block", linears(block), block, batches(torch.randn(2, 3, 4), 1))) == 3


def test_non_finite_inputs_are_refused_naming_block_layer_and_samples() -> None:
    block, hidden = Attention(), torch.randn(6, 5, 4)
    hidden[3, 1, 2] = float("nan")
    hidden[4, 0, 0] = float("inf")
    hidden[4, 1, 0] = -float("inf")
    with pytest.raises(
        InputError,
        match=r"model.layers.7: the input of block.a .* for 3 tokens, in .*\[3, 4\]",
    ):
        collect_grams("model.layers.7", linears(block), block, batches(hidden, 2)[1:])


def test_a_layer_that_sees_some_tokens_only_is_refused() -> None:
    class Routed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)[..., :4] + self.c(x[:, :2]).sum()

    block = Routed()
    with pytest.raises(InputError, match=r"block.c saw 4 inputs where 10 tokens passed block 1"):
        collect_grams("block 1", linears(block), block, batches(torch.randn(2, 5, 4), 1))


def test_hooks_are_gone_afterwards() -> None:
    block = Attention()
    collect_grams("block", linears(block), block, batches(torch.randn(2, 3, 4), 1))
    assert not any(linear._forward_pre_hooks for linear in linears(block).values())
