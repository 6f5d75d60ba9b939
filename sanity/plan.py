"""A plan: everything that decides a run's numbers, as one frozen value that refuses nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sanity import attributions, similarity
from sanity.randomization import ORDERS, reinitialiser
from sanity.registry import suggest
from sanity.stages import GRANULARITIES

PRECISIONS = ("float32", "bfloat16", "tf32", "float64")
TARGETS = ("predicted", "label", "repredicted")
DEFAULT_METHODS = (
    "gradient", "smoothgrad", "gradient_x_input", "guided_backprop", "integrated_gradients",
    "meaningful_perturbation", "edges", "random",
)  # fmt: skip

Members = Mapping[str, Any]


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default, metadata={"help": help_text, **extra})
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class Plan:
    """What is randomized, explained and compared. Raises ValueError for values that make no sense."""

    model: str = _option("efficientnet_lite0", "model by name (--list), or package.module:factory")
    weights: str = _option(
        "pretrained", "pretrained, random (untrained), or a .pth or .safetensors file", metavar="WHERE"
    )
    images: str = _option(
        "bundled", "bundled photographs, a folder, a picture, or a folder of IDX files", metavar="WHERE"
    )
    limit: int | None = _option(None, "only the first N images", metavar="N")
    squash: bool = _option(False, "resize whole pictures to the network's size, as released, instead of cropping")
    skip_bad_images: bool = _option(False, "go on without pictures that cannot be read; the manifest lists them")
    methods: tuple[Any, ...] = _option(
        DEFAULT_METHODS, "explainers by name (--list), name:option=value,..., or package.module:callable"
    )
    orders: tuple[str, ...] = _option(("cascading",), f"orders of randomization: {', '.join(ORDERS)}")
    stages: str | int | tuple[str, ...] | Members = _option(
        "all",
        "all, a number of stages to merge into, stages by name, or a YAML file (name -> modules or parameters)",
        metavar="STAGES",
    )
    granularity: str = _option("block", "block or layer")
    reinit: str = _option("variance_scaling", "where random values come from (--list), e.g. normal:0.01")
    batchnorm: str = _option("keep", "running statistics of randomized BatchNorms: keep or reset")
    redraw: bool = _option(False, "draw every stage of a cascade anew, instead of keeping what was drawn")
    against: str | None = _option(
        None, "weights of the same network trained on permuted labels, for the order data", metavar="FILE"
    )
    target: str = _option(
        "predicted",
        "explained class: predicted by the trained network, label, repredicted at each stage, or an index",
    )
    similarities: tuple[str, ...] = _option(similarity.DEFAULTS, "how maps are compared (--list)")
    seeds: tuple[int, ...] = _option((0,), "seeds of the random weights, one randomization each", metavar="N")
    samples: int | None = _option(None, "samples of SmoothGrad, Integrated Gradients and their kin", metavar="N")
    fresh_noise: bool = _option(
        False, "draw what methods draw, such as SmoothGrad's noise, anew at every stage, as released, instead of once"
    )
    mask_steps: int | None = _option(None, "optimisation steps of meaningful perturbation", metavar="N")
    precision: str = _option(
        "float32",
        "float32; bfloat16: faster on large networks, but it moves scores; tf32, on a GPU; float64 for reference",
    )
    save_maps: bool = _option(False, "keep the raw attributions in maps.safetensors")
    strips: int = _option(4, "draw strips of maps for the first N images", metavar="N")
    hide_pictures: bool = _option(False, "leave the photographs themselves out of the strips")

    def __post_init__(self) -> None:
        for name in ("methods", "orders", "similarities", "seeds"):
            value = getattr(self, name)
            if not value:
                raise ValueError(f"--{name} is empty")
            if len(set(value)) < len(value):
                raise ValueError(f"--{name} names something twice: {' '.join(map(str, value))}")
        for order in self.orders:
            _one_of("order", order, ORDERS)
        if ("data" in self.orders) != (self.against is not None):
            raise ValueError("the order data and --against FILE, the network trained on permuted labels, go together")
        for name in self.similarities:
            similarity.get(name)
        _one_of("granularity", self.granularity, GRANULARITIES)
        _one_of("batchnorm", self.batchnorm, ("keep", "reset"))
        _one_of("precision", self.precision, PRECISIONS)
        if not self.target.isdecimal():
            _one_of("target", self.target, TARGETS)
        reinitialiser(self.reinit)
        self._check_numbers()
        names = [method.name for method in self.explainers()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"--methods has {twice[0]!r} twice; one run holds one variant of a method")

    def _check_numbers(self) -> None:
        least = {"limit": 1, "samples": 1, "mask_steps": 1, "strips": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= 10**9:
                raise ValueError(f"--{name.replace('_', '-')} must be from {low} to 10^9, not {value}")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"--seeds must be non-negative integers below 2^63, not {self.seeds}")
        if isinstance(self.stages, int) and self.stages < 1:
            raise ValueError(f"--stages must be at least 1, not {self.stages}")

    def explainers(self) -> list[attributions.Method]:
        """Return the methods, with this plan's samples and steps. Names must differ."""
        return [self._sized(attributions.find(spec)) for spec in self.methods]

    def _sized(self, method: attributions.Method) -> attributions.Method:
        sizes = {"samples": self.samples, "steps": self.mask_steps}
        return method.with_options(**{k: v for k, v in sizes.items() if v is not None and k in method.options})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `run.json` and in a plan file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["methods"] = [m if isinstance(m, str) else attributions.find(m).name for m in self.methods]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _one_of(kind: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(suggest(kind, value, known))


def from_dict(values: Mapping[str, Any]) -> Plan:
    """Plain values -> Plan. Raises ValueError for unknown keys and wrong types."""
    known = {f.name: f for f in fields(Plan)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(suggest("plan key", key, known))
        wrong = _type_error(str(known[key].type), value)
        if wrong:
            raise ValueError(f"plan key {key!r}: {wrong}, not {value!r}")
    return Plan(**{k: _value(str(known[k].type), v) for k, v in values.items()})


def _value(kind: str, value: Any) -> Any:
    if kind == "str" and isinstance(value, int):
        return str(value)
    if kind.startswith("tuple") and isinstance(value, str | int):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _type_error(kind: str, value: Any) -> str:
    """Why a value of a plan file does not fit its field, or nothing."""
    if kind == "bool" and not isinstance(value, bool):
        return "must be true or false"
    if kind == "str | None" and not isinstance(value, str | None):
        return "must be text"
    if kind == "str" and (isinstance(value, bool) or not isinstance(value, str | int)):
        return "must be text"
    if kind.startswith("int") and (isinstance(value, bool) or not isinstance(value, int | None)):
        return "must be a whole number"
    if kind.startswith("tuple"):
        of = int if "int" in kind else str
        listed = value if isinstance(value, list | tuple) else [value]
        if any(not isinstance(item, of) or isinstance(item, bool) for item in listed):
            return f"must be a list of {'whole numbers' if of is int else 'names'}"
    return ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a plan file or a stages file. Raises ValueError in one line."""
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold names and values, not {type(found).__name__}")
    return found


def presets() -> dict[str, Path]:
    """Plan files that come with the package, by name."""
    folder = Path(str(files("sanity") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset(name: str) -> dict[str, Any]:
    """Read a preset's plan file. Raises ValueError for an unknown name."""
    known = presets()
    _one_of("preset", name, known)
    return read_yaml(known[name])
