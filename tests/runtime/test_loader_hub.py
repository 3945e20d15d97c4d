"""A compressed model on the hub loads and evaluates as its folder does; what was downloaded is checked."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streamslr
from streamslr.errors import HubError, InputError
from streamslr.results.evaluate import evaluate
from tests.support.hub_server import Hub, serve_hub

IDS = torch.arange(2, 42).view(2, 20)
BLOCK = "model-block-00001.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


@pytest.mark.slow
def test_a_compressed_repository_loads_and_evaluates_as_its_folder(hub: Hub, compressed: Path, text: Path) -> None:
    hub.add("org/slr", compressed)
    with torch.inference_mode():
        ours, theirs = (streamslr.load(name, device="cpu", verify=True)(IDS).logits for name in ("org/slr", compressed))
    assert torch.equal(ours, theirs)
    first, second = (
        evaluate(str(name), text, 16, windows=4, device="cpu", free_memory=10**9) for name in ("org/slr", compressed)
    )
    assert first.nll == second.nll


def test_a_damaged_file_of_a_repository_is_found(hub: Hub, compressed: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "slr")
    (folder / BLOCK).write_bytes((folder / BLOCK).read_bytes()[:-1] + b"\x7f")
    hub.add("org/slr", folder)
    with pytest.raises(InputError, match=f"{BLOCK} is damaged"):
        streamslr.load("org/slr", device="cpu", verify=True)
    with pytest.raises(InputError, match=f"{BLOCK} is damaged"):
        evaluate("org/slr", text, 16, windows=4, device="cpu", free_memory=10**9)


def test_a_revision_is_loaded_as_it_was(hub: Hub, compressed: Path, tmp_path: Path) -> None:
    other = shutil.copytree(compressed, tmp_path / "slr")
    (other / BLOCK).write_bytes((other / BLOCK).read_bytes()[:-1] + b"\x01")
    hub.add("org/slr", compressed, refs=("first",))
    hub.add("org/slr", other)
    with torch.inference_mode():
        first, folder, last = (
            model(IDS).logits
            for model in (
                streamslr.load("org/slr", device="cpu", revision="first"),
                streamslr.load(compressed, device="cpu"),
                streamslr.load("org/slr", device="cpu"),
            )
        )
    assert torch.equal(first, folder)
    assert not torch.equal(first, last)


def test_a_hub_that_is_down_is_an_error_of_the_hub(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(HubError):
        streamslr.load("org/slr", device="cpu")
