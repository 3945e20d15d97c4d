"""What tests on a pretended GPU share."""

import pytest

from streamslr.io import packing


@pytest.fixture(autouse=True)
def _no_tables_of_another_device() -> None:
    """Forget tables of packing that a GPU of another test holds: to this one they are strange memory."""
    packing._flags_of_byte.cache_clear()
    packing._shifts_of_byte.cache_clear()
