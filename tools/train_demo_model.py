"""Train the demo's model on the documentation inside CPython, and write tools/demo_model with its texts.

    OMP_NUM_THREADS=1 python tools/train_demo_model.py tools/demo_model
    OMP_NUM_THREADS=1 python tools/train_demo_model.py --type gpt_neox /tmp/neox    # a second architecture

It takes about twenty minutes on one core with bf16 instructions. The texts, the tokenizer and the order of the batches
depend on the seed and on CPython's version alone; the committed model was made with 3.11.7 on Linux.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import math
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from streamslr.io.durable import write_json
from streamslr.io.folder import index_json
from streamslr.io.packed_layout import INDEX_FILE
from streamslr.io.safetensors_file import write_shard

VOCABULARY = 2048
WINDOW = 256  # tokens, as the demo calibrates and evaluates
BATCH = 8  # windows
STEPS = 2400
PEAK_LR = 2e-3
SHARDS = 3
END = "<|endoftext|>"
HELDOUT_BYTES = 60_000
CALIBRATION_BYTES = 300_000
LARGEST_HELDOUT = 8_000  # bytes of one document, so that the held-out text has many documents
SKIPPED = {"site-packages", "dist-packages", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=["llama", "gpt_neox"], default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    train, calibration, heldout = split(collect(), args.seed)
    (args.out / "calibration.txt").write_text(calibration, encoding="utf-8")
    (args.out / "heldout.txt").write_text(heldout, encoding="utf-8")
    tokenizer = train_tokenizer(train)
    ids = torch.tensor(tokenizer(END.join(train))["input_ids"])  # [n]
    heldout_ids = torch.tensor(tokenizer(heldout)["input_ids"])
    print(f"{len(train)} documents, {sum(map(len, train))} characters, {len(ids)} tokens to train on")

    config = configuration(args.type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    fit(model, ids, heldout_ids, args.steps, args.seed)
    model.to(torch.bfloat16)
    save(model, tokenizer, args.out)
    print(f"held-out perplexity in bf16, computed in float32: {perplexity(model.float(), heldout_ids):.3f}")


def configuration(model_type: str) -> PretrainedConfig:
    """Return a config of six blocks 192 wide: Llama with grouped-query attention, or GPT-NeoX, with biases."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if model_type == "gpt_neox":
        return AutoConfig.for_model("gpt_neox", intermediate_size=768, **common)
    return AutoConfig.for_model("llama", intermediate_size=512, num_key_value_heads=3, **common)


# Text


def collect() -> dict[str, list[str]]:
    """Return the paragraphs of each document: a topic of the reference manual, or all docstrings of a module."""
    documents = {f"topic {name}": paragraphs(text) for name, text in sorted(topics.items())}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED.isdisjoint(relative.parts) or not all(part.isidentifier() for part in relative.parts[:-1]):
            continue
        document = documents.setdefault(f"module {relative.parts[0].removesuffix('.py')}", [])
        for text in docstrings(path):
            document += paragraphs(text)
    for name in sorted(sys.builtin_module_names):
        document = documents.setdefault(f"module {name}", [])
        for text in builtin_docstrings(name):
            document += paragraphs(text)
    return documents


def paragraphs(text: str) -> list[str]:
    text = "\n".join(line.rstrip() for line in text.splitlines())
    return [part for part in re.split(r"\n{2,}", text.strip("\n")) if part.strip()]


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings in a source file, each under the line that defines its object."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 keeps Python 2 around
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        if isinstance(node, ast.Module):
            yield text
        elif isinstance(node, ast.ClassDef):
            yield f"class {node.name}:\n" + textwrap.indent(text, "    ")
        else:
            yield f"{node.name}({ast.unparse(node.args)})\n" + textwrap.indent(text, "    ")


def builtin_docstrings(name: str) -> Iterator[str]:
    """Yield the docstrings of a module that is compiled into the interpreter, and of the methods of its classes."""
    module = importlib.import_module(name)
    for owner in [module, *(item for _, item in sorted(vars(module).items()) if inspect.isclass(item))]:
        if isinstance(owner.__doc__, str):
            yield inspect.cleandoc(owner.__doc__)
        for attribute, item in sorted(vars(owner).items()):
            text = getattr(item, "__doc__", None)
            if inspect.isroutine(item) and isinstance(text, str):
                yield f"{attribute}\n" + textwrap.indent(inspect.cleandoc(text), "    ")


def split(documents: dict[str, list[str]], seed: int) -> tuple[list[str], str, str]:
    """Return training documents, calibration text and held-out text.

    Held-out documents are whole. The manual repeats paragraphs under several topics: a paragraph of a held-out document
    is removed from all others, and any other paragraph stays once. Calibration text is part of the training text, as it
    is for large models.
    """
    names = sorted(documents, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    heldout: list[str] = []
    size = 0
    for name in names:
        text = "\n\n".join(documents[name])
        if size < HELDOUT_BYTES and 500 < len(text.encode()) < LARGEST_HELDOUT:
            heldout.append(name)
            size += len(text.encode())
    seen = {normal(part) for name in heldout for part in documents[name]}
    train = []
    for name in names:
        if name in heldout:
            continue
        new = []
        for part in documents[name]:
            if normal(part) not in seen:
                new.append(part)
                seen.add(normal(part))
        if new:
            train.append("\n\n".join(new))
    calibration: list[str] = []
    for text in train:
        if len(text.encode()) < CALIBRATION_BYTES // 8:  # many documents, not one package
            calibration.append(text)
        if sum(len(text.encode()) for text in calibration) > CALIBRATION_BYTES:
            break
    print("held out:", ", ".join(heldout))
    return (
        train,
        "\n\n".join(calibration) + "\n",
        "\n\n".join("\n\n".join(documents[n]) for n in heldout) + "\n",
    )


def normal(paragraph: str) -> str:
    return " ".join(paragraph.split()).lower()


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCABULARY tokens that adds no tokens around a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


# Training


def fit(model: PreTrainedModel, ids: Tensor, heldout_ids: Tensor, steps: int, seed: int) -> None:
    """Train by AdamW on random windows of `ids` [n]; the rate rises for 5 % of the steps, then falls by cosine."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    running = 0.0
    for step in range(steps):
        warmup = max(1, steps // 20)
        rate = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * max(rate, 0.02)
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW + 1] for start in starts])  # [BATCH, WINDOW + 1]
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 300 == 0 or step + 1 == steps:
            print(
                f"step {step + 1}: training perplexity {math.exp(running):.2f}, held out "
                f"{perplexity(model, heldout_ids):.2f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the perplexity over successive windows of WINDOW tokens; all tokens of a window but the first count."""
    model.eval()  # type: ignore[no-untyped-call]
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = []
    for batch in torch.split(windows, BATCH):
        logits = model(batch).logits.float()[:, :-1]
        losses.append(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean().item())


# Saving


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as SHARDS safetensors files of about even size, with index, config and tokenizer."""
    state = {name: p.detach() for name, p in model.named_parameters()}  # a tied head is listed once
    total = sum(tensor.nbytes for tensor in state.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, tensor in state.items():
        parts[min(done * SHARDS // total, SHARDS - 1)][name] = tensor
        done += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(out / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_json(out / INDEX_FILE, index_json(weight_map, total))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)
    generation = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)  # type: ignore[no-untyped-call]
    generation.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
