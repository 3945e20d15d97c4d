"""Fused experts taken apart: a linear for each weight of an expert, multiplied by the model's own code."""

import copy
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Concatenate, MergeModulelist, PreTrainedModel, WeightConverter

from streamslr.errors import first_line
from streamslr.gpu import in_any_order
from streamslr.model.expert_slices import Slice, can_convert_slices
from streamslr.model.fused_weight import FusedWeight, experts_with_hooks
from streamslr.model.parameter_names import ParameterNames, find_modules
from streamslr.model.transformers_compat import WeightTransform

log = logging.getLogger("streamslr")

_TRIAL_EXPERTS, _TRIAL_NUMBERS = 4, 2**25
"""Experts, and most numbers in the weights, of a module that is tried."""


class Experts(nn.Module):
    """Experts of a model, its own module, whose weights have become linears `EXPERT.NAME`.

    The class is mixed into that of the module, so that its own code runs: routing, biases, clamps, activation. On a CPU
    both give the same bits, except in bf16 where a module gives F.linear a bias: here a rounded product is added to it.

    Attributes:
        weights: the parameters that were taken apart, by their names in the module.
        number: number E of experts.
        top_k: experts k that a token passes; 0 until a token has.
        received: shape of the last input.
        only: experts that pass their tokens while their inputs are wanted, and no output; None for all.
    """

    received: tuple[int, ...] = ()
    only: frozenset[int] | None = None
    weights: Mapping[str, FusedWeight]
    number: int
    top_k: int

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """Pass tokens through the experts chosen for them, by the module's own code.

        An expert without tokens is skipped, unless hooks wait to see its inputs. On meta, where nothing is chosen,
        every expert sees every token.

        Args:
            hidden_states: [n, h]; [E · n, h], zeros where an expert is not chosen, in a module without `routing`.
            routing: experts chosen for each token [n, k], and their weights [n, k].
            named: the same by name.

        Returns:
            What the module's own code returns.
        """
        chosen = next(iter((*routing, *named.values())), None)
        self.received = hidden_states.shape
        self.top_k = self.number if chosen is None else chosen.shape[-1]
        weights = tuple(self.weights.values())
        if hidden_states.is_meta:
            tokens = hidden_states.shape[:-1].numel() // (self.number if chosen is None else 1)
            for weight in weights:
                for expert in range(len(weight)):
                    weight.product(expert, hidden_states.new_empty(tokens, _inputs(weight)))
            return torch.empty_like(hidden_states)
        for weight in weights:
            weight.called.clear()
        with _ExactCounts() if torch.are_deterministic_algorithms_enabled() else nullcontext():
            out: Tensor = super().forward(hidden_states, *routing, **named)
        for weight, expert in experts_with_hooks(weights):
            weight.product(expert, hidden_states.new_empty(0, _inputs(weight)))
        return out if self.only is None else torch.empty_like(out)


class _ExactCounts(TorchFunctionMode):
    """Let histc count integers while deterministic operators are wanted: such counts are the same in any order.

    transformers counts the tokens of experts so, and CUDA refuses it there whatever the dtype.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        exact = func is torch.histc and not args[0].is_floating_point()
        with in_any_order() if exact else nullcontext():
            return func(*args, **(kwargs or {}))


def _inputs(weight: FusedWeight) -> int:
    """Return the width d of the inputs of an expert."""
    return weight.shape[-2 if weight.transposed else -1]


@cache
def _mixed(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a module with `Experts` in front."""
    return type(cls.__name__, (Experts, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


@dataclass(frozen=True)
class TakenApart:
    """Result of `unfuse`.

    Attributes:
        experts: module path -> the experts there.
        conversions: how transformers renames and fuses keys, without what fuses these experts.
        slices: key of an expert's weight -> where it is, for experts that the checkpoint stores fused.
        refused: path of a parameter that stays fused -> why.
        named_here: path of each parameter of experts whose linears are called `EXPERT.PARAMETER`, which transformers
            does not put together again.
    """

    experts: Mapping[str, Experts]
    conversions: list[WeightTransform]
    slices: Mapping[str, Slice]
    refused: Mapping[str, str]
    named_here: frozenset[str]


@dataclass(frozen=True)
class _Found:
    """A module of experts, and how its own code multiplies: parameter -> True where it takes [d, o]."""

    module: nn.Module
    transposed: Mapping[str, bool]
    converters: Mapping[str, WeightConverter | None]
    """Parameter -> the conversion that stacks weights of single experts into it."""

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return the names of an expert's linears in a checkpoint that stores the experts one by one, if one can."""
        converter = self.converters[parameter]
        return tuple(_leaf(pattern) for pattern in converter.source_patterns) if converter else ()


def unfuse(model: PreTrainedModel, conversions: Iterable[WeightTransform], stored: Iterable[str]) -> TakenApart:
    """Take fused experts apart, each weight of an expert into a linear of its own.

    No architecture is known by name. A module is tried with random numbers: its own code must give the same with
    linears in the place of each parameter [E, .., ..]. The conversions say under which names a checkpoint stores
    experts one by one. A linear of experts stored fused is called `EXPERT.PARAMETER`.

    Args:
        model: the model, on meta; changed in place.
        conversions: how transformers renames and fuses the checkpoint's keys.
        stored: the checkpoint's keys, dense or packed.
    """
    conversions, stored = list(conversions), list(stored)
    found, refused = _find_experts(model, conversions)
    if not found:
        return TakenApart({}, conversions, {}, refused, frozenset())
    single = _stored_singly(model, found, stored)
    by_key = ParameterNames(model, (), conversions, stored)
    experts: dict[str, Experts] = {}
    cuts: dict[str, list[Slice]] = {}
    named_here: set[str] = set()
    fusing: list[WeightTransform] = []
    for path, of in found.items():
        cut = {name: _slices(by_key, path, name, of) for name in of.transposed if not single[path, name]}
        if uncut := [name for name, slices in cut.items() if not slices]:
            refused[f"{path}.{uncut[0]}"] = "the checkpoint stores them in a way that streamslr cannot cut by experts"
            continue
        names = {name: single[path, name] or (name,) for name in of.transposed}
        experts[path] = _take_apart(of, names)
        cuts |= {f"{path}.{name}": slices for name, slices in cut.items()}
        if any(names[name] != of.names(name) for name in names):
            named_here |= {f"{path}.{name}" for name in names}
        fusing += [c for c in of.converters.values() if c]
    conversions = [c for c in conversions if c not in fusing]
    apart = ParameterNames(model, (), conversions, ())
    slices = {
        name: part
        for parameter, cut_here in cuts.items()
        for name, part in zip(_name_slices(apart, parameter, cut_here), cut_here, strict=True)
    }
    return TakenApart(experts, conversions, slices, refused, frozenset(named_here))


def _find_experts(
    model: PreTrainedModel, conversions: Sequence[WeightTransform]
) -> tuple[dict[str, _Found], dict[str, str]]:
    """Return the modules of experts by path; and path of a parameter -> why its module cannot be taken apart."""
    found: dict[str, _Found] = {}
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        parameters = _fused_parameters(path, module)
        if not parameters:
            continue
        with torch.device("cpu"):  # `from_pretrained` builds models under meta
            transposed = _try_apart(module, parameters)
        if isinstance(transposed, str):
            refused |= dict.fromkeys((f"{path}.{name}" for name in parameters), transposed)
            log.debug("%s stays fused: %s", path, transposed)
        else:
            converters = {name: _find_converter(path, name, conversions) for name in parameters}
            found[path] = _Found(module, transposed, converters)
    return found, refused


def _stored_singly(
    model: PreTrainedModel, found: Mapping[str, _Found], stored: Iterable[str]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Return, for path and parameter of experts, the names of an expert's linears in the checkpoint; none where fused.

    They are those of the conversion, or the parameter's own where experts were taken apart before.
    """
    linears = {
        f"{path}.{expert}.{name}": (path, name)
        for path, of in found.items()
        for parameter in of.transposed
        for expert in range(len(of.module.get_parameter(parameter)))
        for name in {parameter, *of.names(parameter)}
    }
    modules = {key.rpartition(".")[0] for key in stored}
    present = {linears[linear] for linear in find_modules(model, modules, linears).values()}

    def names(path: str, parameter: str) -> tuple[str, ...]:
        of = found[path]
        choices = [of.names(parameter)] if not of.transposed[parameter] else []
        for choice in (*choices, (parameter,)):
            if any((path, name) in present for name in choice):
                return choice
        return ()

    return {(path, parameter): names(path, parameter) for path, of in found.items() for parameter in of.transposed}


def _fused_parameters(path: str, module: nn.Module) -> tuple[str, ...]:
    """Return the parameters [E, .., ..] of a module of experts; none of another module."""
    own = dict(module.named_parameters(recurse=False))
    fused = tuple(name for name, parameter in own.items() if parameter.dim() == 3)
    named = "expert" in f"{path}.{type(module).__name__}".lower() and not isinstance(module, Experts)
    return fused if named else ()


def _take_apart(found: _Found, names: Mapping[str, tuple[str, ...]]) -> Experts:
    """Put linears on meta into a module in the place of its parameters, and return it as `Experts`."""
    module = found.module
    weights: dict[str, FusedWeight] = {}
    linears: dict[str, dict[str, nn.Linear]] = {}
    for parameter, transposed in found.transposed.items():
        fused = module.get_parameter(parameter)
        number, *matrix = fused.shape
        d, o = matrix if transposed else matrix[::-1]
        for expert in range(number):
            for name in names[parameter]:
                with torch.device("meta"):
                    linear = nn.Linear(d, o // len(names[parameter]), bias=False, dtype=fused.dtype)
                linears.setdefault(str(expert), {})[name] = linear
        weights[parameter] = FusedWeight(module, names[parameter], fused.shape, transposed)
    for name, of in linears.items():
        module.add_module(name, nn.ModuleDict(of).train(module.training))
    for parameter, weight in weights.items():
        del module._parameters[parameter]
        vars(module)[parameter] = weight
    kind: Any = type(module)
    module.__class__ = _mixed(kind)
    made = cast(Experts, module)
    made.weights, made.number, made.top_k = weights, len(linears), 0
    return made


def _slices(names: ParameterNames, path: str, parameter: str, found: _Found) -> list[Slice]:
    """Return the weight of each expert in a parameter that is stored fused; none where it cannot be cut."""
    keys, converter = names.made_of(f"{path}.{parameter}")
    if not keys or (converter and not can_convert_slices(converter)):
        return []
    number, *matrix = found.module.get_parameter(parameter).shape
    d, o = matrix if found.transposed[parameter] else matrix[::-1]
    return [Slice(keys, expert, (o, d), found.transposed[parameter], converter) for expert in range(number)]


def _name_slices(names: ParameterNames, parameter: str, cut: Sequence[Slice]) -> list[str]:
    """Return the key of each expert's weight: beside the tensor that holds it, where the model finds it there.

    Args:
        names: names of the model whose experts are taken apart.
        parameter: path of the parameter that they were.
        cut: its slices.
    """
    path, _, leaf = parameter.rpartition(".")
    key = cut[0].sources[0]
    heads = [key.removesuffix(f".{leaf}")] if key.endswith(f".{leaf}") else []
    first = f"{path}.0.{leaf}.weight"
    head = next((h for h in heads if names.parameters_of(f"{h}.0.{leaf}.weight") == (first,)), path)
    return [f"{head}.{part.expert}.{leaf}.weight" for part in cut]


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
        stacked = [(MergeModulelist, 0), *([(Concatenate, 1)] if len(sources) > 1 else [])]
        if f"{path}.{name}".endswith(fused) and steps == stacked and all(beside):
            return converter
    return None


def _leaf(pattern: str) -> str:
    """Return w1 for `.experts.*.w1.weight`."""
    return pattern.removesuffix(".weight").rpartition(".")[2]


# The trial of a module with linears in the place of its weights


@torch.no_grad()
def _try_apart(module: nn.Module, fused: Sequence[str]) -> dict[str, bool] | str:
    """Find how a module multiplies its weights, on a few large random numbers, in small shapes of the same proportions.

    Returns:
        Parameter -> True where the module's own code takes it as [d, o]; or why the module cannot be taken apart.
    """
    twin = _shrink(module)
    if isinstance(twin, str):
        return twin
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for name, parameter in twin._parameters.items():
        if parameter is not None:
            twin._parameters[name] = nn.Parameter(4 * draw(parameter.shape))
    numbers = {name: twin.get_parameter(name) for name in fused}
    experts = max(map(len, numbers.values()))
    why = ""
    for width in sorted(set(numbers[fused[0]].shape[1:])):
        arguments = _arguments(module, experts, width, draw)
        if arguments is None:
            return "its own code takes neither tokens alone nor tokens with the experts chosen for them"
        try:
            expected = type(module).forward(twin, *arguments)
        except Exception as error:  # a module of another kind may do anything with these
            why = why or f"its own code failed on random numbers ({first_line(error)})"
            continue
        if not isinstance(expected, Tensor) or expected.shape != arguments[0].shape:
            why = "its own code returns something else than a vector for each token"
            continue
        for ways in itertools.product((False, True), repeat=len(fused)):
            apart = _apart(twin, dict(zip(fused, ways, strict=True)))
            try:
                made = apart(*arguments)
            except Exception as error:
                why = f"its own code needs their numbers ({first_line(error)})"
                continue
            if torch.allclose(made, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                return dict(zip(fused, ways, strict=True))
            why = "its own code computes something else when they are multiplied one by one"
    return why


def _apart(twin: nn.Module, transposed: Mapping[str, bool]) -> Experts:
    """Return a copy of a module with its numbers in linears."""
    module = copy.copy(twin)
    module._parameters, module._modules = dict(twin._parameters), dict(twin._modules)
    made = _take_apart(_Found(module, transposed, {}), {name: (name,) for name in transposed})
    for name, weight in made.weights.items():
        for expert, matrix in enumerate(twin.get_parameter(name)):
            linear = made.get_submodule(f"{expert}.{name}")
            cast(nn.Linear, linear).weight = nn.Parameter(matrix.t() if weight.transposed else matrix)
    return made


def _shrink(module: nn.Module) -> nn.Module | str:
    """Return a copy of a module of experts on meta: few experts, each width divided by what divides all of them."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    numbers = {len(p) for p in own.values()}
    widths = {width for p in own.values() for width in p.shape[1:]}
    factor = max(1, math.gcd(*widths) // 4)
    while any(width % factor for width in widths):
        factor -= 1
    # Where numbers of experts differ, its own attributes do not say which of them they mean.
    small = {number: min(number, _TRIAL_EXPERTS) for number in numbers} if len(numbers) == 1 else {}
    small |= {width: width // factor for width in widths}  # also where as many experts are: Qwen3-Next, 512 of each
    twin = copy.copy(module)
    twin._parameters = {
        name: nn.Parameter(torch.empty([small.get(size, size) for size in p.shape], device="meta"))
        for name, p in own.items()
    }
    if sum(p.numel() for p in twin.parameters(recurse=False)) > _TRIAL_NUMBERS:
        return f"it is too large to be tried: {sorted(numbers)} experts, widths {sorted(widths)}"
    for name, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            vars(twin)[name] = small.get(value, value)
    return twin


def _arguments(module: nn.Module, experts: int, width: int, draw: Callable[..., Tensor]) -> tuple[Tensor, ...] | None:
    """Return tokens, and the experts chosen for them with their weights where a module's own code takes these."""
    takes = [
        p for p in inspect.signature(type(module).forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    if len(takes) == 4:  # self, tokens, experts, weights
        index = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [2, 0], [1, 2], [-1, 0]]) % experts
        return draw(len(index), width), index, draw(index.shape)
    if len(takes) == 2:
        tokens = draw(experts, 3, width)
        tokens[:, ::2] *= torch.arange(experts)[:, None, None] % 2  # tokens that no expert of even number is for
        return (tokens.flatten(0, 1),)
    return None
