"""Compressed folders as `run` writes them, made in a moment, and what tests read and change in such folders."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import streamslr
from streamslr.io.durable import file_sha256
from streamslr.io.folder import write_auxiliary_files, write_block, write_index, write_non_block
from streamslr.io.packing import pack
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from streamslr.spec.pattern import parse_pattern
from tests.support.tiny_models import TEXT, tiny_checkpoint

BLOCK = "model-block-00000.safetensors"


def compressed_folder(
    folder: Path,
    architecture: str = "llama",
    pattern: str = "2:4",
    rank: int = 4,
    done: int | None = None,
    **model: Any,
) -> Path:
    """Make a tiny checkpoint in folder/dense and compress it to folder/slr, by magnitude, U and V random.

    Args:
        folder: Folder for both.
        architecture: Model type of transformers.
        pattern: Sparsity pattern of S.
        rank: Rank of U·V.
        done: Number of blocks that are compressed; all by default.
        **model: Arguments of `tiny_checkpoint`.

    Returns:
        The compressed folder.
    """
    checkpoint = open_checkpoint(str(tiny_checkpoint(folder / "dense", architecture, **model)))
    parsed = parse_pattern(pattern)
    blockwise = BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))
    out = folder / "slr"
    out.mkdir()
    write_auxiliary_files(out, checkpoint.config_json(), checkpoint.auxiliary_files(), parsed, rank)
    non_block = [checkpoint.tensors[name] for name in blockwise.non_block_tensors]
    shards = [write_non_block(out, non_block, checkpoint.read_one)]
    generator = torch.Generator().manual_seed(0)
    for i, names in enumerate(blockwise.block_tensors[:done]):
        tensors, linears = checkpoint.read(names), {}
        for linear, (o, d) in blockwise.linears[i].items():
            W = tensors.pop(f"{linear}.weight")
            parts = pack(W * parsed.project(W.float()), parsed, W.dtype)
            if rank:
                U, V = torch.randn(o, rank, generator=generator), torch.randn(rank, d, generator=generator)
                parts |= {"U": (U / 8).to(W.dtype), "V": (V / 8).to(W.dtype)}
            linears[linear] = parts, parsed, (o, d)
        shards.append(write_block(out, i, linears, tensors))
    write_index(out, shards)
    return out


def dense_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the whole model with S + U·V merged, read as `streamslr eval` reads it."""
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.config
    del config.quantization_config
    architecture = type(AutoModelForCausalLM.from_config(config))
    model = architecture.from_pretrained(
        None, config=config, state_dict=checkpoint.read(checkpoint.tensors), dtype=torch.float32
    )
    made: PreTrainedModel = model.to(dtype).eval()
    return made


def perplexities_as_saved(folder: Path, scratch: Path) -> tuple[float, float]:
    """Return the perplexity of a compressed folder, and of what `save_pretrained` makes of it in `scratch`."""
    text, saved = scratch / "text.txt", scratch / "saved"
    text.write_text(TEXT * 4)
    streamslr.load(folder, device="cpu").save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((folder / name).read_bytes())
    first, second = (
        evaluate(str(one), text, 16, device="cpu", free_memory=1 << 30).perplexity for one in (folder, saved)
    )
    return first, second


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a run; of the journal all but measurements and times, which differ by run."""
    files = file_contents(folder)
    journal = json.loads(files["streamslr.json"])
    journal["dense_times"] = journal["sha256"] = None
    for part in (journal, *journal["blocks"]):
        part["measured"] = part["seconds_by_rank"] = None
    return files | {"streamslr.json": json.dumps(journal).encode()}


def rewrite_block(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of BLOCK; index and journal agree with the new shard, so that only its content is wrong."""
    path = folder / BLOCK
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != BLOCK} | dict.fromkeys(tensors, BLOCK)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with edit_journal(folder) as journal:
        journal["blocks"][0]["shard"] |= {"sha256": file_sha256(path), "nbytes": path.stat().st_size}


@contextmanager
def edit_journal(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the journal of a folder, and write what the body makes of it, without the digest of the earlier content."""
    path = folder / "streamslr.json"
    journal = json.loads(path.read_text())
    journal.pop("sha256", None)
    yield journal
    path.write_text(json.dumps(journal))
