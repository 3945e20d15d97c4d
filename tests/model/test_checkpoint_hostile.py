"""Model folders that a stranger made: links, pipes, large files, numbers and JSON that no model has."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamslr.errors import InputError
from streamslr.model.blockwise import BlockwiseModel
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from tests.support.tiny_models import tiny_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_config(folder: Path, **values: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(values))


def blockwise(checkpoint: Checkpoint) -> BlockwiseModel:
    return BlockwiseModel(checkpoint, torch.float32, torch.device("cpu"))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        blockwise(open_checkpoint(str(folder)))
    assert len(str(caught.value)) < 1000
    return str(caught.value)


# Links, pipes, sizes


def test_an_auxiliary_file_that_is_a_link_out_of_the_folder_is_not_copied(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    shutil.move(folder / "tokenizer.json", secret)
    (folder / "tokenizer.json").symlink_to(secret)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError, match=rf"tokenizer.json in .* is a link to {secret}, outside of the model's folder"):
        checkpoint.auxiliary_files()
    assert checkpoint.tokenizer(), "reading through a link is the user's choice"


def test_links_within_the_folder_and_of_weights_are_followed(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "tokenizer.json", folder / "tokenizer-v2.json")
    (folder / "tokenizer.json").symlink_to("tokenizer-v2.json")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shutil.move(shard, tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    checkpoint = open_checkpoint(str(folder))
    assert folder / "tokenizer.json" in checkpoint.auxiliary_files()
    assert checkpoint.read(checkpoint.tensors).keys() == checkpoint.tensors.keys()


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(llama: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llama.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    linked = open_checkpoint(str(snapshot)).auxiliary_files()
    assert [path.name for path in linked] == [path.name for path in open_checkpoint(str(llama)).auxiliary_files()]
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../secret.json")
    (tmp_path / "secret.json").write_text("{}")
    with pytest.raises(InputError, match=r"outside of the model's folder"):
        open_checkpoint(str(snapshot)).auxiliary_files()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "notes.json", "model.safetensors"])
def test_a_pipe_in_the_folder_is_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is a pipe, a socket or a device" in refusal(folder)


def test_a_link_to_a_device_is_refused(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/dev/zero")
    assert "LICENSE is a pipe, a socket or a device" in refusal(folder)


def test_large_files_beside_the_weights_do_not_travel(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (folder / "corpus.json").open("wb") as file:
        file.truncate(400_000_000)
    names = {path.name for path in open_checkpoint(str(folder)).auxiliary_files()}
    assert "tokenizer.json" in names
    assert "corpus.json" not in names
    assert "corpus.json has 400.0 MB" in caplog.text
    (folder / "corpus.json").rename(folder / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer.json has 400.0 MB, more than the 300.0 MB"):
        open_checkpoint(str(folder)).tokenizer()


def test_a_config_of_any_size_is_not_read_whole(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(200_000_000)
    assert "config.json has more than 100,000,000 bytes" in refusal(folder)


# config.json


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**6}, "says num_hidden_layers 1000000, more than any model has"),
        ({"num_labels": 10**12}, "says num_labels 1000000000000"),
        ({"num_hidden_layers": 10**400}, "says num_hidden_layers 1000000"),
        ({"num_hidden_layers": 60_000}, "asks for more than 10,"),
        ({"num_hidden_layers": -1}, "config.json"),
        ({"num_hidden_layers": 0}, "config.json"),
        ({"num_hidden_layers": "2"}, "config.json"),
        ({"num_hidden_layers": 1}, "config.json says 1 blocks, the checkpoint holds block 1 too (model.layers.1."),
        ({"num_hidden_layers": 3}, "lacks 9 of the"),
        ({"vocab_size": 2**62}, "config.json"),
        ({"vocab_size": -5}, "config.json"),
        ({"hidden_size": 2**40}, "config.json"),
        ({"hidden_size": 64.0}, "config.json"),
        ({"intermediate_size": 2**63}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"head_dim": 2**50}, "config.json"),
        ({"quantization_config": "x"}, "is not JSON that describes a model (Expected `object | null`, got `str`"),
        ({"quantization_config": {"quant_method": {"a": 1}}}, "is already quantized"),
        ({"model_type": ["llama"]}, "is not JSON that describes a model (Expected `str | null`"),
        ({"model_type": "\ud83d"}, "a text in it holds half of a surrogate pair"),
        ({"rope_parameters": {"rope_type": "x"}}, "config.json"),
        ({"hidden_act": "no_such"}, "config.json"),
        ({"rms_norm_eps": "x"}, "config.json"),
        ({"layer_types": ["x"]}, "config.json"),
    ],
)
def test_what_no_config_may_say_is_refused(folder: Path, values: dict[str, Any], words: str) -> None:
    edit_config(folder, **values)
    assert words in refusal(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"\xff\xfe{}", b"9" * 5000])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "is not JSON that describes a model" in refusal(folder)


def test_infinity_in_a_config_is_read_as_transformers_writes_it(folder: Path) -> None:
    edit_config(folder, time_step_limit=[0.0, float("inf")])
    assert open_checkpoint(str(folder)).config.time_step_limit == [0.0, float("inf")]


def test_tables_larger_than_the_checkpoint_are_not_computed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "gptj", "gptj", blocks=1)
    edit_config(folder, n_positions=10**9)
    assert "config.json asks for tables of" in refusal(folder)


def test_layers_that_predict_further_tokens_are_kept_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    caplog.set_level("INFO", "streamslr")
    model = blockwise(open_checkpoint(str(folder)))
    assert "does not run these parts, which are kept as they are: model.layers.1 (9 tensors)" in caplog.text
    assert "model.layers.1.mlp.up_proj.weight" in model.non_block_tensors


def test_a_type_of_its_own_is_taken_for_that_of_its_class(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, model_type="llama_of_ours", architectures=["LlamaForCausalLM"], auto_map={"AutoModel": "m.M"})
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.config.model_type, checkpoint.config_json()["model_type"]) == ("llama", "llama")
    assert "does not know model_type 'llama_of_ours'" in caplog.text
    blockwise(checkpoint)


@pytest.mark.parametrize("architectures", [["OursForCausalLM"], ["AutoConfig"], ["__version__"], [], None])
def test_a_type_of_its_own_without_a_class_of_transformers_is_refused(
    folder: Path, architectures: list[str] | None
) -> None:
    edit_config(folder, model_type="llama_of_ours", architectures=architectures, auto_map={"AutoModel": "m.M"})
    assert "(model_type 'llama_of_ours') brings its own modelling code" in refusal(folder)


# Index


def test_a_tensor_that_the_index_lacks_is_read_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "model.norm.weight" in open_checkpoint(str(folder)).tensors
    assert f"{INDEX} of {folder} lacks 1 tensors that the shards hold, first model.norm.weight" in caplog.text


def test_a_tensor_in_two_shards_needs_the_index_to_choose(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    save_file(tensors | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, second)
    assert open_checkpoint(str(folder)).tensors["model.embed_tokens.weight"].shard == first.name
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("model.embed_tokens.weight"))
    assert f"is in {first.name} and in {second.name}" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b"no json",
        b'{"weight_map": {"a": "../b.safetensors"}}',
        b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": "\\ud83d"}}',
        b'{"weight_map": {}}',
        b'{"weight_map":' * 100_000,
        b'{"weight_map": {"a": "x\\u0000"}}',
        b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}',
    ],
)
def test_an_index_that_is_no_index_is_refused(folder: Path, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    assert f"{INDEX} of {folder} has no usable weight_map" in refusal(folder)
