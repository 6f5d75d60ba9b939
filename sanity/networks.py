"""The small classifiers of Adebayo et al. 2018 for 28x28 grey pictures, built as the released code builds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)

SIDE = 28
CNN_STAGES = {name: [name] for name in ("softmax_linear", "fc1", "hidden2", "hidden1")}
MLP_STAGES = {name: [name] for name in ("logits", "hidden3", "hidden2", "hidden1")}


@dataclass(frozen=True)
class Greyscale:
    """PIL picture -> (1, side, side) float32 in [0, 1]: grey level / 255; resized (bilinear) if of another size."""

    side: int = SIDE

    def __call__(self, picture: Image.Image) -> Tensor:
        """Turn any size and mode of picture into the network's input."""
        grey = picture.convert("L")
        if grey.size != (self.side, self.side):
            grey = grey.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(grey))[None].float() / 255

    def unscaled(self, pixels: Tensor) -> Tensor:
        """Levels of the picture, [0, 1] black to white: the network takes just these."""
        return pixels


def cnn_parameters(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights from a normal of deviation .1 cut at .2, biases .1 [code released with Adebayo et al. 2018]."""
    _fill(layer, 0.1, 0.1)


def mlp_parameters(layer: nn.Linear) -> None:
    """Weights from a normal of deviation s = 2 / sqrt(fan_in) cut at 2 s, biases 0 [the same code]."""
    _fill(layer, 2 / math.sqrt(layer.in_features), 0.0)


def _fill(layer: nn.Conv2d | nn.Linear, s: float, bias: float) -> None:
    # TensorFlow's truncated normal: s is the deviation before the cut, which comes at two of them.
    nn.init.trunc_normal_(layer.weight, 0.0, s, -2 * s, 2 * s)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def _started(layer: Layer, initialise: Callable[[Layer], None]) -> Layer:
    """Give a layer its network's initialiser as reset_parameters, which re-initialisation then calls, too."""
    # On the instance: captum's LRP has no rule for a subclass of a layer.
    layer.reset_parameters = partial(initialise, layer)  # type: ignore[method-assign]
    initialise(layer)
    return layer


class CNN(nn.Module):
    """Two convolutions 5x5 (32, 64), each rectified and pooled 2x2, fc of 1024: (N, 1, 28, 28) -> (N, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.hidden1 = _started(nn.Conv2d(1, 32, 5, padding=2), cnn_parameters)
        self.relu1, self.pool1 = nn.ReLU(), nn.MaxPool2d(2)
        self.hidden2 = _started(nn.Conv2d(32, 64, 5, padding=2), cnn_parameters)
        self.relu2, self.pool2 = nn.ReLU(), nn.MaxPool2d(2)
        self.fc1 = _started(nn.Linear(64 * (SIDE // 4) ** 2, 1024), cnn_parameters)
        self.relu3 = nn.ReLU()
        self.softmax_linear = _started(nn.Linear(1024, classes), cnn_parameters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if self.training:
            # The same maxima, the same gradients: rectifying a quarter of the numbers makes a step 13 % cheaper.
            x = self.relu1(self.pool1(self.hidden1(x)))
            x = self.relu2(self.pool2(self.hidden2(x)))
        else:
            x = self.pool1(self.relu1(self.hidden1(x)))
            x = self.pool2(self.relu2(self.hidden2(x)))
        logits: Tensor = self.softmax_linear(self.relu3(self.fc1(x.flatten(1))))
        return logits


class MLP(nn.Module):
    """784-2500-1500-500-classes, rectified: (N, 1, 28, 28) -> (N, classes)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.hidden1 = _started(nn.Linear(SIDE**2, 2500), mlp_parameters)
        self.relu1 = nn.ReLU()
        self.hidden2 = _started(nn.Linear(2500, 1500), mlp_parameters)
        self.relu2 = nn.ReLU()
        self.hidden3 = _started(nn.Linear(1500, 500), mlp_parameters)
        self.relu3 = nn.ReLU()
        self.logits = _started(nn.Linear(500, classes), mlp_parameters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.relu1(self.hidden1(x.flatten(1)))
        logits: Tensor = self.logits(self.relu3(self.hidden3(self.relu2(self.hidden2(x)))))
        return logits


NETWORKS: dict[str, type[CNN] | type[MLP]] = {"cnn": CNN, "mlp": MLP}


def untrained(kind: str) -> Callable[[], NoReturn]:
    """Stand in for the pretrained weights that these networks do not have: ValueError that says how to train."""

    def refuse() -> NoReturn:
        raise ValueError(
            f"mnist_{kind} comes without weights: `python -m sanity.train --data mnist --model {kind} --output DIR` "
            "makes them, then --weights DIR/model.safetensors; --weights random is an untrained network"
        )

    return refuse
