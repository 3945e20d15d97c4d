"""What each linear becomes: sparsity pattern, rank, and the allocation over the model."""
