import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
import torch

from fastzs import clip, text_cache
from fastzs.models.base import join
from fastzs.vocabulary import Vocabulary
from tests.tiny import tiny_clip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    text_cache._memory.clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights():
    return tiny_clip()


def test_names_synonyms_and_groups():
    v = Vocabulary(["cat", {"sofa": ["couch", " settee "]}, {"dog": []}])
    assert v.names == ("cat", "sofa", "dog")
    assert v.phrases == ("cat", "sofa", "couch", "settee", "dog")
    assert v.groups.tolist() == [0, 1, 1, 1, 2]
    assert len(v) == 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no class names"),
        (["cat", "  "], "empty class name"),
        (["cat", "Cat"], "'Cat' is the same name as 'cat'"),
        (["stop sign", "stop_sign"], "same name"),
        (["dining  table", "dining table"], "same name"),
        (["cat", {"animal": ["CAT"]}], "same name"),
        ("cat", "single string"),
        ({"cat", "dog"}, "got a set, which has no order"),
    ],
)
def test_bad_names_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(entries)


@pytest.mark.parametrize(("templates", "message"), [("nope", "unknown"), (["no slot"], "once"), ([], "once")])
def test_bad_templates_are_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(["cat"], templates)


def test_template_sets_have_the_published_sizes():
    sizes = {name: len(templates) for name, templates in clip.TEMPLATES.items()}
    assert sizes == {"raw": 1, "single": 1, "coco15": 15, "openai80": 80, "maskclip85": 85, "shapes": 2}
    assert all(len(set(t)) == len(t) and all(s.count("{}") == 1 for s in t) for t in clip.TEMPLATES.values())


def test_embedding_is_the_normalised_mean_of_normalised_templates(weights):
    templates = ["a photo of a {}", "the {}"]
    got = Vocabulary(["cat", "dog"], templates).embed(weights)
    each = weights.text().encode(["a photo of a dog", "the dog"])
    torch.testing.assert_close(got[1], torch.nn.functional.normalize(each.mean(0), dim=0))
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))


def test_second_run_never_meets_the_text_tower(weights, cache, monkeypatch):
    first = Vocabulary(["cat", "dog"], "single").embed(weights)
    text_cache._memory.clear()  # as in a new process

    def forbidden(self):
        raise AssertionError("the text tower was asked")

    monkeypatch.setattr(clip.Clip, "text", forbidden)
    assert torch.equal(Vocabulary(["cat", "dog"], "single").embed(weights), first)
    with pytest.raises(AssertionError, match="asked"):
        Vocabulary(["cat", "bird"], "single").embed(weights)
    with pytest.raises(AssertionError, match="asked"):
        Vocabulary(["cat", "dog"], "coco15").embed(weights)
    with pytest.raises(AssertionError, match="asked"):
        Vocabulary(["cat", "dog"], "single").embed(tiny_clip(fingerprint="other"))


def files(cache):
    return list((cache / "text").iterdir())


def test_damaged_cache_is_written_again(weights, cache, caplog):
    first = Vocabulary(["cat"], "single").embed(weights)
    (file,) = files(cache)
    file.write_bytes(b"rubbish" * 1000)
    for _ in range(2):
        text_cache._memory.clear()
        assert torch.equal(Vocabulary(["cat"], "single").embed(weights), first)
    (record,) = caplog.records
    assert "is damaged" in record.message
    assert files(cache) == [file]


def test_a_damaged_vector_is_encoded_again(weights, cache):
    first = Vocabulary(["cat"], "single").embed(weights)
    (file,) = files(cache)
    for bad in (b"", b"123", np.full(24, np.nan, "<f4").tobytes(), np.zeros(7, "<f4").tobytes()):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE vectors SET vector = ?", (bad,))
        text_cache._memory.clear()
        assert torch.equal(Vocabulary(["cat"], "single").embed(weights), first)


def test_cache_that_cannot_be_written_is_only_a_warning(weights, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "file" / "below"))
    Vocabulary(["cat"], "single").embed(weights)
    assert "not kept" in caplog.text


def test_no_home_folder_is_needed(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FASTZS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an account that has none
    assert Vocabulary(["cat"], "single").embed(weights).shape == (1, 24)


def test_only_new_phrases_meet_the_text_tower(weights, monkeypatch):
    asked = []
    run = text_cache._run_tower
    monkeypatch.setattr(
        text_cache, "_run_tower", lambda clip, templates, some: asked.append(some) or run(clip, templates, some)
    )
    rows = Vocabulary(["cat", "dog"], "single").embed(weights)
    more = Vocabulary(["dog", "bird", {"cat": ["kitten"]}], "single").embed(weights)
    assert asked == [["cat", "dog"], ["bird", "kitten"]]
    assert torch.equal(more[[2, 0]], rows)
    Vocabulary(["cat"], "single").with_class("background", ["dog", "wall"]).embed(weights)
    assert asked[2:] == [["wall"]]


def test_memory_is_bounded(weights, monkeypatch):
    monkeypatch.setattr(text_cache, "MOST", 3)
    for i in range(5):
        Vocabulary([f"thing {i}", "cat"], "single").embed(weights)
    assert [phrase for _, phrase in text_cache._memory] == ["thing 3", "thing 4", "cat"]
    assert Vocabulary([f"thing {i}" for i in range(5)], "single").embed(weights).shape == (5, 24)


def test_vectors_are_ordinary_tensors(weights):
    with torch.inference_mode():
        rows = Vocabulary(["cat", "dog"], "single").embed(weights)
        assert not any(vector.is_inference() for vector in text_cache._memory.values())
    text_cache._memory.clear()
    layer = torch.nn.Linear(24, 1)
    layer(Vocabulary(["cat", "dog"], "single").embed(weights)).sum().backward()  # refused for inference tensors
    assert rows.shape == (2, 24)


@pytest.mark.slow
def test_many_processes_write_one_file(cache):
    code = (
        "import sys; from fastzs.vocabulary import Vocabulary; from tests.tiny import tiny_clip;"
        "Vocabulary(['cat', f'thing {sys.argv[1]}'], 'single').embed(tiny_clip())"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(i)], stderr=subprocess.PIPE) for i in range(3)]
    assert [process.communicate()[1] for process in running] == [b""] * 3
    (file,) = files(cache)
    with closing(sqlite3.connect(file)) as connection:
        kept = {phrase for (phrase,) in connection.execute("SELECT phrase FROM vectors")}
    assert kept == {"cat", "thing 0", "thing 1", "thing 2"}


def test_synonyms_join_by_max_of_logits_or_mean_of_embeddings(weights):
    entries = [{"sofa": ["couch"]}, "cat"]
    v = Vocabulary(entries, "single")
    assert v.embed(weights).shape[0] == 3
    logits = torch.tensor([1.0, 5.0, 2.0]).view(1, 3, 1, 1)
    assert join(logits, v.row_groups).flatten().tolist() == [5.0, 2.0]
    mean = Vocabulary(entries, "single", synonyms="mean")
    assert mean.row_groups is None
    assert Vocabulary(["cat", "dog"]).row_groups is None
    rows = v.embed(weights)
    torch.testing.assert_close(mean.embed(weights)[0], torch.nn.functional.normalize(rows[0] + rows[1], dim=0))


def test_given_embeddings_are_used_as_they_are(weights, tmp_path):
    rows = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float16)
    np.save(tmp_path / "text.npy", rows)
    got = Vocabulary(["cat", "dog"], embeddings=tmp_path / "text.npy").embed(weights)
    assert torch.equal(got, torch.from_numpy(rows).float())
    given = rows.astype(np.float32)
    given.setflags(write=False)  # as an array that is mapped from a file
    kept = Vocabulary(["cat", "dog"], embeddings=given)
    given.setflags(write=True)
    given[:] = 0
    assert torch.equal(kept.embed(weights), got)
    with pytest.raises(ValueError, match=r"\[2, D\] for 2 names, got \[3, 4\]"):
        Vocabulary(["cat", "dog"], embeddings=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        Vocabulary(["cat"], embeddings=torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="got 4"):
        Vocabulary(["cat"], embeddings=torch.zeros(1, 4)).embed(weights)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        Vocabulary(["cat"], embeddings=tmp_path / "bad.npy")


def test_a_class_can_be_added():
    v = Vocabulary(["road", "sky"]).with_class("background", ["background", "sky", "wall"])
    assert v.names == ("road", "sky", "background")
    assert v.phrases == ("road", "sky", "background", "wall")
    assert v.groups.tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="already"):
        v.with_class("Background", ["floor"])
    with pytest.raises(ValueError, match="every phrase"):
        v.with_class("other", ["sky"])


def test_hash_follows_names_templates_and_embeddings():
    hashes = {
        Vocabulary(["a", "b"]).hash,
        Vocabulary(["b", "a"]).hash,
        Vocabulary(["a", "b"], "single").hash,
        Vocabulary(["a", "b"], embeddings=torch.zeros(2, 4)).hash,
    }
    assert len(hashes) == 4
    assert Vocabulary(["a", "b"]).hash in hashes


def test_thousands_of_names_go_in_batches(weights):
    names = [f"thing number {i}" for i in range(3000)]
    assert Vocabulary(names, ["{}"]).embed(weights).shape == (3000, 24)


class TestShapesOfNames:
    """Names in every shape in which people have them are read or refused, never misread."""

    @pytest.mark.parametrize(
        ("given", "names", "phrases"),
        [
            ({"dog": ["puppy", "hound"], "cat": []}, ("dog", "cat"), ("dog", "puppy", "hound", "cat")),
            ({"dog": "puppy", "cat": None}, ("dog", "cat"), ("dog", "puppy", "cat")),
            ({0: "tree", 1: "lawn"}, ("tree", "lawn"), ("tree", "lawn")),
            (("tree", {"lawn": ("grass",)}), ("tree", "lawn"), ("tree", "lawn", "grass")),
            ((name for name in ("tree", "lawn")), ("tree", "lawn"), ("tree", "lawn")),
            ({"tree": ()}.keys(), ("tree",), ("tree",)),
        ],
    )
    def test_read(self, given, names, phrases):
        vocabulary = Vocabulary(given)
        assert (vocabulary.names, vocabulary.phrases) == (names, phrases)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ([7], "expected a name, or a mapping from a name to its synonyms, got int 7"),
            ([None], "got NoneType None"),
            ([["sofa", "settee"]], "got list"),
            ([b"sofa"], "got bytes"),
            ({1: "tree", 2: "lawn"}, "expected a name, got int 1; names are texts"),
            ([{"sofa": [3]}], "expected a name, got int 3"),
            ([{"sofa": 3}], "expected a list of synonyms of 'sofa', got 3"),
            ([{"sofa": {"settee": []}}], "expected a list of synonyms of 'sofa'"),
            ({}, "no class names given"),
            (iter(()), "no class names given"),
        ],
    )
    def test_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            Vocabulary(given)

    def test_a_text_where_a_list_is_wanted(self):
        with pytest.raises(ValueError, match="expected a list of names for 'background', got the single text 'wall'"):
            Vocabulary(["cat"]).with_class("background", "wall")

    def test_names_that_the_tower_cuts(self, monkeypatch, tmp_path, caplog):
        from fastzs import clip

        monkeypatch.setenv("FASTZS_CACHE", str(tmp_path))
        tower = clip.load("ViT-B-32", "random")
        start = "a very long story " * 40
        with pytest.raises(
            ValueError, match=r"reads class 0, 'a very long .*', and class 1, 'a very long .*', as the same text"
        ):
            Vocabulary([f"{start} of cats", f"{start} of dogs"]).embed(tower)
        assert "the text tower reads only the beginning of 'a photo of a a very long" in caplog.text
        Vocabulary([f"{start} of cats", "dogs"]).embed(tower)
        Vocabulary([{f"{start} of cats": [f"{start} of tigers"]}, "dogs"]).embed(tower)


class TestEmbeddingFiles:
    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (lambda path: None, "cannot be read: No such file"),
            (lambda path: path.mkdir(), "is a folder, not a file"),
            (lambda path: path.write_bytes(b""), "expected an array as numpy.save writes it"),
            (lambda path: path.write_bytes(b"\x80\x04N."), "expected an array as numpy.save writes it"),
            (lambda path: torch.save(torch.ones(2, 3), path), "expected"),
            (lambda path: np.save(path, np.array([{}, []], object), allow_pickle=True), "expected"),
            (lambda path: np.save(path, np.array(["a", "b"])), "an array of <U1"),
        ],
    )
    def test_refused(self, tmp_path, write, message):
        path = tmp_path / "vectors.npy"
        write(path)
        with pytest.raises(ValueError, match=message) as caught:
            Vocabulary(["cat", "dog"], embeddings=path)
        assert str(path) in str(caught.value)

    def test_archive(self, tmp_path):
        np.savez(tmp_path / "v.npz", vectors=np.ones((2, 3)))
        with pytest.raises(ValueError, match="an archive of vectors"):
            Vocabulary(["cat", "dog"], embeddings=tmp_path / "v.npz")
