"""Compressed folders in vLLM, against the same folders loaded by streamslr: tools/test_serving has vLLM."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import streamslr
from streamslr.calibration.tokens import text_windows, window_prefix
from streamslr.errors import InputError
from streamslr.io.packed_layout import packed_bytes
from streamslr.results.evaluate import evaluate
from streamslr.results.export import export
from streamslr.run.journal import LinearRecord, read_journal
from streamslr.spec.pattern import parse_pattern
from streamslr.spec.values import parse_low_rank_values, parse_values
from tests.support.hub_server import serve_hub
from tests.support.tiny_models import VOCABULARY, tiny_checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed here: tools/test_serving")

ENGINE = Path(__file__).parent / "engine.py"
DEMO_MODEL = Path(__file__).parents[2] / "tools" / "demo_model"
# Linears of other than the default 2:4 + 8, by architecture: fused q, k and v of different patterns, ranks, and none.
LLAMA_LIKE = {
    "k_proj": {"pattern": "50%", "rank": 3},
    "v_proj": {"pattern": "4:8", "rank": 0},
    "up_proj": {"pattern": "50%/row"},
    "down_proj": {"pattern": "50%", "rank": 5},
}
ON_GRIDS = {
    "k_proj": {"values": "int4/16"},
    "v_proj": {"pattern": "dense", "values": "int8", "rank": 0},
    "o_proj": {"pattern": "50%", "values": "int4", "low_rank_values": "int8"},
    "up_proj": {"pattern": "50%/row", "values": "fp8/32", "low_rank_values": "int8"},
    "gate_proj": {"low_rank_values": "int8"},
    "down_proj": {"values": "int4", "low_rank_values": "int8"},
}
MIXED = {
    "llama": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": ON_GRIDS,
    "gemma2": LLAMA_LIKE,
    "phi3": {"layers.1.*.qkv_proj": {"pattern": "50%", "rank": 3}, "gate_up_proj": {"pattern": "4:8", "rank": 0}},
    "opt": {"k_proj": {"pattern": "50%", "rank": 0}, "fc1": {"pattern": "1:4"}},
    "gpt_neox": {"query_key_value": {"pattern": "50%"}, "dense_h_to_4h": {"pattern": "8:16", "rank": 0}},
}


def prompts(count: int = 8, length: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, VOCABULARY - 5, (count, length), generator=generator).tolist()


def answer_of_engine(model: Path, environment: dict[str, str] | None = None, **request: Any) -> dict[str, Any]:
    """Return the answer of engine.py."""
    request = {"model": str(model), "arguments": {}, "prompts": prompts(), "max_tokens": 64} | request
    done = subprocess.run(
        [sys.executable, ENGINE],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return answer  # vLLM's log is there too


def generate(folder: Path, ids: Sequence[Sequence[int]], count: int = 64) -> list[list[int]]:
    """Return what `streamslr.load` generates in float32."""
    model: Any = streamslr.load(folder, device="cpu", dtype="float32")
    model.generation_config.eos_token_id = None  # to the end, as vLLM with ignore_eos
    found = [model.generate(torch.tensor([one]), do_sample=False, max_new_tokens=count) for one in ids]
    return [tokens[0, len(one) :].tolist() for one, tokens in zip(ids, found, strict=True)]


def compress(model: Path, text: Path, **settings: Any) -> Path:
    basics: dict[str, Any] = {
        "samples": 4,
        "seq_len": 32,
        "rank": 8,
        "match": False,
        "method": "eora-wanda",
        "device": "cpu",
    }
    out = model.parent / "slr"
    streamslr.compress(model, out, calibration=text, **(basics | settings))
    return out


def compress_mixed(architecture: str, text: Path, folder: Path) -> Path:
    """Compress a tiny model to the patterns and ranks of MIXED."""
    allocation = folder / "linears.json"
    allocation.write_text(json.dumps(MIXED[architecture]))
    tie = architecture == "gemma2"  # vLLM knows it in no other form
    return compress(tiny_checkpoint(folder / "model", architecture, hidden=128, tie=tie), text, allocation=allocation)


@pytest.fixture(scope="module")
def mixed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of mixed patterns and ranks. Read only."""
    return compress_mixed("llama", text, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in bfloat16 at 2:4 + 16, without matching. Read only."""
    out = tmp_path_factory.mktemp("trained") / "slr"
    settings: dict[str, Any] = {"samples": 8, "seq_len": 128, "rank": 16, "method": "eora-wanda", "match": False}
    streamslr.compress(DEMO_MODEL, out, calibration=DEMO_MODEL / "calibration.txt", device="cpu", **settings)
    return out


# Text


@pytest.mark.parametrize("architecture", MIXED)
def test_text_is_that_of_load(architecture: str, text: Path, tmp_path: Path) -> None:
    folder = compress_mixed(architecture, text, tmp_path)
    assert answer_of_engine(folder)["tokens"] == generate(folder, prompts())


def test_biases_and_a_tied_head_are_served(text: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", hidden=128, tie=True, attention_bias=True, mlp_bias=True)
    folder = compress(model, text)
    assert answer_of_engine(folder)["tokens"] == generate(folder, prompts())


def test_a_hub_id_is_served(mixed: Path, tmp_path: Path) -> None:
    with serve_hub() as hub:
        hub.add("org/slr", mixed)
        found = answer_of_engine(Path("org/slr"), hub.environment(tmp_path / "cache"))
    assert found["tokens"] == generate(mixed, prompts())


def test_two_ranks_give_the_text_of_one(mixed: Path) -> None:
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # by itself vLLM wants a NUMA node for each rank
    two = answer_of_engine(mixed, unbound, arguments={"tensor_parallel_size": 2})
    assert two["tokens"] == generate(mixed, prompts())


def test_compiled_text_is_that_of_load(mixed: Path) -> None:
    assert answer_of_engine(mixed, arguments={"enforce_eager": False})["tokens"] == generate(mixed, prompts())


def perplexity_in_vllm(folder: Path, dtype: str, ids: Tensor) -> float:
    request: dict[str, Any] = {"prompts": ids.tolist(), "max_tokens": 1, "prompt_logprobs": True}
    logprobs = torch.tensor(answer_of_engine(folder, arguments={"dtype": dtype}, **request)["logprobs"])
    assert logprobs.shape == (len(ids), ids.shape[1] - 1)
    return math.exp(-logprobs.double().mean())


@pytest.fixture(scope="module")
def heldout(trained: Path) -> Tensor:
    """Windows of 128 tokens, those that `eval` takes: int64 [24, 128]."""
    tokenizer = AutoTokenizer.from_pretrained(trained)
    return text_windows(tokenizer, DEMO_MODEL / "heldout.txt", 128, 24, window_prefix(tokenizer, "auto"))


def test_perplexity_in_float32_is_that_of_eval(trained: Path, heldout: Tensor) -> None:
    text = DEMO_MODEL / "heldout.txt"
    expected = evaluate(str(trained), text, 128, windows=24, device="cpu", free_memory=10**9).perplexity
    assert perplexity_in_vllm(trained, "float32", heldout) == pytest.approx(expected, rel=1e-5)


def test_perplexity_in_bfloat16_is_that_of_a_dense_export(trained: Path, heldout: Tensor, tmp_path: Path) -> None:
    # Not that of eval: vLLM's own kernels for CPUs without AVX-512 cut bfloat16 off instead of rounding it.
    export(trained, tmp_path / "dense", "dense")
    expected = perplexity_in_vllm(tmp_path / "dense", "bfloat16", heldout)
    assert perplexity_in_vllm(trained, "bfloat16", heldout) == pytest.approx(expected, rel=1e-3)


# Memory


def recorded(folder: Path) -> list[tuple[LinearRecord, tuple[int, int]]]:
    """Return the journal's record of each linear, and its shape."""
    state = read_journal(folder)
    assert state
    return [(linear, (linear.shape[0], linear.shape[1])) for block in state.blocks for linear in block.linears]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_linears_take_what_they_take_in_the_shards(architecture: str, text: Path, tmp_path: Path) -> None:
    mixed = compress_mixed(architecture, text, tmp_path)
    most = sum(
        packed_bytes(
            parse_pattern(one.pattern),
            shape,
            one.rank,
            2,
            parse_values(one.values),
            parse_low_rank_values(one.low_rank_values),
        )
        for one, shape in recorded(mixed)
    )
    assert answer_of_engine(mixed, arguments={"dtype": "bfloat16"})["bytes"] == [pytest.approx(most, rel=0.01)]


def test_s_is_dense_where_that_is_asked_for(mixed: Path) -> None:
    dense = sum(o * d + one.rank * (o + d) for one, (o, d) in recorded(mixed))
    answer = answer_of_engine(mixed, {"STREAMSLR_DENSE": "1"})
    assert answer["bytes"] == [4 * dense]
    assert answer["tokens"] == generate(mixed, prompts())


# A server


def completions(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@contextmanager
def server(folder: Path, *arguments: str) -> Iterator[str]:
    """Start vLLM's server on a folder, and give its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    more = ["--enforce-eager", "--max-model-len", "256", *arguments]
    with subprocess.Popen(
        [*line, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout
        said = []
        for text in process.stdout:
            said.append(text)
            if "Application startup complete" in text:
                break
        else:
            raise ChildProcessError("".join(said))
        with ThreadPoolExecutor(1) as reader:
            reader.submit(process.stdout.read)  # a full pipe would stop the server
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def test_sixteen_requests_at_once_get_the_text_of_load(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    words = ["The function returns", "An exception is raised", "A list is", "import os", "The default value", "Each"]
    starts = [f"{first} {second}" for first in words for second in ("the", "of", "when")][:16]
    ids = [tokenizer(start)["input_ids"] for start in starts]
    expected = [tokenizer.decode(tokens) for tokens in generate(trained, ids, 32)]
    body = {"model": str(trained), "max_tokens": 32, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
    with server(trained, "--dtype", "float32") as url, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda start: completions(url, body | {"prompt": start}), starts))
    assert [answer["choices"][0]["text"] for answer in answers] == expected


# Refusals


def test_a_damaged_folder_is_refused_before_weights_are_loaded(mixed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(mixed, damaged)
    (damaged / "model-block-00001.safetensors").unlink()
    with pytest.raises(ChildProcessError, match=r"InputError.*model-block-00001"), server(damaged):
        pass


def quantization(entry: dict[str, Any]) -> Any:
    from streamslr.runtime.vllm import StreamslrQuantization

    return StreamslrQuantization.from_config({"quant_method": "streamslr", "pattern": "2:4", "rank": 4} | entry)


def test_a_later_format_version_is_refused() -> None:
    with pytest.raises(InputError, match="format_version 99"):
        quantization({"format_version": 99})


def test_a_mixture_of_experts_is_refused_before_weights_are_loaded(text: Path, tmp_path: Path) -> None:
    folder = compress(tiny_checkpoint(tmp_path / "model", "mixtral"), text)
    with pytest.raises(InputError, match="mixture of experts"):
        quantization({"format_version": 3}).maybe_update_config(str(folder))


@pytest.mark.parametrize("model_type", ["bloom", "llama4"])
def test_models_whose_weights_vllm_rearranges_by_name_are_refused(mixed: Path, model_type: str) -> None:
    with pytest.raises(InputError, match=f"is a {model_type}, whose weights vLLM rearranges"):
        quantization({"format_version": 3}).maybe_update_config(str(mixed), SimpleNamespace(model_type=model_type))


def test_other_ranks_and_dense_s_do_not_share_compiled_graphs(
    mixed: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    for folder, dense in ((mixed, "0"), (trained, "0"), (mixed, "1")):
        monkeypatch.setenv("STREAMSLR_DENSE", dense)
        config = SimpleNamespace(quantization_config={})
        quantization({"format_version": 3}).maybe_update_config(str(folder), config)
        digests.add(config.quantization_config["linears"])
    assert len(digests) == 3


def test_a_process_that_vllm_forks_can_check_what_it_loads(text: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", blocks=1, hidden=512)
    folder = compress(model, text, rank=0, method="magnitude", pattern="50%")
    script = f"""
import os, torch
from streamslr.io.packed_check import check_positions
from streamslr.runtime.vllm import StreamslrQuantization
from streamslr.spec.pattern import parse_pattern
torch.set_num_threads(2)
StreamslrQuantization().maybe_update_config({str(folder)!r})
if (child := os.fork()) == 0:
    meta, offsets = torch.zeros(1024, 1024, dtype=torch.uint8), torch.zeros(1025, dtype=torch.int64)
    parts = {{"meta": meta, "row_offsets": offsets, "values": torch.zeros(0)}}
    os._exit(len(check_positions(parts, parse_pattern("50%"), (1024, 8192))))
print("ended with", os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["ended with 0"], done.stderr[-2000:]


def test_linears_without_a_layer_are_refused(mixed: Path) -> None:
    known = quantization({"format_version": 3})
    known.maybe_update_config(str(mixed))
    with pytest.raises(InputError, match=r"no layer for the packed linear model\.layers\.0\.mlp\.down_proj"):
        known.require_all_claimed()
    known.require_all_claimed()  # once a process


def test_registering_twice_is_registering_once() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from streamslr.runtime.vllm import register

    register()
    register()
    assert QUANTIZATION_METHODS.count("streamslr") == 1
