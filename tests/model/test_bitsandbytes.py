"""Weights stored by bitsandbytes: its own bytes, states that are wrong or changed, and what a hub has to send."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from streamslr.errors import InputError
from streamslr.model.checkpoint import open_checkpoint
from tests.support.hub_server import Hub, serve_hub
from tests.support.quantized import BNB_FP4, LAYOUTS, NF4, text_tensor
from tests.support.tiny_models import tiny_checkpoint

NAME = "model.layers.0.mlp.up_proj."
STATE = "weight.quant_state.bitsandbytes__"
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("config") / "m", blocks=1, tokenizer=False)
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.fixture
def write(config: dict[str, Any], tmp_path: Path) -> Write:
    """Write a folder of some tensors, and an entry of config.json for them."""

    def write_folder(tensors: dict[str, Tensor], entry: Any = FOUR_BITS, **values: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        entries = {} if entry is None else {"quantization_config": entry}
        (folder / "config.json").write_text(json.dumps(config | entries | values))
        save_file({NAME + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return write_folder


def from_hex(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def made(layout: str, o: int = 40, d: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    return LAYOUTS[layout].make(o, d, np.random.default_rng(1))


# bitsandbytes 0.50.2 wrote these, and decoded them on a CPU, where its kernel without AVX-512 took them (24 columns)

NF4_CODES = (
    "e911e6629724b554fc6365865a71d98d64e6e8c06ba11651b98c88231bf6cbdd4edeab33915406f835a174a45ddcf7ab"  # [4, 24]
)
NF4_VALUES = (
    "0140e53ef8bff8bf014082be82bebbbfe53e0000bbbf4bbf713f04bf04bf4bbf32409d3f82be8dbf82be04bf633e82be"
    "04bf2f3f0000f8bfc83fe53e633ec83f60be2fbfdf3f60bedf3f443e883f1ac060be503f183fd6bfd6bf60bee4bed6bf"
    "503fc63e443e883f443e443ea2bf73bfd6bf503f1a4060be883f503fad3fad3f10bfb63f8e3fb63ff83e2b3f47bf47bf"
    "a23eb0bfbbbe10bffcbf38befc3f213e47bfbbbef83eb0bf000010bff83e10bfbbbe8e3f8e3f5e3ffc3f0000f83e2b3f"
)
FP4_CODES = "de2adee7653ae17e9e5c15aae2a36eb16411459ae1e77e63d9e4c4e9ea51411d7242aa25ad59b768fef611fe1eedf659"
FP4_VALUES = (
    "68bf9bbe9b3f9bbf68bf9bbe9bbee83e9b3e683fe83f9bbf9bbe1b3ce83e9bbe1bbc9bbe683f1bbf1b3c683f9bbf9bbf"
    "9bbe9b3f9bbfe83f9b3e9bbee8bf1b3cd73e573f573c573c573fa13f57bcd7bfd7be573cd7be213f213fd7bed73e2140"
    "a1bf57bcd7be573f57bf573fd7be57bcd7bed7bfa13f573c573f573c573ca1bffe3ea93f293fa93fa9bfa9bfa93f7e3f"
    "a9bf7ebf7e3f29bcfebffe3ea93e0080febea9befebea93e293c293cfebea9be293ca9bea9be7ebffebea93e7e3f29bc"
)
INT8_VALUES = (
    "140a453fc8e3d1bf140ac53e3e9f2fbf93c9043f3a9dbebf2412893d7bbd5e3e00000840f2783cbed8eb153fc8e351bf"
    "b1589cbf369b4d3d7bbd5ebf47a391be"
)


def test_nf4_with_scales_that_are_codes_is_what_bitsandbytes_makes_of_it(write: Write) -> None:
    state = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [4, 24]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.3854167461395264}
    scale_map = torch.zeros(256)  # of which the weight needs three
    for code, number in ((251, 0.9507812261581421), (173, 0.05078125), (0, -0.992968738079071)):
        scale_map[code] = number
    tensors = {
        "weight": from_hex(NF4_CODES, torch.uint8)[:, None],
        "weight.absmax": torch.tensor([251, 173, 0], dtype=torch.uint8),
        "weight.quant_map": torch.tensor(NF4),
        "weight.nested_absmax": torch.tensor([0.41666674613952637]),
        "weight.nested_quant_map": scale_map,
        f"{STATE}nf4": text_tensor(json.dumps(state)),
    }
    decoded = open_checkpoint(str(write(tensors, dtype="bfloat16"))).read_one(f"{NAME}weight")
    assert torch.equal(decoded.view(torch.int16).flatten(), from_hex(NF4_VALUES, torch.int16))


def test_fp4_is_what_bitsandbytes_makes_of_it(write: Write) -> None:
    state = {"quant_type": "fp4", "blocksize": 32, "dtype": "bfloat16", "shape": [4, 24]}
    tensors = {
        "weight": from_hex(FP4_CODES, torch.uint8)[:, None],
        "weight.absmax": torch.tensor([1.8125, 2.515625, 1.984375]),
        "weight.quant_map": torch.tensor(BNB_FP4),
        f"{STATE}fp4": text_tensor(json.dumps(state)),
    }
    decoded = open_checkpoint(str(write(tensors, dtype="bfloat16"))).read_one(f"{NAME}weight")
    assert torch.equal(decoded.view(torch.int16).flatten(), from_hex(FP4_VALUES, torch.int16))


def test_llm_int8_is_what_bitsandbytes_makes_of_it(write: Write) -> None:
    codes = torch.tensor([[46, -98, 23, -41, 31, -89, 4, 13, 127, -11, 35, -49, -73, 3, -52, -17]], dtype=torch.int8)
    tensors = {"weight": codes, "SCB": torch.tensor([2.125])}  # the first versions wrote no weight_format
    folder = write(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, dtype="float32")
    decoded = open_checkpoint(str(folder)).read_one(f"{NAME}weight")
    assert torch.equal(decoded.view(torch.int32).flatten(), from_hex(INT8_VALUES, torch.int32))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_are_what_an_installed_bitsandbytes_makes_of_them(
    write: Write, dtype: torch.dtype, kind: str, nested: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type=kind)
    tensors = {"weight": codes} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    folder = write(tensors, dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(open_checkpoint(str(folder)).read_one(f"{NAME}weight"), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("o", "d"), [(1, 2), (3, 22), (5, 66), (7, 1030)])
@pytest.mark.parametrize("layout", ["nf4", "nf4 nested", "fp4 over rows"])
def test_blocks_go_over_the_ends_of_rows_and_the_last_is_smaller(write: Write, layout: str, o: int, d: int) -> None:
    if layout == "fp4 over rows":
        d *= 2  # of codes that are stored as bf16
    tensors, expected = made(layout, o, d)
    decoded = open_checkpoint(str(write(tensors, dtype="bfloat16"))).read_one(f"{NAME}weight")
    assert torch.equal(decoded.view(torch.int16), expected.view(torch.int16))


def test_one_scale_for_more_scales_than_there_are(write: Write) -> None:
    tensors, expected = made("nf4 nested")
    state = json.loads(bytes(tensors[f"{STATE}nf4"].numpy())) | {"nested_blocksize": 2**40}
    folder = write(tensors | {f"{STATE}nf4": text_tensor(json.dumps(state))}, dtype="bfloat16")
    assert torch.equal(open_checkpoint(str(folder)).read_one(f"{NAME}weight"), expected)


def test_an_entry_of_the_first_versions_names_no_method(write: Write) -> None:
    tensors, expected = made("llm.int8")
    folder = write(tensors, {"load_in_8bit": True, "llm_int8_threshold": 6.0}, dtype="bfloat16")
    assert torch.equal(open_checkpoint(str(folder)).read_one(f"{NAME}weight"), expected)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [40, 63]}, "weight in model.safetensors"),
        ({"shape": [2**40, 2**40]}, "for a weight [1099511627776, 1099511627776]"),
        ({"shape": [2560]}, "shape"),
        ({"shape": None}, "shape"),
        ({"shape": [40, 0]}, "shape"),
        ({"shape": [40, -64]}, "shape"),
        ({"shape": ["40", "64"]}, "shape"),
        ({"blocksize": 0}, "blocksize"),
        ({"blocksize": 63}, "blocksize"),
        ({"blocksize": 128}, "weight.absmax in model.safetensors"),
        ({"dtype": "float64"}, "dtype"),
        ({"quant_type": "fp4"}, "it says quant_type fp4"),
        ({"quant_type": "af4"}, "quant_type"),
        ({"nested_offset": 0.5}, "it holds only some"),
        ({"nested_blocksize": 256, "nested_offset": 0.5, "nested_dtype": "float32"}, "weight.absmax in"),
        ({"nested_dtype": "bfloat16"}, "nested_dtype"),
        ({"rotation": 1}, "rotation"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(write: Write, change: dict[str, Any], words: str) -> None:
    tensors, _ = made("nf4")
    state = json.loads(bytes(tensors[f"{STATE}nf4"].numpy()))
    tensors[f"{STATE}nf4"] = text_tensor(json.dumps(state | change))
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        open_checkpoint(str(write(tensors)))
    assert f"{NAME}weight" in str(caught.value)
    assert "download the model again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"quant_type": "nf4"}', '{"blocksize": 64, "blocksize": 64}', "{" * 999])
def test_a_state_that_is_no_json_of_a_weight_is_refused_by_name(write: Write, text: str) -> None:
    tensors, _ = made("nf4")
    with pytest.raises(InputError, match=re.escape(f"{NAME}{STATE}nf4 in model.safetensors")) as caught:
        open_checkpoint(str(write(tensors | {f"{STATE}nf4": text_tensor(text)})))
    assert "is no state of a weight that streamslr decodes" in str(caught.value)


def test_two_states_of_a_weight_are_refused(write: Write) -> None:
    tensors, _ = made("nf4")
    state = json.loads(bytes(tensors[f"{STATE}nf4"].numpy())) | {"quant_type": "fp4"}
    with pytest.raises(InputError, match="which is stored in another way too"):
        open_checkpoint(str(write(tensors | {f"{STATE}fp4": text_tensor(json.dumps(state))})))


def test_a_state_that_changes_after_it_was_read_is_refused(write: Write) -> None:
    tensors, _ = made("nf4")
    folder = write(tensors)
    checkpoint = open_checkpoint(str(folder))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"shape": [40, 64]', b'"shape": [64, 40]'))
    with pytest.raises(InputError, match="changed since it was opened"):
        checkpoint.read_one(f"{NAME}weight")


def test_codes_that_config_json_says_nothing_of_are_refused_by_name(write: Write) -> None:
    with pytest.raises(InputError, match=re.escape(f"{NAME}weight in model.safetensors")) as caught:
        open_checkpoint(str(write(made("nf4")[0], None)))
    assert "is U8 (1 such weights); give the original model" in str(caught.value)


# On the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def test_states_are_read_from_the_hub_without_its_shards(hub: Hub, write: Write) -> None:
    tensors, expected = made("nf4 nested", 512, 1024)  # farther from the start than what is read for a header
    folder = write(tensors, dtype="bfloat16")
    hub.add("org/nf4", folder)
    checkpoint = open_checkpoint("org/nf4")
    assert checkpoint.tensors == open_checkpoint(str(folder)).tensors
    assert hub.downloads(".safetensors") == []
    assert torch.equal(checkpoint.read_one(f"{NAME}weight"), expected)


def test_a_hub_that_sends_whole_files_alone_costs_the_shard(
    hub: Hub, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, expected = made("nf4", 512, 1024)
    hub.add("org/nf4", write(tensors, dtype="bfloat16"))
    hub.ranges = False
    checkpoint = open_checkpoint("org/nf4")
    assert checkpoint.download_bytes == 0
    assert torch.equal(checkpoint.read_one(f"{NAME}weight"), expected)
