"""Fused experts taken apart: a linear for each weight of an expert, named as the checkpoint stores it."""

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Concatenate, MergeModulelist, PreTrainedModel, WeightConverter

from streamslr.model.parameter_names import find_modules
from streamslr.model.transformers_compat import WeightTransform

log = logging.getLogger("streamslr")

_FUSED: Mapping[str, list[tuple[type, int]]] = {
    "gate_up_proj": [(MergeModulelist, 0), (Concatenate, 1)],
    "down_proj": [(MergeModulelist, 0)],
}
"""Parameters [E, 2i, h] and [E, h, i] of gated experts -> the operations, each along a dimension, by which transformers
makes them of the weights of single experts."""


class Experts(nn.Module):
    """Gated experts that compute what a fused module does, with the weights of expert e in linears `e.NAME`.

    A token x passes the k experts that its router chose: y = Σ w · down(act(gate(x)) · up(x)), added in the router's
    order, as transformers' grouped product does: on a CPU both give the same bits.

    Attributes:
        number: number E of experts.
        top_k: experts k that a token passes; 0 until a token has.
        received: shape of the last input.
        only: experts that pass their tokens while their inputs are wanted, and no output; None for all.
    """

    received: tuple[int, ...] = ()
    only: frozenset[int] | None = None

    def __init__(self, down: tuple[int, ...], names: tuple[str, ...], act_fn: Any) -> None:
        """Allocate the linears.

        Args:
            down: shape [E, h, i] of the fused down projection.
            names: names of gate [i, h], up [i, h] and down [h, i] in the checkpoint.
            act_fn: activation of the gate.
        """
        super().__init__()
        experts, hidden, inner = down
        self.act_fn, self.names, self.number = act_fn, names, experts
        self.top_k = 0
        shapes = ((hidden, inner), (hidden, inner), (inner, hidden))
        for number in range(experts):
            expert = {name: nn.Linear(d, o, bias=False) for name, (d, o) in zip(names, shapes, strict=True)}
            self.add_module(str(number), nn.ModuleDict(expert))

    def linears(self, number: int) -> list[nn.Module]:
        """Return gate, up and down of one expert."""
        expert = cast(nn.ModuleDict, self._modules[str(number)])
        return [expert[name] for name in self.names]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Pass n tokens through the experts chosen for them.

        An expert without tokens is skipped, unless hooks wait to see its inputs. On meta, where nothing is chosen,
        every expert sees every token.

        Args:
            hidden_states: [n, h].
            top_k_index: experts chosen for each token, int64 [n, k].
            top_k_weights: weight w of each of them [n, k].

        Returns:
            Weighted sum of the experts' outputs [n, h].
        """
        n, self.top_k = top_k_index.shape
        self.received = hidden_states.shape
        chosen = top_k_index.flatten()  # [n·k]: choice j of token t is at t·k + j
        order = chosen.argsort(stable=True)
        if chosen.is_meta:
            choices = (order[:n],) * self.number
        else:
            choices = torch.split(order, chosen.bincount(minlength=self.number).tolist())
        weights, outputs = top_k_weights.flatten(), []
        for number, mine in enumerate(choices):  # mine: the choices of this expert, in the order of the tokens
            gate, up, down = self.linears(number)
            if self.only is not None and number not in self.only:
                continue
            if len(mine) or gate._forward_pre_hooks:
                x = hidden_states[mine // self.top_k]
                outputs.append(down(self.act_fn(gate(x)) * up(x)) * weights[mine, None])
        if chosen.is_meta or self.only is not None:
            return torch.empty_like(hidden_states)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return torch.cat(outputs)[back].view(n, self.top_k, -1).sum(1).to(hidden_states.dtype)


def unfuse(
    model: PreTrainedModel, conversions: Iterable[WeightTransform], stored: Iterable[str]
) -> tuple[dict[str, Experts], list[WeightTransform]]:
    """Put `Experts` in the place of each fused module whose weights the checkpoint stores expert by expert.

    No architecture is known by name. The conversions say which weights are fused, and running a module shows that it
    computes the plain gated product. Other modules (biases, clamps, other layouts) stay as they are.

    Args:
        model: the model, on meta.
        conversions: how transformers renames and fuses the checkpoint's keys.
        stored: the checkpoint's keys, dense or packed.

    Returns:
        Module path -> the `Experts` put there, and the conversions without those that fuse them.
    """
    conversions = list(conversions)
    # Fused modules that compute the plain gated product, and the names of their linears in the checkpoint.
    fused: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    fusing: list[WeightTransform] = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own.keys() != _FUSED.keys() or any(parameter.dim() != 3 for parameter in own.values()):
            continue
        converters = [_find_converter(path, name, conversions) for name in _FUSED]
        with torch.device("cpu"):  # `from_pretrained` builds models under meta
            plain = all(converters) and _is_plain(module)  # each: modules of one class may differ in their activation
        if plain:
            names = tuple(_leaf(pattern) for c in converters if c for pattern in c.source_patterns)
            fused[path] = module, names
            fusing += [c for c in converters if c]
    # Of these, the ones whose experts the checkpoint stores one by one.
    linears = {
        f"{path}.{number}.{name}": path
        for path, (module, names) in fused.items()
        for number in range(len(module.get_parameter("down_proj")))
        for name in names
    }
    present = find_modules(model, {key.rpartition(".")[0] for key in stored}, linears)
    made: dict[str, Experts] = {}
    for path in dict.fromkeys(linears[name] for name in present.values()):
        module, names = fused[path]
        down = module.get_parameter("down_proj")  # [E, h, i]
        with torch.device("meta"):
            made[path] = Experts(down.shape, names, module.act_fn).to(down.dtype)
        made[path].train(module.training)
        model.set_submodule(path, made[path])
    return made, [c for c in conversions if not made or c not in fusing]


def _find_converter(path: str, name: str, conversions: Iterable[WeightTransform]) -> WeightConverter | None:
    """Return the conversion that stacks weights of single experts, stored as `*.LEAF.weight`, into `path`.`name`."""
    for converter in conversions:
        if not isinstance(converter, WeightConverter) or len(converter.target_patterns) != 1:
            continue
        fused = converter.target_patterns[0]
        steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
        head = fused.removesuffix(name)
        sources = [pattern.replace("\\", "") for pattern in converter.source_patterns]  # some are escaped
        beside = [source == f"{head}*.{_leaf(source)}.weight" for source in sources]
        if f"{path}.{name}".endswith(fused) and steps == _FUSED[name] and all(beside):
            return converter
    return None


def _leaf(pattern: str) -> str:
    """Return w1 for `.experts.*.w1.weight`."""
    return pattern.removesuffix(".weight").rpartition(".")[2]


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    """Return True when a fused module computes what `Experts` does, on a few large random numbers."""
    draw = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=draw, dtype=torch.float32)
    number = len(module.get_parameter("down_proj"))
    experts, hidden, inner = min(3, number), 8, 4
    gate_up, down = 16 * random(experts, 2 * inner, hidden), random(experts, hidden, inner)
    index = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [2, 0], [1, 2]]) % experts
    x, weights = random(len(index), hidden), random(index.shape)
    twin = copy.copy(module)
    twin._parameters = {"gate_up_proj": nn.Parameter(gate_up), "down_proj": nn.Parameter(down)}
    run = inspect.unwrap(type(module).forward)
    try:  # experts without weights come after the others: a token passes them as it is
        if run(twin, x, torch.full_like(index, number), weights).any():
            return False
    except Exception:
        log.debug("%s has no experts beyond its weights", type(module).__name__)
    try:
        with torch.device("meta"):
            plain = Experts(down.shape, ("gate", "up", "down"), module.act_fn)
        for e in range(experts):
            parts = (*gate_up[e].chunk(2), down[e])
            for linear, weight in zip(plain.linears(e), parts, strict=True):
                linear.weight = nn.Parameter(weight)
        theirs = run(twin, x, index, weights)
    except Exception:  # a module of another kind may do anything with these
        return False
    return theirs.shape == x.shape and torch.allclose(theirs, plain(x, index, weights), rtol=1e-4)
