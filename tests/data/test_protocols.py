from itertools import pairwise

import pytest

from fastzs.data.protocols import PROTOCOLS, Protocol, protocol
from fastzs.vocabulary import Vocabulary

# indices as the published configurations have them
PUBLISHED = {
    "voc15-5": (20, [15, 16, 17, 18, 19]),
    "pascal5i-0": (21, [1, 2, 3, 4, 5]),
    "pascal5i-3": (21, [16, 17, 18, 19, 20]),
    "coco156-15": (171, [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]),
    "context50-10-bg": (60, [20, 34, 49, 15, 8, 25, 7, 55, 32, 1]),
    "context49-10": (59, [19, 33, 48, 14, 7, 24, 6, 54, 31, 0]),
    "context49-10-cascade": (59, [0, 2, 3, 7, 9, 13, 17, 19, 31, 37]),
    "zs3-voc-2": (21, [10, 14]),
    "zs3-voc-10": (21, [10, 14, 1, 18, 8, 20, 19, 5, 9, 16]),
    "zs3-context-4": (60, [20, 34, 49, 15]),
    "context33-4": (33, [9, 13, 17, 7]),
    "camvid": (11, []),
    "ade150": (150, []),
}
NAMES = {
    "voc15-5": "pottedplant sheep sofa train tvmonitor",
    "pascal5i-0": "aeroplane bicycle bird boat bottle",
    "pascal5i-3": "pottedplant sheep sofa train tvmonitor",
    "coco156-15": "cow giraffe suitcase frisbee skateboard carrot scissors cardboard clouds grass playingfield river "
    "road tree wall-concrete",
    "context50-10-bg": "aeroplane bird boat cat cow fence keyboard motorbike sofa tvmonitor",
    "context49-10-cascade": "aeroplane bed bedclothes boat bottle car cloth cow keyboard plate",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_indices(name):
    count, unseen = PUBLISHED[name]
    found = protocol(name)
    assert len(found.classes) == count
    assert list(found.unseen) == sorted(unseen)
    assert sorted((*found.seen, *found.unseen)) == list(range(count))


@pytest.mark.parametrize("name", NAMES)
def test_published_names(name):
    found = protocol(name)
    assert [found.classes[i] for i in found.unseen] == NAMES[name].split()


def test_the_three_context_protocols_differ():
    first, second, third = (protocol(f"context{rest}") for rest in ("50-10-bg", "49-10", "49-10-cascade"))
    assert [first.classes[i] for i in first.unseen] == [second.classes[i] for i in second.unseen]
    assert second.classes == third.classes
    assert second.unseen != third.unseen
    assert len({str(p) for p in (first, second, third)}) == 3


@pytest.mark.parametrize("name", ["voc", "context"])
def test_the_unseen_classes_of_zs3_grow(name):
    lists = [set(protocol(f"zs3-{name}-{count}").unseen) for count in (2, 4, 6, 8, 10)]
    assert [len(each) for each in lists] == [2, 4, 6, 8, 10]
    assert all(small < large for small, large in pairwise(lists))
    found = protocol(f"zs3-{name}-6")
    assert found.drop_unseen
    assert found.background == "class"
    assert 0 in found.seen


def test_context33_has_classes_of_context():
    assert set(protocol("context33-4").classes) < set(protocol("context49-10").classes)


def test_shapes_hold_out_a_quarter_of_the_pairs():
    found = protocol("shapes")
    assert len(found.classes) == 68
    assert len(found.unseen) == 16
    assert all(" " in found.classes[i] for i in found.unseen)


def test_a_protocol_prints_its_split():
    assert str(protocol("voc15-5")) == "voc15-5 (20 classes, 15 seen, 5 unseen, background: ignored)"


def test_own_protocol(tmp_path):
    path = tmp_path / "pets.yaml"
    path.write_text("classes: [cat, dog, bird]\nunseen: [bird]\nreduce_zero_label: true\n")
    assert protocol(path) == Protocol("pets", ("cat", "dog", "bird"), (2,), reduce_zero_label=True)
    path.write_text("name: three\nclasses: [cat, dog, bird]\nunseen: [0, dog]\nbackground: class\ndrop_unseen: true\n")
    wanted = Protocol("three", ("cat", "dog", "bird"), (0, 1), background="class", drop_unseen=True)
    assert protocol(str(path)) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [cat, dog]\nunsen: [dog]\n", "unknown key 'unsen'; nearest known: 'unseen'"),
        ("classes: [cat, dog]\nunseen: [dgo]\n", "'dgo' is none of the classes; nearest: 'dog'"),
        ("classes: [cat, dog]\nunseen: [2]\n", "indices from 0 to 1"),
        ("classes: [cat, dog]\nunseen: [cat, dog]\n", "at least one class to be seen"),
        ("classes: [cat, cat]\n", "given twice: cat"),
        ("classes: []\n", "0 classes"),
        ("- cat\n", "list of names under 'classes'"),
        ("classes: [cat\n", "line 2: is not YAML"),
        ("classes: [cat]\nbackground: class\nreduce_zero_label: 'no'\n", "line 3: expected true or false, got 'no'"),
        ("classes: [cat]\ndrop_unseen: 1\n", "line 2: expected true or false, got '1'"),
        ("classes: [cat, dog]\nunseen: 1\n", "line 2: expected a list of names or numbers of classes, got '1'"),
        ("classes: [cat, dog]\nunseen: dog\n", "line 2: expected a list of names or numbers of classes, got 'dog'"),
        ("classes: [cat, dog]\nunseen:\n- [dog]\n", "line 3: expected a name, got a list"),
        ("classes: [cat, [dog]]\n", "line 1: expected a name, or a name with a list of synonyms, got a list"),
        ("classes: [cat, '']\n", "line 1: expected a name, or a name with a list of synonyms, got ''"),
        ("classes: [cat]\n\nclasses: [dog]\n", "line 3: 'classes' stands there twice"),
        ("classes: cat\n", "line 1: expected a list of names, or of names with a list of synonyms, got 'cat'"),
        ("unseen: [cat]\n", "line 1: expected a mapping with a list of names under 'classes'"),
        ("", "is empty"),
        ("classes: [\xff]\n", "line 1: is not UTF-8 text"),
        ("classes: " + "[" * 3000, "nested too deeply|is not YAML"),
        ("classes: [cat]\nbackground: maybe\n", "got 'maybe'"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        protocol(path)


def test_names_are_what_stands_there(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("classes: [off, Yes, null, ~, 007, 1.50, 2, 1, {bus: [coach, on]}, {car: auto}, {van: }]\n"
                    "unseen: [2, off, 10, ~]\nname: 3\n")  # fmt: skip
    found = protocol(path)
    names = ("off", "Yes", "null", "~", "007", "1.50", "2", "1", "bus", "car", "van")
    assert (found.name, found.classes, found.unseen) == ("3", names, (0, 3, 6, 10))
    assert found.entries == [*names[:8], {"bus": ["coach", "on"]}, {"car": ["auto"]}, "van"]
    assert Vocabulary(found.entries).names == names


def test_unknown_name():
    with pytest.raises(ValueError, match="nearest known: voc15-5"):
        protocol("voc15")


def test_class_lists_are_compared():
    known = PROTOCOLS["camvid"]
    known.check_classes(known.classes, "the model")
    with pytest.raises(ValueError, match="the data set has 20 classes, but protocol camvid has 11"):
        known.check_classes(PROTOCOLS["voc15-5"].classes, "the data set")
    with pytest.raises(ValueError, match="class 0 is 'heaven', but in protocol camvid it is 'sky'"):
        known.check_classes(("heaven", *known.classes[1:]), "the data set")
