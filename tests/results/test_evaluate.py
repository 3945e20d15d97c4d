"""Perplexity: equal to what the whole model gives, whatever the tier, for dense and compressed folders."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

import streamslr
from streamslr.calibration.tokens import text_windows
from streamslr.errors import InputError, StreamslrError
from streamslr.model.checkpoint import open_checkpoint
from streamslr.results.evaluate import evaluate
from tests.support.compressed_folders import compressed_folder, rewrite_block

SEQ_LEN = 16


def whole_model_nll(model: Path, text: Path) -> float:
    ids = text_windows(open_checkpoint(str(model)).tokenizer(), text, SEQ_LEN, None)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        log_p = dense(ids).logits.double().log_softmax(-1)
    return float(-log_p[:, :-1].gather(2, ids[:, 1:, None]).mean())


@pytest.mark.parametrize("free_memory", [0, 10**9])
def test_a_dense_checkpoint_has_the_whole_models_perplexity(llama: Path, text: Path, free_memory: int) -> None:
    result = evaluate(str(llama), text, SEQ_LEN, device="cpu", free_memory=free_memory)
    assert result.nll == pytest.approx(whole_model_nll(llama, text), abs=1e-5)
    assert result.tokens == result.windows * (SEQ_LEN - 1)


@pytest.mark.slow
def test_a_compressed_folder_has_the_perplexity_of_its_merged_weights(
    llama: Path, matched: Path, text: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(matched))
    merged = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weights = {name: checkpoint.read([name])[name].float() for name in checkpoint.tensors}
    merged.load_state_dict(weights, strict=True)
    merged.save_pretrained(tmp_path / "merged")
    open_checkpoint(str(llama)).tokenizer().save_pretrained(tmp_path / "merged")
    result = evaluate(str(matched), text, SEQ_LEN, device="cpu", free_memory=10**9)
    assert result.nll == pytest.approx(whole_model_nll(tmp_path / "merged", text), abs=1e-5)
    assert result.nll != pytest.approx(whole_model_nll(llama, text), abs=1e-3), "compression shows"


def test_an_unfinished_folder_is_refused(text: Path, tmp_path: Path) -> None:
    unfinished = compressed_folder(tmp_path, done=1)
    with pytest.raises(InputError, match="lacks"):
        evaluate(str(unfinished), text, SEQ_LEN, device="cpu", free_memory=10**9)


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(llama: Path, text: Path, tmp_path: Path) -> None:
    """BOS is the first token of every window of calibration and evaluation alike; journal and result say so."""
    model = shutil.copytree(llama, tmp_path / "with-bos")
    words = Tokenizer.from_file(str(model / "tokenizer.json"))
    words.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    words.save(str(model / "tokenizer.json"))
    settings: dict[str, Any] = {"calibration": text, "samples": 4, "seq_len": SEQ_LEN, "rank": 4, "match": False}
    journal = streamslr.compress(model, tmp_path / "out", method="eora-wanda", device="cpu", **settings)
    assert journal.bos
    results = {
        bos: evaluate(str(tmp_path / "out"), text, SEQ_LEN, bos=bos, device="cpu", free_memory=10**9)
        for bos in ("auto", "yes", "no")
    }
    assert {bos: result.bos for bos, result in results.items()} == {"auto": True, "yes": True, "no": False}
    assert results["auto"] == results["yes"]
    assert results["auto"].nll != pytest.approx(results["no"].nll, abs=1e-6)
    plain = streamslr.compress(llama, tmp_path / "plain", method="eora-wanda", device="cpu", **settings)
    assert plain.bos is False
    assert plain.fingerprint["tokens"] != journal.fingerprint["tokens"]


@pytest.mark.parametrize("file", ["model-outside.safetensors", "model-block-00001.safetensors", "tokenizer.json"])
def test_a_flipped_bit_gives_no_perplexity(matched: Path, text: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(matched, tmp_path / "slr")
    content = bytearray((folder / file).read_bytes())
    content[-3] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file} is damaged or was changed: its sha256"):
        evaluate(str(folder), text, SEQ_LEN, device="cpu", free_memory=10**9)


def test_linears_of_another_rank_than_the_journals_give_no_perplexity(
    matched: Path, text: Path, tmp_path: Path
) -> None:
    def drop_low_rank(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("U", "V"):
            del tensors[f"model.layers.0.self_attn.q_proj.{part}"]

    folder = shutil.copytree(matched, tmp_path / "slr")
    rewrite_block(folder, drop_low_rank)
    with pytest.raises(InputError, match=r"q_proj is stored as 2:4 of 64x64 at rank 0, the journal says"):
        evaluate(str(folder), text, SEQ_LEN, device="cpu", free_memory=10**9)


def test_a_file_in_place_of_the_shards_gives_no_perplexity(matched: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(matched, tmp_path / "slr")
    streamslr.load(matched, device="cpu").save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "saved/model.safetensors", folder)
    with pytest.raises(InputError, match=r"does not name model\.safetensors"):
        evaluate(str(folder), text, SEQ_LEN, device="cpu", free_memory=10**9)


def test_without_a_journal_it_says_that_nothing_is_checked(
    matched: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(matched, tmp_path / "slr")
    (folder / "streamslr.json").unlink()
    evaluate(str(folder), text, SEQ_LEN, windows=1, device="cpu", free_memory=10**9)
    assert "no streamslr.json: its bytes are not compared with any digest" in caplog.text


def test_a_changed_setting_of_the_model_gives_no_perplexity(matched: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(matched, tmp_path / "slr")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1', '"rms_norm_eps": 2'))
    with pytest.raises(InputError, match=r"config\.json is damaged or was changed: its sha256"):
        evaluate(str(folder), text, SEQ_LEN, device="cpu", free_memory=10**9)


@pytest.mark.parametrize("fault", ["removed", "flipped"])
def test_hidden_states_that_change_on_the_disk_stop_the_evaluation(
    llama: Path, text: Path, tmp_path: Path, fault: str
) -> None:
    def harm(done: int, total: int) -> None:
        chunk = next(path for path in tmp_path.rglob("*") if path.is_file() and path.name != "zarr.json")
        content = bytearray(chunk.read_bytes())
        content[5] ^= 1
        chunk.unlink() if fault == "removed" else chunk.write_bytes(content)

    with pytest.raises(StreamslrError, match="start the same line again"):
        evaluate(str(llama), text, SEQ_LEN, windows=4, device="cpu", scratch=tmp_path, free_memory=0, step=harm)
    assert not list(tmp_path.iterdir())
