"""An output describes itself as its source does: transformers 4 and 5 and PEFT find one and the same model in it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.errors import InputError
from streamslr.finetune import finetune
from streamslr.results.export import export
from streamslr.results.verify import verify
from tests.support.architectures import save, shrunk_config
from tests.support.markers import slow
from tests.support.tiny_models import tiny_checkpoint, tiny_model

RUN: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False, "method": "eora-wanda"}
IDS = torch.arange(2, 42).view(2, 20)
ROOT = Path(__file__).parents[2]
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}


def checkpoint_of_version_4(folder: Path, architecture: str, prefix: str = "", **config: Any) -> Path:
    """Make a checkpoint as most of the hub has them: config.json of transformers 4, keys without the base's prefix.

    Args:
        folder: Folder to write.
        architecture: Model type of transformers.
        prefix: Beginning of keys to take away.
        **config: As `tiny_checkpoint`.
    """
    tiny_checkpoint(folder, architecture, blocks=2, dtype=torch.float32, shards=1, **config)
    written = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling"):
        written.pop(name, None)
    if rope := written.pop("rope_parameters", None):
        written |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    written["torch_dtype"] = written.pop("dtype")
    written["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps(written, indent=4))
    tensors = load_file(folder / "model.safetensors")
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name != "lm_head.weight" or not prefix
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


SOURCES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "bloom without prefix": ("bloom", {"prefix": "transformer.", "tie": True}),
    "qwen3 without prefix": ("qwen3", {"prefix": "model.", "tie": True}),
    "mixtral": ("mixtral", {}),
}


def compressed_source(tmp_path: Path, text: Path, name: str) -> tuple[Path, Path]:
    """Return a checkpoint and what `run` makes of it."""
    architecture, arguments = SOURCES[name]
    source = checkpoint_of_version_4(tmp_path / "source", architecture, **arguments)
    streamslr.compress(source, tmp_path / "slr", calibration=text, **RUN)
    return source, tmp_path / "slr"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits
    return result


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", ["llama", "bloom without prefix", *slow("qwen3 without prefix", "mixtral")])
def test_outputs_have_the_config_and_the_names_of_the_source(name: str, text: Path, tmp_path: Path) -> None:
    source, folder = compressed_source(tmp_path, text, name)
    export(folder, tmp_path / "dense", "dense")
    config = read_config(source)
    assert list(read_config(tmp_path / "dense").items()) == list(config.items()), "the same entries in the same order"
    assert {**read_config(folder), "quantization_config": None} == {**config, "quantization_config": None}
    index = json.loads((tmp_path / "dense/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(source / "model.safetensors").keys()
    expected = logits(streamslr.load(folder, device="cpu"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)
    if name != "mixtral":
        export(folder, tmp_path / "peft", "peft")
        assert read_config(tmp_path / "peft/base") == config
        torch.testing.assert_close(
            logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft/adapter")), expected
        )


@pytest.mark.slow
@pytest.mark.parametrize("match", [False, True])
def test_tensors_that_transformers_joins_keep_their_names(match: bool, text: Path, tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "slr"
    save(tiny_model(shrunk_config("olmo_hybrid")), source)
    streamslr.compress(source, folder, calibration=text, **RUN | {"match": match})
    export(folder, tmp_path / "dense", "dense")
    exported = load_file(next((tmp_path / "dense").glob("model-00002*")))
    theirs = load_file(source / "model.safetensors")
    assert {name for name in theirs if ".layers.0." in name} == exported.keys()
    key = "model.layers.0.linear_attn.k_conv1d.weight"
    assert torch.equal(exported[key], theirs[key]) != match
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(streamslr.load(folder, device="cpu"))
    )
    assert not verify(folder).problems


_IN_VERSION_4 = """
import sys, torch, peft
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    base = folder / "base" if (folder / "adapter").exists() else folder
    model, report = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    wrong = {name: found for name, found in report.items() if found}
    assert not wrong, (folder, wrong)
    if base != folder:
        model = peft.PeftModel.from_pretrained(model, folder / "adapter")
    with torch.inference_mode():
        torch.save(model.eval()(torch.arange(2, 42).view(2, 20)).logits, folder / "logits.pt")
"""


@pytest.mark.long
def test_transformers_4_reads_the_same_models(text: Path, tmp_path: Path) -> None:
    made = subprocess.run(
        [ROOT / "tools/environment_v4"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    if made.returncode:
        pytest.skip(f"transformers 4 could not be installed: {made.stderr[-500:]}")
    expected = {}
    for name in SOURCES:
        _, folder = compressed_source(tmp_path / name, text, name)
        own = logits(streamslr.load(folder, device="cpu", dtype="float32"))
        for to in ("dense",) if name == "mixtral" else ("dense", "peft"):
            export(folder, tmp_path / name / to, to)
            expected[tmp_path / name / to] = own
    line = [str(ROOT / ".venv-v4/bin/python"), "-c", _IN_VERSION_4, *map(str, expected)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, own in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), own)


@pytest.mark.slow
def test_code_that_is_not_there_is_not_named(text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_checkpoint(tmp_path / "source", "phi3", blocks=2, dtype=torch.float32)
    for name, auto_map in (
        ("config.json", AUTO_MAP),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}),
    ):
        entries = json.loads((source / name).read_text()) | {"auto_map": auto_map}
        (source / name).write_text(json.dumps(entries))
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (source / f"{name}.py").write_text("raise RuntimeError('code of the checkpoint ran')\n")
    streamslr.compress(source, tmp_path / "slr", calibration=text, **RUN)
    assert "names code of its own (auto_map), which is not run" in caplog.text
    export(tmp_path / "slr", tmp_path / "dense", "dense")
    export(tmp_path / "slr", tmp_path / "peft", "peft")
    finetune(tmp_path / "slr", text, tmp_path / "tuned", seq_len=32, batch=8, steps=1, device="cpu")
    for folder in (tmp_path / "slr", tmp_path / "dense", tmp_path / "peft/base", tmp_path / "tuned"):
        for file in folder.glob("*.json"):
            assert '"auto_map"' not in file.read_text(), file
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert verify(tmp_path / "slr").problems == ()


def test_settings_that_json_has_no_number_for_and_other_letters_stay(text: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", blocks=2)
    config = read_config(source) | {"limit": [0.0, float("inf")], "author": "Æsop"}
    (source / "config.json").write_text(json.dumps(config))
    streamslr.compress(source, tmp_path / "slr", calibration=text, **RUN)
    export(tmp_path / "slr", tmp_path / "dense", "dense")
    assert read_config(tmp_path / "dense") == config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "written"),
    [
        (("torch_dtype",), {"torch_dtype"}),
        (("dtype",), {"dtype"}),
        (("dtype", "torch_dtype"), {"dtype", "torch_dtype"}),
        ((), {"torch_dtype"}),
    ],
)
def test_a_dtype_asked_for_is_written_where_the_source_has_it(
    text: Path, tmp_path: Path, names: tuple[str, ...], written: set[str]
) -> None:
    source = tiny_checkpoint(tmp_path / "source", blocks=2)
    config = {name: value for name, value in read_config(source).items() if name != "dtype"}
    (source / "config.json").write_text(json.dumps(config | dict.fromkeys(names, "bfloat16")))
    streamslr.compress(source, tmp_path / "slr", calibration=text, **RUN)
    export(tmp_path / "slr", tmp_path / "dense", "dense", torch.float32)
    found = read_config(tmp_path / "dense")
    assert {name for name in ("dtype", "torch_dtype") if found.get(name) == "float32"} == written
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").dtype == torch.float32


def test_an_adapter_that_peft_refuses_is_refused_before_any_work(text: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
    }
    layers = ["linear_attention", "full_attention", "mlp"]
    source = tiny_checkpoint(tmp_path / "source", "nemotron_h", layer_types=layers, head_dim=16, **sizes)
    streamslr.compress(source, tmp_path / "slr", calibration=text, **RUN)
    with pytest.raises(InputError, match=r"PEFT refuses an adapter.*out_proj.*export it --to dense"):
        export(tmp_path / "slr", tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()
    export(tmp_path / "slr", tmp_path / "dense", "dense")


def test_only_files_of_the_journal_travel(compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "slr")
    (folder / "notes.json").write_text("{}")
    export(folder, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense/notes.json").exists()
