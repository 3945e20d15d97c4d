"""Text -> windows of token ids: seeded random ones for calibration, consecutive ones for perplexity and training."""

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from streamslr.errors import HubError, InputError
from streamslr.memory import return_freed_memory
from streamslr.model.border import refusing

_PIECE = 2**22
"""Characters tokenized at once: a tokenizer takes 100 bytes a token."""

C4_REPO, C4_FILE = "allenai/c4", "en/c4-train.00000-of-01024.json.gz"
"""Default calibration text: what SparseGPT and 3BASiL calibrate on."""


@dataclass(frozen=True)
class Calibration:
    """Calibration windows, and where they come from."""

    ids: Tensor  # [windows, T] int64
    digest: str  # sha256 of the ids
    source: str  # name of the text for people


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, path: Path | None, num_windows: int, seq_len: int, seed: int
) -> Calibration:
    """Draw random windows of a text, without special tokens.

    A .jsonl file gives one window from each of its documents of more than `seq_len` tokens, in random order, as in the
    papers (SparseGPT, section 4), and more than one where there are too few documents. Any other text is one document,
    in which windows start anywhere.

    Args:
        tokenizer: Tokenizer of the model.
        path: Text; None: the first shard of C4's training set, from the hub.
        num_windows: Number of windows.
        seq_len: Tokens T of a window.
        seed: Seed of documents and starts.

    Raises:
        InputError: The text cannot be read, or holds fewer than num_windows · seq_len tokens in documents that are
            long enough.
        HubError: C4 cannot be fetched.
    """
    draw = random.Random(seed)
    if path is None:
        path, source = _fetch_c4(), f"{C4_REPO}/{C4_FILE}"
    else:
        source = path.name
    if _is_jsonl(path):
        documents = _draw_long_documents(tokenizer, path, num_windows, seq_len, draw)
    else:
        documents = [_tokenize(tokenizer, text) for text in _read_documents(path)]
    _require_enough(path, documents, num_windows, seq_len)
    windows = []
    for i in range(num_windows):
        document = documents[i % len(documents)]
        start = draw.randint(0, len(document) - seq_len - 1)
        windows.append(document[start : start + seq_len])
    ids = torch.stack(windows).long()
    return_freed_memory()
    return Calibration(ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), source)


def text_windows(tokenizer: PreTrainedTokenizerBase, path: Path, seq_len: int, limit: int | None) -> Tensor:
    """Return a whole text as windows [n, T] of token ids, one after another, without special tokens.

    The documents of a .jsonl file are joined by blank lines.

    Args:
        tokenizer: Tokenizer of the model.
        path: Text.
        seq_len: Tokens T of a window.
        limit: Most windows to return; None: all.

    Raises:
        InputError: The text cannot be read, or is shorter than one window.
    """
    ids = _tokenize(tokenizer, "\n\n".join(_read_documents(path)))
    count = len(ids) // seq_len if limit is None else min(limit, len(ids) // seq_len)
    if count < 1:
        raise InputError(
            f"{path} holds {len(ids)} tokens, less than one window of {seq_len}; give more text or a smaller --seq-len"
        )
    return ids[: count * seq_len].long().view(count, seq_len)


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


def _is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".jsonl", ".json"))


def _read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a text: the `text` of each line of a .jsonl file, any other file as a whole.

    Lines are read as a stream, since C4's shard is 0.8 GB unpacked. Raises InputError for whatever cannot be read.
    """
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    number = 0
    try:
        with _open(path) as file:
            if not _is_jsonl(path):
                yield file.read()
                return
            for line in file:
                number += 1
                if line.strip():
                    yield _text_field(line)
    except (UnicodeDecodeError, EOFError, zlib.error, OSError) as error:
        where = f" after line {number}" if number else ""
        raise InputError(f"text {path} cannot be read{where}: {error}") from error
    except ValueError as error:
        raise InputError(f'{path} line {number} is not a JSON object with a "text" field: {error}') from error


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _text_field(line: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{line[:80].strip()!r}")
    return str(record["text"])


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return token ids [n] int32; the text is cut at line ends into pieces of `_PIECE` characters and more."""
    ids = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        with refusing("the model's tokenizer fails on the text", "check the tokenizer's files, or download them again"):
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
    candidates = [i for i, text in enumerate(_read_documents(path)) if len(text.encode()) > seq_len]
    draw.shuffle(candidates)
    found: list[Tensor] = []
    batch = 8 * count
    for first in range(0, len(candidates), batch):
        wanted = {line: order for order, line in enumerate(candidates[first : first + batch])}
        texts = {wanted[i]: text for i, text in enumerate(_read_documents(path)) if i in wanted}
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
