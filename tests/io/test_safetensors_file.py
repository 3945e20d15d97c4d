"""Safetensors files: pinned bytes, the same whatever the order; headers that are read back or refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.durable import file_sha256
from streamslr.io.packed_layout import packed_linears, shard_metadata
from streamslr.io.packing import pack
from streamslr.io.safetensors_file import DTYPE_NAMES, TensorInfo, read_header, shard_header, write_shard
from streamslr.spec.pattern import NofM
from tests.support.forkserver import exit_code
from tests.support.threads import read_headers_at_once

S = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 0], [0, 0, 5, 0, 7, 0, 0, 0]])


def tiny_block() -> dict[str, Tensor]:
    """Return a block of one linear, 2:4 plus rank 1, and a norm."""
    packed = pack(S, NofM(2, 4), torch.bfloat16)
    return {
        "layers.0.q_proj.meta": packed["meta"],
        "layers.0.q_proj.values": packed["values"],
        "layers.0.q_proj.U": torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16),
        "layers.0.q_proj.V": torch.ones(1, 8, dtype=torch.bfloat16),
        "layers.0.norm.weight": torch.tensor([0.5, 1.5]),
    }


METADATA = shard_metadata({"layers.0.q_proj": (NofM(2, 4), (2, 8))})


def test_the_bytes_of_a_whole_shard_are_pinned(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "block.safetensors", tiny_block(), METADATA)
    content = (tmp_path / "block.safetensors").read_bytes()
    header = (
        b'{"__metadata__":{"format":"pt","layers.0.q_proj":"2:4 2x8"},'
        b'"layers.0.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"layers.0.q_proj.U":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]},'
        b'"layers.0.q_proj.V":{"dtype":"BF16","shape":[1,8],"data_offsets":[12,28]},'
        b'"layers.0.q_proj.values":{"dtype":"BF16","shape":[2,4],"data_offsets":[28,44]},'
        b'"layers.0.q_proj.meta":{"dtype":"U8","shape":[2,1],"data_offsets":[44,46]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex(
        "0000003f 0000c03f"  # norm: 0.5, 1.5
        "803f 80bf"  # U: 1, -1
        "803f803f803f803f803f803f803f803f"  # V: ones
        "803f 0040 0000 0000  0000 a040 e040 0000"  # values: 1 2 0 0, 0 5 7 0
        "01 01"  # meta: columns 0 2 and 0 1 of each row, 1 + 6·0
    )
    assert content == len(header).to_bytes(8, "little") + header + data
    assert written.file == "block.safetensors"
    assert written.nbytes == len(content)
    assert written.sha256 == "a803906b359d8d9082bdf5c4dd8879bb3c1c3170240ace21c87a6af19cdf9e2f"
    assert hashlib.sha256(content).hexdigest() == written.sha256 == file_sha256(tmp_path / written.file)


def test_safetensors_reads_it_back(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    tensors = tiny_block() | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "naïve": torch.tensor([True, False, True]),
        "turned": torch.arange(6.0).view(2, 3).T,
        "offsets": torch.arange(3),
    }
    write_shard(path, tensors, METADATA)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert packed_linears(file.metadata()) == {"layers.0.q_proj": (NofM(2, 4), (2, 8))}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()),
        st.tuples(st.sampled_from(list(DTYPE_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(),
)
def test_bytes_depend_on_content_not_on_order(
    tmp_path_factory: pytest.TempPathFactory,
    declared: dict[str, tuple[torch.dtype, list[int]]],
    random: Random,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        name: torch.full(shape, 1).to(dtype) if shape else torch.tensor(1).to(dtype)
        for name, (dtype, shape) in declared.items()
    }
    shuffled = list(tensors.items())
    random.shuffle(shuffled)
    one = write_shard(folder / "one.safetensors", tensors, {"format": "pt", "a": "1", "b": "2"})
    sources = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in shuffled]
    two = write_shard(folder / "two.safetensors", sources, {"b": "2", "a": "1", "format": "pt"})
    assert one.sha256 == two.sha256
    assert one.nbytes == (folder / "one.safetensors").stat().st_size
    loaded = load_file(folder / "two.safetensors")
    assert {name: (t.dtype, list(t.shape)) for name, t in loaded.items()} == {
        name: (dtype, list(shape)) for name, (dtype, shape) in declared.items()
    }


def test_tensors_are_fetched_one_at_a_time(tmp_path: Path) -> None:
    """The next tensor is asked for when the one before is in the file, so never two are needed."""
    path = tmp_path / "lazy.safetensors"
    sizes: list[int] = []

    def fetch() -> Tensor:
        sizes.append((tmp_path / "lazy.safetensors.partial").stat().st_size)
        return torch.ones(1000)

    written = write_shard(path, [(name, torch.float32, (1000,), fetch) for name in "abc"], {})
    start = written.nbytes - 3 * 4000
    assert sizes == [start, start + 4000, start + 8000]


def test_a_source_that_is_not_as_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a was declared torch.float32 \[2\], but is torch.float32 \[3\]"):
        write_shard(tmp_path / "x", [("a", torch.float32, (2,), lambda: torch.ones(3))], {})
    with pytest.raises(ValueError, match="unique"):
        write_shard(tmp_path / "x", [("a", torch.float32, (1,), lambda: torch.ones(1))] * 2, {})
    with pytest.raises(InputError, match=r"c: a shard cannot hold torch.complex64"):
        write_shard(tmp_path / "x", {"c": torch.ones(1, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []


# Headers


def test_a_header_tells_what_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "block.safetensors"
    tensors = tiny_block()
    written = write_shard(path, tensors, METADATA)
    header = shard_header(path)
    assert header.metadata == METADATA
    assert header.size == written.nbytes
    assert header.tensors == {
        name: TensorInfo(name, t.dtype, tuple(t.shape), "block.safetensors", t.nbytes) for name, t in tensors.items()
    }
    content = path.read_bytes()
    for name, (first, end) in header.ranges.items():
        assert content[first:end] == tensors[name].contiguous().view(torch.uint8).numpy().tobytes()


def refusal(entries: object, data: int = 0, end: Callable[[bytes], bytes] = lambda raw: raw) -> str:
    """Return the refusal of a file with this header and number of bytes of data."""
    raw = end(json.dumps(entries).encode())
    content = len(raw).to_bytes(8, "little") + raw + bytes(data)
    with pytest.raises(InputError) as caught:
        read_header(lambda n: (content[:n], len(content)), "a.safetensors", "org/model")
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "data", "words"),
    [
        ([], 0, "not a safetensors header"),
        ({"a": 1}, 0, "not a safetensors header"),
        ({"__metadata__": {"format": 1}}, 0, "Expected `str`, got `int`"),
        ({"__metadata__": dict.fromkeys(map(str, range(200_000)), "")}, 0, "of length <= 100000"),
        (dict.fromkeys(map(str, range(200_000)), 0), 0, "of length <= 100000"),
        ({"__metadata__": ["format"]}, 0, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, 8, "a [4] takes 16 bytes, its offsets hold 8"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, 4, "a: Expected `int` >= 0"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8, "a: Expected `int`, got `float`"),
        ({"a": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 8]}}, 8, "its offsets hold 8"),
        ({"a": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 8]}}, 8, "a: Expected `int` <="),
        ({"a": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, 4, "a: Expected `array` of length <= 64"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, 0, "a: Expected `int` >= 0"),
        (
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            8,
            "a begins at byte 4, where the tensor before",
        ),
        (
            {name: {"dtype": "U8", "shape": [4], "data_offsets": at} for name, at in (("a", [0, 4]), ("b", [2, 6]))},
            6,
            "b begins at byte 2, where the tensor before it ends at 4",
        ),
        ({"a\x1b[31m": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, 1, r"'a\\x1b[31m' holds control"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1, "has dtype F4, which streamslr cannot read"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 7, "truncated: "),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 9, "longer than its header says"),
    ],
)
def test_a_hostile_header_is_refused_by_name(entries: object, data: int, words: str) -> None:
    message = refusal(entries, data)
    assert "a.safetensors" in message
    assert "org/model" in message
    assert words in message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 100_000, "does not begin with an object"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b' {"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "does not begin with an object"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2 + b"}", "JSON is malformed"),
        (b'{"a":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "it holds 'a' twice"),
        (b'{"\\ud83d":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "not a safetensors header"),
        (b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "not a safetensors header"),
    ],
)
def test_a_header_that_is_no_sound_json_is_refused(raw: bytes, words: str) -> None:
    assert words in refusal(0, data=1, end=lambda _: raw)


@pytest.mark.slow
def test_what_a_header_may_say_safetensors_reads_too(tmp_path: Path) -> None:
    """Every mutated file that passes our check is one that the library opens, with the same tensors."""
    path = tmp_path / "block.safetensors"
    write_shard(path, tiny_block(), METADATA)
    content, random = path.read_bytes(), Random(0)
    accepted = 0
    for _ in range(3000):
        mutated = bytearray(content)
        for _ in range(random.choice((1, 1, 2))):
            mutated[random.randrange(8 + int.from_bytes(content[:8], "little"))] = random.randrange(256)
        path.write_bytes(mutated)
        try:
            header = shard_header(path)
        except InputError:
            continue
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == header.tensors.keys()
        accepted += 1
    assert accepted > 100


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a.safetensors: it is no regular file"):
        shard_header(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_threads_read_the_first_headers_of_a_process(tmp_path: Path) -> None:
    """Where threads are the first to decode a type, msgspec ends one process of several by SIGSEGV."""
    write_shard(tmp_path / "shard.safetensors", tiny_block(), METADATA)
    assert [exit_code(read_headers_at_once, tmp_path / "shard.safetensors") for _ in range(40)] == [0] * 40
