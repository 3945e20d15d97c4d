"""Families of models in the form of the hub, through all that streamslr does: equal at each step, or refused.

`tests/support/families.py` makes them and says what becomes of each; the models guide has its table.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel

import streamslr
from streamslr.calibration.tokens import text_windows
from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.memory import free_host_memory
from streamslr.model.checkpoint import open_checkpoint
from streamslr.model.meta_model import auto_class
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.results.inspect import read_run
from streamslr.results.verify import verify
from streamslr.run.context import open_run
from tests.support.architectures import FAMILIES_BEGIN, GUIDE, SEQ_LEN, WINDOWS, section, whole_loss
from tests.support.compressed_folders import run_contents
from tests.support.families import FAMILIES, Family, families_table
from tests.support.killing import compress_in_child
from tests.support.markers import long

ALSO = {"qwen3_5", "granite_4_micro", "nemotron_3_nano", "gemma_4_26b_a4b", "kimi_k2_6"}
"""Second forms of families."""
KILLED = ["deepseek_v3", "qwen3_5_moe", "gpt_oss", "llama4", "jamba", "gemma_3n", "gpt2"]
"""One of each way in which a checkpoint is read or a block is called."""
COMPRESSED = [
    *(name for name, family in FAMILIES.items() if family.result == "all" and name not in ALSO),
    *long(*(name for name, family in FAMILIES.items() if family.result == "all" and name in ALSO)),
]
STREAMED = [name for name, family in FAMILIES.items() if family.result != "refused"]
NOT_COMPRESSED = [name for name, family in FAMILIES.items() if family.result != "all"]
RUN: dict[str, Any] = {
    **{"pattern": "1:4", "samples": 4, "seq_len": SEQ_LEN, "rank": 4, "device": "cpu", "host_mem": "4GB"},
    **{"match_epochs": 2, "match_batch": 2, "method": "eora-sparsegpt"},
}


@dataclass(frozen=True)
class Made:
    """A family's checkpoint, its dense twin, and the windows of a text."""

    family: Family
    hub: Path
    twin: Path
    text: Path
    ids: Tensor

    @property
    def own_class(self) -> Any:
        """Class of transformers that makes the whole model that was stored."""
        config = AutoConfig.from_pretrained(self.twin)
        return AutoModelForMultimodalLM if "text_config" in config.sub_configs else auto_class(config)

    def whole(self, folder: Path) -> float:
        """Return the loss of a dense folder, whole in transformers, once it is sure that nothing in it is random."""
        model, report = self.own_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"]
        return whole_loss(model, self.ids)

    def loaded(self, folder: Path) -> float:
        return whole_loss(streamslr.load(folder, device="cpu", dtype="float32"), self.ids)

    def streamed(self, folder: Path) -> float:
        free = free_host_memory()
        return evaluate(str(folder), self.text, SEQ_LEN, windows=WINDOWS, device="cpu", free_memory=free).nll

    def settings(self, out: Path) -> dict[str, Any]:
        return {"model": self.hub, "out": out, "calibration": self.text, **RUN}


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp(request.param)
    family = FAMILIES[request.param]
    family.make().write(folder / "hub", folder / "twin")
    ids = text_windows(AutoTokenizer.from_pretrained(folder / "twin"), text, SEQ_LEN, WINDOWS)
    yield Made(family, folder / "hub", folder / "twin", text, ids)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def packed(made: Made) -> Path:
    """Return the folder that a run without interruption makes."""
    out = made.hub.parent / "packed"
    streamslr.compress(**made.settings(out))
    return out


def equal(loss: float) -> Any:
    return pytest.approx(loss, rel=1e-6)


def test_the_guide_has_the_table_of_families() -> None:
    assert section(GUIDE.read_text(), FAMILIES_BEGIN) == families_table()


@pytest.mark.slow
@pytest.mark.parametrize("made", STREAMED, indirect=True)
def test_streamed_it_predicts_what_transformers_does(made: Made) -> None:
    assert made.streamed(made.hub) == equal(made.whole(made.twin))


@pytest.mark.slow
@pytest.mark.parametrize("made", NOT_COMPRESSED, indirect=True)
def test_refused_before_work_for_the_reason_that_the_guide_gives(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(made.family.reason)):
        streamslr.compress(**made.settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("made", COMPRESSED, indirect=True)
def test_loaded_exported_and_saved_it_predicts_the_same(made: Made, packed: Path, tmp_path: Path) -> None:
    loss = made.streamed(packed)
    assert abs(loss - made.whole(made.twin)) > 1e-5 * loss, "a mix-up with the dense model would not show"
    export(packed, tmp_path / "exported", "dense", torch.float32)
    streamslr.load(packed, device="cpu").save_pretrained(tmp_path / "saved")
    for path in packed.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "saved")
    found = {
        "loaded": made.loaded(packed),
        "exported": made.whole(tmp_path / "exported"),
        "exported, streamed": made.streamed(tmp_path / "exported"),
        "saved": made.loaded(tmp_path / "saved"),
        "saved, streamed": made.streamed(tmp_path / "saved"),
    }
    assert found == {step: equal(loss) for step in found}


@pytest.mark.slow
@pytest.mark.parametrize("made", COMPRESSED, indirect=True)
def test_the_plan_foretells_what_is_written(made: Made, packed: Path) -> None:
    planned = open_run(RunConfig.of(**made.settings(made.hub.parent / "other"))).plan.output_bytes
    written = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert written == pytest.approx(planned, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "made", [*KILLED, *long(*(sorted(FAMILIES.keys() - {*KILLED, *NOT_COMPRESSED})))], indirect=True
)
def test_killed_it_goes_on_to_the_same_bytes(made: Made, packed: Path, tmp_path: Path) -> None:
    settings = made.settings(tmp_path / "out")
    assert compress_in_child(settings, die_at=9) == -9
    assert (tmp_path / "out" / "streamslr.json").exists()
    assert compress_in_child(settings) == 0
    assert run_contents(tmp_path / "out") == run_contents(packed)


@pytest.mark.slow
@pytest.mark.parametrize("made", COMPRESSED, indirect=True)
def test_it_keeps_every_name_and_the_bytes_outside_its_blocks(made: Made, packed: Path, tmp_path: Path) -> None:
    assert verify(packed).problems == ()
    export(packed, tmp_path / "exported", "dense")
    dense = load_file(made.twin / "model.safetensors")
    kept = {name: list(tensor.shape) for name, tensor in dense.items() if not re.search(made.family.left_out, name)}
    exported = open_checkpoint(str(tmp_path / "exported")).tensors
    assert {name: list(info.shape) for name, info in exported.items()} == kept
    outside = load_file(packed / "model-outside.safetensors")
    assert len(outside) >= 2
    assert [name for name, tensor in outside.items() if not torch.equal(tensor, dense[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("made", COMPRESSED, indirect=True)
def test_the_model_of_its_own_class_is_loaded(made: Made, packed: Path) -> None:
    whole: PreTrainedModel = made.own_class.from_pretrained(made.twin)
    assert type(streamslr.load(packed, device="cpu")) is type(whole)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["qwen3_5"], indirect=True)
def test_the_decoder_alone_is_loaded_where_transformers_has_a_class_for_it(made: Made, packed: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert type(decoder).__name__ == "Qwen3_5ForCausalLM"
    assert whole_loss(decoder, made.ids) == equal(made.streamed(packed))


@pytest.mark.slow
@pytest.mark.parametrize("made", COMPRESSED, indirect=True)
def test_what_the_model_does_not_run_is_named(made: Made, packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_run(packed).unread == made.family.unread
    caplog.set_level(logging.INFO, "streamslr")
    open_run(RunConfig.of(**made.settings(made.hub.parent / "other")))
    assert ("kept as they are" in caplog.text) == bool(made.family.unread)
    assert all(part in caplog.text for part in made.family.unread)
