"""A checkpoint, in a folder or on the hub -> one live transformer block at a time."""
