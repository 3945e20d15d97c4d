"""The version of streamslr: part of what a run pins at its start."""

__version__ = "0.13.0"
