"""Compressed folders as `run` leaves them, made in a moment: pruned by magnitude, U and V random."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamslr.io.folder import write_auxiliary_files, write_block, write_index, write_non_block
from streamslr.io.packing import pack
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import open_checkpoint
from streamslr.spec.pattern import parse_pattern
from tests.support.tiny_models import tiny_checkpoint


def compressed_folder(
    folder: Path,
    architecture: str = "llama",
    pattern: str = "2:4",
    rank: int = 4,
    blocks: int | None = None,
    **model: Any,
) -> Path:
    """folder/slr, of a tiny model in folder/dense; `blocks`: only so many are done. `model`: of tiny_checkpoint."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(folder / "dense", architecture, **model)))
    parsed = parse_pattern(pattern)
    blockwise = BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))
    out = folder / "slr"
    out.mkdir()
    write_auxiliary_files(out, checkpoint, parsed, rank)
    shards = [write_non_block(out, checkpoint, blockwise.non_block_tensors)]
    generator = torch.Generator().manual_seed(0)
    for i, names in enumerate(blockwise.block_tensors[:blocks]):
        tensors, packed = checkpoint.read(names), {}
        for linear, (o, d) in blockwise.linears[i].items():
            W = tensors.pop(f"{linear}.weight")
            packed[linear] = pack(W * parsed.project(W.float()), parsed, W.dtype)
            if rank:
                U, V = torch.randn(o, rank, generator=generator), torch.randn(rank, d, generator=generator)
                packed[linear] |= {"U": (U / 8).to(W.dtype), "V": (V / 8).to(W.dtype)}
        shards.append(write_block(out, i, dict.fromkeys(packed, parsed), packed, blockwise.linears[i], tensors))
    write_index(out, shards)
    return out


def dense_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model holding S + U·V, put together by the reader that `streamslr eval` uses."""
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.config
    del config.quantization_config
    architecture = type(AutoModelForCausalLM.from_config(config))
    model = architecture.from_pretrained(
        None, config=config, state_dict=checkpoint.read(checkpoint.tensors), dtype=torch.float32
    )
    made: PreTrainedModel = model.to(dtype).eval()
    return made
