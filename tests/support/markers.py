"""Marks for single cases of a parametrised test."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Mark cases as slow; a tuple is one case of several parameters."""
    return _marked(pytest.mark.slow, cases)


def long(*cases: Any) -> list[Any]:
    """Mark cases as long, each a tuple of parameters or one of them."""
    return _marked(pytest.mark.long, cases)


def _marked(mark: pytest.MarkDecorator, cases: tuple[Any, ...]) -> list[Any]:
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*part, marks=mark) for part in parts]
