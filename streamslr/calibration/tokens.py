"""Calibration text -> seeded, hashed windows of token ids."""

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

_PIECE = 2**22  # characters tokenized at once

C4_REPO, C4_FILE = (
    "allenai/c4",
    "en/c4-train.00000-of-01024.json.gz",
)  # what SparseGPT and 3BASiL calibrate on


@dataclass(frozen=True)
class Calibration:
    """ids [samples, T] int64; digest: sha256 of the ids; source: what a person would call the text."""

    ids: Tensor
    digest: str
    source: str


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, path: Path | None, samples: int, seq_len: int, seed: int
) -> Calibration:
    """Random windows of `seq_len` tokens, without special tokens, from `path` or from C4's first training shard.

    A text file is one document, and windows start anywhere in it. Of a .jsonl file, documents of more than
    `seq_len` tokens are drawn at random and give a window each, as in the papers (SparseGPT, section 4).
    Raises InputError when the text holds fewer than samples · seq_len tokens in such documents.
    """
    draw = random.Random(seed)
    if path is None:
        path, source = _fetch_c4(), f"{C4_REPO}/{C4_FILE}"
    else:
        source = path.name
        if not path.is_file():
            raise InputError(f"calibration file {path} does not exist")
    if _is_jsonl(path):
        documents = _long_documents(tokenizer, path, samples, seq_len, draw)
    else:
        documents = [_tokenize(tokenizer, _read_text(path))]
    _require_enough(path, [len(d) for d in documents if len(d) > seq_len], documents, samples, seq_len)
    windows = []
    for i in range(samples):
        document = documents[i % len(documents)]
        start = draw.randint(0, len(document) - seq_len - 1)
        windows.append(document[start : start + seq_len])
    ids = torch.stack(windows).long()
    return_freed_memory()
    return Calibration(ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), source)


def text_windows(tokenizer: PreTrainedTokenizerBase, path: Path, seq_len: int, limit: int | None) -> Tensor:
    """Windows [n, T] of a whole text, one after another, for perplexity; at most `limit`.

    The documents of a .jsonl are joined by blank lines.
    """
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    text = "\n\n".join(_documents(path)) if _is_jsonl(path) else _read_text(path)
    ids = _tokenize(tokenizer, text)
    count = len(ids) // seq_len if limit is None else min(limit, len(ids) // seq_len)
    if count < 1:
        raise InputError(
            f"{path} holds {len(ids)} tokens, less than one window of {seq_len}; give more text or a smaller --seq-len"
        )
    return ids[: count * seq_len].long().view(count, seq_len)


def _require_enough(path: Path, long: list[int], documents: list[Tensor], samples: int, seq_len: int) -> None:
    need = max(samples * seq_len, seq_len + 1)  # of one window too, so that its start can be drawn
    if sum(long) >= need:
        return
    if len(documents) == 1:
        there = f"holds {len(documents[0]):,} tokens"
    else:
        there = f"holds {sum(long):,} tokens in {len(long):,} documents of more than {seq_len:,} tokens"
    raise InputError(
        f"{path} {there}; {samples:,} windows of {seq_len:,} tokens need {need:,}. "
        "Give more text, or a smaller --samples or --seq-len"
    )


def _is_jsonl(path: Path) -> bool:
    return any(path.name.removesuffix(".gz").endswith(ending) for ending in (".jsonl", ".json"))


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


_UNREADABLE = (UnicodeDecodeError, EOFError, zlib.error, OSError)


def _read_text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read()
    except _UNREADABLE as error:
        raise InputError(f"text {path} cannot be read: {error}") from error


def _documents(path: Path) -> Iterator[str]:
    """The `text` of each line, read as a stream: C4's shard is 0.8 GB unpacked."""
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
                if line.strip():
                    yield _text_field(line)
    except _UNREADABLE as error:
        raise InputError(f"text {path} cannot be read after line {number}: {error}") from error
    except ValueError as error:
        raise InputError(f'{path} line {number} is not a JSON object with a "text" field: {error}') from error


def _text_field(line: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{line[:80].strip()!r}")
    return str(record["text"])


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids [n] int32. Text beyond a piece is cut at line ends: a tokenizer takes 100 bytes a token."""
    ids = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        piece = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(torch.tensor(piece, dtype=torch.int32))
        start = end
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)


def _long_documents(
    tokenizer: PreTrainedTokenizerBase, path: Path, samples: int, seq_len: int, draw: random.Random
) -> list[Tensor]:
    """Token ids of up to `samples` random documents of more than seq_len tokens.

    Two streamed readings, so that the file never lies in memory: the first finds the lines long enough in
    bytes (a token is at least one), the next ones tokenize random batches of those.
    """
    candidates = [i for i, text in enumerate(_documents(path)) if len(text.encode()) > seq_len]
    draw.shuffle(candidates)
    found: list[Tensor] = []
    batch = 8 * samples
    for first in range(0, len(candidates), batch):
        wanted = {line: order for order, line in enumerate(candidates[first : first + batch])}
        texts = {wanted[i]: text for i, text in enumerate(_documents(path)) if i in wanted}
        for order in range(len(wanted)):
            ids = _tokenize(tokenizer, texts[order])
            if len(ids) > seq_len:
                found.append(ids)
                if len(found) == samples:
                    return found
    return found


def _fetch_c4() -> Path:
    try:
        return Path(hf_hub_download(C4_REPO, C4_FILE, repo_type="dataset"))
    except (hub_errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # OSError: those of the hub too
        raise HubError(
            f"the default calibration text {C4_REPO}/{C4_FILE} cannot be fetched from the hub: {error}. "
            "Check the network, or give a text of your own with --calibration FILE"
        ) from error
