"""Perplexity of a compressed folder or a dense checkpoint, streamed block by block."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamslr.calibration.hidden_states import HiddenStates, InMemory, OnDisk, read_batches, spans
from streamslr.calibration.tokens import text_windows
from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.run.context import pick_device
from streamslr.run.plan import BATCH_TOKENS

_MEMORY_SHARE = 0.25
"""Of the free host memory that hidden states may take before they go to disk; two boundaries exist at a time."""


@dataclass(frozen=True)
class Evaluation:
    """perplexity = exp(nll); nll: mean negative log-likelihood (nats) of the `tokens` predicted tokens."""

    model: str
    text: str
    perplexity: float
    nll: float
    windows: int
    seq_len: int
    tokens: int
    device: str
    dtype: str


@torch.inference_mode()
def evaluate(
    model: str,
    text: Path,
    seq_len: int,
    *,
    windows: int | None = None,
    revision: str | None = None,
    device: str | None = None,
    scratch: Path | None = None,
    free_memory: int,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Perplexity of `model` (folder or hub id) on the windows of `seq_len` tokens of `text`, one after another.

    All tokens of a window but its first are predicted (the measure of the SparseGPT and 3BASiL papers).
    windows: only so many from the start. free_memory: host bytes; hidden states that would take more than a
    quarter of it lie in `scratch` (a temporary folder) instead. step: called with (blocks done, blocks in all).
    Raises InputError when the text is too short or the folder is unfinished.
    """
    checkpoint = open_checkpoint(model, revision)
    where, dtype = pick_device(device)
    blockwise = BlockwiseModel(checkpoint, dtype, where)
    ids = text_windows(checkpoint.tokenizer(), text, seq_len, windows)  # [n, T]
    micro_batch = max(1, BATCH_TOKENS // seq_len)
    batches = spans([(0, len(ids))], micro_batch)
    hidden_size = blockwise.hidden_size
    boundary_bytes = len(ids) * seq_len * hidden_size * dtype.itemsize
    in_memory = 2 * boundary_bytes <= _MEMORY_SHARE * free_memory

    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="streamslr-eval-", dir=scratch) as folder:

        def new(index: int) -> HiddenStates:
            if in_memory:
                return InMemory(len(ids), seq_len, hidden_size, dtype)
            return OnDisk(Path(folder) / f"{index}.zarr", len(ids), seq_len, hidden_size, dtype)

        hidden = new(0)
        blockwise.load_non_block()
        for start in range(0, len(ids), micro_batch):
            hidden.write(start, blockwise.embed(ids[start : start + micro_batch].to(where)))
        blockwise.evict_non_block()
        hidden.seal()
        for i in range(len(blockwise.block_names)):
            block = blockwise.load_block(i)
            upcoming = new(i + 1)
            for start, x in read_batches(hidden, batches):
                upcoming.write(start, block.run(x.to(where)))
            upcoming.seal()
            blockwise.evict_block(i)
            hidden.drop()
            hidden = upcoming
            step(i + 1, len(blockwise.block_names))
        blockwise.load_non_block()
        nll = 0.0
        for start, x in read_batches(hidden, batches):
            batch = ids[start : start + micro_batch].to(where)
            nll += _negative_log_likelihood(blockwise.logits(batch, x.to(where)), batch)
        blockwise.evict_non_block()
        hidden.drop()
    tokens = len(ids) * (seq_len - 1)
    nll /= tokens
    if not math.isfinite(nll):
        raise InputError(f"{model} gives a loss of {nll} on {text}: its weights or activations are not finite")
    return Evaluation(
        model=model,
        text=str(text),
        perplexity=math.exp(nll),
        nll=nll,
        windows=len(ids),
        seq_len=seq_len,
        tokens=tokens,
        device=where.type,
        dtype=str(dtype).removeprefix("torch."),
    )


def _negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """Summed over the predicted tokens of logits [b, T, v], ids [b, T]; a window at a time: vocabularies are wide."""
    return sum(
        float(torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum"))
        for row, target in zip(logits, ids, strict=True)
    )
