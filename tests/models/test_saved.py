"""Saved models: what is loaded is exactly what was saved, or it is refused with the file and the cause."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastzs import checkpoints
from fastzs.clip.state import WeightsError
from fastzs.models import SZN, ClipRC, ZegCLIP
from fastzs.models import saved as saved_module
from fastzs.models.trained import TrainedModel
from tests.training import small


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    small(ZegCLIP).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(change(state), path)


def test_round_trip(folder):
    torch.manual_seed(2)
    first = ZegCLIP.from_pretrained(folder)
    torch.manual_seed(3)
    second = ZegCLIP.open(str(folder))
    assert states_equal(first, second)
    assert {name: t for name, t in load_file(folder / "model.safetensors").items()}.keys() == first.state_dict().keys()
    assert first.fingerprint == second.fingerprint != ""
    assert not first.training
    first.save_pretrained(folder.parent / "again")
    assert states_equal(ZegCLIP.from_pretrained(folder.parent / "again"), second)


def test_the_fingerprint_is_of_the_content(folder):
    before = ZegCLIP.from_pretrained(folder).fingerprint
    change_config(folder, calibration=0.25)
    after = ZegCLIP.from_pretrained(folder).fingerprint
    change_weights(folder, lambda state: {name: t + 1e-3 for name, t in state.items()})
    assert len({before, after, ZegCLIP.from_pretrained(folder).fingerprint}) == 3


def half(state):
    return dict(list(state.items())[::2])


def one(state):
    return dict(list(state.items())[:1])


def prefixed(state):
    return {f"net.{name}": t for name, t in state.items()}


def nan(state):
    name = next(iter(state))
    return state | {name: torch.full_like(state[name], torch.nan)}


def more(state):
    return state | {"extra.weight": torch.zeros(2)}


def reshaped(state):
    name = next(name for name, t in state.items() if t.ndim == 2)
    return state | {name: torch.zeros(3, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, "missing: "),
        (one, "missing: "),
        (prefixed, "unexpected: net."),
        (nan, "NaN or infinite values"),
        (more, r"unexpected: extra\.weight"),
        (reshaped, r"is \[3, 3\]"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(WeightsError, match=message) as caught:
        ZegCLIP.from_pretrained(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("kind", [ClipRC, SZN])
def test_another_models_folder(folder, kind):
    with pytest.raises(WeightsError, match=f"it is a ZegCLIP, not a {kind.__name__}"):
        kind.from_pretrained(folder)
    # as written before the class's name was kept
    config = json.loads((folder / "config.json").read_text())
    config.pop("model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError):
        kind.from_pretrained(folder)
    ZegCLIP.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: is not JSON"),
        ("[]", "expected a mapping of settings, got list"),
        ('{"decoder_layer": 3}', "ZegCLIP has no setting 'decoder_layer'; nearest known: 'decoder_layers'"),
        ('{"zzz": 3}', "no setting 'zzz'; is it a checkpoint of another model?"),
        ("\xff", "config.json, line 1: is not UTF-8"),
    ],
)
def test_configurations_that_are_wrong(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=message):
        ZegCLIP.from_pretrained(folder)


def test_settings_that_make_no_model(folder):
    change_config(folder, decoder_layers=1)
    with pytest.raises(WeightsError, match=r"model\.safetensors: does not fit ZegCLIP"):
        ZegCLIP.from_pretrained(folder)
    change_config(folder, sizes={"width": 3})
    with pytest.raises(WeightsError, match=r"config\.json: its settings make no ZegCLIP"):
        ZegCLIP.from_pretrained(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_files_that_are_not_there(folder, file):
    (folder / file).unlink()
    with pytest.raises(WeightsError, match=f"there is no {file} in it"):
        ZegCLIP.from_pretrained(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors: cannot be read as weights"):
        ZegCLIP.from_pretrained(folder)


def test_digests_of_training_are_checked(tmp_path):
    model = small(ZegCLIP)
    folder = checkpoints.save(tmp_path, 1, model.save_pretrained, {}, ["last"])
    assert states_equal(ZegCLIP.from_pretrained(tmp_path / "last"), model)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoints.CheckpointError, match=r"model\.safetensors is not as it was written"):
        ZegCLIP.open(tmp_path / "last")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("demo_e9.ckpt", "checkpoint demo_e9.ckpt: there is no such file"),
        ("x/szn.pth.tar", "there is no such file"),
        ("weights.BIN", "there is no such file"),
        ("runs/lost", "there is no such file or folder; nearest there: runs/last"),
        ("runs/voc/last", "there is no such file or folder"),
        ("nowhere", "there is no such file or folder"),
        ("a/b/c/d", "there is no such file or folder"),
        ("", "there is no config.json in it"),
    ],
)
def test_a_missing_path_fails_at_once_without_asking_the_hub(tmp_path, monkeypatch, place, message):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    (tmp_path / "runs" / "last").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saved_module, "_online", asked)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    with pytest.raises(WeightsError, match=message):
        ZegCLIP.open(place)


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_module, "_online", lambda: False)
    with pytest.raises(WeightsError, match="not in the cache and cannot be fetched without"):
        TrainedModel.from_pretrained("somebody/model")
    monkeypatch.setattr(saved_module, "_online", lambda: True)

    def refused(*_, **__):
        raise OSError("401\nClient Error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(WeightsError, match="as a hub id it cannot be fetched: OSError: 401 Client Error"):
        TrainedModel.from_pretrained("somebody/model")


def test_a_hub_id_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_module, "try_to_load_from_cache", lambda name, file, **_: str(folder / file))
    assert states_equal(ZegCLIP.open("somebody/model", revision="v1"), ZegCLIP.open(folder))
