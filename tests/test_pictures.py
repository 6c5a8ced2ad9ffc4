import contextlib
import io
import os
import socket
import warnings

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from fastzs.pictures import ImageError, find_pictures, limit_pixels, read_picture, split_batch
from fastzs.result import Segmentation

OLD = pytest.mark.skipif(PIL.__version__ < "13", reason="Pillow below 13 cannot read the YCbCr TIFF that it writes")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(size=(40, 24)):
    """RGB, four flat quarters: red, green / blue, white; width x height."""
    image = Image.new("RGB", size)
    half = (size[0] // 2, size[1] // 2)
    for i, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        image.paste(colour, (i % 2 * half[0], i // 2 * half[1], (i % 2 + 1) * half[0], (i // 2 + 1) * half[1]))
    return image


def corners(tensor):
    return [tuple(tensor[:, y, x].tolist()) for y, x in ((2, 2), (2, -3), (-3, 2), (-3, -3))]


def near(colour, wanted, tolerance=12):
    return all(abs(a - b) <= tolerance for a, b in zip(colour, wanted, strict=True))


def check(picture, wanted, size=(24, 40), tolerance=0):
    tensor = read_picture(picture)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, *size)
    assert tensor.is_contiguous()
    for colour, want in zip(corners(tensor), wanted, strict=True):
        assert near(colour, want, tolerance), (colour, want)


FOUR = (RED, GREEN, BLUE, WHITE)
GREYS = ((76,) * 3, (150,) * 3, (29,) * 3, (255,) * 3)  # 0.299 R + 0.587 G + 0.114 B


@pytest.mark.parametrize(
    ("name", "mode", "wanted", "tolerance"),
    [
        ("rgb.png", "RGB", FOUR, 0),
        ("rgb.jpg", "RGB", FOUR, 12),
        ("rgb.webp", "RGB", FOUR, 12),
        ("rgb.bmp", "RGB", FOUR, 0),
        ("rgb.tif", "RGB", FOUR, 0),
        ("cmyk.jpg", "CMYK", FOUR, 12),
        ("cmyk.tif", "CMYK", FOUR, 1),
        pytest.param("ycbcr.tif", "YCbCr", FOUR, 3, marks=OLD),
        ("palette.png", "P", FOUR, 0),
        ("palette.gif", "P", FOUR, 0),
        ("grey.png", "L", GREYS, 1),
        ("rgba.png", "RGBA", FOUR, 0),
        ("la.png", "LA", GREYS, 1),
        ("bits.png", "1", ((0,) * 3, (0,) * 3, (0,) * 3, WHITE), 0),
    ],
)
def test_modes(tmp_path, name, mode, wanted, tolerance):
    path = tmp_path / name
    image = quarters()
    if mode == "1":  # black but where it is pure white
        image = image.convert("L").point([0] * 255 + [255]).convert("1")
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    else:
        image = image.convert(mode)
    image.save(path)
    check(path, wanted, tolerance=tolerance)
    check(str(path), wanted, tolerance=tolerance)
    with Image.open(path) as opened:
        check(opened, wanted, tolerance=tolerance)


def test_16_bit_grey(tmp_path):
    values = np.array([[0, 128, 129, 257, 65535, 32768, 65406, 65407]], dtype=np.uint16).repeat(3, axis=0)
    Image.fromarray(values).save(tmp_path / "deep.png")
    wanted = np.rint(values[0] / 257.0)
    assert read_picture(tmp_path / "deep.png")[:, 0].tolist() == [wanted.tolist()] * 3
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tif")  # mode I
    assert read_picture(tmp_path / "deep.tif")[:, 0].tolist() == [wanted.tolist()] * 3


@pytest.mark.parametrize("pixels", [np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32)])
def test_more_than_16_bits(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(ImageError, match=r"deep\.tif: cannot be read: its pixels .* do not fit 16 bits"):
        read_picture(tmp_path / "deep.tif")


def test_floating_point(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif: cannot be read: its pixels are floating point"):
        read_picture(tmp_path / "float.tif")


def test_transparent_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 4))
    image.paste((0, 0, 0, 128), (0, 4, 4, 8))
    image.save(tmp_path / "alpha.png")
    tensor = read_picture(tmp_path / "alpha.png")
    assert tensor[:, 1, 1].tolist() == [255, 0, 0]
    assert tensor[:, 1, 6].tolist() == [255, 255, 255]
    assert all(abs(v - 127) <= 1 for v in tensor[:, 6, 1].tolist())

    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 4, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    tensor = read_picture(tmp_path / "palette.png")
    assert tensor[:, 1, 1].tolist() == [0, 0, 255]
    assert tensor[:, 1, 6].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("orientation", "order"),
    [(1, (0, 1, 2, 3)), (2, (1, 0, 3, 2)), (3, (3, 2, 1, 0)), (4, (2, 3, 0, 1)),
     (5, (0, 2, 1, 3)), (6, (2, 0, 3, 1)), (7, (3, 1, 2, 0)), (8, (1, 3, 0, 2))],
)  # fmt: skip
def test_exif_orientation(tmp_path, orientation, order):
    exif = Image.Exif()
    exif[0x0112] = orientation
    quarters().save(tmp_path / "turned.jpg", exif=exif)
    size = (24, 40) if orientation < 5 else (40, 24)
    check(tmp_path / "turned.jpg", [FOUR[i] for i in order], size=size, tolerance=12)


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png", "pages.tif"])
def test_first_frame_of_an_animation(tmp_path, name):
    others = [Image.new("RGB", (40, 24), c) for c in (GREEN, BLUE)]
    quarters().save(tmp_path / name, save_all=True, append_images=others)
    check(tmp_path / name, FOUR, tolerance=12)


def test_arrays_and_tensors():
    array = np.asarray(quarters())
    check(array, FOUR)
    check(array[:, ::-1], (GREEN, RED, WHITE, BLUE))
    check(torch.from_numpy(array.copy()).permute(2, 0, 1), FOUR)


def test_does_not_share_memory_with_an_array():
    array = np.zeros((4, 4, 3), np.uint8)
    tensor = read_picture(array)
    array[:] = 9
    assert tensor.sum() == 0


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4), np.int32), r"expected \[H, W, 3\] or \[H, W\], uint8 or floating .* got dtype int32"),
        (np.full((4, 4), 1.5), "expected from 0 to 1, got 1.5 to 1.5"),
        (np.full((4, 4, 3), -0.5), "expected from 0 to 1, got -0.5 to -0.5"),
        (np.zeros((4, 4, 4), np.uint8), r"got shape \[4, 4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "got dtype torch.int64"),
        (torch.full((4, 4), 255.0), "expected from 0 to 1, got 255 to 255"),
        (b"no image", "the image in memory: not an image that Pillow can read"),
        (np.zeros((3, 4, 4), np.uint8), r"shape \[3, 4, 4\]"),
        (np.full((4, 4, 3), np.nan, np.float32), "expected from 0 to 1, got nan to nan"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"expected \[3, H, W\] .*got shape \[4, 4, 3\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"shape \[1, 3, 4, 4\]"),
        (torch.zeros(3, 4, 0, dtype=torch.uint8), r"shape \[3, 4, 0\]"),
        (Image.new("RGB", (0, 4)), "the PIL image: has no pixels"),
        (3, "cannot be a int"),
        (None, "cannot be a NoneType"),
    ],
)
def test_refuses(picture, message):
    with pytest.raises(ImageError, match=message):
        read_picture(picture)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "words.jpg").write_text("this is not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("words.jpg", "empty.png"):
        with pytest.raises(ImageError, match=f"{name}: not an image"):
            read_picture(tmp_path / name)
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_picture(tmp_path)


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.tif", "cut.bmp"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_files_are_named(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError, match=name.replace(".", r"\.")):
        read_picture(tmp_path / name)


@pytest.mark.parametrize("name", ["noise.jpg", "noise.png", "noise.gif", "noise.webp", "noise.tif", "noise.bmp"])
def test_damaged_files_never_raise_anything_else(tmp_path, name):
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if name.endswith((".jpg", ".png", ".webp")) else {}
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image.save(buffer, format=Image.registered_extensions()[name[5:]], **options)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    for _ in range(150):
        damaged = data.copy()
        places = rng.integers(0, min(len(data), 400), 3)
        damaged[places] = rng.integers(0, 256, 3)
        (tmp_path / name).write_bytes(damaged.tobytes())
        with warnings.catch_warnings(), contextlib.suppress(ImageError):
            warnings.simplefilter("ignore")
            assert read_picture(tmp_path / name).shape[0] == 3


def test_decompression_bomb_guard(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(ImageError, match=r"bomb\.png: has more than .* pixels, the most that is read"):
        read_picture(tmp_path / "bomb.png")


def test_a_limit_on_pixels_is_without_a_warning(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (300, 300)).save(tmp_path / "large.png")
    limit_pixels(90_000)
    assert read_picture(tmp_path / "large.png").shape == (3, 300, 300)
    assert not recwarn.list
    limit_pixels(89_000)
    with pytest.raises(ImageError, match="more than 89,000 pixels"):
        read_picture(tmp_path / "large.png")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        limit_pixels(0)


def test_8192_squared_is_within_the_guard():
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS > 8192 * 8192


@pytest.fixture
def tree(tmp_path):
    for name in ("b.png", "a.jpg", "sub/a.JPG", "sub/deep/c.webp", "notes.txt", ".hidden.png", ".cache/x.png",
                 "odd[1].png", "raw.dat"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(root, found):
    return [path.relative_to(root).as_posix() for path in found]


def test_find_in_folders_files_and_globs(tree):
    everything = ["a.jpg", "b.png", "odd[1].png", "sub/a.JPG", "sub/deep/c.webp"]
    assert names(tree, find_pictures([tree])) == everything
    assert names(tree, find_pictures([tree, tree / "sub", str(tree / "a.jpg"), tree / "sub" / ".." / "b.png"])) == [
        *everything
    ]
    assert names(tree, find_pictures([str(tree / "*.png")])) == ["b.png", "odd[1].png"]
    assert names(tree, find_pictures([str(tree / "**" / "*.*")])) == everything
    assert names(tree, find_pictures([str(tree / "**")])) == everything
    assert names(tree, find_pictures([tree / "raw.dat"])) == ["raw.dat"]
    assert names(tree, find_pictures([tree / "odd[1].png"])) == ["odd[1].png"]


def test_find_skips_a_folder(tree):
    assert names(tree, find_pictures([tree], skip=tree / "sub")) == ["a.jpg", "b.png", "odd[1].png"]
    with pytest.raises(ImageError, match=r"c\.webp.*outside of"):
        find_pictures([tree / "sub" / "deep" / "c.webp"], skip=tree / "sub")


def test_find_names_what_matches_nothing(tree):
    (tree / "bare").mkdir()
    for given in ("gone.png", "*.bmp", "bare", "gone/"):
        with pytest.raises(ImageError, match="no such image") as caught:
            find_pictures([tree / "a.jpg", tree / given])
        assert given.rstrip("/") in str(caught.value)
    with pytest.raises(ImageError, match="no images given"):
        find_pictures([])


def test_grey_fractions_and_batches():
    array = np.asarray(quarters())
    grey = array[..., 1]
    for picture in (grey, grey[..., None], torch.from_numpy(grey.copy()), Image.fromarray(grey)):
        assert torch.equal(read_picture(picture), torch.from_numpy(grey.copy()).expand(3, -1, -1))
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert torch.equal(read_picture((array / 255).astype(dtype)), read_picture(array))
    assert read_picture(array > 0).max() == 255
    many = split_batch(np.stack([array, array[:, ::-1]]))
    assert many is not None
    assert torch.equal(read_picture(many[1]), read_picture(array[:, ::-1]))
    assert split_batch(array) is None
    assert split_batch([array]) is None


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4), (4, 4)])
def test_does_not_share_memory_with_a_tensor(shape):
    given = torch.zeros(shape, dtype=torch.uint8)
    picture = read_picture(given)
    given.fill_(9)
    assert picture.sum() == 0
    picture[0] += 1
    assert picture[1:].sum() == 0


def test_from_memory_and_open_files(tmp_path):
    quarters().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    check(data, FOUR)
    check(io.BytesIO(data), FOUR)
    with (tmp_path / "a.png").open("rb") as stream:
        check(stream, FOUR)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    quarters().save(tmp_path / "a.png")
    check("~/a.png", FOUR)
    assert find_pictures(["~/a.png", "~/*.png", "~"]) == [tmp_path / "a.png"]
    with pytest.raises(ImageError, match="outside of ~"):
        find_pictures(["~"], skip="~")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs FIFOs")
    os.mkfifo(tmp_path / "p.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.jpg"))
        for path, kind in ((tmp_path / "p.jpg", "a FIFO"), (tmp_path / "s.jpg", "a socket"), ("/dev/zero", "a device")):
            with pytest.raises(ImageError, match=f"{path}: cannot be read: is {kind}, not a file"):
                read_picture(path)
        assert len(find_pictures([tmp_path])) == 2  # each is named when it fails


def test_eight_bits_in_wider_numbers(tmp_path, caplog):
    for dtype in (np.int32, np.uint16):
        Image.fromarray(np.full((4, 4), 201, dtype)).save(tmp_path / "low.tif")
        assert read_picture(tmp_path / "low.tif").unique().tolist() == [201]
    assert not caplog.records
    Image.fromarray(np.full((4, 4), 1023, np.uint16)).save(tmp_path / "ten bits.tif")
    read_picture(tmp_path / "ten bits.tif")
    assert "ten bits.tif: its 16-bit pixels reach 1023 of 65535, so it comes out nearly black" in caplog.text


def test_heic(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra 'heif'")
    heif.register_heif_opener()
    quarters().resize((80, 48)).save(tmp_path / "a.heic", quality=100)
    assert find_pictures([tmp_path]) == [tmp_path / "a.heic"]
    assert read_picture(tmp_path / "a.heic").shape == (3, 48, 80)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"a\.heic: HEIC images need pillow-heif.*fastzs\[heif\]"):
        read_picture(tmp_path / "a.heic")


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "more").mkdir(parents=True)
    quarters().save(tmp_path / "store" / "more" / "c.png")
    quarters().save(tmp_path / "photos" / "deep" / "a.png")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "round").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "gone").symlink_to(tmp_path / "nowhere")
    found = find_pictures([tmp_path / "photos"])
    assert sorted(path.name for path in found) == ["a.png", "c.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything may be read")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    closed = tmp_path / "in" / "closed"
    closed.mkdir(parents=True)
    quarters().save(tmp_path / "in" / "a.png")
    closed.chmod(0)
    assert find_pictures([tmp_path / "in"]) == [tmp_path / "in" / "a.png", closed]
    with pytest.raises(ImageError, match=r"closed.*Permission denied"):
        read_picture(closed)


def test_kinds_that_cannot_be_read_are_told(tmp_path, caplog):
    quarters().save(tmp_path / "a.png")
    for name in ("b.NEF", "c.psd", "d.psd", "notes.txt"):
        (tmp_path / name).touch()
    assert find_pictures([tmp_path]) == [tmp_path / "a.png"]
    assert "3 images of kinds that cannot be read (.nef, .psd) are left out" in caplog.text


def test_results_are_no_pictures(tmp_path, caplog):
    quarters().save(tmp_path / "a.png")
    quarters().save(tmp_path / "b_overlay.jpg")
    result = Segmentation(torch.zeros(24, 40, dtype=torch.uint8), ("x",), image=read_picture(quarters()))
    result.save(tmp_path / "masks.png")
    for ending in ("png", "jpg"):
        result.overlay(tmp_path / f"a_overlay.{ending}")
    (tmp_path / "broken.png").write_bytes((tmp_path / "masks.png").read_bytes()[:20])
    wanted = [tmp_path / name for name in ("a.png", "b_overlay.jpg", "broken.png")]
    assert find_pictures([tmp_path]) == wanted
    assert "3 label maps and overlays of fastzs are left out" in caplog.text
    assert find_pictures([tmp_path / "*.png", tmp_path / "*.jpg"]) == wanted
    with pytest.raises(ImageError, match=r"masks\.png'.*no image in it but results of fastzs"):
        find_pictures([tmp_path / "masks.png"])
