import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fastzs.data import shapes
from fastzs.data.batches import batches
from fastzs.data.datasets import (
    ADE20K150,
    VOC2012,
    CamVid,
    CocoStuff164k,
    DataError,
    FolderDataset,
    PairsFile,
    PascalContext,
    ShapesDataset,
    open_dataset,
    seed_of,
)
from fastzs.data.protocols import PROTOCOLS, protocol
from fastzs.data.transforms import training_transform
from fastzs.metrics import ConfusionMatrix
from fastzs.yaml_files import read_remap
from tests.data.folders import camvid, put_list, put_mask, put_picture, voc


def values(dataset, index: int = 0) -> set[int]:
    return set(dataset[index][1].unique().tolist())


def test_sample(tmp_path):
    picture, labels = VOC2012(voc(tmp_path), "val")[0]
    assert isinstance(picture, tv_tensors.Image)
    assert isinstance(labels, tv_tensors.Mask)
    assert picture.dtype == labels.dtype == torch.uint8
    assert picture.shape == (3, 6, 8)
    assert labels.shape == (6, 8)
    assert labels.flatten()[:4].tolist() == [255, 0, 19, 255]


def test_voc_lists(tmp_path):
    root = voc(tmp_path / "VOCdevkit" / "VOC2012")
    assert VOC2012(root, "train").names == ("a", "b")
    assert VOC2012(tmp_path, "val").names == ("c",)  # the folder above serves as well
    augmented = VOC2012(root, "trainaug")
    assert augmented.names == ("a", "b", "d")
    assert values(augmented, 0) == {0, 19, 255}  # VOC's own mask of a, not SBD's
    assert values(augmented, 2) == {1, 255}
    put_list(root / "ImageSets" / "Segmentation" / "trainaug.txt", ["d"])
    assert VOC2012(root, "trainaug").names == ("d",)


def test_voc_names_the_lists_that_are_there(tmp_path):
    with pytest.raises(DataError, match=r"tarin.txt cannot be read.*lists there: aug, train, val"):
        VOC2012(voc(tmp_path), "tarin")
    with pytest.raises(DataError, match="no folder JPEGImages in it"):
        VOC2012(tmp_path / "elsewhere", "train")


def test_coco_stuff(tmp_path):
    for split in ("train", "val"):
        put_picture(tmp_path / "images" / f"{split}2017" / "000000000009.jpg")
        put_mask(tmp_path / "annotations" / f"{split}2017" / "000000000009_labelTrainIds.png", [0, 170, 255])
        put_mask(tmp_path / "annotations" / f"{split}2017" / "000000000009.png", [0, 181, 255])  # the unconverted one
    dataset = CocoStuff164k(tmp_path, "train")
    assert dataset.names == ("000000000009",)
    assert values(dataset) == {0, 170, 255}
    assert dataset.classes == PROTOCOLS["coco156-15"].classes


def test_pascal_context_with_and_without_background(tmp_path):
    root = tmp_path / "VOC2010"
    put_picture(root / "JPEGImages" / "x.jpg")
    put_mask(root / "SegmentationClassContext" / "x.png", [0, 1, 59])
    put_list(root / "ImageSets" / "SegmentationContext" / "val.txt", ["x"])
    with_background, without = PascalContext(tmp_path, background=True), PascalContext(tmp_path)
    assert values(with_background) == {0, 1, 59}
    assert values(without) == {255, 0, 58}
    assert with_background.classes[1:] == without.classes
    assert open_dataset(protocol("context50-10-bg"), tmp_path, "val").classes == with_background.classes
    assert open_dataset(protocol("context49-10"), tmp_path, "val").classes == without.classes


def test_context_with_33_classes_ignores_the_others(tmp_path):
    root, found = tmp_path / "VOC2010", protocol("context33-4")
    put_picture(root / "JPEGImages" / "x.jpg")
    place = protocol("context49-10").classes.index
    put_mask(root / "SegmentationClassContext" / "x.png", [0, *(1 + place(name) for name in ("bag", "sofa", "wall"))])
    put_list(root / "ImageSets" / "SegmentationContext" / "val.txt", ["x"])
    dataset = open_dataset(found, tmp_path, "val")
    assert dataset.classes == found.classes
    assert values(dataset) == {255, found.classes.index("sofa"), found.classes.index("wall")}


def test_pictures_with_unseen_classes_can_be_left_out_of_training(tmp_path):
    root, zs3 = voc(tmp_path), protocol("zs3-voc-2")  # a and b show aeroplane and tvmonitor, d bicycle
    put_mask(root / "SegmentationClass" / "b.png", [0, 1, 10, 255])  # a cow
    assert open_dataset(zs3, root, "train").names == ("a",)
    assert open_dataset(zs3, root, "trainaug").names == ("a", "d")
    assert VOC2012(root, "train").names == ("a", "b")
    put_mask(root / "SegmentationClass" / "c.png", [10])
    assert open_dataset(zs3, root, "val").names == ("c",)
    with pytest.raises(DataError, match="every image shows one of aeroplane"):
        VOC2012(root, "train", background=True).without([1])


def test_ade20k(tmp_path):
    for split in ("training", "validation"):
        put_picture(tmp_path / "images" / split / "ADE_1.jpg")
        put_mask(tmp_path / "annotations" / split / "ADE_1.png", [0, 1, 150])
    assert values(ADE20K150(tmp_path, "train")) == {255, 0, 149}


def test_camvid(tmp_path):
    dataset = CamVid(camvid(tmp_path), "test")
    assert len(dataset) == 3
    assert values(dataset) == {*range(11), 255}  # 11 is unlabelled


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_and_data_sets_have_the_same_classes(name, tmp_path):
    known = protocol(name)
    if known.dataset in ("voc2012", "camvid", "shapes"):
        make = {"voc2012": voc, "camvid": camvid, "shapes": str}[known.dataset]
        known.check_classes(open_dataset(known, make(tmp_path), "val").classes, "the data set")


def test_a_protocol_without_its_folder(tmp_path):
    with pytest.raises(ValueError, match="voc15-5 needs the folder"):
        open_dataset(protocol("voc15-5"), None, "val")
    (tmp_path / "own.yaml").write_text("classes: [a]\n")
    with pytest.raises(ValueError, match="not about a data set known here"):
        open_dataset(protocol(tmp_path / "own.yaml"), tmp_path, "val")


def folders(root, names=("a", "b/c"), size=(6, 8)):
    for i, name in enumerate(names):
        put_picture(root / "images" / f"{name}.jpg", size, i)
        put_mask(root / "masks" / f"{name}.png", [0, 1, 2, 255], size)
    return root / "images", root / "masks"


def test_folder(tmp_path):
    dataset = FolderDataset(*folders(tmp_path), ["x", "y", "z"])
    assert dataset.names == ("a", "b/c")
    assert values(dataset, 1) == {0, 1, 2, 255}
    assert values(FolderDataset(*folders(tmp_path), ["x", "y"], reduce_zero_label=True)) == {0, 1, 255}


def test_pairs_file(tmp_path):
    folders(tmp_path)
    path = tmp_path / "pairs.txt"
    path.write_text(f"# image mask\nimages/a.jpg\tmasks/a.png\n\n{tmp_path}/images/b/c.jpg masks/b/c.png\n")
    dataset = PairsFile(path, ["x", "y", "z"])
    assert dataset.names == ("images/a", "c")  # results named so stay in their folder
    assert values(dataset, 1) == {0, 1, 2, 255}
    path.write_text("images/a.jpg\n")
    with pytest.raises(DataError, match="line 1: expected an image and a mask"):
        PairsFile(path, ["x", "y", "z"])
    with pytest.raises(DataError, match="cannot be read"):
        PairsFile(tmp_path / "none.txt", ["x"])


def test_missing_masks_are_named_and_counted(tmp_path):
    images, masks = folders(tmp_path, names=[f"{i}" for i in range(9)])
    for i in range(8):
        (masks / f"{i}.png").unlink()
    with pytest.raises(DataError) as caught:
        FolderDataset(images, masks, ["x", "y", "z"])
    text = str(caught.value)
    assert "8 files are missing" in text
    assert text.count(str(masks)) == 5
    assert "and 3 more" in text


def test_masks_without_pictures_are_refused(tmp_path):
    images, masks = folders(tmp_path)
    (images / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 masks have no image.*\n +a.png"):
        FolderDataset(images, masks, ["x", "y", "z"])


def test_labels_outside_the_list_are_named_and_counted(tmp_path):
    images, masks = folders(tmp_path)
    put_mask(masks / "a.png", [0, 3, 7])
    with pytest.raises(
        DataError, match=r"1 images or masks.*\n.*a.png: expected labels from 0 to 2, or 255 for ignored, got 3, 7"
    ):
        FolderDataset(images, masks, ["x", "y", "z"])
    with pytest.raises(DataError, match="expected labels from 1 to 2, or 255 for ignored, got 3, 7"):
        FolderDataset(images, masks, ["x", "y"], reduce_zero_label=True)


def test_other_sizes_are_named_and_counted(tmp_path):
    images, masks = folders(tmp_path)
    put_mask(masks / "b" / "c.png", [0, 1], (5, 8))
    with pytest.raises(DataError, match=r"1 images or masks.*\n.*c.jpg is 8 x 6 pixels, its mask .*c.png 8 x 5"):
        FolderDataset(images, masks, ["x", "y", "z"])


def test_pictures_turned_by_exif_fit_masks_that_are_upright(tmp_path):
    images, masks = folders(tmp_path, names=["a"])
    image = Image.open(images / "a.jpg")
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(images / "a.jpg", exif=exif)
    put_mask(masks / "a.png", [0, 1], (8, 6))
    picture, labels = FolderDataset(images, masks, ["x", "y"])[0]
    assert picture.shape[1:] == labels.shape == (8, 6)


@pytest.mark.parametrize("damage", ["mask", "picture", "colours", "sixteen"])
def test_unreadable_files_are_named(tmp_path, damage):
    images, masks = folders(tmp_path)
    victim = images / "a.jpg" if damage == "picture" else masks / "a.png"
    if damage == "colours":
        Image.new("RGB", (8, 6)).save(victim)
    elif damage == "sixteen":
        Image.fromarray(np.full((6, 8), 256, np.uint16)).save(victim)
    else:
        victim.write_bytes(victim.read_bytes()[:20])
    with pytest.raises(DataError, match=f"1 images or masks.*\n.*{victim.name}"):
        FolderDataset(images, masks, ["x", "y", "z"])


def test_empty_data_sets_and_class_lists_are_refused(tmp_path):
    images, masks = folders(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in it"):
        FolderDataset(tmp_path / "empty", tmp_path / "empty", ["x"])
    with pytest.raises(DataError, match="expected 1 to 65535 classes, got 0"):
        FolderDataset(images, masks, [])
    with pytest.raises(DataError, match="got 65536"):
        FolderDataset(images, masks, [str(i) for i in range(65536)])
    with pytest.raises(DataError, match="no such folder"):
        FolderDataset(tmp_path / "none", masks, ["x"])


def test_two_pictures_of_one_name_are_refused(tmp_path):
    images, masks = folders(tmp_path)
    put_picture(images / "a.png")
    with pytest.raises(DataError, match=r"a.jpg and a.png have the same name"):
        FolderDataset(images, masks, ["x", "y", "z"])


def test_a_checked_data_set_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    images, masks = folders(tmp_path)
    FolderDataset(images, masks, ["x", "y", "z"])
    reads = []
    monkeypatch.setattr(FolderDataset, "_problem", lambda self, pair, used: reads.append(pair))
    FolderDataset(images, masks, ["x", "y", "z"])
    assert reads == []
    FolderDataset(images, masks, ["x", "y", "z", "more"])
    assert len(reads) == 2
    os.utime(masks / "a.png", ns=(1, 1))
    FolderDataset(images, masks, ["x", "y", "z"])
    assert len(reads) == 4


def test_a_mask_that_changes_after_the_check_is_still_refused(tmp_path):
    images, masks = folders(tmp_path)
    dataset = FolderDataset(images, masks, ["x", "y", "z"])
    put_mask(masks / "a.png", [9])
    with pytest.raises(DataError, match="got 9"):
        dataset[0]
    put_mask(masks / "a.png", [0], (3, 3))
    with pytest.raises(DataError, match=r"its mask .* 3 x 3"):
        dataset[0]


def test_shapes():
    dataset = ShapesDataset("train", length=40, size=64)
    picture, labels = dataset[7]
    assert picture.shape == (3, 64, 64)
    again = ShapesDataset("train", length=99, size=64)[7]
    assert torch.equal(picture, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(picture, ShapesDataset("val", length=40, size=64)[7][0])
    assert not torch.equal(picture, ShapesDataset("train", length=40, size=64, seed=1)[7][0])
    found = {dataset.classes[i] for n in range(40) for i in dataset[n][1].unique()}
    assert found & set(shapes.UNSEEN_PAIRS)
    assert found & set(shapes.SEEN_PAIRS)
    assert set(dataset.classes) == {*shapes.PAIRS, *shapes.GROUNDS}
    assert len(set(dataset.names)) == len(dataset) == 40
    with pytest.raises(IndexError):
        dataset[40]
    with pytest.raises(DataError, match="cannot draw 0"):
        ShapesDataset("train", length=0)


def test_seeds_differ_and_fit_the_generator():
    seeds = {seed_of(0, split, i) for split in ("train", "val") for i in range(1000)}
    assert len(seeds) == 2000
    assert max(seeds) < 2**32
    assert seed_of(1, "a") != seed_of("1", "a")


def test_masks_by_value_or_colour_as_a_label_file_says(tmp_path):
    images, masks = folders(tmp_path)
    classes = ["road", "sky", "7"]
    labels = tmp_path / "labels.yaml"

    def dataset():
        return FolderDataset(images, masks, classes, remap=read_remap(labels, {n: i for i, n in enumerate(classes)}))

    for name in ("a", "b/c"):
        put_mask(masks / f"{name}.png", [0, 9, 200, 255])
    labels.write_text("0: sky\n9: 7\n200: 0\n255: ignored\n")
    assert dataset()[0][1].flatten()[:4].tolist() == [1, 2, 0, 255]
    pixels = np.resize(np.array([[128, 64, 128], [70, 130, 180], [0, 0, 0]], np.uint8), (6, 8, 3))
    for name in ("a", "b/c"):
        Image.fromarray(pixels).save(masks / f"{name}.png")
    labels.write_text("'#804080': road\n'#4682B4': sky\n'#000000': ignored\n")
    assert dataset()[0][1].flatten()[:3].tolist() == [0, 1, 255]
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(masks / "b" / "c.png")
    with pytest.raises(DataError, match=r"c.png has the colours #010203, which the label file does not name"):
        dataset()
    put_mask(masks / "b" / "c.png", [0])
    with pytest.raises(DataError, match=r"c.png has no colours; the label file names colours"):
        dataset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: raod\n", "line 1: expected the name or number of a class, or ignored, got 'raod'"),
        ("0: road\n1: 2\n", "line 2: expected the name or number of a class, or ignored, got '2'"),
        ("- road\n", "line 1: expected a mapping from values or colours"),
        ("70000: road\n", "line 1: expected a value from 0 to 65535"),
        ("'#12345': road\n", "expected a value from 0 to 65535 or a colour"),
        ("0: road\n0: sky\n", "line 2: 0 stands there twice"),
        ("0: road\n'#000000': sky\n", "values and colours are mixed"),
        ("'#102030': road\n#a0B0c0: sky\n", "line 2: to YAML this is a comment; write the colour in quotes: .#a0B0c0"),
        ("", "is empty"),
    ],
)
def test_label_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "labels.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_remap(path, {"road": 0, "sky": 1})


@pytest.mark.parametrize("kind", ["I;16.png", "I.tif", "L.TIF", "P.PNG", "L.bmp"])
def test_kinds_of_masks(tmp_path, kind):
    images, masks = folders(tmp_path)
    mode, ending = kind.split(".")
    values = np.resize(np.array([0, 1, 2, 255]), (6, 8))
    for name in ("a", "b/c"):
        (masks / f"{name}.png").unlink()
        image = Image.fromarray(values.astype({"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8)))
        if mode == "P":
            image.putpalette(bytes(768))
        image.save(masks / f"{name}.{ending}")
    dataset = FolderDataset(images, masks, ["x", "y", "z"])
    assert torch.equal(dataset[1][1], torch.from_numpy(values.astype(np.uint8)))


def test_more_than_255_classes(tmp_path):
    images, masks = folders(tmp_path)
    for name in ("a", "b/c"):
        values = np.resize(np.array([0, 255, 299, 65535], np.uint16), (6, 8))
        Image.fromarray(values).save(masks / f"{name}.png")
    dataset = FolderDataset(images, masks, [str(i) for i in range(300)])
    assert dataset[0][1].flatten()[:4].tolist() == [0, 255, 299, 65535]
    matrix = ConfusionMatrix(300)
    matrix.add(dataset[0][1].as_subclass(torch.Tensor), torch.full((6, 8), 299))
    assert matrix.counts.sum() == 36
    assert matrix.counts[255, 299] == 12
    batch = next(
        batches(dataset, training_transform(16, (0,) * 3, (1,) * 3, ignored=65535), batch_size=2, steps=range(1))
    )
    assert set(batch.target.unique().tolist()) <= {0, 255, 299, 65535}
    assert (batch.target == 65535).any()


def test_what_systems_leave_in_folders(tmp_path):
    images, masks = folders(tmp_path)
    (masks / "._a.png").write_bytes(b"rubbish")
    (images / ".DS_Store").touch()
    put_picture(images / ".ipynb_checkpoints" / "a-checkpoint.jpg")
    put_mask(masks / ".ipynb_checkpoints" / "a-checkpoint.png", [0])
    put_picture(images / "caf\u00e9.jpg")
    put_mask(masks / "cafe\u0301.png", [1])
    put_picture(tmp_path / "more" / "c.jpg")
    put_mask(tmp_path / "more masks" / "c.png", [2])
    (images / "linked").symlink_to(tmp_path / "more")
    (masks / "linked").symlink_to(tmp_path / "more masks")
    dataset = FolderDataset(images, masks, ["x", "y", "z"])
    assert dataset.names == ("a", "b/c", "caf\u00e9", "linked/c")


def test_masks_inside_the_folder_of_pictures(tmp_path):
    images, masks = folders(tmp_path)
    masks.rename(images / "masks")
    assert FolderDataset(images, images / "masks", ["x", "y", "z"]).names == ("a", "b/c")


def test_names_that_are_not_utf8(tmp_path):
    images, masks = folders(tmp_path)
    try:
        (images / "a.jpg").rename(images / "a\udce9.jpg")
        (masks / "a.png").rename(masks / "a\udce9.png")
    except OSError:
        pytest.skip("the file system has UTF-8 names only")
    assert len(FolderDataset(images, masks, ["x", "y", "z"])) == 2


@pytest.mark.parametrize(("held", "reduce"), [([0, 255], False), ([0, 255], True), ([255], False), ([0], True)])
def test_masks_in_which_nothing_would_count(tmp_path, held, reduce):
    images, masks = folders(tmp_path)
    for name in ("a", "b/c"):
        put_mask(masks / f"{name}.png", held)
    with pytest.raises(DataError, match="the masks hold only"):
        FolderDataset(images, masks, ["background", "cat"], reduce_zero_label=reduce)
    if held == [0, 255] and not reduce:
        told = {255: 1}
        assert values(FolderDataset(images, masks, ["background", "cat"], remap=told)) == {0, 1}
        assert values(FolderDataset(images, masks, ["background", "cat"], remap={255: None})) == {0, 255}


def test_files_that_are_none(tmp_path):
    images, masks = folders(tmp_path)
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs FIFOs")
    for path in (masks / "a.png", images / "a.jpg"):
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match=r"1 files are missing"):
            FolderDataset(images, masks, ["x", "y", "z"])
        path.unlink()
        path.write_bytes(kept)


def test_pairs_file_with_a_byte_order_mark(tmp_path):
    images, masks = folders(tmp_path)
    (tmp_path / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + f"{images}/a.jpg\t{masks}/a.png\r\n".encode())
    assert len(PairsFile(tmp_path / "pairs.txt", ["x", "y", "z"])) == 1
    (tmp_path / "pairs.txt").write_bytes(b"a.jpg\ta.png\nb\xff.jpg\tb.png\n")
    with pytest.raises(DataError, match=r"pairs.txt, line 2: is not UTF-8 text"):
        PairsFile(tmp_path / "pairs.txt", ["x", "y", "z"])
