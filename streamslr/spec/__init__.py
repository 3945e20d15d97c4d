"""The spec of each linear: sparsity patterns, ranks, and the allocation over the model."""
