import gzip
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sanity import images
from sanity.images import Images, Picture, bundled, decode, find, folder, idx, tensors

SHARED = Path(__file__).parents[2] / "shared"
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def encoded(pixels, kind="PNG", **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(width, height, depth, colour, rows, *chunks):
    """A PNG put together by hand, for what PIL does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def decoded(data):
    picture = decode(data)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def write(root, *names, shade=0):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.full((2, 3), shade + i, np.uint8)))


def to_tensor(picture):
    pixels = np.array(picture, dtype=np.float32)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


# Kinds of picture


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_back_exactly(kind):
    np.testing.assert_array_equal(decoded(encoded(NOISE, kind)), NOISE)


def test_lossless_webp_comes_back_exactly():
    np.testing.assert_array_equal(decoded(encoded(NOISE, "WEBP", lossless=True)), NOISE)


def test_jpeg_keeps_a_flat_colour():
    flat = np.full((16, 16, 3), (200, 90, 40), np.uint8)
    got = decoded(encoded(flat, "JPEG", quality=95)).astype(int)
    assert np.abs(got - flat).max() <= 2  # YCbCr rounds each colour


def test_greyscale_fills_three_channels():
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(decoded(encoded(grey)), np.stack([grey] * 3, -1))


def test_one_bit_is_black_and_white():
    picture = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    np.testing.assert_array_equal(decoded(encoded(picture))[0, :, 0], [0, 255, 0])


def test_alpha_is_laid_over_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 102]]], np.uint8)
    want = [[10, 20, 30], [255, 255, 255], [153, 153, 153]]  # 255 * (1 - 102 / 255) = 153
    np.testing.assert_array_equal(decoded(encoded(rgba))[0], want)


def test_grey_with_alpha_is_laid_over_white():
    picture = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 51)])
    np.testing.assert_array_equal(decoded(encoded(picture))[0, 0], [204, 204, 204])


def test_palette_with_a_transparent_entry():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    plain = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    np.testing.assert_array_equal(decoded(encoded(picture))[0], plain)
    want = [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    np.testing.assert_array_equal(decoded(encoded(picture, transparency=1))[0], want)


def test_cmyk():
    inks = bytes([0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 255])
    got = decoded(encoded(Image.frombytes("CMYK", (3, 1), inks), "TIFF"))
    np.testing.assert_array_equal(got[0], [[255, 0, 0], [255, 255, 255], [0, 0, 0]])
    assert decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4, 0] >= 250


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    deep = np.array([[0, 257, 1000, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(decoded(encoded(deep, kind))[0, :, 0], [0, 1, 4, 128, 255])


def test_sixteen_bit_tiff_agrees_with_tifffile(tmp_path):
    deep = np.random.default_rng(1).integers(0, 65536, (9, 7), dtype=np.uint16)
    for order in "<>":
        tifffile.imwrite(tmp_path / "deep.tif", deep, byteorder=order)
        got = decoded((tmp_path / "deep.tif").read_bytes())
        np.testing.assert_array_equal(got[..., 0], np.rint(deep / 257))


def test_sixteen_bit_png_with_a_transparent_grey():
    key = (b"tRNS", struct.pack(">H", 1000))
    data = png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 40000), key)
    np.testing.assert_array_equal(decoded(data)[0, :, 0], [255, 156])


def test_floats_are_stretched_from_least_to_greatest():
    values = np.array([[-1.0, 0.0, 1.0, 3.0]], np.float32)
    np.testing.assert_array_equal(decoded(encoded(values, "TIFF"))[0, :, 0], [0, 64, 128, 255])


def test_wide_integers_are_stretched_and_a_constant_is_black():
    values = np.array([[-100000, 0, 100000]], np.int32)
    np.testing.assert_array_equal(decoded(encoded(values, "TIFF"))[0, :, 0], [0, 128, 255])
    assert decoded(encoded(np.full((2, 2), 7, np.int32), "TIFF")).max() == 0


def test_non_finite_floats_are_refused():
    with pytest.raises(ValueError, match="non-finite"):
        decode(encoded(np.array([[0, np.nan]], np.float32), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90), (2, lambda x: x[:, ::-1])],
)
def test_exif_rotation_is_applied(orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(encoded(NOISE, exif=exif)), undo(NOISE))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(BytesIO(data)).n_frames == 2
        np.testing.assert_array_equal(decoded(data)[0, 0], [255, 0, 0])


def test_one_pixel_and_twenty_megapixels():
    assert decode(encoded(np.zeros((1, 1, 3), np.uint8))).size == (1, 1)
    assert decode(encoded(Image.new("L", (5000, 4000)), compress_level=1)).size == (5000, 4000)


def test_size_warns_nobody_below_the_limit_and_is_refused_above(monkeypatch):
    with pytest.raises(ValueError, match="196000000 pixels"):
        decode(png(14000, 14000, 8, 0, b""))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1200 pixels: PIL warns from 1000, refuses from 2000
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(BytesIO(encoded(NOISE)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(NOISE)).size == (30, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.05, 0.6, 0.95])
def test_truncated_pictures_are_refused(kind, kept):
    data = encoded(NOISE, kind)
    with pytest.raises(ValueError, match=r"\S") as caught:
        decode(data[: int(kept * len(data))])
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_png_is_refused():
    data = bytearray(encoded(NOISE))
    data[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match="checksum"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", ["PCX", "TGA", "EPS"])
def test_formats_that_were_not_asked_for_are_refused(kind):
    with pytest.raises(ValueError, match="not a picture"):
        decode(encoded(NOISE, kind))


# Folders


def test_folder_in_natural_order_with_plain_ids(tmp_path):
    write(tmp_path, "img10.png", "img2.PNG", "IMG1.png", "b/2.png", "b/10.png", "a-b/1.png", "a/1.png")
    found = folder(tmp_path)
    assert found.ids == ("a/1", "a-b/1", "b/2", "b/10", "IMG1", "img2", "img10")
    assert found.name == tmp_path.name
    assert found.labels == (None,) * 7
    assert found.skipped == ()


def test_folder_takes_every_kind_and_ignores_the_rest(tmp_path):
    suffixes = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "JPG"]
    for i, suffix in enumerate(suffixes):
        (tmp_path / f"{i}.{suffix}").write_bytes(encoded(NOISE))  # the content decides how it is decoded
    write(tmp_path, ".hidden.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert folder(tmp_path).ids == tuple(str(i) for i in range(len(suffixes)))


def test_ids_keep_the_extension_where_they_must_and_are_unique(tmp_path):
    write(tmp_path, "a.png", "a.gif", "a.png.png", "b.png", "c/b.png")
    assert set(folder(tmp_path).ids) == {"a.png", "a.gif", "a.png.png", "b", "c/b"}
    assert folder(tmp_path, limit=1).ids == ("a.gif",)  # an id does not depend on the limit


def test_a_name_that_is_not_utf8_becomes_a_valid_id(tmp_path):
    try:
        (tmp_path / "caf\udce9.png").write_bytes(encoded(NOISE))
    except OSError as error:
        pytest.skip(f"this file system takes UTF-8 names only: {error}")
    assert folder(tmp_path).ids == ("caf\\xe9",)
    assert len(folder(tmp_path).digest) == 64


def test_a_single_file(tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(NOISE))
    found = folder(tmp_path / "cat.png")
    assert found.ids == ("cat",)
    np.testing.assert_array_equal(np.asarray(found.pictures[0].open()), NOISE)


BAD = {"empty": b"", "text": b"hello", "cut": encoded(NOISE)[:200]}


@pytest.mark.parametrize(("name", "reason"), [("empty", "empty"), ("text", "not a picture"), ("cut", "runcated")])
def test_a_bad_picture_is_named_in_one_line(tmp_path, name, reason):
    write(tmp_path, "a.png")
    (tmp_path / f"{name}.png").write_bytes(BAD[name])
    with pytest.raises(ValueError, match=rf"{name}\.png.*{reason}.*--skip-bad-images") as caught:
        folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_bad_pictures_are_skipped_and_listed(tmp_path):
    write(tmp_path, "a.png", "z.png")
    for name, data in BAD.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    found = folder(tmp_path, skip_bad=True)
    assert found.ids == ("a", "z")
    assert [name for name, _ in found.skipped] == ["cut", "empty", "text"]
    assert folder(tmp_path, skip_bad=True, limit=2).skipped == found.skipped[:1]
    with pytest.raises(ValueError, match="cut"):
        folder(tmp_path, limit=2)
    assert folder(tmp_path, limit=1).ids == ("a",)  # what the limit leaves out is not decoded


def test_all_bad_empty_missing_and_limit(tmp_path):
    with pytest.raises(ValueError, match="no picture below"):
        folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"all 1 pictures .* empty"):
        folder(tmp_path, skip_bad=True)
    with pytest.raises(ValueError, match="at least 1: 0"):
        folder(tmp_path, limit=0)


def test_a_picture_that_went_bad_later_is_named(tmp_path):
    write(tmp_path, "a.png")
    found = folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.png.*not a picture"):
        found.load(to_tensor)


# Sets


def test_pictures_are_opened_only_when_loaded(tmp_path, monkeypatch):
    write(tmp_path, *(f"{i}.png" for i in range(5)))
    found = folder(tmp_path)
    opened = []
    monkeypatch.setattr(images, "decode", lambda data: opened.append(1) or decode(data))
    pieces = list(found.chunks(2))
    assert [piece.ids for piece in pieces] == [("0", "1"), ("2", "3"), ("4",)]
    assert found.digest
    assert not opened
    loaded = pieces[1].load(to_tensor)
    assert len(opened) == 2
    assert loaded.shape == (2, 3, 2, 3)
    torch.testing.assert_close(loaded, found.load(to_tensor)[2:4], rtol=0, atol=0)


def test_load_wants_one_shape_and_a_preprocess(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(encoded(NOISE))
    with pytest.raises(ValueError, match=r"differ in shape: \[\(3, 2, 3\), \(3, 40, 30\)\]"):
        folder(tmp_path).load(to_tensor)
    with pytest.raises(ValueError, match="'a' needs a preprocess"):
        folder(tmp_path).load()


def test_digest_follows_content_ids_and_order(tmp_path):
    write(tmp_path, "a.png", "b.png")
    first = folder(tmp_path)
    assert folder(tmp_path) == first
    assert folder(tmp_path).digest == first.digest
    swapped = Images(first.name, first.pictures[::-1])
    write(tmp_path, "a.png", "b.png", shade=9)
    changed = folder(tmp_path)
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    digests = {first.digest, swapped.digest, changed.digest, folder(tmp_path).digest, first.limit(1).digest}
    assert len(digests) == 5


def test_sets_refuse_nonsense():
    picture = Picture("x", None, "0", lambda: Image.new("RGB", (1, 1)))
    with pytest.raises(ValueError, match=r"not unique in 'twins': \['x'\]"):
        Images("twins", (picture, picture))
    with pytest.raises(ValueError, match="no picture in 'none'"):
        Images("none", ())
    with pytest.raises(ValueError, match="at least 1: 0"):
        Images("one", (picture,)).chunks(0)
    with pytest.raises(ValueError, match="at least 1: -1"):
        Images("one", (picture,)).limit(-1)
    assert len(Images("one", (picture,)).limit(None)) == 1


# Bundled photographs


def test_bundled_photographs_are_those_of_the_libraries():
    found = bundled()
    assert found.ids == ("coffee", "camera", "flower", "china", "stereo_motorcycle", "chelsea", "rocket")
    got = {picture.id: np.asarray(picture.open()) for picture in found.pictures}
    for name in ("coffee", "chelsea", "rocket"):
        np.testing.assert_array_equal(got[name], getattr(skimage.data, name)())
    np.testing.assert_array_equal(got["camera"], np.stack([skimage.data.camera()] * 3, -1))
    np.testing.assert_array_equal(got["stereo_motorcycle"], skimage.data.stereo_motorcycle()[0])
    for name in ("china", "flower"):
        np.testing.assert_array_equal(got[name], load_sample_image(f"{name}.jpg"))


def test_a_missing_bundled_photograph_is_named(monkeypatch):
    monkeypatch.setitem(images.BUNDLED, "rocket", ("scikit-image", "skimage/data/no.jpg"))
    with pytest.raises(FileNotFoundError, match=r"'rocket' is missing: .*no\.jpg; reinstall scikit-image"):
        bundled()


# IDX files


def idx_bytes(array, magic=None):
    header = struct.pack(">I", 0x800 + array.ndim if magic is None else magic)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


DIGITS = np.random.default_rng(2).integers(0, 256, (3, 4, 5), dtype=np.uint8)
CLASSES = np.array([7, 2, 1], np.uint8)


def write_idx(root, prefix="t10k", pack=bytes, end=""):
    (root / f"{prefix}-images-idx3-ubyte{end}").write_bytes(pack(idx_bytes(DIGITS)))
    (root / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(pack(idx_bytes(CLASSES)))


@pytest.mark.parametrize(("pack", "end"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_gives_grey_pictures_with_labels(tmp_path, pack, end):
    write_idx(tmp_path, pack=pack, end=end)
    found = idx(tmp_path)
    assert found.ids == ("test-00000", "test-00001", "test-00002")
    assert found.labels == (7, 2, 1)
    assert {picture.open().mode for picture in found.pictures} == {"L"}
    np.testing.assert_array_equal(found.load(to_tensor)[:, 0], DIGITS)
    assert idx(tmp_path, limit=2) == found.limit(2)


def test_idx_train_and_its_errors(tmp_path):
    write_idx(tmp_path, "train")
    assert idx(tmp_path, "train").ids[0] == "train-00000"
    with pytest.raises(FileNotFoundError, match="no t10k-images-idx3-ubyte"):
        idx(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'valid': one of test, train"):
        idx(tmp_path, "valid")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t10k-images-idx3-ubyte", idx_bytes(DIGITS, 2049), "images-idx3.*2051: it has magic number 2049"),
        ("t10k-images-idx3-ubyte", b"\0\0", "images-idx3.*2051: it has 2 bytes"),
        ("t10k-images-idx3-ubyte", idx_bytes(DIGITS)[:-1], r"images-idx3.*\[3, 4, 5\].*: 59"),
        ("t10k-labels-idx1-ubyte", idx_bytes(CLASSES) + b"0", r"labels-idx1.*\[3\].*: 4"),
        ("t10k-labels-idx1-ubyte", idx_bytes(CLASSES[:2]), "3 test pictures and 2 labels"),
    ],
)
def test_idx_files_are_checked(tmp_path, name, data, message):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        idx(tmp_path)


@pytest.mark.parametrize("spoil", [lambda x: x[:-9], lambda x: b"plain", lambda x: x[:12] + b"\xff" * 20 + x[32:]])
def test_bad_gzip_is_named(tmp_path, spoil):
    write_idx(tmp_path, pack=lambda data: spoil(gzip.compress(data)), end=".gz")
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz' is not sound gzip"):
        idx(tmp_path)


def test_real_mnist():
    root = SHARED / "data" / "mnist"
    if not root.is_dir():
        pytest.skip(f"no MNIST at {root}")
    found = idx(root)
    assert len(found) == 10_000
    assert found.labels[:10] == (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)
    assert found.pictures[0].open().size == (28, 28)


# Tensors


def test_tensors_come_back_untouched():
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    found = tensors(x, labels=torch.tensor([4, 0, 1]))
    assert found.ids == ("image-000", "image-001", "image-002")
    assert found.labels == (4, 0, 1)
    assert torch.equal(found.load(), x)
    assert torch.equal(found.load(to_tensor), x)
    assert tensors(x).digest == found.digest != tensors(x + 1).digest
    assert [len(piece) for piece in found.chunks(2)] == [2, 1]


def test_tensors_can_be_looked_at():
    ramp = torch.tensor([-1.0, 0.0, 1.0]).expand(1, 1, 2, 3)
    grey = tensors(ramp).pictures[0].open()
    np.testing.assert_array_equal(np.asarray(grey), [[0, 128, 255]] * 2)
    assert tensors(torch.rand(1, 3, 2, 2)).pictures[0].open().mode == "RGB"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"\(1, 3, 4, 4\) torch.uint8"),
        (torch.zeros(0, 3, 4, 4), r"\(0, 3, 4, 4\)"),
        (torch.tensor([0.0, float("nan")]).reshape(2, 1, 1, 1), r"\(2, 1, 1, 1\) hold non-finite.*\[1\]"),
    ],
)
def test_tensors_of_the_wrong_kind_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        tensors(x)


def test_tensor_names_and_labels_are_checked():
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"not unique in 'tensors': \['a'\]"):
        tensors(x, ["a", "a"])
    with pytest.raises(ValueError, match="2 images, 1 ids, 2 labels"):
        tensors(x, ["a"])
    with pytest.raises(ValueError, match="2 images, 2 ids, 3 labels"):
        tensors(x, labels=[1, 2, 3])
    with pytest.raises(ValueError, match="whole numbers"):
        tensors(x, labels=[0.5, 1])


# Finding the source


def test_find_tells_the_sources_apart(tmp_path):
    write(tmp_path, "photos/a.png", "photos/b.png")
    (tmp_path / "digits").mkdir()
    write_idx(tmp_path / "digits")
    assert find("bundled", limit=2).ids == ("coffee", "camera")
    assert find(str(tmp_path / "photos"), limit=1).ids == ("a",)
    assert find(str(tmp_path / "photos" / "b.png")).ids == ("b",)
    assert find(str(tmp_path / "digits")).labels == (7, 2, 1)
    with pytest.raises(FileNotFoundError, match="no train-images"):
        find(str(tmp_path / "digits"), split="train")
    with pytest.raises(ValueError, match="no image source"):
        find("")
