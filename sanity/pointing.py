"""The pointing game (Zhang et al. 2018): does a map's peak lie on the object? Boxes, and where cropping takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sanity.models import Preprocessing
from sanity.registry import first_line

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels from the upper left corner; x1 and y1 are where the box ends (exclusive)."""


def read_boxes(path: Path) -> dict[str, tuple[Box, ...]]:
    """Boxes by image: JSON {image: [[x0, y0, x1, y1], ...]}, a VOC XML file, or a folder of such.

    An image's name is its id, or for XML the file's name without the extension. VOC counts pixels from 1 and includes
    the last one; that is put right. Every object of a picture counts, whatever its class. Raises ValueError in one line
    for anything that is not so.
    """
    if not path.exists():
        raise ValueError(f"--boxes: no such file or folder: {str(path)!r}")
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"--boxes: no .xml below {str(path)!r}")
    if files[0].suffix.lower() == ".xml":
        return {file.stem: _checked(file, file.stem, _voc(file)) for file in files}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--boxes: cannot read {path}: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--boxes: {path} must hold image -> boxes, not {type(found).__name__}")
    return {str(image): _checked(path, image, boxes) for image, boxes in found.items()}


def _voc(path: Path) -> list[list[float]]:
    try:
        found = ElementTree.parse(path).getroot().findall("./object/bndbox")  # of objects, not of their parts
        edges = [[float(one.findtext(k, "missing")) for k in ("xmin", "ymin", "xmax", "ymax")] for one in found]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"--boxes: cannot read {path}: {first_line(error)}") from None
    return [[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in edges]


def _checked(path: Path, image: str, boxes: Any) -> tuple[Box, ...]:
    found = []
    for box in boxes if isinstance(boxes, list) else [boxes]:
        numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)
        if not numbers or not all(map(math.isfinite, box)) or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"--boxes: {path}: image {image!r}: {box!r} is no box [x0, y0, x1, y1]")
        found.append((float(box[0]), float(box[1]), float(box[2]), float(box[3])))
    return tuple(found)


def boxes_of(boxes: Mapping[str, tuple[Box, ...]], image: str) -> tuple[Box, ...]:
    """Boxes of an image by its id or, for pictures in subfolders, by the last part of it."""
    return boxes.get(image, boxes.get(image.rpartition("/")[2], ()))


def through(preprocess: Preprocessing, size: tuple[int, int], box: Box) -> Box | None:
    """Where a box of a picture of (width, height) lies after resizing and cropping; None if nothing of it is left."""
    width, height = size
    if preprocess.squash:
        wide, high, left, top = preprocess.crop, preprocess.crop, 0, 0
    else:
        short = min(width, height)
        # torchvision rounds the longer side down, and a crop's odd pixel as Python's round does.
        wide, high = (preprocess.resize if s == short else preprocess.resize * s // short for s in size)
        left, top = (_offset(side, preprocess.crop) for side in (wide, high))
    x = [min(max(v * wide / width - left, 0), preprocess.crop) for v in (box[0], box[2])]
    y = [min(max(v * high / height - top, 0), preprocess.crop) for v in (box[1], box[3])]
    return (x[0], y[0], x[1], y[1]) if x[0] < x[1] and y[0] < y[1] else None


def _offset(side: int, crop: int) -> int:
    """Pixels cut off before the crop begins; negative where the picture is padded."""
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)


def hit(pixel: tuple[int, int], boxes: Sequence[Box], tolerance: float) -> bool:
    """Whether the centre of pixel (column, row) is on a box, or at most `tolerance` pixels away from one."""
    x, y = pixel[0] + 0.5, pixel[1] + 0.5
    return any(math.hypot(max(a - x, 0, x - c), max(b - y, 0, y - d)) <= tolerance for a, b, c, d in boxes)
