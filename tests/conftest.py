"""Settings that must stand before torch is imported."""

import os

# Tensors here are tiny; threads would only wait for each other, the more so in the children of tests/killing.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")
