"""Small layers with the structure of trained ones: correlated inputs, decaying spectra, outlier channels."""

import torch
from torch import Tensor

from streamslr.solve import LayerProblem, parse_pattern


def made_problem(o: int = 48, d: int = 64, pattern: str = "2:4", rank: int = 4, seed: int = 0) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spectrum = torch.arange(1, d + 1).float().rsqrt()
    basis = torch.linalg.qr(normal(d, d)).Q
    channels = torch.exp(0.5 * normal(d))
    X = ((normal(6 * d, d) * spectrum) @ basis.T + 0.1) * channels
    low = normal(o, 6) @ torch.diag(torch.tensor([3.0, 2.0, 1.5, 1.0, 0.7, 0.5])) @ normal(6, d)
    W = 0.02 * (low / 3 + normal(o, d) * torch.exp(0.3 * normal(o, d)))
    return LayerProblem(f"layers.{seed}.made", W, X.T @ X / len(X), parse_pattern(pattern), rank, seed)
