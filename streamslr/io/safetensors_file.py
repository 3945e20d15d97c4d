"""The safetensors file: a reader of its header and a writer, the two halves of one format.

    8 bytes    n, the length of the header, little-endian
    n bytes    JSON: tensor name -> dtype, shape, data_offsets [first, last + 1]; "__metadata__" -> texts by name
    the rest   the tensors' bytes, little-endian, row-major; offsets count from here

Tensors themselves are read by the safetensors library, which maps the file.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from streamslr.errors import InputError
from streamslr.io.durable import durable_file
from streamslr.outside import decoder_of, open_regular, parse_json
from streamslr.printable import printable

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of torch's dtypes in headers."""

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of weights that are not quantized."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_METADATA = "__metadata__"
_HEADER_GUESS = 1 << 17
"""Bytes read first of a file: huggingface_hub found the header of 97 % of the hub's files within 100 kB."""
_HEADER_LIMIT = 100_000_000
"""Length of the longest header that the format allows."""

ReadStart = Callable[[int], tuple[bytes, int]]
"""Reads up to the first n bytes of a file, and tells the size of the whole file."""

TensorSource = tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]
"""Name, dtype and shape of a tensor to write, and the function that gives it when its turn comes."""


@dataclass(frozen=True)
class TensorInfo:
    """Description of one tensor, from the header of the file that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    """Name of the file."""
    nbytes: int


@dataclass(frozen=True)
class ShardHeader:
    """Header of one safetensors file."""

    raw: bytes
    """Its JSON as stored."""
    size: int
    """Bytes of the whole file."""
    tensors: Mapping[str, TensorInfo]
    ranges: Mapping[str, tuple[int, int]]
    """Range of each tensor's bytes in the file: first, last + 1."""
    metadata: Mapping[str, str]


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


_Entries = Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=100_000)]
"""Entries of a header. The largest model on the hub has some 90,000 tensors, in 163 files."""
_Metadata = Annotated[dict[str, str], msgspec.Meta(max_length=100_000)]
"""Texts of a header. safetensors parses all of them whenever a file is opened; ours has one for each linear."""


class _Entry(msgspec.Struct, frozen=True):
    """Description of a tensor as a header stores it."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True)
class WrittenShard:
    """A file that `write_shard` wrote."""

    file: str
    """Its name in its folder."""
    sha256: str
    """Digest of the whole file, as hex."""
    nbytes: int


def shard_header(path: Path) -> ShardHeader:
    """Read the header of a safetensors file on this machine. Errors as `read_header`."""
    return read_header(partial(read_part, path, 0), path.name, str(path.parent))


def read_part(path: Path, first: int, nbytes: int) -> tuple[bytes, int]:
    """Return up to `nbytes` of a regular file from `first` on, and the size of the whole. Raises InputError."""
    with open_regular(path) as file:
        try:
            file.seek(first)
            return file.read(nbytes), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_header(read: ReadStart, file: str, label: str) -> ShardHeader:
    """Read a header, and check it against itself and against the size of the file.

    Args:
        read: reads the start of the file, wherever that is.
        file: name of the file.
        label: folder or repository of the file, for error messages.

    Raises:
        InputError: the file is truncated or damaged, or holds a dtype that torch lacks.
    """

    def damaged(problem: str) -> InputError:
        return InputError(f"{file} in {label}: {problem}; copy or download the file again")

    start, size = read(_HEADER_GUESS)
    length = int.from_bytes(start[:8], "little")
    if size < 8:
        raise damaged(f"{size} bytes are no safetensors file")
    if length > _HEADER_LIMIT:
        raise damaged(f"its first 8 bytes claim a header of {length} bytes, so it is no safetensors file")
    if length > size - 8:
        raise damaged(f"truncated: {size} bytes, of which the header alone takes {length + 8}")
    if len(start) < 8 + length:
        start, _ = read(8 + length)
    raw = start[8 : 8 + length]
    try:
        metadata, described = _parse_header(raw)
    except ValueError as error:
        raise damaged(f"its header is not a safetensors header ({error})") from error
    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, tuple[int, int]] = {}
    end = 0
    for name, entry in sorted(described.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _DTYPES:
            raise InputError(
                f"{name} in {file} of {label} has dtype {printable(entry.dtype[:20])}, which streamslr cannot "
                f"read; give the original model in bf16, fp16 or fp32"
            )
        dtype, shape = _DTYPES[entry.dtype], entry.shape
        nbytes = prod(shape) * dtype.itemsize
        first, last = entry.data_offsets
        if last - first != nbytes:
            raise damaged(f"{name} {list(shape)} takes {nbytes} bytes, its offsets hold {last - first}")
        if first != end:
            raise damaged(f"{name} begins at byte {first}, where the tensor before it ends at {end}")
        end = last
        tensors[name] = TensorInfo(name, dtype, shape, file, nbytes)
        ranges[name] = (8 + length + first, 8 + length + last)
    if 8 + length + end != size:
        problem = "truncated" if 8 + length + end > size else "longer than its header says"
        raise damaged(f"{problem}: {size} bytes, the header speaks of {8 + length + end}")
    return ShardHeader(raw, size, {name: tensors[name] for name in described}, ranges, metadata)


def _parse_header(raw: bytes) -> tuple[Mapping[str, str], Mapping[str, _Entry]]:
    """Return the texts and the descriptions of the tensors that a header holds. Raises ValueError."""
    if not raw.startswith(b"{"):
        raise ValueError("it does not begin with an object")
    entries = parse_json(raw, _Entries)
    texts = bytes(entries.pop(_METADATA, b"null"))
    metadata = {} if texts == b"null" else parse_json(texts, _Metadata)
    described, decoder = {}, decoder_of(_Entry)
    for name, entry in entries.items():
        if not name.isprintable():
            raise ValueError(f"the tensor name {printable(name)!r} holds control characters")
        try:
            described[name] = decoder.decode(entry)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{name}: {error}") from error
    return metadata, described


def write_shard(
    path: Path, tensors: Iterable[TensorSource] | Mapping[str, Tensor], metadata: Mapping[str, str]
) -> WrittenShard:
    """Write one safetensors file durably, fetching one tensor at a time.

    The bytes depend on names, values and metadata alone. Tensors are ordered by falling element size, then by name,
    so that each is aligned for a zero-copy view; safetensors' own writer does the same. The header is padded with
    spaces to a multiple of 8.

    Args:
        path: file to write; a file of that name is replaced.
        tensors: tensors by name, or sources that are asked one after another.
        metadata: texts for the header.

    Raises:
        BudgetError: the disk is full.
        StreamslrError: the system refuses the file. In both cases no part of it is left.
        InputError: a dtype that the format lacks.
        ValueError: names that are not unique, or a tensor that is not as its source declared it.
    """
    sources = _ordered(tensors)
    entries: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, shape, _ in sources:
        start, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    nbytes = 8 + len(header) + end
    with durable_file(path, nbytes) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for source in sources:
            file.write(_bytes_of(source))
    return WrittenShard(path.name, file.sha256, nbytes)


def _ordered(tensors: Iterable[TensorSource] | Mapping[str, Tensor]) -> list[TensorSource]:
    """Return the sources in the order of the file."""
    if isinstance(tensors, Mapping):
        tensors = [(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in tensors.items()]
    sources: list[TensorSource] = list(tensors)
    names = [name for name, *_ in sources]
    if len(set(names)) != len(names) or _METADATA in names:
        raise ValueError(f"tensor names must be unique and not {_METADATA}: {sorted(names)}")
    for name, dtype, _, _ in sources:
        if dtype not in DTYPE_NAMES:
            raise InputError(f"{name}: a shard cannot hold {dtype}")
    return sorted(sources, key=lambda source: (-source[1].itemsize, source[0]))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _bytes_of(source: TensorSource) -> memoryview:
    """Fetch a tensor and return its bytes, little-endian as on every machine that torch supports."""
    name, dtype, shape, fetch = source
    tensor = fetch().detach()
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} was declared {dtype} {list(shape)}, but is {tensor.dtype} {list(tensor.shape)}")
    flat = tensor.to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
