"""Perplexity of a compressed folder or a dense checkpoint, streamed block by block."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamslr.calibration.hidden_states import HiddenStates, InMemory, OnDisk, Span, read_batches, spans
from streamslr.calibration.tokens import text_windows, window_prefix
from streamslr.errors import InputError
from streamslr.gpu import deterministic_libraries, pick_device
from streamslr.io.folder import require_as_written
from streamslr.io.packed_layout import read_quantization_config
from streamslr.io.scratch import scratch_folder
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.ranks import ALONE, Ranks
from streamslr.run.journal import JOURNAL_FILE, read_journal
from streamslr.run.planning import BATCH_TOKENS
from streamslr.runtime.stored_model import find_difference

log = logging.getLogger("streamslr")

MEMORY_FRACTION = 0.25
"""Fraction of the free host memory that the two boundaries alive at a time may take; larger ones go to disk."""

_LARGEST_LOSS = 700.0
"""Loss in nats beyond which exp overflows. Guessing costs log(vocabulary), some 12."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on a text: perplexity = exp(nll)."""

    model: str
    text: str
    perplexity: float
    nll: float
    """Mean negative log-likelihood of the predicted tokens, in nats."""
    windows: int
    seq_len: int
    tokens: int
    """Number of predicted tokens."""
    bos: bool
    """True where each window begins with the tokenizer's BOS."""
    device: str
    dtype: str


@torch.inference_mode()
def evaluate(
    model: str,
    text: Path,
    seq_len: int,
    *,
    windows: int | None = None,
    bos: str = "auto",
    revision: str | None = None,
    device: str | None = None,
    scratch: Path | None = None,
    free_memory: int,
    ranks: Ranks = ALONE,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure the perplexity of a model on the consecutive windows of a text, one block in memory at a time.

    All tokens of a window but its first are predicted, as in the SparseGPT and 3BASiL papers. Every file of a
    compressed folder is compared with its digest in the journal before it is used.

    Args:
        model: A compressed folder, a dense checkpoint or a hub id.
        text: .txt, .jsonl with a `text` field, or .gz of either.
        seq_len: Tokens in a window.
        windows: Evaluate only so many windows from the start of the text; None stands for all.
        bos: First token of each window is the tokenizer's BOS: "yes", "no", or "auto", where it adds one by itself.
        revision: Branch, tag or commit of a hub model.
        device: "cpu" or "cuda"; None stands for cuda where there is one.
        scratch: Folder for hidden states on disk; None stands for the system's temporary folder.
        free_memory: Free host memory in bytes. Hidden states that would take more than a quarter of it lie on disk.
        ranks: Processes that each take a share of the windows, and all get the result.
        step: Called with (blocks done, blocks in all).

    Raises:
        InputError: The text is shorter than one window, there are fewer windows than ranks, the folder is unfinished or
            damaged, or the loss is not finite.
        StreamslrError: Another rank ended.
    """
    checkpoint = open_checkpoint(model, revision)
    where, dtype = pick_device(device, index=ranks.local_rank)
    if where.index:
        torch.cuda.set_device(where)  # for kernels that run on the current device
    blockwise = BlockwiseModel(checkpoint, dtype, where)
    digests = read_digests(checkpoint)
    tokenizer = checkpoint.tokenizer()
    prefix = window_prefix(tokenizer, bos)
    ids = text_windows(tokenizer, text, seq_len, windows, prefix)  # [n, T]
    blockwise.require_windows(seq_len, ids)
    seen = checkpoint.identity, hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    if len(set(ranks.gather(seen))) > 1:
        raise InputError("ranks see different models or texts; give all of them the same")
    total = len(ids)
    ids = ids[list(ranks.share(total, "windows"))]
    batches = spans([(0, len(ids))], max(1, BATCH_TOKENS // seq_len))
    widths = blockwise.widths(seq_len)
    boundary_bytes = len(ids) * seq_len * max(widths) * dtype.itemsize
    in_memory = 2 * boundary_bytes <= MEMORY_FRACTION * free_memory / ranks.local_world

    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with (
        scratch_folder("streamslr-eval-", scratch) as folder,
        _checked_ahead(blockwise, digests) as require_sound,
        deterministic_libraries(where, strict=False),
    ):

        def new_boundary(index: int) -> HiddenStates:
            if in_memory:
                return InMemory(len(ids), seq_len, widths[index], dtype)
            return OnDisk(folder / f"{index}.zarr", len(ids), seq_len, widths[index], dtype)

        hidden = _run_blocks(blockwise, ids, batches, new_boundary, require_sound, step)
        nll = _sum_losses(blockwise, ids, batches, hidden)
        hidden.drop()
    tokens = total * (seq_len - 1)
    nll = ranks.sum(nll) / tokens
    if not nll < _LARGEST_LOSS:
        raise InputError(f"{model} gives a loss of {nll:.4g} on {text}: its weights are damaged, or overflow")
    return Evaluation(
        model=model,
        text=str(text),
        perplexity=math.exp(nll),
        nll=nll,
        windows=total,
        seq_len=seq_len,
        tokens=tokens,
        bos=bool(prefix),
        device=where.type,
        dtype=str(dtype).removeprefix("torch."),
    )


def read_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digest of each shard of a compressed folder, from its journal; check its other files.

    A dense checkpoint has none. A folder of `save_pretrained` has no journal: a warning says that nothing is checked.

    Raises:
        InputError: The folder is unfinished, config.json or the tokenizer are not as they were written, or the shards
            hold other packed linears than the journal records.
    """
    if read_quantization_config(checkpoint.config) is None:
        return {}
    path = checkpoint.fetch_file(JOURNAL_FILE)
    state = read_journal(path.parent) if path else None
    if path is None or state is None:
        log.warning("%s has no %s: its bytes are not compared with any digest", checkpoint.model, JOURNAL_FILE)
        return {}
    state.require_complete(path.parent)
    for name, digest in state.auxiliary_files.items():
        require_as_written(checkpoint.fetch_file(name) or path.parent / name, digest)
    digests = {shard.file: shard.sha256 for shard in state.shards}
    if strangers := sorted({info.shard for info in checkpoint.tensors.values()} - digests.keys()):
        raise InputError(f"{path} does not name {strangers[0]}, which the model is read from; remove that file")
    if problem := find_difference(state, checkpoint.packed_linears):
        raise InputError(f"{checkpoint.model}: {problem}; `streamslr verify` tells more")
    return digests


@contextmanager
def _checked_ahead(blockwise: BlockwiseModel, digests: Mapping[str, str]) -> Iterator[Callable[[int | None], None]]:
    """Yield a function that returns once the shards of a block, or of all else for None, are found as written.

    A thread reads the shards of the block after it meanwhile, which are then in the system's cache.
    """
    checkpoint = blockwise.checkpoint
    checks: dict[str, Future[None]] = {}

    def check(file: str) -> None:
        path = checkpoint.fetch_file(file)
        assert path is not None  # the checkpoint has read its header
        require_as_written(path, digests[file])

    with ThreadPoolExecutor(1, thread_name_prefix="digests") as pool:

        def begin(names: Iterable[str]) -> list[Future[None]]:
            files = {checkpoint.tensors[name].shard for name in names} & digests.keys()
            checks.update({file: pool.submit(check, file) for file in sorted(files - checks.keys())})
            return [checks[file] for file in files]

        def require_sound(block: int | None) -> None:
            names = blockwise.non_block_tensors if block is None else blockwise.block_tensors[block]
            begun = begin(names)
            for following in blockwise.block_tensors[0 if block is None else block + 1 :][:1]:
                begin(following)
            for future in begun:
                future.result()

        yield require_sound


def _run_blocks(
    blockwise: BlockwiseModel,
    ids: Tensor,
    batches: Sequence[Span],
    new_boundary: Callable[[int], HiddenStates],
    require_sound: Callable[[int | None], None],
    step: Callable[[int, int], None],
) -> HiddenStates:
    """Pass the windows ids [n, T] through the embeddings and every block; return the last boundary."""
    hidden = new_boundary(0)
    require_sound(None)
    blockwise.load_non_block()
    for start, stop in batches:
        hidden.write(start, blockwise.embed(ids[start:stop].to(blockwise.device)))
    blockwise.evict_non_block()
    hidden.seal()
    blocks = len(blockwise.block_names)
    for i in range(blocks):
        require_sound(i)
        block = blockwise.load_block(i)
        upcoming = new_boundary(i + 1)
        for start, x in read_batches(hidden, batches):
            upcoming.write(start, block.hand_on(x.to(blockwise.device))[1])
        upcoming.seal()
        blockwise.evict_block(i)
        hidden.drop()
        hidden = upcoming
        step(i + 1, blocks)
    return hidden


def _sum_losses(blockwise: BlockwiseModel, ids: Tensor, batches: Sequence[Span], hidden: HiddenStates) -> float:
    """Return the negative log-likelihood (nats) of all predicted tokens, from the last boundary."""
    blockwise.load_non_block()
    nll = 0.0
    for start, x in read_batches(hidden, batches):
        batch = ids[start : start + len(x)].to(blockwise.device)
        nll += _negative_log_likelihood(blockwise.logits(batch, x.to(blockwise.device)), batch)
    blockwise.evict_non_block()
    return nll


def _negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """Return the sum over the predicted tokens of logits [b, T, v] and ids [b, T].

    Goes window by window, because float32 logits of a wide vocabulary are large.
    """
    return sum(
        float(torch.nn.functional.cross_entropy(row[:-1].float(), following[1:], reduction="sum"))
        for row, following in zip(logits, ids, strict=True)
    )
