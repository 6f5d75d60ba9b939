"""One image, one method: what the network says, and the map as pictures. `python -m sanity.explain IMAGE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sanity import attributions, images, maps, models
from sanity.attributions import Inputs, Method
from sanity.attributions.masks import MaskSettings
from sanity.attributions.perturbation import MaskResult, optimise_mask
from sanity.cli import HelpFormatter, parse
from sanity.command import guarded_main
from sanity.engine import Engine, predict
from sanity.images import Images, Picture
from sanity.models import Classifier
from sanity.randomization import guarded
from sanity.records import Array
from sanity.run import refuse_unsuited

INTRODUCTION = """Explain one image with one method.

  python -m sanity.explain photo.jpg
  python -m sanity.explain photo.jpg --model resnet50 --method integrated_gradients --output pictures/
  python -m sanity.explain photo.jpg --method meaningful_perturbation:steps=300,null=noise

Prints the class and its probability before and, for masks, after masking. Writes NAME_heatmap.png and
NAME_overlay.png and, for masks, NAME_mask.png (black: deleted) and NAME_perturbed.png."""
OPACITY = 0.6
MASK = "meaningful_perturbation"
COMPACT = "l1=0.0008,tv=0.003,mask_blur=3.0,steps=100"
"""Options of a mask here, before the user's own: a deleted pixel costs eight times as much (Fong and Vedaldi take ten
times for localization), an edge a third, and the mask is finer. At the registry's price a mask deletes half a picture,
to the last bit of evidence."""


def parser() -> ArgumentParser:
    """Flags of `python -m sanity.explain`."""
    made = ArgumentParser(
        prog="sanity explain", description=INTRODUCTION, formatter_class=HelpFormatter, exit_on_error=False
    )
    made.add_argument("image", type=str, help="picture file")
    made.add_argument("--model", default="efficientnet_lite0", metavar="NAME", help="model, as sanity run takes it")
    made.add_argument("--weights", default="pretrained", metavar="WHERE", help="pretrained, random, or a file")
    made.add_argument("--method", default="meaningful_perturbation", metavar="NAME", help="method, name:option=value")
    made.add_argument("--target", type=int | None, metavar="N", help="class index (default: the predicted class)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the method's noise")
    made.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder for the pictures")
    return made


def command(arguments: Sequence[str]) -> int:
    """Explain, print, write."""
    values = parse(parser(), arguments)
    path = Path(values.image)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; sanity explain takes one picture")
    (picture,) = only(path).pictures
    method = find(values.method)
    classifier = models.load(values.model, values.weights)
    with guarded(classifier.network):
        inputs, probabilities = look(classifier, picture, values.target, values.seed)
        refuse_unsuited([method], classifier.network, inputs.pixels)
        values.output.mkdir(parents=True, exist_ok=True)
        print(f"Category with highest probability: {said(classifier, probabilities)}")
        if values.target is not None:
            print(f"Explained category: {told(classifier, values.target, probabilities)}")
        written = (mask if method.name == MASK else heat)(method, classifier, inputs)
    for name, made in written.items():
        made.save(values.output / f"{path.stem}_{name}.png")
    print("written to " + ", ".join(str(values.output / f"{path.stem}_{name}.png") for name in written))
    return 0


def only(path: Path) -> Images:
    """One picture. Raises ValueError in one line if it cannot be read."""
    try:
        return images.folder(path)
    except ValueError as error:
        # There is nothing to go on with without it.
        raise ValueError(str(error).partition("; use --skip")[0]) from error


def find(spec: str) -> Method:
    """The method of a `name:option=value,...`; masks are compact unless the options say otherwise."""
    name, _, rest = spec.partition(":")
    return attributions.find(f"{name}:{COMPACT},{rest}".rstrip(",") if name == MASK else spec)


def look(classifier: Classifier, picture: Picture, target: int | None, seed: int) -> tuple[Inputs, Tensor]:
    """Inputs of one picture, and its class probabilities (classes,)."""
    pixels = picture.load(classifier.preprocess)[None]
    probabilities = predict(classifier.network, pixels, 1)[0].double().softmax(0)
    if target is not None and not 0 <= target < len(probabilities):
        raise ValueError(
            f"--target {target}: the network has {len(probabilities)} classes, 0 to {len(probabilities) - 1}"
        )
    index = int(probabilities.argmax()) if target is None else target
    return Inputs(pixels, torch.tensor([index]), (picture.id,), seed), probabilities


def said(classifier: Classifier, probabilities: Tensor) -> str:
    """Name and probability of the most probable class."""
    return told(classifier, int(probabilities.argmax()), probabilities)


def told(classifier: Classifier, index: int, probabilities: Tensor) -> str:
    """Name and probability of a class."""
    return f"{classifier.class_name(index)} {float(probabilities[index]):.1%}"


def mask(method: Method, classifier: Classifier, inputs: Inputs) -> dict[str, Image.Image]:
    """Optimise a mask, say what it does to the class, and return the four pictures."""
    options: dict[str, Any] = dict(method.options)
    settings = MaskSettings(**options)
    with tqdm(total=settings.steps, desc=method.name, unit=" evaluations", leave=False) as bar:

        def advance(step: int, objective: Tensor) -> None:
            bar.update()

        found: MaskResult = optimise_mask(classifier.network, inputs, settings, advance)
    after = predict(classifier.network, found.perturbed, 1)[0].double().softmax(0)
    index = int(inputs.targets[0])
    print(f"After masking {float(1 - found.mask.mean()):.1%} of the picture: {told(classifier, index, after)}", end="")
    print(f"; category with highest probability: {said(classifier, after)}")
    pictures = shown(1 - found.mask[0, 0], photograph(classifier, inputs.pixels[0]))
    kept = (found.mask[0, 0].clamp(0, 1) * 255).round().byte().numpy()
    return {"perturbed": photograph(classifier, found.perturbed[0]), **pictures, "mask": Image.fromarray(kept)}


def heat(method: Method, classifier: Classifier, inputs: Inputs) -> dict[str, Image.Image]:
    """Explain with any other method; returns heat map and overlay."""
    engine = Engine([method], 8)
    with tqdm(total=engine.cost, desc=method.name, unit=" evaluations", leave=False) as bar:
        engine.on_progress = bar.update
        found = engine.explain(classifier.network, inputs)[method.name]
    status = maps.status(maps.signed(found))[0]
    if status != maps.OK:
        raise ValueError(f"{method.name} gave a {status}: there is nothing to show")
    return shown(maps.clip_signed(maps.signed(found))[0], photograph(classifier, inputs.pixels[0]))


def shown(heat: Tensor, picture: Image.Image) -> dict[str, Image.Image]:
    """Heat map (H, W) in [-1, 1] in colours, alone and over the picture: blue below 0, red above, or magma from 0."""
    signed = bool((heat < 0).any())
    scaled = (heat + 1) / 2 if signed else heat
    colours = mpl.colormaps["RdBu_r" if signed else "magma"](scaled.clamp(0, 1).double().numpy())[..., :3]
    # What the map leaves out stays the photograph.
    weight = OPACITY * heat.abs().clamp(0, 1).double().numpy()[..., None]
    under = np.asarray(picture) / 255
    return {"heatmap": to_image(colours), "overlay": to_image(under * (1 - weight) + colours * weight)}


def photograph(classifier: Classifier, pixels: Tensor) -> Image.Image:
    """Pixels as the network takes them (C, H, W) as a picture, in the levels that the file had.

    Where the preprocessing does not say how it scales, the least value is black and the greatest white.
    """
    unscaled = getattr(classifier.preprocess, "unscaled", None)
    if unscaled is None:
        low, high = pixels.amin(), pixels.amax()
        levels = (pixels - low) / (high - low).clamp(min=1e-12)
    else:
        levels = unscaled(pixels)
    return to_image(levels.expand(3, -1, -1).permute(1, 2, 0).numpy())


def to_image(values: Array) -> Image.Image:
    """(H, W, 3) in [0, 1] -> picture; what lies outside is clipped."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.explain`: exit code 0, 2 for what the user must mend, 130 after Ctrl-C."""
    return guarded_main("sanity explain", lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
