"""Windows that are too long and ids outside the vocabulary, refused before a device reads a table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.windows import CheckedLookups, OutsideTableError
from tests.support.tiny_models import VOCABULARY, tiny_checkpoint


def blockwise_of(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_windows_longer_than_a_table_of_positions(architecture: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"n_positions": 8, "max_position_embeddings": 8}
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", architecture, blocks=1, **sizes))
    blockwise.require_windows(8)
    with pytest.raises(InputError, match=r"windows of 9 tokens \(its table of positions has \d+ rows\); .* at most 8"):
        blockwise.require_windows(9)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_angles_and_alibi_have_no_table(architecture: str, tmp_path: Path) -> None:
    blockwise_of(tiny_checkpoint(tmp_path / "m", architecture, blocks=1, max_position_embeddings=8)).require_windows(9)


@pytest.mark.parametrize(("ids", "says"), [([1, VOCABULARY], "token id 384"), ([-1, 2], "token id -1")])
def test_ids_outside_the_vocabulary(ids: list[int], says: str, tmp_path: Path) -> None:
    blockwise = blockwise_of(tiny_checkpoint(tmp_path / "m", blocks=1))
    blockwise.require_windows(2, torch.tensor([[0, VOCABULARY - 1]]))
    with pytest.raises(InputError, match=f"the text has {says}, and the vocabulary of .* has 384 ids"):
        blockwise.require_windows(2, torch.tensor([ids]))


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, i: torch.nn.functional.embedding(i, table),
        lambda table, i: table[i],
        lambda table, i: table[:, None][i, :],
        lambda table, i: table.index_select(0, i),
        lambda table, i: table.gather(0, i[:, None].expand(-1, 3)),
    ],
)
def test_each_kind_of_lookup_is_checked(look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
    table = torch.randn(5, 3)
    with CheckedLookups():
        assert torch.equal(look_up(table, torch.tensor([0, 4])).flatten(), table[[0, 4]].flatten())
        with pytest.raises(OutsideTableError, match="index 5 is outside of a table of 5 rows"):
            look_up(table, torch.tensor([0, 5]))
