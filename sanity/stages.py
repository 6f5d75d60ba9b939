"""What is randomized together: stages written out by name, or derived from the order of execution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sanity.registry import suggest

GRANULARITIES = ("block", "layer")
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LARGEST_BLOCK = 12
"""A module with more weighted layers than this is opened: it holds blocks, it is not one."""


@dataclass(frozen=True)
class Stage:
    """Parameters randomized together, and the modules whose running statistics belong to them.

    Names are those of `network.named_parameters()` and `network.named_modules()`.
    """

    name: str
    parameters: tuple[str, ...]
    norms: tuple[str, ...] = ()


def written_out(network: nn.Module, members: Mapping[str, Sequence[str]]) -> tuple[Stage, ...]:
    """Stages from name -> modules or parameters, in the order given (logits first).

    Raises ValueError for a member that names nothing in the network, or has no parameters, and for a
    parameter claimed by two stages.
    """
    known = {name: name for name, _ in _tensors(network)}
    claimed: dict[str, str] = {}
    stages = []
    for stage, paths in members.items():
        names = [name for path in _listed(paths) for name in _below(path, known, stage)]
        for name in dict.fromkeys(names):
            if claimed.setdefault(name, stage) != stage:
                raise ValueError(f"{name} belongs to two stages, {claimed[name]!r} and {stage!r}")
        stages.append(_stage(network, stage, names))
    return tuple(stages)


def _listed(paths: str | Sequence[str]) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def _below(path: str, known: Iterable[str], stage: str) -> list[str]:
    found = [name for name in known if name == path or name.startswith(f"{path}.")]
    if not found:
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name in known)
        raise ValueError(f"stage {stage!r}: " + suggest("module or parameter", path, modules))
    return found


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and running statistics by name, shared ones once."""
    statistics = (
        (f"{path}.{name}" if path else name, buffer)
        for path, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, buffer in module.named_buffers(recurse=False)
    )
    return [*network.named_parameters(), *statistics]


def _stage(network: nn.Module, name: str, tensors: Iterable[str]) -> Stage:
    """Sort tensors' names into parameters and the modules that keep running statistics."""
    parameters = dict(network.named_parameters())
    unique = dict.fromkeys(tensors)
    owners = dict.fromkeys(tensor.rpartition(".")[0] for tensor in unique)
    norms = tuple(o for o in owners if getattr(network.get_submodule(o), "running_mean", None) is not None)
    return Stage(name, tuple(tensor for tensor in unique if tensor in parameters), norms)


class _Uses(TorchFunctionMode):
    """Notes the first use of each named tensor in any torch function, modules or not."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in named}
        self.order: dict[str, None] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Asking a parameter for its device or size is not a use of it.
        if func.__name__ != "__get__" and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            used = (self.names.get(id(leaf)) for leaf in tree_leaves((args, kwargs)))
            self.order.update(dict.fromkeys(name for name in used if name))
        return result


def execution_order(network: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of parameters and running statistics in the order in which `network(example)` first uses them."""
    with torch.no_grad(), _Uses(_tensors(network)) as uses:
        network(example)
    return tuple(uses.order)


def derived(network: nn.Module, example: Tensor, granularity: str = "block") -> tuple[Stage, ...]:
    """Stages in reverse order of execution, the logits' first.

    A layer is a module that owns parameters, with the normalisation beside it (an attention counts as one
    layer); a block is the largest module of at most 12 layers that neither is a mere container nor holds
    one that repeats blocks.
    Parameters that the forward pass does not use are in no stage: see `untouched`.
    """
    order = execution_order(network, example)
    layers = _layers(network, order)
    if granularity == "block":
        opened = _opened(network, layers.values())
        layers = {name: _block(name, layer, opened) for name, layer in layers.items()}
    groups: dict[str, list[str]] = {}
    for name in order:
        groups.setdefault(layers[name], []).append(name)
    stages = [_stage(network, group, names) for group, names in groups.items()]
    return tuple(stage for stage in reversed(stages) if stage.parameters)


def _layers(network: nn.Module, order: Sequence[str]) -> dict[str, str]:
    """Tensor -> its layer: the owning module, or the tensor itself where the owner has other modules in it."""
    modules = dict(network.named_modules())
    attentions = [path for path, module in modules.items() if isinstance(module, nn.MultiheadAttention)]
    layers = {}
    for tensor in order:
        owner = tensor.rpartition(".")[0]
        attention = next((path for path in attentions if f"{owner}.".startswith(f"{path}.")), None)
        has_children = next(modules[owner].children(), None) is not None
        layers[tensor] = attention if attention is not None else (tensor if has_children else owner)
    joined = _joined_norms(modules, list(dict.fromkeys(layers.values())))
    return {tensor: joined[layer] for tensor, layer in layers.items()}


def _joined_norms(modules: Mapping[str, nn.Module], layers: Sequence[str]) -> dict[str, str]:
    """A normalisation joins the layer before it, unless only the layer after it has the same parent."""
    weighted = [layer for layer in layers if not isinstance(modules.get(layer), NORMS)]
    joined = {layer: layer for layer in weighted}
    for place, norm in enumerate(layers):
        if norm in joined:
            continue
        before = [layer for layer in layers[:place] if layer in weighted][-1:]
        after = [layer for layer in layers[place:] if layer in weighted][:1]
        near = [layer for layer in before + after if layer.rpartition(".")[0] == norm.rpartition(".")[0]]
        joined[norm] = next(iter([*near, *before, *after]), norm)
    return joined if weighted else {layer: layer for layer in layers}


def _opened(network: nn.Module, layers: Iterable[str]) -> set[str]:
    """Paths of the modules that hold blocks rather than being one."""
    unique = set(layers)
    opened = {""}
    for path, module in network.named_modules():
        if isinstance(module, CONTAINERS) or _within(path, unique) > LARGEST_BLOCK:
            opened.add(path)
        if isinstance(module, CONTAINERS) and _repeats(path, module, unique):
            parts = path.split(".")
            opened.update(".".join(parts[:n]) for n in range(1, len(parts)))
    return opened


def _within(path: str, layers: set[str]) -> int:
    return sum(layer.startswith(f"{path}.") for layer in layers)


def _repeats(path: str, container: nn.Module, layers: set[str]) -> bool:
    """Whether a container holds one kind of block twice, such as a transformer's encoder layers."""
    blocks = [(type(child), _within(f"{path}.{name}", layers)) for name, child in container.named_children()]
    kinds = [kind for kind, weighted in blocks if weighted > 1 and not issubclass(kind, CONTAINERS)]
    return len(set(kinds)) < len(kinds)


def _block(tensor: str, layer: str, opened: set[str]) -> str:
    """Shortest prefix of a layer's path that is not itself opened."""
    parts = layer.split(".")
    prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((prefix for prefix in prefixes if prefix not in opened), tensor)


def grouped(stages: Sequence[Stage], count: int) -> tuple[Stage, ...]:
    """Merge neighbours into `count` stages of nearly equal length, named `first..last`.

    Raises ValueError unless 1 <= count <= len(stages).
    """
    if not 1 <= count <= len(stages):
        raise ValueError(f"--stages {count}: the network has {len(stages)} stages")
    edges = [round(i * len(stages) / count) for i in range(count + 1)]
    return tuple(_merged(stages[a:b]) for a, b in pairwise(edges))


def _merged(stages: Sequence[Stage]) -> Stage:
    name = stages[0].name if len(stages) == 1 else f"{stages[0].name}..{stages[-1].name}"
    return Stage(
        name,
        tuple(p for stage in stages for p in stage.parameters),
        tuple(n for stage in stages for n in stage.norms),
    )


def select(stages: Sequence[Stage], names: Sequence[str]) -> tuple[Stage, ...]:
    """Keep the named stages, in the network's order. Raises ValueError for a name it does not have."""
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise ValueError(suggest("stage", name, known))
    return tuple(stage for stage in stages if stage.name in names)


def untouched(network: nn.Module, stages: Iterable[Stage]) -> tuple[str, ...]:
    """Parameters that no stage reaches, by name."""
    reached = {name for stage in stages for name in stage.parameters}
    return tuple(name for name, _ in network.named_parameters() if name not in reached)
