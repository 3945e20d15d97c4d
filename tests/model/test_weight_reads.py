"""Code of a model that uses a linear in another way than to call it: seen before work begins, and right after it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, initialization
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaPreTrainedModel

import streamslr
from streamslr.config import RunConfig
from streamslr.errors import InputError
from streamslr.io.safetensors_file import shard_header
from streamslr.model.weight_reads import AbsentWeight, WeightReadError
from streamslr.results.export import export
from streamslr.results.inspect import block_summary, block_table, read_run, run_table
from streamslr.results.report.page import render_page
from streamslr.results.verify import verify
from streamslr.run.context import open_run
from streamslr.run.journal import JournalState
from streamslr.runtime.linear import SparseLowRankLinear
from streamslr.spec.pattern import parse_pattern

SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "match": False}


def shown(*tables: Table) -> str:
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(*tables)
    return console.export_text()


def linears_of(journal: JournalState) -> set[str]:
    return {linear.name.partition("mlp.")[2] for block in journal.blocks for linear in block.linears} - {""}


# What a packed linear answers


def packed() -> SparseLowRankLinear:
    return SparseLowRankLinear(16, 8, parse_pattern("2:4"), 2, dtype=torch.bfloat16)


def test_a_packed_linear_tells_dtype_device_and_shape_of_its_weight() -> None:
    weight = packed().weight
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (torch.bfloat16, "cpu", (8, 16))
    assert (weight.size(0), weight.dim(), weight.numel(), weight.is_cuda) == (8, 2, 128, False)
    assert "weight" not in dict(packed().named_parameters()) | packed().state_dict()
    assert packed().to(torch.float32).weight.dtype == torch.float32


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: weight * 2,
        lambda weight: torch.ones(3, 16) @ weight.T,
        lambda weight: weight[0],
        lambda weight: nn.functional.linear(torch.ones(1, 16), weight),
        lambda weight: torch.cat([weight, weight]),
        lambda weight: weight == 0,
        lambda weight: weight.data.normal_(),
        lambda weight: weight.tolist(),
        lambda weight: list(weight),
    ],
)
def test_a_packed_linear_has_no_numbers_to_read(read: Callable[[AbsentWeight], object]) -> None:
    with pytest.raises(WeightReadError, match=r"linear 8x16, which is packed; export the folder with --to dense"):
        read(packed().weight)


def test_transformers_initialisation_leaves_a_packed_linear_alone() -> None:
    weight = packed().weight
    assert initialization.normal_(weight) is weight


# A model whose code reads weights


def reads_values(self: Any, x: Tensor) -> Tensor:
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return nn.functional.linear(hidden, self.down_proj.weight)


def reads_dtype(self: Any, x: Tensor) -> Tensor:
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    out: Tensor = self.down_proj(hidden.to(self.down_proj.weight.dtype).to(self.down_proj.weight.device))
    return out


def pools(self: Any, x: Tensor) -> Tensor:
    hidden = self.act_fn(self.gate_proj(x)) + self.up_proj(x.mean(1, keepdim=True))
    out: Tensor = self.down_proj(hidden)
    return out


def skips(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "dense", "why"),
    [
        (reads_values, "down_proj", "the model's own code reads its weight"),
        (reads_dtype, None, ""),
        (pools, "up_proj", "it sees 2 inputs where 10 tokens pass its block"),
        (skips, "up_proj", "it sees 0 inputs where 10 tokens pass its block"),
    ],
)
def test_a_linear_that_cannot_be_packed_stays_dense(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: Any, dense: str | None, why: str
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    out = tmp_path / "slr"
    plan = open_run(RunConfig(model=str(llama), out=out, calibration=text, **SETTINGS)).plan
    assert plan.dense == ((f"model.layers.*.mlp.{dense} (2 linears): {why}",) if dense else ())

    journal = streamslr.compress(llama, out, calibration=text, **SETTINGS)
    assert linears_of(journal) == {"gate_proj", "up_proj", "down_proj"} - {dense}
    if dense:
        assert f"model.layers.0.mlp.{dense}.weight" in shard_header(out / "model-block-00000.safetensors").tensors
    recorded = {f"model.layers.1.mlp.{dense}": why} if dense else {}
    assert block_summary(out, read_run(out).blocks[1])["dense"] == recorded
    assert (f"model.layers.*.mlp.{dense} (2 linears): " in render_page(out, journal)) == bool(dense)
    assert (why in shown(block_table(out, journal.blocks[1]), run_table(out, journal))) == bool(dense or not why)
    assert not verify(out).problems
    export(out, tmp_path / "dense", "dense", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ours = streamslr.load(out, device="cpu", dtype=torch.float32)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def reads_all_values(self: Any, x: Tensor) -> Tensor:
    gate, up, down = (linear.weight for linear in (self.gate_proj, self.up_proj, self.down_proj))
    out: Tensor = (self.act_fn(x @ gate.T) * (x @ up.T)) @ down.T
    return out


def attends_with_values(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    q, k, v, o = (getattr(self, f"{name}_proj").weight for name in "qkvo")
    return hidden_states + hidden_states @ q.T @ o.T + (hidden_states @ (k + v).T).sum(), None


def test_a_block_of_which_no_linear_can_be_packed_is_refused_with_the_reason(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", reads_all_values)
    monkeypatch.setattr(LlamaAttention, "forward", attends_with_values)
    why = r"no linear of model\.layers\.0 can be packed, first .*_proj: the model's own code reads its weight"
    with pytest.raises(InputError, match=why):
        open_run(RunConfig(model=str(llama), out=tmp_path / "slr", calibration=text, **SETTINGS))


def initialize_with(monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], object]) -> None:
    """Have the initialisation of an MLP do something with its down projection."""

    def init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        PreTrainedModel._init_weights(self, module)
        if isinstance(module, LlamaMLP):
            work(module.down_proj)

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", init_weights, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "dense"),
    [
        (lambda linear: initialization.normal_(linear.weight), False),
        (lambda linear: nn.init.normal_(linear.weight), False),  # transformers guards torch's own too
        (lambda linear: initialization.normal_(linear.weight, std=linear.weight.shape[0] ** -0.5), False),
        (lambda linear: torch.isnan(linear.weight), True),
    ],
)
def test_initialisation_that_reads_a_weight(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Any], object], dense: bool
) -> None:
    initialize_with(monkeypatch, work)
    journal = streamslr.compress(llama, tmp_path / "slr", calibration=text, **SETTINGS)
    assert ("down_proj" not in linears_of(journal)) == dense
    streamslr.load(tmp_path / "slr", device="cpu")


def test_initialisation_that_needs_a_dense_linear_is_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize_with(monkeypatch, lambda linear: linear.reset_parameters())
    with pytest.raises(InputError, match="cannot initialise LlamaMLP when its linears are packed"):
        open_run(RunConfig(model=str(llama), out=tmp_path / "slr", calibration=text, **SETTINGS))
