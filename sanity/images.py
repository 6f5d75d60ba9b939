"""Image sets: the bundled photographs, a folder, IDX files, tensors of one's own.

A set holds recipes, not pixels: a picture is decoded when it is opened, so that a folder of any size fits
in memory. Errors that a user can cause are `ValueError` or `FileNotFoundError`, one line each.
"""

import gzip
import hashlib
import json
import math
import operator
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

BUNDLED = {
    "coffee": ("scikit-image", "skimage/data/coffee.png"),
    "camera": ("scikit-image", "skimage/data/camera.png"),
    "flower": ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    "china": ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    "stereo_motorcycle": ("scikit-image", "skimage/data/motorcycle_left.png"),
    "chelsea": ("scikit-image", "skimage/data/chelsea.png"),
    "rocket": ("scikit-image", "skimage/data/rocket.jpg"),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SPLITS = {"test": "t10k", "train": "train"}


@dataclass(frozen=True)
class Picture:
    """One picture. Two are equal if id, label and hash are.

    `open` gives a fully decoded 8-bit PIL image: RGB for photographs, L for IDX digits. A picture that came
    as a tensor keeps it in `pixels` (C, H, W); its `open` is for looking at only (see `tensors`).
    """

    id: str
    label: int | None
    sha256: str
    open: Callable[[], Image.Image] = field(compare=False, repr=False)
    pixels: Tensor | None = field(default=None, compare=False, repr=False)

    def load(self, preprocess: Callable[[Image.Image], Tensor] | None) -> Tensor:
        """Network input (C, H, W): the tensor it came as, or `preprocess` of the opened picture."""
        if self.pixels is not None:
            return self.pixels
        if preprocess is None:
            raise ValueError(f"picture {self.id!r} needs a preprocess function to become a tensor")
        return preprocess(self.open())


@dataclass(frozen=True)
class Images:
    """At least one picture, in order, with unique ids (else ValueError).

    `skipped` names the bad pictures that were left out, each with its reason.
    """

    name: str
    pictures: tuple[Picture, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.pictures:
            raise ValueError(f"no picture in {self.name!r}")
        if twice := [key for key, count in Counter(self.ids).items() if count > 1]:
            raise ValueError(f"picture ids are not unique in {self.name!r}: {twice[:5]}")

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pictures' ids, in order."""
        return tuple(picture.id for picture in self.pictures)

    @property
    def labels(self) -> tuple[int | None, ...]:
        """The pictures' class indices, None where unknown."""
        return tuple(picture.label for picture in self.pictures)

    @property
    def digest(self) -> str:
        """The image list's hash: SHA-256 over every picture's id and hash, in order."""
        lines = (json.dumps([picture.id, picture.sha256]) + "\n" for picture in self.pictures)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def limit(self, n: int | None) -> "Images":
        """Give the first `n` pictures; all of them for None. ValueError unless n >= 1."""
        return replace(self, pictures=self.pictures[: _count(n)])

    def chunks(self, size: int) -> Iterator["Images"]:
        """Split into sets of `size` pictures, the last perhaps smaller. ValueError unless size >= 1."""
        if size < 1:
            raise ValueError(f"chunk size must be at least 1: {size}")
        starts = range(0, len(self), size)
        return (replace(self, pictures=self.pictures[start : start + size]) for start in starts)

    def load(self, preprocess: Callable[[Image.Image], Tensor] | None = None) -> Tensor:
        """Open every picture: (N, C, H, W). Tensors are stacked as they came, whatever `preprocess` is.

        ValueError if the preprocessed pictures differ in shape.
        """
        loaded = [picture.load(preprocess) for picture in self.pictures]
        if len(shapes := {tuple(pixels.shape) for pixels in loaded}) > 1:
            raise ValueError(f"preprocessed pictures of {self.name!r} differ in shape: {sorted(shapes)}")
        return torch.stack(loaded)


def find(source: str, split: str = "test", skip_bad: bool = False, limit: int | None = None) -> Images:
    """Tell the sources apart: "bundled", a folder with IDX files, a folder of pictures, a picture file.

    A folder that is itself called bundled is reached as "./bundled". `split` is for IDX files only.
    """
    if not source:
        raise ValueError("no image source given: bundled, a folder or a picture file")
    if source == "bundled":
        return bundled().limit(limit)
    if any(_idx_file(Path(source), f"{prefix}-images-idx3-ubyte") for prefix in SPLITS.values()):
        return idx(source, split, limit)
    return folder(source, skip_bad, limit)


def bundled() -> Images:
    """Photographs that scikit-image and scikit-learn carry on disk; the confidently recognised ones first.

    Nothing is downloaded: FileNotFoundError names a file that the installed package lacks.
    """
    return Images("bundled", tuple(_bundled(name, *where) for name, where in BUNDLED.items()))


def _bundled(name: str, package: str, relative: str) -> Picture:
    module, _, rest = relative.partition("/")
    spec = find_spec(module)
    path = Path(spec.origin).parent / rest if spec and spec.origin else Path(relative)
    if not path.is_file():
        raise FileNotFoundError(f"the bundled photograph {name!r} is missing: no {path}; reinstall {package}")
    return _picture(name, path)


def folder(path: str | Path, skip_bad: bool = False, limit: int | None = None) -> Images:
    """All pictures below a folder, in natural order, or a single picture file.

    Ids are paths relative to the folder, without the extension unless another file then has the same id.
    Hidden files and folders are ignored, linked folders not entered. `limit` takes the first pictures, bad
    ones included. Every picture is decoded once, here: a bad one is a ValueError that names it or, with
    `skip_bad`, an entry in `skipped`; ValueError if none is left.
    """
    path = Path(path)
    named = _named(path)[: _count(limit)]
    pictures, skipped = [], []
    for name, file in named:
        try:
            pictures.append(_picture(name, file))
        except (ValueError, OSError) as error:
            reason = _one_line(error)
            if not skip_bad:
                hint = "use --skip-bad-images to go on without it"
                raise ValueError(f"bad picture {str(file)!r}: {reason}; {hint}") from error
            skipped.append((name, reason))
    if not pictures:
        raise ValueError(f"all {len(skipped)} pictures of {str(path)!r} are bad, the first: {skipped[0][1]}")
    return Images(path.resolve().name, tuple(pictures), tuple(skipped))


def _named(path: Path) -> list[tuple[str, Path]]:
    """Picture files with their ids; an id does not depend on how many pictures are then used."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {str(path)!r}")
    root, files = (path, _walk(path)) if path.is_dir() else (path.parent, [path])
    relative = sorted((file.relative_to(root) for file in files), key=_natural)
    if not relative:
        raise ValueError(f"no picture below {str(path)!r} (looked for {' '.join(SUFFIXES)})")
    long = [_text(name) for name in relative]
    short = [_text(name.with_suffix("")) for name in relative]
    taken = Counter(long + short)
    return [(s if taken[s] == 1 else n, root / r) for s, n, r in zip(short, long, relative, strict=True)]


def _walk(root: Path) -> list[Path]:
    files: list[Path] = []
    for directory, below, names in os.walk(root, onerror=_raise):
        below[:] = [name for name in below if not name.startswith(".")]
        visible = (name for name in names if not name.startswith("."))
        files += [Path(directory, name) for name in visible if name.lower().endswith(SUFFIXES)]
    return files


def _raise(error: OSError) -> NoReturn:
    raise error


def _natural(path: Path) -> tuple[object, ...]:
    """Sort key: folder by folder, digits as numbers, capitals beside small letters."""
    pieces = [re.split("([0-9]+)", part.lower()) for part in path.parts]
    numbered = [[int(p) if i % 2 else p for i, p in enumerate(part)] for part in pieces]
    return numbered, path.parts


def _text(path: Path) -> str:
    """POSIX path as valid text, also where the file's name is not UTF-8."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _picture(name: str, path: Path) -> Picture:
    """Read the file once, to hash it and to see that it can be decoded."""
    data = path.read_bytes()
    decode(data)
    return Picture(name, None, hashlib.sha256(data).hexdigest(), partial(_open, path))


def carried(images: Images) -> Images:
    """The same pictures, with the bytes of their files, or pixels of their own, in them: to be sent elsewhere.

    OSError if a file can no longer be read.
    """
    return replace(images, pictures=tuple(map(_carried, images.pictures)))


def _carried(picture: Picture) -> Picture:
    opens = picture.open
    if isinstance(opens, partial) and opens.func is _open:
        (path,) = opens.args
        return replace(picture, open=partial(_decoded, path, path.read_bytes()))
    if picture.pixels is not None:
        # A view would take the whole set's storage with it.
        pixels = picture.pixels.clone()
        return replace(picture, pixels=pixels, open=partial(_shown, pixels))
    return picture


def _open(path: Path) -> Image.Image:
    return _decoded(path, path.read_bytes())


def _decoded(path: Path, data: bytes) -> Image.Image:
    try:
        return decode(data)
    except ValueError as error:
        raise ValueError(f"bad picture {str(path)!r}: {error}") from error


def decode(data: bytes) -> Image.Image:
    """8-bit RGB picture, upright (EXIF), from the bytes of a picture file; of an animation, the first frame.

    Transparency is laid over white. 16-bit grey is divided by 257. Grey in 32-bit integers or floats has no
    known range: its own least and greatest values become 0 and 255, a constant one becomes 0. ValueError
    with a one-line reason for anything broken, non-finite, or above 178 million pixels (PIL's limit).
    """
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    with warnings.catch_warnings():
        # What PIL only warns about is size, below its limit, and broken metadata: the pixels are sound.
        warnings.simplefilter("ignore")
        try:
            # PIL looks at a PNG's checksums in verify() only, and wants a fresh image afterwards.
            Image.open(BytesIO(data), formats=FORMATS).verify()
            return _rgb(Image.open(BytesIO(data), formats=FORMATS))
        except UnidentifiedImageError:
            raise ValueError("not a picture, or its header is damaged") from None
        except Exception as error:  # PIL's decoders raise SyntaxError, struct.error, IndexError and more
            raise ValueError(_one_line(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    # Older PIL, and PPM in any, give 16-bit grey as mode I.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    image = ImageOps.exif_transpose(image)
    if sixteen:
        values = np.asarray(image).astype(np.float64)
        values[values == image.info.get("transparency")] = 65535
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image))).convert("RGB")
    if "transparency" in image.info or image.mode in ("P", "PA", "LA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _stretched(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Least value to 0, greatest to 255; a constant to 0."""
    if not np.isfinite(values).all():
        raise ValueError("it holds non-finite pixels")
    above = values.astype(np.float64) - float(values.min())
    return np.asarray(np.rint(above / (above.max() or 1) * 255), np.uint8)


def idx(folder: str | Path, split: str = "test", limit: int | None = None) -> Images:
    """MNIST-like IDX files with labels, gzipped or not: 8-bit grey pictures, ids "test-00000" and on.

    The files are read once; a picture's hash is that of its pixels' bytes. FileNotFoundError if a file is
    missing, ValueError naming it if its magic number or its size is not what it should be.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    root = Path(folder)
    pixels = _read_idx(root, f"{SPLITS[split]}-images-idx3-ubyte", 3)
    labels = _read_idx(root, f"{SPLITS[split]}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels):
        raise ValueError(f"{str(root)!r} holds {len(pixels)} {split} pictures and {len(labels)} labels")
    digits = zip(pixels[: _count(limit)], labels.tolist(), strict=False)
    pictures = (
        Picture(f"{split}-{i:05d}", label, _sha256(x), partial(Image.fromarray, x))
        for i, (x, label) in enumerate(digits)
    )
    return Images(f"{root.resolve().name}/{split}", tuple(pictures))


def _idx_file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


def _read_idx(root: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    if (path := _idx_file(root, name)) is None:
        raise FileNotFoundError(f"no {name} or {name}.gz in {str(root)!r}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not sound gzip: {_one_line(error)}") from error
    start, magic = 4 + 4 * dimensions, 0x800 + dimensions  # 8: unsigned bytes
    if len(data) < start or (found := int.from_bytes(data[:4], "big")) != magic:
        shown = f"magic number {found}" if len(data) >= start else f"{len(data)} bytes"
        raise ValueError(f"{str(path)!r} is no IDX file of magic number {magic}: it has {shown}")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{str(path)!r} should hold {shape} bytes after its header: {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def tensors(pixels: Tensor, ids: Sequence[str] | None = None, labels: Sequence[int] | Tensor | None = None) -> Images:
    """Network inputs from Python, already preprocessed: (N, C, H, W), floating, finite; not copied.

    Default ids are "image-000" and on. `load` gives the tensors back untouched; a picture's `open` shows
    them, its least value black and its greatest white, the mean of the channels unless there are 3.
    ValueError if the shape, the type, a value, or the number of ids or labels is wrong.
    """
    if pixels.ndim != 4 or not pixels.is_floating_point() or 0 in pixels.shape:
        shape = tuple(pixels.shape)
        raise ValueError(f"images must be a floating tensor (N, C, H, W), none of them 0: {shape} {pixels.dtype}")
    if not (finite := pixels.isfinite().flatten(1).all(dim=1)).all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"images of shape {tuple(pixels.shape)} hold non-finite values, at {bad[:5]}")
    names = [f"image-{i:03d}" for i in range(len(pixels))] if ids is None else list(ids)
    classes = [None] * len(pixels) if labels is None else _whole(labels)
    if not len(names) == len(classes) == len(pixels):
        raise ValueError(f"{len(pixels)} images, {len(names)} ids, {len(classes)} labels")
    rows = zip(names, classes, pixels.detach(), strict=True)
    return Images("tensors", tuple(_tensor(name, label, x) for name, label, x in rows))


def _tensor(name: str, label: int | None, x: Tensor) -> Picture:
    array = x.cpu().double().numpy()
    return Picture(name, label, _sha256(array), partial(_shown, x), x)


def _shown(x: Tensor) -> Image.Image:
    channels = x.cpu().double().numpy()
    shown = channels.transpose(1, 2, 0) if len(channels) == 3 else channels.mean(axis=0)
    return Image.fromarray(_stretched(shown))


def _whole(labels: Sequence[int] | Tensor) -> Sequence[int]:
    try:
        return [operator.index(label) for label in labels]
    except TypeError as error:
        raise ValueError(f"labels must be whole numbers: {_one_line(error)}") from error


def _count(n: int | None) -> int | None:
    if n is not None and n < 1:
        raise ValueError(f"limit must be at least 1: {n}")
    return n


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
