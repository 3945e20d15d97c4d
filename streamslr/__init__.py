"""Out-of-core compression."""
