"""Errors of other libraries: over a user's files they become one line; those not about files pass through."""

import pytest

from streamslr.errors import HubError, InputError
from streamslr.model.border import refusing


class Panic(BaseException):
    """As pyo3 raises where a library in Rust panics."""


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a\nb"), RecursionError("a"), Panic("a"), OSError("a")])
def test_any_error_becomes_one_line(error: BaseException) -> None:
    with (
        pytest.raises(InputError, match=r"^config.json cannot be read: '?a'?; copy it again$"),
        refusing("config.json cannot be read", "copy it again"),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("a"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        HubError("a"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_not_about_the_file_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, refusing("config.json cannot be read", "copy it again"):
        raise error
    assert raised.value is error
