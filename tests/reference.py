"""3BASiL in float64 as the paper writes it: slow, explicit, and independent of the package's solver."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """S [o, d] and UV [o, d] in float64, and the iterations it took."""

    S: Tensor
    UV: Tensor
    iterations: int


def damped(gram: Tensor, share: float = 0.005) -> Tensor:
    """H [d, d] float64 as the official code solves in it: dead inputs get 1, then both kinds of damping."""
    H = gram.double().clone()
    diagonal = torch.diagonal(H)
    live = diagonal > 0
    extra = share * diagonal + share * diagonal[live].mean() if live.any() else torch.zeros_like(diagonal)
    H += torch.diag(torch.where(live, extra, 1.0 - diagonal))
    return H


def loss(weight: Tensor, gram: Tensor, approximation: Tensor) -> float:
    """tr(R H Rᵀ) / tr(W H Wᵀ), float64, columns of dead inputs left out."""
    live = torch.diagonal(gram) > 0
    H = damped(gram)[live][:, live]
    W = weight.double()[:, live]
    R = W - approximation.double()[:, live]
    return (torch.trace(R @ H @ R.T) / torch.trace(W @ H @ W.T)).item()


def project(scores: Tensor, pattern: str) -> Tensor:
    """Bool [o, d]: the largest magnitudes, n of every m for "n:m", all but the share for "p%"."""
    o, d = scores.shape
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = scores.abs().reshape(o, d // m, m)
        chosen = groups.topk(n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(2, chosen, True).reshape(o, d)
    kept = round(o * d * (1 - float(pattern.rstrip("%")) / 100))
    chosen = scores.abs().flatten().topk(kept).indices
    return torch.zeros(o * d, dtype=torch.bool).scatter(0, chosen, True).reshape(o, d)


def root(G: Tensor) -> Tensor:
    """The symmetric G^½."""
    values, vectors = torch.linalg.eigh(G)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def best_low_rank(E: Tensor, G: Tensor, rank: int) -> Tensor:
    """argmin over rank-r UV [o, d] of ‖(E − UV) G^½‖_F: the truncated SVD of E G^½, brought back."""
    half = root(G)
    u, values, vt = torch.linalg.svd(E @ half, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank] @ torch.linalg.inv(half)


def sparse_step(W: Tensor, UV: Tensor, D: Tensor, Y: Tensor, G: Tensor, rho: float) -> Tensor:
    """S = [(W − UV) G + ρ (D − Y)] (G + ρI)⁻¹: the minimum over S of the augmented Lagrangian, dual scaled."""
    identity = torch.eye(len(G), dtype=G.dtype)
    return ((W - UV) @ G + rho * (D - Y)) @ torch.linalg.inv(G + rho * identity)


def solve(weight: Tensor, gram: Tensor, pattern: str, rank: int, rho: float = 0.1) -> Reference:
    """The paper's iteration with the official schedule of ρ."""
    H = damped(gram)
    scale = torch.diagonal(H).sqrt()
    G = H / scale[:, None] / scale[None, :]
    W = weight.double() * scale
    W[:, torch.diagonal(gram) <= 0] = 0
    D = W * project(W, pattern)
    Y, UV = torch.zeros_like(W), torch.zeros_like(W)
    support, iterations, moved = D != 0, 0, math.inf
    while moved > 0 and not (iterations >= 100 and moved < 3e-4):
        for _ in range(10):
            S = sparse_step(W, UV, D, Y, G, rho)
            D = (S + Y) * project(S + Y, pattern)
            Y = S + Y - D
            UV = best_low_rank(W - S, G, rank)
            iterations += 1
        now = D != 0
        moved = ((now != support).sum() / now.sum()).item()
        support = now
        growth = 1.1 if moved > 0.1 else 1.05 if moved > 0.005 else 1.02
        rho, Y = rho * growth, Y / growth
    return Reference(D / scale, UV / scale, iterations)
