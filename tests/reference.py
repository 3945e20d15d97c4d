"""Each method and matching in float64 as its paper writes it: slow, explicit, independent of the package."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    """Bool [o, d]: the largest magnitudes, n of every m for "n:m", all but the share for "p%", in "p%/row" of a row."""
    o, d = scores.shape
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = scores.abs().reshape(o, d // m, m)
        chosen = groups.topk(n, dim=2).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(2, chosen, True).reshape(o, d)
    share = 1 - float(pattern.removesuffix("/row").rstrip("%")) / 100
    if pattern.endswith("/row"):
        chosen = scores.abs().topk(round(d * share), dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    kept = round(o * d * share)
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


# Pure sparsity: W, H -> S [o, d] float64, H damped


def magnitude(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    return W * project(W, pattern)


def wanda(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    return W * project(W * torch.diagonal(H).sqrt(), pattern)


def sparsegpt(W: Tensor, H: Tensor, pattern: str, block: int = 128) -> Tensor:
    """arXiv 2301.00774, equations 3 to 5: the inverse of what is left of H, anew for each column."""
    W = W.clone()
    d = W.shape[1]
    remaining = [torch.linalg.inv(H[j:, j:]) for j in range(d)]
    saliency = torch.stack([inverse[0, 0] for inverse in remaining])
    kept = torch.zeros_like(W, dtype=torch.bool)
    decided = int(pattern.split(":")[1]) if ":" in pattern else block
    for j in range(d):
        if j % decided == 0:
            at = slice(j, min(j + decided, d))
            kept[:, at] = project(W[:, at] / saliency[at].sqrt(), pattern)
        error = torch.where(kept[:, j], 0, W[:, j]) / remaining[j][0, 0]
        W[:, j:] -= error[:, None] * remaining[j][0]
        W[:, j] *= kept[:, j]
    return W


def refitted(W: Tensor, H: Tensor, support: Tensor) -> Tensor:
    """The least loss that a support [o, d] allows, row by row from the normal equations."""
    S = torch.zeros_like(W)
    for i, kept in enumerate(support):
        S[i, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[i])
    return S


def alps(W: Tensor, H: Tensor, pattern: str) -> Tensor:
    """arXiv 2406.07831: ADMM as in `solve`, without U·V, then the values of its support to the end."""
    scale = torch.diagonal(H).sqrt()
    G = H / scale[:, None] / scale[None, :]
    T = W * scale
    D, Y, rho, support = T * project(T, pattern), torch.zeros_like(T), 0.1, None
    for i in range(1, 400):
        S = sparse_step(T, torch.zeros_like(T), D, Y, G, rho)
        D = (S + Y) * project(S + Y, pattern)
        Y = S + Y - D
        if i % 3 == 0:  # the paper looks at the support every 3 iterations
            if support is not None:
                moved = ((D != 0) != support).sum().item()
                if moved == 0:
                    break
                growth = 1.3 if moved >= 0.1 * D.numel() else 1.2 if moved >= 0.005 * D.numel() else 1.1
                rho, Y = rho * growth, Y / growth
            support = D != 0
    return refitted(T, G, D != 0) / scale


def best_support(W: Tensor, H: Tensor, n: int, m: int) -> float:
    """The least tr(R H Rᵀ) over all n:m supports of one row W [d], by trying each."""
    d = len(W)
    groups = list(itertools.combinations(range(m), n))
    least = math.inf
    for choice in itertools.product(groups, repeat=d // m):
        support = torch.zeros(1, d, dtype=torch.bool)
        support[0, [m * g + i for g, chosen in enumerate(choice) for i in chosen]] = True
        R = W[None] - refitted(W[None], H, support)
        least = min(least, (R @ H @ R.T).item())
    return least


# Sparse plus low rank: W, H -> S, UV [o, d] float64


Prune = Callable[[Tensor, Tensor, str], Tensor]


def eora(W: Tensor, H: Tensor, pattern: str, rank: int, prune: Prune) -> tuple[Tensor, Tensor]:
    S = prune(W, H, pattern)
    return S, best_low_rank(W - S, H, rank)


def hassle_free(W: Tensor, H: Tensor, pattern: str, rank: int, prune: Prune, turns: int) -> tuple[Tensor, Tensor]:
    S, UV = torch.zeros_like(W), torch.zeros_like(W)
    for _ in range(turns):
        S = prune(W - UV, H, pattern)
        UV = best_low_rank(W - S, H, rank)
    return S, UV


def oats(W: Tensor, H: Tensor, pattern: str, rank: int, turns: int) -> tuple[Tensor, Tensor]:
    """arXiv 2409.13652, algorithm 2: plain SVDs of the scaled weight."""
    scale = torch.diagonal(H).sqrt()
    A = W * scale
    S, L = torch.zeros_like(A), torch.zeros_like(A)
    for _ in range(turns):
        u, values, vt = torch.linalg.svd(A - S, full_matrices=False)
        L = (u[:, :rank] * values[:rank]) @ vt[:rank]
        S = (A - L) * project(A - L, pattern)
    return S / scale, L / scale


# Transformer matching


def cosine(done: float, final: float) -> float:
    """The share of a learning rate, from 1 to `final`, when a share `done` of the steps is taken."""
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


class Adam:
    """Kingma & Ba, arXiv 1412.6980, algorithm 1, with its defaults, for one tensor."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.steps = parameter, 0
        self.m, self.v = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, gradient: Tensor, lr: float) -> None:
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        self.parameter -= lr * m / (v.sqrt() + 1e-8)


def match(
    block: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    X: Tensor,
    T: Tensor,
    epochs: Sequence[Sequence[slice]],
    lr: float,
    low_rank_share: float,
    vector_share: float,
    final: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """Adam on ‖f(X) − T‖² for X, T [samples, T, h], over all parts of the block at once: what they became, the curve.

    factors: linear -> S, U, V, dense, its mask where S is not 0; the block's other parameters start as they are.
    epochs: for each that trains, the samples of its steps. The learning rates are relative: a linear's kept values
    move lr · rms(kept) / √(kept a row) a step, U and V low_rank_share of that, its bias
    lr · vector_share · rms(kept) · √(kept a row), and a norm's weight and bias lr · vector_share · rms(its weight).
    """
    block, X, T = copy.deepcopy(block).double(), X.double(), T.double()
    leaves, masks, rates = {}, {}, {}
    for name, (S, U, V) in factors.items():
        mask = S != 0
        kept = S[mask].double()
        size, a_row = kept.square().mean().sqrt(), len(kept) / len(S)
        leaves |= {f"{name}.S": S.double(), f"{name}.U": U.double(), f"{name}.V": V.double()}
        rates[f"{name}.S"] = lr * size / math.sqrt(a_row)
        rates |= dict.fromkeys((f"{name}.U", f"{name}.V"), low_rank_share * lr * size / math.sqrt(a_row))
        rates[f"{name}.bias"] = lr * vector_share * size * math.sqrt(a_row)
        masks[name] = mask
    for name, parameter in block.named_parameters():
        module = name.rpartition(".")[0]
        if name.removesuffix(".weight") not in factors:
            leaves[name] = parameter.detach().clone()
            if module not in factors:
                rates[name] = lr * vector_share * block.get_parameter(f"{module}.weight").square().mean().sqrt()

    def error(samples: slice) -> Tensor:
        weights = {
            f"{name}.weight": leaves[f"{name}.S"] * mask + leaves[f"{name}.U"] @ leaves[f"{name}.V"]
            for name, mask in masks.items()
        }
        others = {name: leaf for name, leaf in leaves.items() if name[-2:] not in (".S", ".U", ".V")}
        return (torch.func.functional_call(block, weights | others, X[samples]) - T[samples]).square().sum()

    optimizers = {name: Adam(leaf) for name, leaf in leaves.items()}
    curve = [(error(slice(None)) / T.square().sum()).item()]
    taken, total = 0, sum(map(len, epochs))
    for steps in epochs:
        lost = 0.0
        for samples in steps:
            for leaf in leaves.values():
                leaf.requires_grad_()
            loss = error(samples)
            scaled = loss * T.numel() / T.square().sum()
            gradients = dict(zip(leaves, torch.autograd.grad(scaled, list(leaves.values())), strict=True))
            lost += loss.item()
            for name, leaf in leaves.items():
                leaf.requires_grad_(False)
                optimizers[name].step(gradients[name], rates[name] * cosine(taken / total, final))
            taken += 1
        curve.append(lost / T.square().sum().item())
    return leaves, curve


# How sparse each block may be


def outlier_ratio(linears: Sequence[tuple[Tensor, Tensor]], times: float) -> float:
    """Return OWL's ratio of outliers (arXiv 2310.05175): how many of A_ij = ‖X_j‖·|W_ij| exceed `times` their mean.

    Args:
        linears: W [o, d] and the inputs X [n, d] of each linear of a block.
        times: The factor of the mean.
    """
    scores = torch.cat([(W.double().abs() * X.double().norm(dim=0)).flatten() for W, X in linears])
    return (scores > times * scores.mean()).double().mean().item()
