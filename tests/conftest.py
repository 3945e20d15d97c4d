"""Shared fixtures: a text, a dense model, two compressed folders; and settings that must precede the import of torch.

The process that only hands out tests to others reads this file too, so torch is imported where it is needed.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamslr
from tests.support.browser import CHROMIUM

# Tensors here are tiny: more threads would only wait for each other, above all in the children of support/killing.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # Triton reads it when it is first imported, by whatever test
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file of the longest test, so that no process is left with it when the others have ended."""
    items.sort(key=lambda item: item.path.name != "test_run.py")


def pytest_collection_finish() -> None:
    """Spare what the imports made from garbage collection: a run collects several times, and so takes half as long."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a browser or a GPU where there is none."""
    if item.get_closest_marker("browser") and CHROMIUM is None:
        pytest.skip("no chromium here: the page was not opened in a browser")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread, as each rank of a test does."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate, train and evaluate on."""
    from tests.support.tiny_models import TEXT

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of two blocks. Read only: every test of the session sees it."""
    from tests.support.tiny_models import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama", blocks=2)


@pytest.fixture(scope="session")
def compressed(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run` makes of `llama` at 2:4 + 4 without matching. Read only."""
    out = tmp_path_factory.mktemp("compressed") / "slr"
    streamslr.compress(llama, out, calibration=text, samples=4, seq_len=16, rank=4, device="cpu", match=False)
    return out


@pytest.fixture(scope="session")
def matched(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `run` makes of `llama` at 2:4 + 4 with matching, within 4 GB of host memory. Read only."""
    out = tmp_path_factory.mktemp("matched") / "slr"
    settings: dict[str, Any] = {"samples": 4, "seq_len": 16, "rank": 4, "device": "cpu", "host_mem": "4GB"}
    streamslr.compress(llama, out, calibration=text, match_epochs=3, match_batch=2, **settings)
    return out
