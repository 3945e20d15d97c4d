"""A finished folder beside its dense model, on check windows: the figures that a run gives of itself, at any time."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from streamslr.calibration.hidden_states import boundary_bytes, scratch_bytes
from streamslr.calibration.tokens import C4_FILE, C4_REPO, calibration_windows, ids_digest, window_prefix
from streamslr.errors import InputError, ResumeError, first_line
from streamslr.gpu import deterministic_libraries, pick_device
from streamslr.io.folder import require_as_written
from streamslr.io.scratch import scratch_folder
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from streamslr.results.evaluate import MEMORY_FRACTION, read_digests
from streamslr.results.inspect import read_run
from streamslr.run.check import Check
from streamslr.run.journal import JournalState, Quality
from streamslr.run.quality import describe_quality, warn_of

DEFAULT_WINDOWS = 4
"""Windows where neither the user nor the journal says how many."""

log = logging.getLogger("streamslr")


@dataclass(frozen=True)
class Checked:
    """A compressed folder beside its dense model."""

    folder: str
    model: str
    text: str
    own_windows: bool
    """True where these are the windows that the run was checked on."""
    quality: Quality
    cosines: tuple[float | None, ...]
    """Cosine between the hidden states of both models behind each block, mean over tokens; None: not finite."""


@torch.inference_mode()
def check(
    folder: Path,
    *,
    model: str | None = None,
    text: Path | None = None,
    windows: int | None = None,
    device: str | None = None,
    free_memory: int,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Compare a finished folder with its dense model, one block in memory at a time; warn where the result is suspect.

    Every file of the folder is compared with its digest in the journal before it is used, and the dense model's shards
    with those that the run read.

    Args:
        folder: The compressed folder.
        model: The dense model, a folder or a hub id; None: that of the journal, on the hub, in the current folder or
            beside `folder`.
        text: .txt, .jsonl with a `text` field, or .gz of either; None: the calibration text, found like the model. From
            the calibration text come the check windows of the run, from another one as many random windows.
        windows: Number of windows; None: as many as the run had, or `DEFAULT_WINDOWS`.
        device: "cpu" or "cuda"; None stands for cuda where there is one.
        free_memory: Free host memory in bytes. Hidden states that would take more than a quarter of it lie on disk.
        step: Called with (blocks done, blocks in all).

    Raises:
        InputError: Model or text are not found or not those of the run, or the folder is unfinished or damaged.
    """
    state = read_run(folder)
    finished = open_checkpoint(str(folder))
    for file, digest in read_digests(finished).items():
        require_as_written(folder / file, digest)
    if text is None and state.calibration != f"{C4_REPO}/{C4_FILE}":
        text = _find(state.calibration, folder, "text", "--text")
    where, dtype = pick_device(device)
    with _dense_model(state, folder, model) as dense:
        blockwise = BlockwiseModel(dense, dtype, where)
        blockwise.require_compressible()  # on a GPU blocks then run in the dtypes that they had in the run
        ids, own_windows = _draw_windows(state, finished, text, windows)
        blockwise.require_windows(ids.shape[1], ids)
        boundary = boundary_bytes(len(ids), ids.shape[1], max(blockwise.widths(ids.shape[1])), dtype.itemsize)
        with scratch_folder("streamslr-check-") as scratch, deterministic_libraries(where, strict=False):
            in_memory = scratch_bytes(0, 0, boundary) <= MEMORY_FRACTION * free_memory
            side_by_side = Check(blockwise, ids, scratch, in_memory)
            cosines = side_by_side.replay(len(blockwise.block_names), finished, step)
            quality = side_by_side.compare(cosines, finished)
            side_by_side.drop()
    if quality.verdict == "suspect":
        log.warning("%s", warn_of(quality))
    source = f"{C4_REPO}/{C4_FILE}" if text is None else str(text)
    return Checked(str(folder), dense.model, source, own_windows, quality, tuple(cosines))


@contextmanager
def _dense_model(state: JournalState, folder: Path, model: str | None) -> Iterator[Checkpoint]:
    """Yield the dense model that the folder was made from; afterwards hold what was read to what the run read.

    Raises:
        InputError: It is not found, or has other weights.
    """
    identity, revision = str(state.fingerprint["model"]), None
    if model is None and identity.startswith("hub:"):
        model, _, revision = identity.removeprefix("hub:").rpartition("@")
    elif model is None:
        model = str(_find(state.model, folder, "model", "--model"))
    dense = open_checkpoint(model, revision)
    advice = "give the model that the folder was made from with --model"
    if dense.identity != identity and set(dense.shards) != set(state.dense_shards):
        raise InputError(f"{folder} was not made from {dense.model}, whose files or headers are others; {advice}")
    if not state.dense_shards:
        log.warning("the journal of %s does not say which weights it was made from: they are not compared", folder)
    try:
        pinned = dense.pin(state.dense_shards, {})
        yield dense
        pinned.check()
    except ResumeError as error:
        why = first_line(error).partition(":")[0]
        raise InputError(f"{folder} was not made from {dense.model} as it is now: {why}; {advice}") from error


def _find(name: str, folder: Path, what: str, flag: str) -> Path:
    """Return the path of a model or text that the journal names, in the current folder or beside the compressed one."""
    places = [Path(name), folder.absolute().parent / name]
    found = next((path for path in places if name and path.exists()), None)
    if found is None:
        raise InputError(
            f"{folder} was made with the {what} {name or 'of a name it does not say'}; give it with {flag}"
        )
    return found


def _draw_windows(
    state: JournalState, finished: Checkpoint, text: Path | None, windows: int | None
) -> tuple[Tensor, bool]:
    """Return windows [n, T] of token ids, and True where they are all check windows of the run and no others."""
    settings, tokenizer = state.fingerprint, finished.tokenizer()
    count = windows or (state.check.windows if state.check else DEFAULT_WINDOWS)
    prefix = window_prefix(tokenizer, "yes" if state.bos else "no")
    seq_len, seed = int(settings["seq_len"]), int(settings["seed"])
    if text is None or text.name == state.calibration:
        held_out = int(settings.get("match_held_out", 0)) if settings["match"] else 0  # none in early versions
        drawn = calibration_windows(tokenizer, text, int(settings["samples"]), seq_len, seed, prefix, held_out, count)
        if drawn.digest == settings["tokens"]:
            return drawn.check, state.check is not None and ids_digest(drawn.check) == state.check.tokens
        log.warning("%s is another text than the run was calibrated on", text or C4_FILE)
    return calibration_windows(tokenizer, text, count, seq_len, seed, prefix).ids, False


def check_table(checked: Checked) -> Table:
    """Return a table with one row a block, and the figures of the whole model below it."""
    quality = checked.quality
    which = "the run's check windows" if checked.own_windows else f"{quality.windows} windows"
    table = Table(
        min_width=100,
        title=f"{checked.folder} beside {checked.model}, on {which} of {checked.text}",
        caption=f"{describe_quality(quality)}\nverdict: {quality.verdict}"
        + (f", {quality.reason}" if quality.reason else "")
        + "\ncosine: between the hidden states that leave the block in both models, mean over tokens",
        caption_justify="left",
    )
    for name in ("block", "cosine"):
        table.add_column(name, justify="right")
    for index, cosine in enumerate(checked.cosines):
        table.add_row(str(index), "not finite" if cosine is None else f"{cosine:.5f}")
    return table
