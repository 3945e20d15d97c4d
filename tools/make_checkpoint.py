"""Make a checkpoint to measure with: a model with its blocks repeated, or one of random weights; shard by shard.

python tools/make_checkpoint.py --from tools/demo_model --repeat-blocks 4 OUT
python tools/make_checkpoint.py --random llama --hidden 1024 --ffn 2816 --layers 4 --tokenizer tools/demo_model OUT
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from streamslr.io.durable import write_json
from streamslr.io.folder import index_json
from streamslr.io.packed_layout import INDEX_FILE
from streamslr.io.safetensors_file import DTYPE_NAMES, TensorSource, write_shard

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Weight = Callable[[str, Tensor, torch.Generator], Tensor]
"""Fills and returns an empty tensor, from its name and a generator."""
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="checkpoint to repeat")
    kind.add_argument("--random", metavar="TYPE", help="transformers' model type, such as llama")
    parser.add_argument("--repeat-blocks", type=int, default=1, metavar="N", help="how often to repeat the blocks")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the hidden states")
    parser.add_argument("--ffn", type=int, default=2816, help="width inside the MLP")
    parser.add_argument("--layers", type=int, default=4, help="number of blocks")
    parser.add_argument("--heads", type=int, help="number of attention heads [default: heads 64 wide]")
    parser.add_argument("--kv-heads", type=int, help="number of key-value heads [default: as many as heads]")
    parser.add_argument("--vocab", type=int, help="tokens [default: the tokenizer's, or 32000]")
    parser.add_argument("--dtype", choices=["BF16", "F16", "F32"], default="BF16")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="folder to copy the tokenizer from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.source:
        shards = repeated(args)
    else:
        heads = args.heads or args.hidden // 64
        sizes = {
            "hidden_size": args.hidden,
            "intermediate_size": args.ffn,
            "num_hidden_layers": args.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": args.kv_heads or heads,
        }
        if args.vocab:
            sizes["vocab_size"] = args.vocab
        shards = random(args.out, args.random, sizes, args.tokenizer, DTYPES[args.dtype], args.shards, args.seed)
    write(args.out, shards)


def write(out: Path, shards: list[list[TensorSource]]) -> None:
    """Write the shards, one at a time, and their index."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, sources in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = write_shard(out / file, sources, {"format": "pt"})
        weight_map |= {name: file for name, *_ in sources}
        total += sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape, _ in sources)
        print(f"{out / file}: {len(sources)} tensors, {written.nbytes} bytes")
    write_json(out / INDEX_FILE, index_json(weight_map, total))


def copy_auxiliary_files(source: Path, out: Path, glob: str = "*") -> None:
    """Copy the files beside the weights: config, tokenizer, generation config."""
    for path in source.glob(glob):
        if path.is_file() and path.suffix in {".json", ".model", ".jinja"} and path.name != INDEX_FILE:
            shutil.copyfile(path, out / path.name)


def repeated(args: argparse.Namespace) -> list[list[TensorSource]]:
    """Return the shards of args.source once for each repetition, blocks renumbered, non-block tensors only once."""
    copy_auxiliary_files(args.source, args.out)
    config = json.loads((args.source / "config.json").read_text())
    text_config = config.get("text_config", config)
    depth_key = next(key for key in DEPTH_KEYS if key in text_config)
    depth = text_config[depth_key]
    text_config[depth_key] = depth * args.repeat_blocks
    if "layer_types" in text_config:
        text_config["layer_types"] *= args.repeat_blocks
    write_json(args.out / "config.json", config)

    shards = []
    for repetition in range(args.repeat_blocks):
        for path in sorted(args.source.glob("*.safetensors")):
            sources: list[TensorSource] = []
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    block = re.fullmatch(r"(.*?\.)(\d+)(\..+)", name)
                    if block is None and repetition:
                        continue
                    view = file.get_slice(name)
                    new = f"{block[1]}{int(block[2]) + repetition * depth}{block[3]}" if block else name
                    shape = tuple(view.get_shape())
                    sources.append((new, DTYPES[view.get_dtype()], shape, partial(read, path, name)))
            if sources:
                shards.append(sources)
    return shards


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def random(
    out: Path,
    model_type: str,
    sizes: Mapping[str, int],
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    weight: Weight | None = None,
) -> list[list[TensorSource]]:
    """Return the shards of a model of random weights, of about even size, and write its config.

    Args:
        out: Folder for the config and the tokenizer.
        model_type: Model type of transformers, such as llama.
        sizes: Sizes by the names in transformers' config; vocab_size is the tokenizer's, or 32000, by default.
        tokenizer: Folder to copy a tokenizer from.
        dtype: Dtype of the weights.
        shards: Number of shards.
        seed: Seed of the weights.
        weight: Draws one tensor; `untrained` by default.
    """
    vocab = 32000
    if tokenizer:
        copy_auxiliary_files(tokenizer, out, "*token*")
        copy_auxiliary_files(tokenizer, out, "*vocab*")
        vocab = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config: PretrainedConfig = AutoConfig.for_model(model_type, **{"vocab_size": vocab, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    weight = weight or partial(untrained, std=config.initializer_range)

    total = sum(parameter.nbytes for parameter in model.parameters())
    cut: list[list[TensorSource]] = [[] for _ in range(shards)]
    done = 0
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        tensor = partial(draw, weight, name, shape, dtype, seed)
        cut[min(done * shards // total, shards - 1)].append((name, dtype, shape, tensor))
        done += parameter.nbytes
    return [sources for sources in cut if sources]


def draw(weight: Weight, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Draw one tensor, which depends on the seed and its name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return weight(name, torch.empty(shape, dtype=dtype), generator)


def untrained(name: str, empty: Tensor, generator: torch.Generator, std: float) -> Tensor:
    """Draw a tensor as it is before training: normal weights, norms 1, biases 0."""
    if empty.dim() < 2:
        return empty.fill_(0 if name.endswith("bias") else 1)
    return empty.normal_(0, std, generator=generator)


if __name__ == "__main__":
    main()
