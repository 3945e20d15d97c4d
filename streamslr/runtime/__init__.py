"""A compressed folder as a model of transformers that runs: packed linears, loading, registration."""
