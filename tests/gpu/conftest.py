"""What tests on a pretended GPU share."""

import pytest

from streamslr.io import packing
from streamslr.solvers import threebasil_fused


@pytest.fixture(autouse=True)
def _a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was found on the GPU of another test, and tables that it holds: strange memory to this one."""
    monkeypatch.setattr(threebasil_fused, "_verdicts", {})
    packing._flags_of_byte.cache_clear()
    packing._shifts_of_byte.cache_clear()
