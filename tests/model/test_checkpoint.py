"""Checkpoints in folders: what headers tell, what is refused before anything is loaded, what reading gives."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamslr.errors import InputError
from streamslr.io.packed_layout import quantization_config, shard_metadata
from streamslr.io.packing import merge, pack
from streamslr.io.safetensors_file import shard_header, write_shard
from streamslr.model.checkpoint import open_checkpoint
from streamslr.spec.pattern import parse_pattern
from tests.support.tiny_models import TEXT, tiny_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("made") / "llama")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "llama"))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder: Path, revision: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder), revision)
    return str(caught.value)


# Reading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_of_the_files(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    folder = tiny_checkpoint(tmp_path / "m", dtype=dtype, shards=shards)
    stored = {name: tensor for path in shards_of(folder) for name, tensor in load_file(path).items()}
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors.keys() == stored.keys()
    read = checkpoint.read(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        assert torch.equal(read[name], stored[name])
        assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(stored[name].shape), stored[name].nbytes)
        assert name in load_file(folder / info.shard)
    assert checkpoint.config.model_type == "llama"


def test_reading_maps_the_file_and_dropping_the_tensors_unmaps_it(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    gc.disable()
    try:
        tensors = checkpoint.read(checkpoint.tensors)
        assert str(folder) in Path("/proc/self/maps").read_text()
        del tensors
        assert str(folder) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_a_write_to_a_tensor_never_reaches_the_file(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    before = [path.read_bytes() for path in shards_of(folder)]
    checkpoint.read(["model.norm.weight"])["model.norm.weight"].fill_(7.0)
    assert before == [path.read_bytes() for path in shards_of(folder)]


def test_prefetch_and_release_leave_a_folder_as_it_is(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    checkpoint = open_checkpoint(str(folder), evict=True)
    checkpoint.prefetch(checkpoint.tensors)
    checkpoint.read(checkpoint.tensors)
    checkpoint.release(checkpoint.tensors)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_header_longer_than_the_first_read(folder: Path) -> None:
    path = shards_of(folder)[0]
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "note": "x" * 300_000})
    checkpoint = open_checkpoint(str(folder))
    assert torch.equal(checkpoint.read(tensors)[next(iter(tensors))], next(iter(tensors.values())))
    assert shard_header(path).tensors.keys() == tensors.keys()


def test_an_unknown_name_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tensor model\.nothing"):
        open_checkpoint(str(folder)).read(["model.nothing"])


def test_a_file_that_changes_after_opening_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    path = folder / checkpoint.tensors["model.norm.weight"].shard
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=rf"{path.name} had \d+ bytes when it was opened"):
        checkpoint.read(["model.norm.weight"])


# Identity, auxiliary files, tokenizer


def test_identity_is_of_content_not_of_path(made: Path, folder: Path) -> None:
    assert open_checkpoint(str(folder)).identity == open_checkpoint(str(made)).identity


def test_identity_changes_with_sizes_headers_and_config(made: Path, folder: Path) -> None:
    identities = {open_checkpoint(str(made)).identity}
    edit_json(folder / "config.json", lambda c: c.update(rms_norm_eps=1e-3))
    identities.add(open_checkpoint(str(folder)).identity)
    path = shards_of(folder)[0]
    save_file(load_file(path), path, metadata={"format": "pt", "by": "another"})
    identities.add(open_checkpoint(str(folder)).identity)
    assert len(identities) == 3


def test_auxiliary_files_are_those_that_travel(folder: Path) -> None:
    for name in ("README.md", "LICENSE.txt", "chat_template.jinja", "tokenizer.model", "training.log"):
        (folder / name).write_text("x")
    names = {path.name for path in open_checkpoint(str(folder)).auxiliary_files()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE.txt",
        "chat_template.jinja",
        "tokenizer.model",
    }


def test_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = open_checkpoint(str(folder)).tokenizer()
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    bare = tiny_checkpoint(tmp_path / "bare", tokenizer=False)
    with pytest.raises(InputError, match="no tokenizer"):
        open_checkpoint(str(bare)).tokenizer()


# What is refused, before anything is loaded


def test_a_missing_shard(folder: Path) -> None:
    shards_of(folder)[1].unlink()
    message = refusal(folder)
    assert "model-00002-of-00002.safetensors" in message
    assert "copy or download" in message


def test_a_truncated_shard(folder: Path) -> None:
    path = shards_of(folder)[0]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(folder)
    assert path.name in message
    assert f"truncated: {size - 1000} bytes, the header speaks of {size}" in message


def test_a_shard_cut_inside_its_header(folder: Path) -> None:
    path = shards_of(folder)[0]
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated: 100 bytes" in refusal(folder)
    path.write_bytes(b"")
    assert "0 bytes are no safetensors file" in refusal(folder)


def test_trailing_bytes(folder: Path) -> None:
    path = shards_of(folder)[0]
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert f"{path.name} in {folder}: longer than its header says" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "claim a header of"),
        ((16).to_bytes(8, "little") + b"this is no JSON!", "not a safetensors header"),
    ],
)
def test_a_garbage_header(folder: Path, content: bytes, words: str) -> None:
    path = shards_of(folder)[0]
    path.write_bytes(content)
    message = refusal(folder)
    assert path.name in message
    assert words in message


def test_an_index_naming_a_tensor_that_no_shard_holds(folder: Path) -> None:
    name = shards_of(folder)[0].name
    edit_json(folder / INDEX, lambda c: c["weight_map"].update({"model.layers.9.mlp.up_proj.weight": name}))
    message = refusal(folder)
    assert "model.layers.9.mlp.up_proj.weight" in message
    assert name in message


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_not_floats(folder: Path, dtype: torch.dtype, name: str) -> None:
    path = shards_of(folder)[0]
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    message = refusal(folder)
    assert path.name in message
    assert name in message
    assert "bf16, fp16 or fp32" in message


def test_pickles_only(folder: Path) -> None:
    for path in [*shards_of(folder), folder / INDEX]:
        path.unlink()
    assert "has no model.safetensors and no model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "PyTorch pickles (pytorch_model.bin), not safetensors; convert it" in refusal(folder)


def test_configs_that_cannot_be_used(folder: Path) -> None:
    config = folder / "config.json"
    original = config.read_text()
    edit_json(config, lambda c: c.update(quantization_config={"quant_method": "hqq"}))
    assert "already quantized (hqq)" in refusal(folder)
    config.write_text(original)
    edit_json(config, lambda c: c.update(model_type="nothing_known"))
    assert "does not know model_type 'nothing_known'" in refusal(folder)
    edit_json(config, lambda c: c.update(auto_map={"AutoConfig": "x.XConfig"}, architectures=["XForCausalLM"]))
    assert "its own modelling code, which streamslr does not run" in refusal(folder)
    config.write_text(original)
    edit_json(config, lambda c: c.update(num_attention_heads="four"))
    assert "transformers cannot use config.json" in refusal(folder)
    config.write_text("{")
    assert "config.json" in refusal(folder)
    config.unlink()
    assert "has no config.json" in refusal(folder)


def test_code_beside_a_known_architecture_is_ignored(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit('must never run')")
    edit_json(folder / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_x.X"}))
    assert open_checkpoint(str(folder)).config.model_type == "llama"


def test_paths_and_names_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    assert "is a file; give the folder" in refusal(folder / "config.json")
    assert "--revision v2 is only for models on the hub" in refusal(folder, "v2")
    for name in ("./nowhere", "/no/such/folder", "a/b/c", "org/na me", "~/nothing-here"):
        with pytest.raises(InputError, match=r"no folder .*no hub id"):
            open_checkpoint(name)


# Folders that streamslr wrote


def compress(source: Path, folder: Path, pattern_text: str, rank: int, blocks: int) -> dict[str, torch.Tensor]:
    """Write a compressed folder as `run` leaves it after `blocks` blocks; return the merged weight of each linear."""
    pattern = parse_pattern(pattern_text)
    folder.mkdir()
    dense = open_checkpoint(str(source))
    weight_map: dict[str, str] = {}
    merged: dict[str, torch.Tensor] = {}
    for i in range(blocks):
        tensors, linears = {}, {}
        prefix = f"model.layers.{i}."
        for name, tensor in dense.read(n for n in dense.tensors if n.startswith(prefix)).items():
            if tensor.dim() != 2:
                tensors[name] = tensor
                continue
            linear = name.removesuffix(".weight")
            o, d = tensor.shape
            S = tensor * pattern.project(tensor.float())
            parts = pack(S, pattern, torch.bfloat16)
            if rank:
                parts["U"] = torch.randn(o, rank, dtype=torch.bfloat16)
                parts["V"] = torch.randn(rank, d, dtype=torch.bfloat16)
            merged[name] = merge(parts, pattern, (o, d), torch.float32)
            tensors |= {f"{linear}.{part}": value for part, value in parts.items()}
            linears[linear] = pattern, (o, d)
        shard = write_shard(folder / f"model-block-{i:05d}.safetensors", tensors, shard_metadata(linears))
        weight_map |= dict.fromkeys(tensors, shard.file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", folder)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=quantization_config(pattern, rank)))
    return merged


@pytest.mark.parametrize(("pattern", "rank"), [("2:4", 4), ("4:8", 0), ("50%", 4), ("50%/row", 4)])
def test_a_compressed_folder_reads_as_dense_weights(made: Path, tmp_path: Path, pattern: str, rank: int) -> None:
    merged = compress(made, tmp_path / "out", pattern, rank, blocks=2)
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    dense = open_checkpoint(str(made))
    names = {name for name in dense.tensors if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert set(checkpoint.tensors) == names
    checkpoint.prefetch(names)
    read = checkpoint.read(names)
    for name in names:
        info = checkpoint.tensors[name]
        assert (info.shape, info.nbytes) == (dense.tensors[name].shape, read[name].nbytes)
        assert (read[name].dtype, tuple(read[name].shape)) == (info.dtype, info.shape)
        expected = merged[name] if name in merged else dense.read([name])[name]
        assert torch.equal(read[name], expected)


def test_a_compressed_folder_of_another_format_version(made: Path, tmp_path: Path) -> None:
    compress(made, tmp_path / "out", "2:4", 0, blocks=1)
    edit_json(tmp_path / "out/config.json", lambda c: c["quantization_config"].update(format_version=99))
    assert "format_version 99" in refusal(tmp_path / "out")


def test_a_compressed_folder_that_lost_a_part(made: Path, tmp_path: Path) -> None:
    compress(made, tmp_path / "out", "2:4", 0, blocks=1)
    path = tmp_path / "out/model-block-00000.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.meta"]
    linears = {"model.layers.0.mlp.up_proj": (parse_pattern("2:4"), (128, 64))}
    write_shard(path, tensors, shard_metadata(linears))
    edit_json(tmp_path / "out" / INDEX, lambda c: c["weight_map"].pop("model.layers.0.mlp.up_proj.meta"))
    message = refusal(tmp_path / "out")
    assert "names the packed linear model.layers.0.mlp.up_proj" in message
    assert "streamslr verify" in message


def test_no_network_for_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a folder needs no network")

    monkeypatch.setattr("socket.socket.connect", forbidden)
    checkpoint = open_checkpoint(str(folder))
    checkpoint.tokenizer()
    checkpoint.auxiliary_files()
    assert AutoModelForCausalLM.from_config(checkpoint.config)
