"""Runs that store U and V, or S, in fewer bits than the checkpoint has, end to end as a user sees them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.errors import InputError
from streamslr.finetune import finetune
from streamslr.results.export import export
from streamslr.results.inspect import describe_method, read_run, summary, totals
from streamslr.results.verify import verify
from tests.support.compressed_folders import dense_model, perplexities_as_saved
from tests.support.tiny_models import tiny_checkpoint

IDS = torch.arange(24).view(2, 12) % 50


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("models")
    dtypes = (torch.float32, torch.bfloat16)
    return {dtype: tiny_checkpoint(folder / str(dtype), blocks=2, shards=1, dtype=dtype) for dtype in dtypes}


def compress(model: Path, text: Path, out: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "match_epochs": 3, "method": "eora-wanda"}
    return streamslr.compress(model, out, calibration=text, device="cpu", **settings | changes)


@pytest.fixture(scope="module")
def finished(models: dict[torch.dtype, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with U and V in int8, of a float32 model. Read only."""
    out = tmp_path_factory.mktemp("int8") / "out"
    compress(models[torch.float32], text, out, low_rank_values="int8")
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in sorted(folder.glob("model-block-*")) for name, t in load_file(shard).items()}


def test_codes_of_u_and_v_reach_the_disk_the_journal_and_the_description(finished: Path) -> None:
    state = read_run(finished)
    assert verify(finished).problems == ()
    tensors = tensors_of(finished)
    for linear in totals_linears(state):
        U, V, scales = (tensors[f"{linear.name}.{part}"] for part in ("U", "V", "low_rank_scales"))
        assert (U.dtype, V.dtype, scales.dtype, tuple(scales.shape)) == (torch.int8, torch.int8, torch.float32, (4,))
        assert linear.low_rank_values == "int8"
        assert linear.nbytes == sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{linear.name}."))
    assert describe_method(state) == "eora-wanda at 2:4 + rank 4 in int8"
    assert summary(finished, state)["totals"]["bits_per_weight"] == totals(state.blocks)["bits_per_weight"]
    assert json.loads((finished / "config.json").read_text())["quantization_config"]["low_rank_values"] == "int8"


def totals_linears(state: Any) -> list[Any]:
    return [linear for block in state.blocks for linear in block.linears]


def test_loaded_they_stay_codes_and_compute_what_the_folder_says(finished: Path) -> None:
    loaded = streamslr.load(finished, device="cpu")
    linear = loaded.model.layers[0].mlp.up_proj
    assert linear.U.dtype == linear.V.dtype == torch.int8
    torch.testing.assert_close(logits(loaded), logits(dense_model(finished)), rtol=1e-4, atol=1e-4)
    assert linear.low_rank_scales.dtype == torch.float32


def test_saved_it_evaluates_as_the_folder_does(finished: Path, tmp_path: Path) -> None:
    first, second = perplexities_as_saved(finished, tmp_path)
    assert first == second


def test_exports_compute_the_same(finished: Path, tmp_path: Path) -> None:
    expected = logits(dense_model(finished))
    export(finished, tmp_path / "dense", to="dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    export(finished, tmp_path / "peft", to="peft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "peft" / "adapter"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)


def test_finetuning_stores_them_as_numbers(finished: Path, text: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    finetune(finished, text, tuned, seq_len=32, batch=8, lr=0.05, steps=3, device="cpu")
    assert verify(tuned).problems == ()
    assert describe_method(read_run(tuned)) == "eora-wanda at 2:4 + rank 4"
    assert "low_rank_values" not in json.loads((tuned / "config.json").read_text())["quantization_config"]
    tensors = tensors_of(tuned)
    assert not [name for name in tensors if name.endswith("low_rank_scales")]
    assert {t.dtype for name, t in tensors.items() if name.endswith((".U", ".V"))} == {torch.float32}
    torch.testing.assert_close(
        logits(streamslr.load(tuned, device="cpu")), logits(dense_model(tuned)), rtol=1e-4, atol=1e-4
    )


def test_where_the_checkpoint_is_bf16_asking_for_bf16_changes_no_shard(
    models: dict[torch.dtype, Path], text: Path, tmp_path: Path
) -> None:
    asked = {"values": "bf16", "low_rank_values": "bf16"}
    compress(models[torch.bfloat16], text, tmp_path / "stored")
    compress(models[torch.bfloat16], text, tmp_path / "bf16", **asked)
    for shard in (tmp_path / "stored").glob("*.safetensors"):
        assert (tmp_path / "bf16" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("values", "low_rank", "expected"),
    [
        ("bf16", "stored", (torch.bfloat16, torch.float32)),
        ("stored", "bf16", (torch.float32, torch.bfloat16)),
        ("bf16", "int8", (torch.bfloat16, torch.int8)),
        ("int4", "bf16", (torch.uint8, torch.bfloat16)),
    ],
)
def test_a_float32_checkpoint_is_stored_in_what_was_asked_for(
    models: dict[torch.dtype, Path],
    text: Path,
    tmp_path: Path,
    values: str,
    low_rank: str,
    expected: tuple[torch.dtype, torch.dtype],
) -> None:
    out = tmp_path / "out"
    compress(models[torch.float32], text, out, values=values, low_rank_values=low_rank)
    assert verify(out).problems == ()
    tensors = tensors_of(out)
    name = "model.layers.1.mlp.down_proj"
    assert (tensors[f"{name}.values"].dtype, tensors[f"{name}.U"].dtype) == expected
    loaded = logits(streamslr.load(out, device="cpu"))
    torch.testing.assert_close(loaded, logits(dense_model(out)), rtol=1e-4, atol=1e-4)


def test_an_allocation_gives_some_linears_codes(models: dict[torch.dtype, Path], text: Path, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps({"q_proj": {"low_rank_values": "int8"}}))
    state = compress(models[torch.float32], text, tmp_path / "out", allocation=tmp_path / "some.json")
    found = {linear.name for linear in totals_linears(state) if linear.low_rank_values == "int8"}
    assert found == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert verify(tmp_path / "out").problems == ()
    assert state.allocation["model.layers.0.self_attn.q_proj"]["low_rank_values"] == "int8"


def test_a_float16_checkpoint_is_refused_before_any_work(text: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", blocks=1, shards=1, dtype=torch.float16)
    with pytest.raises(InputError, match=r"proj: U and V in int8 cannot go with float16.*--low-rank-values bf16"):
        compress(model, text, tmp_path / "out", low_rank_values="int8")


def test_loading_codes_in_float16_is_refused(finished: Path) -> None:
    with pytest.raises(InputError, match=r"U and V in int8 cannot go with float16.*bfloat16 or float32"):
        streamslr.load(finished, device="cpu", dtype="float16")
    loaded = streamslr.load(finished, device="cpu").model.layers[0].mlp.up_proj.half()
    with pytest.raises(InputError, match="U and V in int8 cannot go with float16"):
        loaded(torch.ones(1, loaded.in_features, dtype=torch.float16))


def test_low_rank_values_that_are_not_known_are_refused(
    models: dict[torch.dtype, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="low-rank values 'int4' are not known; there are stored, bf16, int8"):
        compress(models[torch.float32], text, tmp_path / "out", low_rank_values="int4")
