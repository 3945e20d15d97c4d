"""Files beside the weights that change what the model is: refused or warned about, never carried along."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from streamslr.errors import InputError
from streamslr.model.checkpoint import open_checkpoint
from tests.support.tiny_models import tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", blocks=1, shards=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "would put an adapter on the model.*merge_and_unload"),
        ("hf_quant_config.json", "quantized already"),
        ("quantize_config.json", "quantized already"),
        ("quant_config.json", "quantized already"),
    ],
)
def test_a_file_that_makes_it_another_model_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"transformers_weights": "other.safetensors"}, "'other.safetensors', which streamslr does not"),
        ({"vision_config": {"quantization_config": {"quant_method": "fp8"}}}, r"vision_config\.quantization_config"),
    ],
)
def test_an_entry_of_the_config_that_makes_it_another_model(folder: Path, entry: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["modules.json", "sentence_bert_config.json", "params.json"])
def test_a_description_of_files_that_are_not_copied_stays_behind(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / name).write_text("{}")
    names = {path.name for path in open_checkpoint(str(folder)).auxiliary_files()}
    assert name not in names
    assert "tokenizer.json" in names
    assert f"{name} describe files that are neither read nor copied" in caplog.text


def test_other_weights_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text("{}")
    with caplog.at_level(logging.INFO, "streamslr"):
        open_checkpoint(str(folder))
    assert "not from pytorch_model.bin" in caplog.text
    assert "as transformers does, the first is read" in caplog.text
