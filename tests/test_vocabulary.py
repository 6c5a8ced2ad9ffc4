import numpy as np
import pytest
import torch

from fastzs import clip, vocabulary
from fastzs.models.base import join
from fastzs.vocabulary import Vocabulary
from tests.tiny import tiny_clip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    vocabulary._memory.clear()
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
    vocabulary._memory.clear()  # as in a new process

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


def test_damaged_cache_is_written_again(weights, cache, caplog):
    first = Vocabulary(["cat"], "single").embed(weights)
    (file,) = (cache / "text").iterdir()
    file.write_bytes(b"rubbish")
    vocabulary._memory.clear()
    assert torch.equal(Vocabulary(["cat"], "single").embed(weights), first)
    assert "damaged" in caplog.text
    assert file.read_bytes() != b"rubbish"


def test_cache_that_cannot_be_written_is_only_a_warning(weights, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "file" / "below"))
    Vocabulary(["cat"], "single").embed(weights)
    assert "not kept" in caplog.text


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
    with pytest.raises(ValueError, match=r"\[2, D\], got \[3, 4\]"):
        Vocabulary(["cat", "dog"], embeddings=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        Vocabulary(["cat"], embeddings=torch.full((1, 4), torch.nan))
    with pytest.raises(ValueError, match="4 wide"):
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
