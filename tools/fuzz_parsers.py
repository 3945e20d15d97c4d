"""Feed the parsers of outside files with mutated bytes, until one raises anything but InputError.

Half of the mutations are atheris's, half those of tests/support/mutations.py.

    pip install atheris
    python tools/fuzz_parsers.py header --seconds 300

The target is one of: header, config, index, allocation, journal, text. What it finds lies in crash-… in the current
folder, and `python tools/fuzz_parsers.py header --repeat crash-…` shows it. A header that our reader accepts must be
one that the safetensors library accepts too.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import atheris
import click

with atheris.instrument_imports(
    include=["streamslr.io", "streamslr.spec", "streamslr.run.journal", "streamslr.calibration.text"]
):
    from streamslr.calibration.text import read_documents
    from streamslr.errors import InputError
    from streamslr.io.safetensors_file import read_header
    from streamslr.model.checkpoint import open_checkpoint
    from streamslr.run.journal import read_journal
    from streamslr.spec.allocation import file_digest

import safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.mutations import mutate

SEEDS = {
    "header": [
        b'{"__metadata__":{"format":"pt","q":"2:4 2x8"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
    "config": [b'{"model_type":"llama","hidden_size":8,"quantization_config":{"quant_method":"streamslr"}}'],
    "index": [b'{"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors"}}'],
    "allocation": [b'{"q_proj":{"pattern":"2:4","rank":32},"*":{"rank":0}}'],
    "journal": [
        b'{"format_version":3,"fingerprint":{},"blocks":[],"blocks_total":1,"calibration":"a","micro_batch":1}'
    ],
    "text": [b'{"text":"a"}\n{"text":"b"}\n'],
}


def _header(data: bytes, folder: Path) -> None:
    header, tensors = data[:-8], data[-8:]
    content = len(header).to_bytes(8, "little") + header + tensors
    read_header(lambda n: (content[:n], len(content)), "a.safetensors", "fuzz")
    safetensors.deserialize(content)  # type: ignore[no-untyped-call]


def _config(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    open_checkpoint(str(folder))  # which then finds no weights


def _index(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type":"llama"}')
    (folder / "model.safetensors.index.json").write_bytes(data)
    open_checkpoint(str(folder))  # which then finds no shards


def _allocation(data: bytes, folder: Path) -> None:
    (folder / "a.json").write_bytes(data)
    file_digest(folder / "a.json")


def _journal(data: bytes, folder: Path) -> None:
    (folder / "streamslr.json").write_bytes(data)
    read_journal(folder)


def _text(data: bytes, folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(data)
    list(read_documents(folder / "a.jsonl"))


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "header": _header,
    "config": _config,
    "index": _index,
    "allocation": _allocation,
    "journal": _journal,
    "text": _text,
}


@click.command()
@click.argument("target", type=click.Choice(sorted(TARGETS)))
@click.option("--seconds", default=300, show_default=True, help="Seconds to try.")
@click.option("--repeat", type=click.Path(path_type=Path, exists=True), help="File to try once.")
def main(target: str, seconds: int, repeat: Path | None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="streamslr-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        content = seed + bytes(8) if target == "header" else seed
        (corpus / str(number)).write_bytes(content)
    work = folder / "work"
    work.mkdir()

    def one(data: bytes) -> None:
        with suppress(InputError):
            TARGETS[target](data, work)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return mutate(data, "text" if target == "text" else "json", random)[1][:max_size]

    if repeat:
        one(repeat.read_bytes())
        return
    one(content)  # imports what it needs, which takes longer than a hang may
    arguments = [sys.argv[0], str(corpus), f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10"]
    atheris.Setup(arguments, one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
