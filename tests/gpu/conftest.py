"""What tests on a pretended GPU share."""

from collections.abc import Iterator

import pytest

from streamslr.io import packing
from streamslr.runtime import triton_product
from streamslr.solvers import threebasil_fused


@pytest.fixture(scope="module", autouse=True)
def _no_trace() -> Iterator[None]:
    """Keep what runs of a module's fixtures found on their GPU from the tests of other modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threebasil_fused, "_verdicts", {})
        yield


@pytest.fixture(autouse=True)
def _a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was found on the GPU of another test, and tables that it holds: strange memory to this one."""
    monkeypatch.setattr(threebasil_fused, "_verdicts", {})
    packing._flags_of_byte.cache_clear()
    packing._shifts_of_byte.cache_clear()
    monkeypatch.setattr(triton_product, "_verdicts", {})
    triton_product._ranks_of_byte.cache_clear()
