"""Text -> windows of token ids: seeded random ones for calibration, consecutive ones for perplexity and training."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from streamslr.calibration.text import is_jsonl, read_documents
from streamslr.errors import HubError, InputError
from streamslr.memory import return_freed_memory
from streamslr.model.border import refusing

_PIECE = 2**22
"""Characters tokenized at once: a tokenizer takes 100 bytes a token."""

C4_REPO, C4_FILE = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"
"""Default calibration text: what SparseGPT and 3BASiL calibrate on."""

Place = tuple[int, int]
"""Number of the document that a window is of, and its first token there."""

_CHECK_TOKENIZER = "check the tokenizer's files, or download them again"


@dataclass(frozen=True)
class Calibration:
    """Calibration windows, and where they come from."""

    ids: Tensor  # [windows, T] int64, those held out behind the others
    digest: str  # sha256 of the ids
    source: str  # name of the text for people
    check: Tensor  # check windows [n, T] int64, of the same text
    held_out_overlapping: int = 0  # held-out windows that share text with others, because the text is too short
    overlapping: int = 0  # check windows that do


def window_prefix(tokenizer: PreTrainedTokenizerBase, bos: str) -> list[int]:
    """Return the token ids that every window begins with: the tokenizer's BOS, or none.

    Models that were trained with BOS before each text need it: Gemma's hidden states are far out of range without.

    Args:
        tokenizer: Tokenizer of the model.
        bos: "yes", "no", or "auto": where the tokenizer puts BOS before a text by itself.

    Raises:
        InputError: BOS is asked for, and the tokenizer has none.
    """
    token = tokenizer.bos_token_id
    if bos == "yes" and token is None:
        raise InputError("--bos yes, but the model's tokenizer has no BOS token; use --bos auto")
    if bos == "auto":
        with refusing("the model's tokenizer fails", _CHECK_TOKENIZER):
            adds_bos = token is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [token]
        return [token] if adds_bos else []
    return [token] if bos == "yes" else []


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    path: Path | None,
    num_windows: int,
    seq_len: int,
    seed: int,
    prefix: Sequence[int] = (),
    held_out: int = 0,
    check: int = 0,
) -> Calibration:
    """Draw random windows of a text; none has special tokens but those of `prefix`.

    A .jsonl file gives one window from each of its documents of more than `seq_len` tokens, in random order, as in the
    papers (SparseGPT, section 4), and more than one where there are too few documents. Any other text is one document,
    in which windows start anywhere. Held-out windows are drawn after these, and check windows after them, each by
    random numbers of their own: how many there are changes no window that was drawn before. They share no text with
    other windows where there is enough of it.

    Args:
        tokenizer: Tokenizer of the model.
        path: Text; None: the first shard of C4's training set, from the hub.
        num_windows: Number of windows that are fitted.
        seq_len: Tokens T of a window.
        seed: Seed of documents and starts.
        prefix: First tokens of every window; the text gives the other T − len(prefix).
        held_out: Number of held-out windows.
        check: Number of check windows.

    Raises:
        InputError: The text cannot be read, or holds too few tokens in documents that are long enough.
        HubError: C4 cannot be fetched.
    """
    draw = random.Random(seed)
    if path is None:
        path, source = _fetch_c4(), f"{C4_REPO}/{C4_FILE}"
    else:
        source = path.name
    length = seq_len - len(prefix)  # of the text in a window
    if is_jsonl(path):
        documents = _draw_long_documents(tokenizer, path, num_windows + held_out + check, length, draw)
    else:
        documents = [_tokenize(tokenizer, text) for text in read_documents(path)]
    _require_enough(path, documents[:num_windows], num_windows, length)
    places = []
    for i in range(num_windows):
        number = i % min(num_windows, len(documents))
        places.append((number, draw.randint(0, len(documents[number]) - length - 1)))
    overlapping = []
    for what, count in (("held-out", held_out), ("check", check)):
        apart, shared = _draw_apart(documents, places, count, length, random.Random(f"{what} windows of seed {seed}"))
        places += apart
        overlapping.append(shared)
    ids = _prepend(prefix, torch.stack([documents[number][start : start + length] for number, start in places]).long())
    return_freed_memory()
    calibrating, checking = ids[: num_windows + held_out].clone(), ids[num_windows + held_out :].clone()
    return Calibration(calibrating, ids_digest(calibrating), source, checking, *overlapping)


def ids_digest(ids: Tensor) -> str:
    """Return the sha256 of windows of token ids, int64 [n, T]."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def text_windows(
    tokenizer: PreTrainedTokenizerBase, path: Path, seq_len: int, limit: int | None, prefix: Sequence[int] = ()
) -> Tensor:
    """Return a whole text as windows [n, T] of token ids, one after another.

    The documents of a .jsonl file are joined by blank lines. No window has special tokens but those of `prefix`.

    Args:
        tokenizer: Tokenizer of the model.
        path: Text.
        seq_len: Tokens T of a window.
        limit: Most windows to return; None: all.
        prefix: First tokens of every window; the text gives the other T − len(prefix).

    Raises:
        InputError: The text cannot be read, or is shorter than one window.
    """
    length = seq_len - len(prefix)  # of the text in a window
    ids = _tokenize(tokenizer, "\n\n".join(read_documents(path)))
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if count < 1:
        raise InputError(
            f"{path} holds {len(ids)} tokens, less than one window of {length}; give more text or a smaller --seq-len"
        )
    return _prepend(prefix, ids[: count * length].long().view(count, length))


def _draw_apart(
    documents: Sequence[Tensor], taken: Sequence[Place], count: int, length: int, draw: random.Random
) -> tuple[list[Place], int]:
    """Draw `count` more windows, apart from those taken and from each other; where no room is left, anywhere.

    Returns:
        The windows, and how many of them share text with others.
    """
    drawn: list[Place] = []
    overlapping = 0
    for _ in range(count):
        spaces = _free_starts(documents, [*taken, *drawn], length)
        overlapping += not spaces
        spaces = spaces or [(number, range(len(ids) - length + 1)) for number, ids in enumerate(documents)]
        ((number, starts),) = draw.choices(spaces, [len(starts) for _, starts in spaces])
        drawn.append((number, draw.choice(starts)))
    return drawn, overlapping


def _free_starts(documents: Sequence[Tensor], taken: Sequence[Place], length: int) -> list[tuple[int, range]]:
    """Return where a window can start without sharing text with one that is taken: documents and ranges in them."""
    starts: list[list[int]] = [[] for _ in documents]
    for number, start in taken:
        starts[number].append(start)
    spaces = []
    for number, document in enumerate(documents):
        end = 0
        for start in (*sorted(starts[number]), len(document)):
            if start - end >= length:
                spaces.append((number, range(end, start - length + 1)))
            end = max(end, start + length)
    return spaces


def _prepend(prefix: Sequence[int], windows: Tensor) -> Tensor:
    """Return windows [n, T] of ids with the same first tokens before each."""
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(len(windows), -1), windows], dim=1)


def _require_enough(path: Path, documents: list[Tensor], num_windows: int, seq_len: int) -> None:
    long = [len(document) for document in documents if len(document) > seq_len]
    need = max(num_windows * seq_len, seq_len + 1)  # one token more than one window, so that its start can be drawn
    if sum(long) >= need:
        return
    if len(documents) == 1:
        found = f"holds {len(documents[0]):,} tokens"
    else:
        found = f"holds {sum(long):,} tokens in {len(long):,} documents of more than {seq_len:,} tokens"
    raise InputError(
        f"{path} {found}; {num_windows:,} windows of {seq_len:,} tokens need {need:,}. "
        "Give more text, or a smaller --samples or --seq-len"
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return token ids [n] int32; the text is cut at line ends into pieces of `_PIECE` characters and more."""
    ids = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        with refusing("the model's tokenizer fails on the text", _CHECK_TOKENIZER):
            piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            ids.append(torch.tensor(piece, dtype=torch.int32))
        start = end
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)


def _draw_long_documents(
    tokenizer: PreTrainedTokenizerBase, path: Path, count: int, seq_len: int, draw: random.Random
) -> list[Tensor]:
    """Return token ids of up to `count` random documents of more than `seq_len` tokens.

    The file is never held in memory. A first reading finds the documents that are long enough in bytes (a token is at
    least one); each further one tokenizes a random batch of these.
    """
    candidates = [i for i, text in enumerate(read_documents(path)) if len(text.encode()) > seq_len]
    draw.shuffle(candidates)
    found: list[Tensor] = []
    batch = 8 * count
    for first in range(0, len(candidates), batch):
        wanted = {line: order for order, line in enumerate(candidates[first : first + batch])}
        texts = {wanted[i]: text for i, text in enumerate(read_documents(path, again=True)) if i in wanted}
        for order in range(len(wanted)):
            ids = _tokenize(tokenizer, texts[order])
            if len(ids) > seq_len:
                found.append(ids)
                if len(found) == count:
                    return found
    return found


def _fetch_c4() -> Path:
    try:
        return Path(hf_hub_download(C4_REPO, C4_FILE, repo_type="dataset"))
    except (hub_errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # hub errors are OSErrors too
        raise HubError(
            f"the default calibration text {C4_REPO}/{C4_FILE} cannot be fetched from the hub: {error}. "
            "Check the network, or give a text of your own with --calibration FILE"
        ) from error
