"""Weights that other tools stored in 8 or 4 bits: decoded to the bit, and refused where parts do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamslr.errors import InputError
from streamslr.model.checkpoint import Checkpoint, open_checkpoint
from tests.support.quantized import LAYOUTS, Layout, compressed_tensors
from tests.support.tiny_models import tiny_checkpoint

NAME = "model.layers.0.mlp.up_proj."


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("config") / "m", blocks=1, tokenizer=False)
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


Write = Callable[..., Path]


@pytest.fixture
def write(config: dict[str, Any], tmp_path: Path) -> Write:
    """Write a folder of some tensors, and an entry of config.json for them."""

    def write_folder(entry: Any, tensors: dict[str, Tensor], prefix: str = NAME, **values: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry} | values))
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return write_folder


def made(layout: Layout, o: int, d: int) -> tuple[dict[str, Tensor], Tensor]:
    return layout.make(o, d, np.random.default_rng(1))


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder))
    return str(caught.value)


# Values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("o", "d"), [(40, 64), (256, 384)])
def test_a_weight_is_decoded_as_the_reference_does(write: Write, layout: str, o: int, d: int) -> None:
    tensors, expected = made(LAYOUTS[layout], o, d)
    checkpoint = open_checkpoint(str(write(LAYOUTS[layout].entry, tensors)))
    info = checkpoint.tensors[f"{NAME}weight"]
    assert checkpoint.tensors.keys() == {info.name}, "the stored parts are hidden"
    assert (info.dtype, info.shape, info.nbytes) == (torch.bfloat16, (o, d), 2 * o * d)
    assert same_bits(checkpoint.read_one(info.name), expected)


@pytest.mark.parametrize(("o", "d"), [(1, 1), (130, 300), (128, 129), (300, 100), (2100, 260)])
@pytest.mark.parametrize("layout", ["fp8 blocks", "float blocks"])
def test_blocks_at_the_edges_are_smaller(write: Write, layout: str, o: int, d: int) -> None:
    tensors, expected = made(LAYOUTS[layout], o, d)
    checkpoint = open_checkpoint(str(write(LAYOUTS[layout].entry, tensors)))
    assert same_bits(checkpoint.read_one(f"{NAME}weight"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.uint8])
def test_fp8_is_what_transformers_makes_of_it(write: Write, dtype: torch.dtype, scales: torch.dtype) -> None:
    codes = random_bytes(2, 256, 384)
    codes[codes & 127 == 127] = 0
    codes = codes.view(torch.float8_e4m3fn)
    factors = random_bytes(2, 2, 3)
    factors = factors // 8 + 110 if scales == torch.uint8 else (factors.float() / 300).to(scales)
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {"gate_up_proj": codes, "gate_up_proj_scale_inv": factors}
    folder = write(entry, tensors, "model.experts.", dtype=str(dtype).removeprefix("torch."))
    decoded = open_checkpoint(str(folder)).read_one("model.experts.gate_up_proj")
    assert same_bits(decoded, Fp8Dequantize(None)._dequantize_one(codes, factors, output_dtype=dtype))


def test_mxfp4_is_what_transformers_makes_of_it(write: Write) -> None:
    blocks, scales = random_bytes(3, 24, 5, 16), random_bytes(3, 24, 5).clamp(max=254)  # 255 is no number
    tensors = {"down_proj_blocks": blocks, "down_proj_scales": scales, "down_proj_bias": torch.zeros(3, 24)}
    checkpoint = open_checkpoint(str(write({"quant_method": "mxfp4"}, tensors, "experts.")))
    assert checkpoint.tensors.keys() == {"experts.down_proj", "experts.down_proj_bias"}
    assert checkpoint.tensors["experts.down_proj"].shape == (3, 160, 24)
    assert same_bits(checkpoint.read_one("experts.down_proj"), convert_moe_packed_tensors(blocks, scales))


def test_mxfp4_is_sixteen_values_times_a_power_of_two(write: Write) -> None:
    values = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks, scales = random_bytes(1, 2, 1, 16), torch.tensor([[[124], [130]]], dtype=torch.uint8)
    folder = write({"quant_method": "mxfp4"}, {"x_blocks": blocks, "x_scales": scales}, "experts.")
    decoded = open_checkpoint(str(folder)).read_one("experts.x")
    for row, factor in enumerate((2.0**-3, 2.0**3)):
        for column in range(32):
            code = int(blocks[0, row, 0, column // 2]) >> 4 * (column % 2) & 15
            assert decoded[0, column, row] == values[code] * factor


@pytest.mark.parametrize("layout", [name for name, of in LAYOUTS.items() if "config_groups" in of.entry])
def test_compressed_tensors_decodes_the_same(write: Write, layout: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    of = LAYOUTS[layout]
    tensors, expected = made(of, 40, 64)
    if "weight_g_idx" in tensors:
        pytest.skip("newer versions of compressed-tensors read no g_idx")
    group = quantization.QuantizationScheme.model_validate(of.entry["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(of.entry["format"])
    decoded = compressor.decompress(dict(tensors), group)["weight"]
    assert same_bits(decoded.to(torch.bfloat16), expected)


def test_the_decoder_of_a_model_of_parts_may_say_how_it_is_quantized(write: Write) -> None:
    tensors, expected = made(LAYOUTS["int4 groups"], 40, 64)
    text_config = {"model_type": "mistral", "quantization_config": LAYOUTS["int4 groups"].entry}
    checkpoint = open_checkpoint(str(write(None, tensors, model_type="mistral3", text_config=text_config)))
    assert same_bits(checkpoint.read_one(f"{NAME}weight"), expected)
    assert checkpoint.dense_config_json()["text_config"] == {"model_type": "mistral"}


def test_parts_may_lie_in_different_shards(write: Write) -> None:
    tensors, expected = made(LAYOUTS["fp8 blocks"], 130, 64)
    folder = write(LAYOUTS["fp8 blocks"].entry, tensors)
    (folder / "model.safetensors").unlink()
    names = {f"{NAME}{rest}": f"model-{i}.safetensors" for i, rest in enumerate(tensors)}
    for (name, shard), tensor in zip(names.items(), tensors.values(), strict=True):
        save_file({name: tensor}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    checkpoint = open_checkpoint(str(folder))
    checkpoint.prefetch(checkpoint.tensors)
    assert same_bits(checkpoint.read_one(f"{NAME}weight"), expected)


def test_a_nan_among_the_codes_is_a_nan(write: Write) -> None:
    tensors, _ = made(LAYOUTS["fp8 blocks"], 8, 8)
    tensors["weight"].view(torch.uint8)[3, 4] = 0xFF
    decoded = open_checkpoint(str(write(LAYOUTS["fp8 blocks"].entry, tensors))).read_one(f"{NAME}weight")
    assert decoded.isnan().nonzero().tolist() == [[3, 4]]


def test_nothing_is_decoded_before_the_loader_asks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = made(LAYOUTS["fp8 blocks"], 8, 8)
    checkpoint = open_checkpoint(str(write(LAYOUTS["fp8 blocks"].entry, tensors)))

    def forbidden(*_: Any) -> None:
        raise AssertionError("decoded too early")

    monkeypatch.setattr(Checkpoint, "read_one", forbidden)
    deferred = checkpoint.read_or_defer([f"{NAME}weight"])[f"{NAME}weight"]
    assert callable(deferred)


# What is refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_part_is_refused_by_name(write: Write, layout: str) -> None:
    for part in made(LAYOUTS[layout], 40, 64)[0].keys() - {"input_scale", "g_idx", "weight_g_idx", "weight_format"}:
        tensors, _ = made(LAYOUTS[layout], 40, 64)
        del tensors[part]
        if part == "weight_zero_point" and "weight" in tensors:
            continue  # symmetric then
        message = refusal(write(LAYOUTS[layout].entry, tensors))
        assert NAME + ("weight" if part == "weight_packed" else part) in message
        assert "which no shard holds; download the model again" in message


@pytest.mark.parametrize(
    ("layout", "part", "wrong"),
    [
        ("fp8 blocks", "weight_scale_inv", torch.ones(2, 1)),
        ("fp8 blocks", "weight_scale_inv", torch.ones(1, 1, 2)),
        ("fp8 blocks", "weight_scale_inv", torch.ones(3)),
        ("fp8 blocks", "weight_scale_inv", torch.ones(1, 1, dtype=torch.int32)),
        ("fp8 tensor", "weight_scale_inv", torch.ones(2, 2)),
        ("fbgemm", "weight_scale", torch.ones(41, 1)),
        ("float channel", "weight_scale", torch.ones(40, 3)),
        ("int8 groups, zeros", "weight_zero_point", torch.ones(40, 1, dtype=torch.int8)),
        ("int4 groups", "weight_scale", torch.ones(40, 3)),
        ("int4 groups", "weight_scale", torch.ones(41, 2)),
        ("int4 groups", "weight_packed", torch.ones(40, 8, dtype=torch.int64)),
        ("int4 groups", "weight_shape", torch.ones(3, dtype=torch.int64)),
        ("int4 groups, zeros", "weight_zero_point", torch.ones(4, 2, dtype=torch.int32)),
        ("int4 groups out of order", "weight_g_idx", torch.ones(63, dtype=torch.int32)),
        ("gptq", "scales", torch.ones(2, 41)),
        ("gptq", "qzeros", torch.ones(2, 4, dtype=torch.int32)),
        ("gptq", "g_idx", torch.ones(63, dtype=torch.int32)),
        ("awq", "scales", torch.ones(3, 40)),
        ("awq", "qzeros", torch.ones(2, 4, dtype=torch.int32)),
        ("awq", "qweight", torch.ones(64, dtype=torch.int32)),
        ("nf4", "weight", torch.zeros(1281, 1, dtype=torch.uint8)),
        ("nf4", "weight", torch.zeros(1280, dtype=torch.uint8)),
        ("nf4", "weight", torch.zeros(1280, 1, dtype=torch.int8)),
        ("nf4", "weight.absmax", torch.ones(41)),
        ("nf4", "weight.absmax", torch.ones(40, dtype=torch.uint8)),
        ("nf4", "weight.quant_map", torch.ones(15)),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", torch.ones(5000, dtype=torch.uint8)),
        ("nf4 nested", "weight.absmax", torch.ones(80)),
        ("nf4 nested", "weight.nested_absmax", torch.ones(2)),
        ("nf4 nested", "weight.nested_quant_map", torch.ones(255)),
        ("llm.int8", "SCB", torch.ones(41)),
        ("llm.int8", "SCB", torch.ones(40, dtype=torch.bfloat16)),
        ("llm.int8", "weight_format", torch.zeros(2, dtype=torch.uint8)),
    ],
)  # fmt: skip
def test_a_part_of_another_shape_or_dtype_is_refused(write: Write, layout: str, part: str, wrong: Tensor) -> None:
    tensors, _ = made(LAYOUTS[layout], 40, 64)
    message = refusal(write(LAYOUTS[layout].entry, tensors | {part: wrong}))
    assert f"{NAME}{part}" in message or f"{NAME}weight_packed" in message or f"{NAME}qweight" in message
    assert str(list(wrong.shape)) in message or f"[40, 8] with scales {list(wrong.shape)}" in message


@pytest.mark.parametrize(
    ("layout", "part", "wrong", "words"),
    [
        ("int4 groups", "weight_shape", torch.tensor([40, 63]), "its weight_shape says [40, 63]"),
        ("int4 groups out of order", "weight_g_idx", torch.full((64,), 2), "2 groups, its g_idx goes from 2 to 2"),
        ("gptq", "qzeros", torch.full((2, 5), -1), "a zero point of 16"),
        ("nf4", "weight.quant_map", torch.linspace(-1, 1, 16), "says nf4, and the 16 numbers beside it are others"),
        ("nf4", "weight.quant_map", torch.full((16,), torch.nan), "the 16 numbers beside it are others"),
        ("llm.int8", "weight_format", torch.tensor(3), "has weight_format 3, an order of older GPU kernels"),
    ],
)
def test_numbers_that_contradict_the_headers_are_refused_when_read(
    write: Write, layout: str, part: str, wrong: Tensor, words: str
) -> None:
    tensors, _ = made(LAYOUTS[layout], 40, 64)
    kept = wrong.to(tensors[part].dtype)
    checkpoint = open_checkpoint(str(write(LAYOUTS[layout].entry, tensors | {part: kept})))
    with pytest.raises(InputError) as caught:
        checkpoint.read_one(f"{NAME}weight")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes), but no weight is stored so"),
        ({"quant_method": "hqq"}, "is already quantized (hqq); streamslr decodes fp8, fbgemm_fp8, mxfp4, compressed-"),
        ({"bits": 4}, "is already quantized (an unnamed method)"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "is already quantized (fp8), in a way that streamslr"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "is already quantized (fp8), in a way that"),
        (compressed_tensors("nvfp4-pack-quantized", "float", 4), "(compressed-tensors, nvfp4-pack-quantized)"),
        (compressed_tensors("marlin-24"), "(compressed-tensors, marlin-24)"),
        (
            compressed_tensors("dense") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "(compressed-tensors, sparsity sparse-24-bitmask)",
        ),
        (compressed_tensors("int-quantized") | {"transform_config": {"r": 1}}, "rotates activations"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "(gptq, marlin)"),
        ({"quant_method": "gptq", "bits": 3}, "says that it is quantized (gptq), but no weight is stored so"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "(awq, version gemv)"),
    ],
)
def test_a_format_without_a_decoder_is_refused_by_name(write: Write, entry: dict[str, Any], words: str) -> None:
    message = refusal(write(entry, {"weight": torch.ones(128, 64)}))
    assert words in message
    assert "; give the original model in bf16, fp16 or fp32" in message or "take quantization_config out" in message


def test_weights_in_8_bits_that_no_scale_belongs_to(write: Write) -> None:
    tensors, _ = made(LAYOUTS["fp8 blocks"], 40, 64)
    folder = write(LAYOUTS["fp8 blocks"].entry, tensors)
    save_file(load_file(folder / "model.safetensors") | {"model.x": tensors["weight"]}, folder / "model.safetensors")
    assert "model.x in model.safetensors" in refusal(folder)
    assert "cannot be read without model.x_scale_inv" in refusal(folder)


def test_a_weight_in_two_forms_is_refused(write: Write) -> None:
    tensors, dense = made(LAYOUTS["awq"], 40, 64)
    message = refusal(write(LAYOUTS["awq"].entry, tensors | {"weight": dense}))
    assert f"stands for {NAME}weight, which is stored in another way too" in message


def test_scales_beside_a_weight_that_is_not_coded(write: Write) -> None:
    message = refusal(
        write(compressed_tensors("int-quantized"), {"weight": torch.ones(8, 8), "weight_scale": torch.ones(8, 1)})
    )
    assert "is F32, and" in message
    assert "beside it is for F8_E4M3 or I8" in message


def test_scales_of_activations_that_awq_puts_into_the_model(write: Write) -> None:
    tensors, _ = made(LAYOUTS["awq"], 40, 64)
    message = refusal(
        write(LAYOUTS["awq"].entry, {f"a.{n}": t for n, t in tensors.items()} | {"act.scales": torch.ones(8)})
    )
    assert f"{NAME}act.scales" in message
