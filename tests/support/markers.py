"""Marks for single cases of a parametrised test."""

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Mark cases as slow; a tuple is one case of several parameters."""
    parts = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*part, marks=pytest.mark.slow) for part in parts]
