import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastzs.kernels
from fastzs import doctor
from fastzs.kernels.dispatch import choose, watch


@pytest.fixture(scope="module")
def found():
    return doctor.report()


def test_report_is_plain_data(found):
    assert json.loads(json.dumps(found)) == found


def test_every_op_is_covered_and_works(found):
    folder = Path(next(iter(fastzs.kernels.__path__)))
    ops = {path.parent.name for path in folder.glob("*/api.py")}
    assert ops == set(doctor.CALLS), "each op of kernels/ wants a typical call in fastzs/doctor.py"
    for op in found["ops"]:
        assert op["problem"] is None, op
        assert op["backend"] is not None, op


def test_reasons_are_given_for_what_is_not_taken(found):
    for op in found["ops"]:
        assert op["backend"] not in op["others"]
        assert all(op["others"].values())


def test_a_failing_op_is_reported_and_the_others_go_on(monkeypatch):
    def broken(device):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setitem(doctor.CALLS, "label_map", ("a call", broken))
    choices = {choice["op"]: choice for choice in doctor.op_choices(torch.device("cpu"))}
    assert choices["label_map"]["problem"] == "RuntimeError: no such instruction"
    assert choices["key_smoothing"]["problem"] is None
    assert "FAILED: RuntimeError" in doctor.text({**doctor.report(), "ops": list(choices.values())})


def test_preference_shows(monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", "reference")
    assert {choice["backend"] for choice in doctor.op_choices(torch.device("cpu"))} == {"reference"}


def test_versions():
    versions = doctor.versions()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"fastzs", "python", "triton", "open_clip_torch", "xformers"} <= set(versions)


@pytest.mark.parametrize(
    ("can", "precision", "word"),
    [
        ({"avx512_bf16": True}, "bf16", "has avx512_bf16"),
        ({"amx_bf16": True, "avx2": True}, "bf16", "has amx_bf16"),
        ({"avx2": True}, "fp32", "no bf16 instructions"),
    ],
)
def test_precision_says_why(monkeypatch, can, precision, word):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    cpu = doctor.devices()[0]
    assert cpu["precision"] == precision
    assert word in cpu["why"]


def test_text_has_what_the_report_has(found):
    text = doctor.text(found)
    for op in found["ops"]:
        assert op["op"] in text
        assert all(reason in text for reason in op["others"].values())
    for name, version in found["versions"].items():
        assert name in text.lower()
        assert version is None or version in text
    assert all(device["why"] in text for device in found["devices"])


def test_watch_sees_only_what_happens_meanwhile():
    reasons = {"cuda": "no device", "reference": None}
    choose("an op", "auto", reasons)
    with watch() as outer:
        choose("an op", "auto", reasons)
        with watch() as inner:
            choose("another", "auto", reasons)
        choose("an op", "reference", reasons)  # not a choice
    choose("an op", "auto", reasons)
    assert [(c.op, c.backend, c.reasons) for c in inner] == [("another", "reference", reasons)]
    assert [c.op for c in outer] == ["an op", "another"]


@pytest.mark.parametrize(("major", "precision"), [(9, "bf16"), (8, "bf16"), (7, "fp32")])
def test_describes_a_gpu(monkeypatch, major, precision):
    about = SimpleNamespace(name="A GPU", major=major, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    device = doctor.describe_device(torch.device("cuda:1"))
    assert (device["device"], device["name"], device["precision"]) == ("cuda:1", "A GPU", precision)
    assert device["details"] == f"compute capability {major}.0, 80 GiB"
    assert ("have bf16" in device["why"]) == (precision == "bf16")


def test_an_account_without_a_home_keeps_nothing_and_makes_no_folder(monkeypatch, tmp_path):
    from fastzs.cache import cache_folder

    monkeypatch.chdir(tmp_path)
    for name in ("FASTZS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown number of a user
    with pytest.raises(NotADirectoryError):
        cache_folder().mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []
