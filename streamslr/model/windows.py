"""Windows that a model can take: ids of its vocabulary, and no more tokens than a table of positions has rows.

A GPU finds an index outside of a table by an assertion that ends the process and names no cause, so tables are looked
at before it reads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from streamslr.errors import InputError, first_line, says_not_deterministic, says_out_of_memory

_aten = torch.ops.aten


def require_ids(model: PreTrainedModel, ids: Tensor, label: str) -> None:
    """Check that token ids are within the embedding of a model.

    Args:
        model: the model; its embedding may be on the meta device.
        ids: token ids, on the host unless a wait for the device is no matter.
        label: the model, for the message.

    Raises:
        InputError: an id is negative, or as large as the vocabulary or larger.
    """
    size = vocabulary_size(model)
    if size is None or not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= size:
        raise InputError(
            f"the text has token id {most if most >= size else least}, and the vocabulary of {label} has {size:,} ids, "
            f"from 0: its tokenizer is another model's; put the tokenizer files that the model was made with beside it"
        )


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Return the number of rows of a model's embedding; None where it has none of the usual kind."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers raises it where it finds no embedding
        return None
    return size if isinstance(size, int) else None


class OutsideTableError(IndexError):
    """An index is outside of the table that it is looked up in.

    Attributes:
        rows: number of rows of the table.
        index: the index.
    """

    def __init__(self, rows: int, index: int) -> None:
        super().__init__(f"index {index} is outside of a table of {rows} rows")
        self.rows, self.index = rows, index


@contextmanager
def refusing_windows(model: str, tokens: int, positions: int | None) -> Iterator[None]:
    """Turn errors about the length of windows, from a table of positions or a mask, into one that says what to do.

    Args:
        model: the model's class, for the message.
        tokens: length of the windows.
        positions: max_position_embeddings of the model; None where config.json has none.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        passes = says_out_of_memory(error) or says_not_deterministic(error)
        if passes or (isinstance(error, RuntimeError) and tokens <= (positions or 0)):
            raise
        why = first_line(error)
        if isinstance(error, OutsideTableError):
            why = f"its table of positions has {error.rows} rows"
        most = f" {positions}" if positions else " its max_position_embeddings"
        raise InputError(
            f"{model} cannot take windows of {tokens} tokens ({why}); give a --seq-len of at most{most}"
        ) from error


class CheckedLookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that compares each index with its table before the device does; each comparison waits for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match func.overloadpacket:
            case _aten.embedding:
                _check(args[0].shape[0], args[1])
            case _aten.gather | _aten.index_select:
                _check(args[0].shape[args[1]], args[2])
            case _aten.index:
                for dim, indices in enumerate(args[1]):
                    if indices is not None and indices.dtype == torch.int64:
                        _check(args[0].shape[dim], indices)
        return func(*args, **(kwargs or {}))


def _check(rows: int, indices: Tensor) -> None:
    if indices.is_meta or not indices.numel():
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if most >= rows or least < -rows:
        raise OutsideTableError(rows, most if most >= rows else least)
