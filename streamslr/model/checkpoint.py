"""Tensors of a model: described by headers alone, read when asked for, and decoded where they are stored packed."""

import copy
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from streamslr.config import format_bytes
from streamslr.errors import InputError, StreamslrError
from streamslr.io.packed_layout import read_quantization_config
from streamslr.io.safetensors_file import WEIGHT_DTYPES, ShardHeader, TensorInfo, read_header, read_part
from streamslr.model.border import refusing
from streamslr.model.config_file import parse_config
from streamslr.model.decoders import Decoder, PackedWeight, TransposedWeight, packed_weights
from streamslr.model.expert_slices import Slice, slice_weight
from streamslr.model.other_files import is_auxiliary, refuse_other_model
from streamslr.model.pinned_shards import PinnedShards, ShardDigest, Times
from streamslr.model.quantization import Quantization, without_quantization
from streamslr.model.quantized_weights import quantized_weights
from streamslr.model.sources import CONFIG_FILE, ModelSource, find_source
from streamslr.model.weight_files import identity_of, list_tensors, refuse_quantized_weights, shard_names
from streamslr.outside import read_bounded
from streamslr.spec.pattern import SparsityPattern

_LARGEST_AUXILIARY, _MOST_AUXILIARY = 300_000_000, 500
"""Bytes of the largest auxiliary file and number of the most; a tokenizer of 256,000 tokens takes 35 MB."""

log = logging.getLogger("streamslr")


def open_checkpoint(model: str, revision: str | None = None, evict: bool = False) -> "Checkpoint":
    """Read the headers of a model, dense or written by streamslr; no weights yet.

    Args:
        model: a folder with config.json and safetensors (one file, or many with an index), or "org/name" on the hub.
        revision: branch, tag or commit on the hub, resolved once.
        evict: delete downloaded shards once they are done; see `Checkpoint.release`.

    Raises:
        InputError: files that cannot be used.
        HubError: the hub cannot be reached, or refuses.
    """
    return Checkpoint(model, find_source(model, revision), evict)


class Checkpoint:
    """The tensors of one model in a folder or on the hub. Safe to use from several threads.

    Attributes:
        model: folder or hub id, as the user gave it.
        identity: "hub:ID@commit", or the sha256 over config.json, file names, headers and sizes of a folder, and over
            what the index says of tensors that two files hold.
        config: config.json as transformers reads it, without a quantization of other tools.
        tensors: description of each tensor by its key. A packed linear shows as its merged weight in float32, a weight
            that another tool quantized as the decoded one, in the dtype that config.json says, and one that was given
            to `transpose` as [o, d].
        pinned: digests of the shards that were read, once `pin` was called.
    """

    def __init__(self, model: str, source: ModelSource, evict: bool) -> None:
        self.model = model
        self._source = source
        self._evict = evict
        if CONFIG_FILE not in source.files:
            raise source.missing_file_error(CONFIG_FILE, ", so nothing says what architecture it is")
        self._raw_config = read_bounded(source.fetch(CONFIG_FILE))
        self.config, self._config_json, quantization = parse_config(self._raw_config, source)
        refuse_other_model(source, self.config_json())
        shards, weight_map = shard_names(source)
        with ThreadPoolExecutor(8) as pool:  # on the hub a header costs a round trip or two
            headers = list(pool.map(self._read_header, shards))
        self._headers = dict(zip(shards, headers, strict=True))
        self.identity: str = source.identity or identity_of(self._raw_config, self._headers, weight_map)
        self._stored = list_tensors(source, self._headers, weight_map)
        self._decoders: Mapping[str, Decoder] = self._find_decoders(quantization)
        hidden = {name for decoder in self._decoders.values() for name in (*decoder.stored, *decoder.unread)}
        shown = {name: info for name, info in self._stored.items() if name not in hidden}
        self.tensors: Mapping[str, TensorInfo] = shown | {name: d.info for name, d in self._decoders.items()}
        refuse_quantized_weights(source, self.tensors)
        self.pinned: PinnedShards | None = None
        self._done: set[str] = set()
        self._lock = threading.Lock()  # guards _done

    def pin(self, digests: Mapping[str, ShardDigest], times: Mapping[str, Times]) -> PinnedShards:
        """Hold every shard to one content from here on: `digests` of an earlier process, or as it is first read.

        Args:
            digests: content of each shard that an earlier process read.
            times: times of the files that had it.

        Returns:
            The pinned shards, to ask for the digests and for what has changed.

        Raises:
            ResumeError: a shard has other content than in `digests`.
        """
        self.pinned = PinnedShards(digests, times)
        found = {shard: self._source.local_path(shard) for shard in self._headers}
        self.pinned.check_earlier({shard: path for shard, path in found.items() if path})
        return self.pinned

    def transpose(self, names: Iterable[str]) -> None:
        """Show these weights, stored as [d, o], as [o, d] from now on; those that are decoded are so already."""
        as_they_are = [name for name in names if name in self._stored and name not in self._decoders]
        found = {name: TransposedWeight.of(self._stored[name]) for name in as_they_are}
        self._decoders = {**self._decoders, **found}
        self.tensors = {**self.tensors, **{name: decoder.info for name, decoder in found.items()}}

    def show_slices(self, slices: Mapping[str, Slice]) -> None:
        """Show the weights of experts by these keys from here on, in the place of the fused tensors that hold them."""
        found = {name: slice_weight(name, part, self.tensors, self._decoders) for name, part in slices.items()}
        fused = {source for part in slices.values() for source in part.sources}
        self.tensors = {name: info for name, info in self.tensors.items() if name not in fused} | {
            name: weight.info for name, weight in found.items()
        }
        self._decoders = {**self._decoders, **found}

    @property
    def packed_linears(self) -> dict[str, tuple[SparsityPattern, tuple[int, int], int]]:
        """Packed linears: name -> pattern, shape (o, d) of the weight, rank."""
        found = {}
        for name, decoder in self._decoders.items():
            if isinstance(decoder, PackedWeight):
                V = self._stored.get(decoder.parts.get("V", ""))
                found[name.removesuffix(".weight")] = decoder.pattern, decoder.shape, V.shape[0] if V and V.shape else 0
        return found

    @property
    def shards(self) -> list[str]:
        """Names of the files that hold the tensors."""
        return list(self._headers)

    @property
    def download_bytes(self) -> int:
        """Size of the shards that are not on this machine yet."""
        return sum(header.size for shard, header in self._headers.items() if self._source.local_path(shard) is None)

    @property
    def largest_shard_bytes(self) -> int:
        """Size of the largest shard."""
        return max(header.size for header in self._headers.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors to the CPU, and download the shards that are not on this machine yet.

        Stored tensors are views of the mapped file; writes to them stay private.

        Raises:
            InputError: an unknown name, or a file that changed since it was opened or cannot be read.
            HubError: a download failed.
        """
        tensors = {}
        for shards, wanted in self._by_shards(names, done=False).items():
            with self._reading(shards) as get:
                for name in wanted:
                    decoder = self._decoders.get(name)
                    tensors[name] = decoder.decode(get) if decoder else get(name)
        return tensors

    def read_or_defer(self, names: Iterable[str]) -> dict[str, Tensor | Callable[[], Tensor]]:
        """Read tensors that are stored as they are; return a function for each that is decoded, so that none waits.

        Errors as `read`; the functions have the same.
        """
        names = list(names)
        tensors: dict[str, Tensor | Callable[[], Tensor]] = {**self.read(n for n in names if n not in self._decoders)}
        return tensors | {name: partial(self.read_one, name) for name in names if name in self._decoders}

    def read_one(self, name: str) -> Tensor:
        """Read one tensor, as `read`."""
        return self.read([name])[name]

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to download or read ahead what holds these tensors, in the background; errors wait for `read`."""
        missing = []
        wanted = [name for group in self._by_shards(names, done=False).values() for name in group]
        by_shard: dict[str, list[str]] = {}
        for name in self._stored_names(wanted):
            by_shard.setdefault(self._stored[name].shard, []).append(name)
        for shard, stored in by_shard.items():
            path = self._source.local_path(shard)
            if path is None:
                missing.append(shard)
            else:
                _read_ahead(path, [self._headers[shard].ranges[name] for name in stored])
        if missing:
            # A daemon: Ctrl-C must not wait for a download; the hub's client goes on with a partial file.
            threading.Thread(target=self._fetch_ahead, args=(missing,), daemon=True).start()

    @property
    def downloaded(self) -> set[str]:
        """Shards that `release` may delete: those that this process downloaded, and any that are added."""
        return self._source.downloaded

    def release(self, names: Iterable[str]) -> None:
        """Note that these tensors are done.

        With `evict`, a shard whose tensors are all done is deleted from the hub's cache if it is one of `downloaded`; a
        later `read` downloads it again.
        """
        shards = {shard for group in self._by_shards(names, done=True) for shard in group}
        if not self._evict:
            return
        if self.pinned:
            self.pinned.wait()
        for shard in sorted(shards):
            with self._lock:
                finished = all(name in self._done for name in self.tensors if shard in self._shards_of(name))
            if finished:
                self._source.evict(shard)

    def fetch_file(self, name: str) -> Path | None:
        """Return the path of a file beside the weights, after downloading it where needed; None where it is missing."""
        return self._source.fetch(name) if name in self._source.files else None

    def config_json(self) -> dict[str, Any]:
        """Return the JSON of config.json as it is: what transformers makes of it depends on the version.

        Only a model_type that transformers does not know is replaced, where it knows the class.
        """
        return copy.deepcopy(self._config_json)

    def dense_config_json(self) -> dict[str, Any]:
        """Return the JSON of config.json as it is for the same model of dense weights."""
        return without_quantization(self.config_json())

    def auxiliary_files(self) -> list[Path]:
        """Fetch the files that travel with config and weights: tokenizer, generation config, licence.

        Raises:
            InputError: As `require_no_outer_links`; a tokenizer's file is too large; or there are too many. Others that
                are too large are left out, with a warning.
        """
        self.require_no_outer_links()
        return self._fetch_auxiliary()

    def require_no_outer_links(self) -> None:
        """Raise InputError where an auxiliary file is a link out of the folder: its content would go into an output."""
        for name in sorted(filter(is_auxiliary, self._source.files)):
            if target := self._source.outer_target(name):
                raise InputError(
                    f"{name} in {self._source.label} is a link to {target}, outside of the model's folder, and would "
                    f"be copied into the output; put a copy of the file in its place"
                )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer. Raises InputError when transformers cannot load it."""
        self._fetch_auxiliary()
        folder = self._source.fetch(CONFIG_FILE).parent
        what = f"{self._source.label} holds no tokenizer that transformers can load"
        with refusing(what, "put the model's tokenizer files beside its config.json"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        return tokenizer

    def _fetch_auxiliary(self) -> list[Path]:
        names = sorted(filter(is_auxiliary, self._source.files))
        if len(names) > _MOST_AUXILIARY:
            raise InputError(
                f"{self._source.label} has {len(names)} files beside its weights ({names[0]}, …), {_MOST_AUXILIARY} "
                f"are allowed; move what is no part of the model elsewhere"
            )
        found = []
        for path in (self._source.fetch(name) for name in names):
            size = path.stat().st_size
            if size <= _LARGEST_AUXILIARY:
                found.append(path)
                continue
            large = f"{path} has {format_bytes(size)}, more than the {format_bytes(_LARGEST_AUXILIARY)} that a file"
            if _is_tokenizers(path.name):
                raise InputError(f"{large} of a tokenizer may have; copy or download it again")
            log.warning("%s beside the weights may have: left out of the output", large)
        return found

    def _read_header(self, shard: str) -> ShardHeader:
        return read_header(partial(self._source.read_part, shard, 0), shard, self._source.label)

    def _read_small(self, names: Iterable[str]) -> list[bytes]:
        """Return the bytes of small stored tensors, of which no shard is downloaded."""

        def read(name: str) -> bytes:
            info = self._stored[name]
            first, end = self._headers[info.shard].ranges[name]
            return self._source.read_part(info.shard, first, end - first)[0]

        with ThreadPoolExecutor(8) as pool:  # on the hub each costs a round trip
            return list(pool.map(read, names))

    def _require_unchanged(self, shard: str, path: Path) -> None:
        """Raise InputError where a shard has another size, or once it is pinned another header, than when opened."""
        header = self._headers[shard]
        size = path.stat().st_size
        changed = "" if size == header.size else f"had {header.size} bytes when it was opened and has {size} now"
        if not changed and self.pinned and self.pinned.read(shard, path):
            start, _ = read_part(path, 0, 8 + len(header.raw))
            changed = "" if start[8:] == header.raw else "has another header than when it was opened"
        if changed:
            raise InputError(f"{path} {changed}: something else writes there; let it end, then run the same line again")

    def _find_decoders(self, quantization: Quantization | None) -> Mapping[str, Decoder]:
        """Return the decoder of each weight that is stored in another form, by its name."""
        label, dtype = self._source.label, getattr(self.config.get_text_config(), "dtype", None)
        if read_quantization_config(self.config) is not None:
            return packed_weights(self._headers, label)
        if quantization is None:
            return {}
        found = quantized_weights(
            quantization,
            self._stored,
            dtype if dtype in WEIGHT_DTYPES else torch.bfloat16,
            label,
            self._read_small,
        )
        log.info("%s is quantized (%s): %d weights are decoded", label, quantization.quant_method, len(found))
        if unread := [name for weight in found.values() for name in weight.unread]:
            log.info("%s and others (%d) say how activations are rounded: left out", unread[0], len(unread))
        return found

    @contextmanager
    def _reading(self, shards: Iterable[str]) -> Iterator[Callable[[str], Tensor]]:
        """Fetch shards, and yield what reads a stored tensor of them; errors as `read`."""
        with ExitStack() as stack:
            files = {}
            for shard in shards:
                path = self._source.fetch(shard)
                self._require_unchanged(shard, path)
                with _readable(path):
                    files[shard] = path, stack.enter_context(safe_open(path, framework="pt", device="cpu"))

            def get(name: str) -> Tensor:
                path, file = files[self._stored[name].shard]
                with _readable(path):
                    tensor: Tensor = file.get_tensor(name)
                return tensor

            yield get

    def _shards_of(self, name: str) -> tuple[str, ...]:
        """Return the shards that hold what is stored of a tensor, in order."""
        return tuple(sorted({self._stored[stored].shard for stored in self._stored_names([name])}))

    def _by_shards(self, names: Iterable[str], done: bool) -> dict[tuple[str, ...], list[str]]:
        """Group names by the shards that hold them, and note them as done or as needed (again)."""
        wanted: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise InputError(f"{self._source.label} holds no tensor {name}")
            wanted.setdefault(self._shards_of(name), []).append(name)
        flat = {name for group in wanted.values() for name in group}
        with self._lock:
            if done:
                self._done |= flat
            else:
                self._done -= flat
        return wanted

    def _stored_names(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the names of the tensors that are stored for these."""
        for name in names:
            yield from self._decoders[name].stored if name in self._decoders else (name,)

    def _fetch_ahead(self, shards: list[str]) -> None:
        for shard in shards:
            try:
                self._source.fetch(shard)
            except StreamslrError as error:  # `read` will try again, and raise it to its caller
                log.info("fetching %s ahead failed: %s", shard, error)
                return


def _is_tokenizers(name: str) -> bool:
    """Tell if a tokenizer of transformers may read this auxiliary file."""
    return not name.endswith(".json") or name.startswith(
        ("tokenizer", "special_tokens", "added_tokens", "vocab", "chat_template", "processor", "preprocessor")
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what safetensors raises over a file into an InputError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}; copy or download the file again") from error


def _read_ahead(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Ask the system to read these ranges of a file into its cache."""
    if not hasattr(os, "posix_fadvise"):  # macOS: its own read-ahead has to do
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for first, end in ranges:
            os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
