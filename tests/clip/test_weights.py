import argparse
import io
import json
import pickle
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fastzs import clip
from fastzs.clip import hub as hub_files
from fastzs.clip import weights
from fastzs.clip.blocks import QuickGELU
from fastzs.clip.state import WeightsError, read_state, to_openai_names
from fastzs.needed import MissingPackage

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def folder(tmp_path):
    """A weights folder as open_clip and the hub lay it out."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    return tmp_path


def state(folder):
    return read_state(folder / "open_clip_model.safetensors")


def test_folder_gives_both_towers(folder):
    loaded = clip.load(weights=folder)
    reference = open_clip.CLIP(**TINY)
    reference.load_state_dict(state(folder))
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.vision()(images), reference.eval().encode_image(images))
        tokens = open_clip.SimpleTokenizer(context_length=16)(["a cat"])
        wanted = reference.encode_text(tokens, normalize=True)
    torch.testing.assert_close(loaded.text().encode(["a cat"]), wanted)
    assert loaded.mean == [0.5] * 3


def write_torchscript(tensors, path):
    """An archive such as OpenAI distributes: a traced module that holds the tensors under their names."""
    root = torch.nn.Module()
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, torch.nn.Parameter(value))
    torch.jit.script(root).save(path)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "torchscript"])
def test_files_of_every_kind_read_alike(folder, tmp_path, kind):
    tensors = state(folder)
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pth":
        torch.save(tensors, path)
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "meta": {"epoch": 1}}, path)
    else:
        write_torchscript(tensors, path)
    read = read_state(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of bytes read")
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_is_read_once(folder, tmp_path, monkeypatch, suffix):
    """For its fingerprint; the towers' tensors are maps, which do not count as read."""
    monkeypatch.setattr(weights.open_clip, "get_model_config", lambda name: TINY)
    save = torch.save if suffix == "pth" else save_file
    for name in ("warm", "cold"):  # what is read of the libraries at their first use is none of ours
        path = tmp_path / f"{name}.{suffix}"
        save(state(folder), path)
        before = bytes_read()
        loaded = clip.load("tiny", path)
        loaded.vision()
        loaded.text()
        taken = bytes_read() - before
    size = path.stat().st_size
    assert size <= taken < 1.5 * size, f"{taken} bytes of {size}"  # measured: 1.2; the tokenizer's words are the rest


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_pickled_code_never_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "raw.pth"):
        with pytest.raises(WeightsError, match=name):
            clip.load("ViT-B-32", tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_truncated_and_foreign_files_are_named(folder, tmp_path):
    content = (folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    buffer = io.BytesIO()
    torch.save(state(folder), buffer)
    (tmp_path / "short.pt").write_bytes(buffer.getvalue()[:-1000])
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("short.safetensors", "short.pt", "text.pt", "list.pt"):
        with pytest.raises(WeightsError, match=name):
            read_state(tmp_path / name)


def test_weights_that_do_not_fit_name_the_keys(folder, tmp_path):
    tensors = state(folder)
    cases = {
        "missing: proj": {k: v for k, v in tensors.items() if k != "visual.proj"},
        "unexpected: extra": tensors | {"visual.extra": torch.zeros(1)},
        r"of another shape: proj is \[32, 8\], expected \[32, 16\]": tensors | {"visual.proj": torch.zeros(32, 8)},
        "NaN or infinite values in proj": tensors | {"visual.proj": torch.full((32, 16), torch.nan)},
        "NaN or infinite values in conv1.weight": tensors
        | {"visual.conv1.weight": tensors["visual.conv1.weight"].index_fill(0, torch.tensor(3), torch.inf)},
    }
    for message, broken in cases.items():
        save_file({k: v.contiguous() for k, v in broken.items()}, folder / "open_clip_model.safetensors")
        with pytest.raises(WeightsError, match=message):
            clip.load(weights=folder).vision()


def test_weights_without_text_tower_say_so(folder):
    visual = {k: v for k, v in state(folder).items() if k.startswith("visual.")}
    save_file(visual, folder / "open_clip_model.safetensors")
    loaded = clip.load(weights=folder)
    loaded.vision()
    with pytest.raises(WeightsError, match="no text tower"):
        loaded.text()


@pytest.mark.parametrize(
    ("backbone", "name", "wanted"),
    [
        ("ViT-B-61", "openai", "ViT-B-16"),
        ("ViT-B-16", "opnai", "openai"),
        ("ViT-B-16", "nowhere/model.pt", "no such file"),
    ],
)
def test_unknown_names_suggest_known_ones(backbone, name, wanted):
    with pytest.raises(WeightsError, match=wanted):
        clip.load(backbone, name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache and no network."""
    monkeypatch.setattr(hub_files, "online", lambda: False)
    monkeypatch.setattr(hub_files, "try_to_load_from_cache", lambda repo, name: hub_cache.get((repo, name)))
    hub_cache: dict[tuple[str, str], str] = {}
    return hub_cache


def test_offline_and_not_cached_says_what_to_do_at_once(hub):
    wanted = r"fetch open_clip_model.safetensors from timm/vit_base_patch16_clip_224.openai .*weights='shapes'"
    with pytest.raises(WeightsError, match=wanted):
        clip.load("ViT-B-16", "openai")
    with pytest.raises(WeightsError, match="hf download someone/something"):
        clip.load(weights="hf-hub:someone/something")


def test_cached_weights_need_no_network(hub, folder):
    path = str(folder / "open_clip_model.safetensors")
    hub["timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"] = path
    loaded = clip.load("ViT-B-16", "openai")
    assert str(loaded.path) == path
    assert loaded.published
    assert loaded.quick_gelu
    hub["someone/something", "open_clip_config.json"] = str(folder / "open_clip_config.json")
    hub["someone/something", "open_clip_model.safetensors"] = path
    assert clip.load(weights="hf-hub:someone/something").config == TINY


def test_online_but_refused_names_the_reason(hub, monkeypatch):
    def refused(*args):
        raise PermissionError("gated")

    monkeypatch.setattr(hub_files, "online", lambda: True)
    monkeypatch.setattr(hub_files, "hf_hub_download", refused)
    with pytest.raises(WeightsError, match="PermissionError"):
        clip.load("ViT-B-16", "openai")


def test_maskclips_converted_names_become_openais(folder, tmp_path):
    tower = clip.load(weights=folder).vision()
    named = {}
    for key, value in tower.state_dict().items():
        name = key.replace("transformer.resblocks.", "layers.").replace("attn.", "attn.attn.")
        name = name.replace("mlp.c_fc.", "ffn.layers.0.0.").replace("mlp.c_proj.", "ffn.layers.1.")
        name = (
            name.replace("ln_1.", "ln1.")
            .replace("ln_2.", "ln2.")
            .replace("ln_pre.", "ln0.")
            .replace("ln_post.", "ln1.")
        )
        name = name.replace("conv1.", "patch_embed.projection.").replace("class_embedding", "cls_token")
        name = name.replace("positional_embedding", "pos_embed")
        named[name] = value[None] if name == "pos_embed" else value[None, None] if name == "cls_token" else value
    projection = named.pop("proj").T
    torch.save({"clip": named, "proj": {"weight": projection}}, tmp_path / "ViT16_clip_weights.pth")
    got = to_openai_names(read_state(tmp_path / "ViT16_clip_weights.pth"))
    assert {k.removeprefix("visual.") for k in got} == set(tower.state_dict())
    for key, value in tower.state_dict().items():
        assert torch.equal(got[f"visual.{key}"], value), key


def test_random_weights_are_the_same_every_time():
    first, second = (clip.load("ViT-B-32", "random").vision() for _ in range(2))
    assert torch.equal(first.proj, second.proj)


def test_folder_without_configuration_or_weights_is_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"open_clip_config\.json"):
        clip.load(weights=empty)
    shutil.copy(folder / "open_clip_config.json", empty)
    with pytest.raises(WeightsError, match=r"open_clip_model\.safetensors"):
        clip.load(weights=empty)


def test_all_that_decides_a_result_is_in_the_fingerprint(folder, tmp_path):
    config_path, path = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), state(folder)
    seen = {"as it was": clip.load(weights=folder).fingerprint}

    def changed(what, **model):
        config_path.write_text(json.dumps({**config, "model_cfg": TINY | model}))
        seen[what] = clip.load(weights=folder).fingerprint

    changed("activation", quick_gelu=True)
    changed("sizes", vision_cfg=TINY["vision_cfg"] | {"head_width": 8})
    changed("context", text_cfg=TINY["text_cfg"] | {"pool_type": "last"})
    for key in ("mean", "std"):
        config_path.write_text(json.dumps({**config, "preprocess_cfg": {key: [0.25] * 3}}))
        seen[key] = clip.load(weights=folder).fingerprint
    config_path.write_text(json.dumps(config))
    save_file(tensors | {"logit_scale": tensors["logit_scale"] + 1}, path)
    seen["contents"] = clip.load(weights=folder).fingerprint
    save_file(tensors, path)
    (folder / "words.json").write_text(json.dumps({"words": ["cat"], "background": []}))
    seen["words"] = clip.load(weights=folder).fingerprint
    (folder / "words.json").unlink()
    assert len(set(seen.values())) == len(seen), seen
    assert clip.load(weights=folder).fingerprint == seen["as it was"]


def test_a_file_read_as_another_backbone_has_another_fingerprint(folder, tmp_path):
    path = folder / "open_clip_model.safetensors"
    backbones = ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16")
    assert len({clip.load(backbone, path).fingerprint for backbone in backbones}) == len(backbones)


def openai_again(tensors, kind):
    """OpenAI's tensors as people save them: the archive's state dict, or that of a model on a GPU."""
    if kind == "marked":
        return tensors | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}
    return {k: v if ".ln_" in k or k.startswith("ln_") or "embedding" in k else v.half() for k, v in tensors.items()}


@pytest.mark.parametrize("kind", ["marked", "half"])
def test_openais_weights_saved_again_keep_their_activation(folder, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(weights.open_clip, "get_model_config", lambda name: TINY)
    path = tmp_path / "again.pt"
    torch.save(openai_again(state(folder), kind), path)
    loaded = clip.load("ViT-B-32", path)
    assert loaded.quick_gelu
    assert loaded.published
    assert isinstance(loaded.vision().blocks[0].mlp.gelu, QuickGELU)
    loaded.text()


def test_a_file_that_does_not_tell_its_activation_is_taken_with_a_warning(folder, tmp_path, caplog):
    path = folder / "open_clip_model.safetensors"
    clip.load("ViT-B-32-quickgelu", path)
    clip.load("ViT-B-16-plus", path)
    assert not caplog.records
    clip.load("ViT-B-32", path)
    (record,) = caplog.records
    assert "GELU is taken, as ViT-B-32 has it" in record.getMessage()
    assert "ViT-B-32-quickgelu" in record.getMessage()


def test_the_text_towers_tensors_are_exact_too(folder):
    tensors = state(folder)
    save_file(tensors | {"transformer.extra": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected: transformer\.extra"):
        clip.load(weights=folder).text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"open_clip_config\.json: cannot be read as JSON"),
        ("[1]", r"open_clip_config\.json: expected a mapping, got list"),
        ("{}", r"open_clip_config\.json: expected model_cfg with embed_dim"),
        ('{"model_cfg": {"embed_dim": 1}}', r"open_clip_config\.json: expected model_cfg with embed_dim"),
    ],
)
def test_a_damaged_configuration_is_named(folder, content, message):
    (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        clip.load(weights=folder)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "weights.bin"])
def test_what_is_no_weights_file_is_called_what_it_is(tmp_path, name):
    pointer = tmp_path / name
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(WeightsError, match="pointer of git-lfs, not the weights; fetch them with 'git lfs pull'"):
        clip.load("ViT-B-32", pointer)
    image = tmp_path / "photo.jpg"
    image.write_bytes(b"\xff\xd8\xff\xe0 JFIF")
    with pytest.raises(WeightsError, match="is not a weights file; expected safetensors"):
        clip.load("ViT-B-32", image)


def test_an_object_in_a_file_is_refused_by_its_name(tmp_path):
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pt")
    with pytest.raises(WeightsError, match=r"\(argparse\.Namespace\); save its state_dict") as error:
        clip.load("ViT-B-32", tmp_path / "run.pt")
    assert "\x1b" not in str(error.value)


def test_text_towers_of_the_hub_need_transformers_and_say_so_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = r"\(roberta-base\) need transformers, which is not installed: pip install 'fastzs\[hf\]'"
    with pytest.raises(MissingPackage, match=sentence):
        clip.load("roberta-ViT-B-32", "laion2b_s12b_b32k")


def test_a_tokenizer_that_cannot_be_had_is_missed_at_once(hub):
    with pytest.raises(WeightsError, match=r"of ViT-B-16-SigLIP's tokenizer is not in the cache.*no network"):
        clip.load("ViT-B-16-SigLIP", "webli")


def test_random_weights_take_any_text(monkeypatch):
    loaded = clip.load("ViT-B-32-SigLIP2-256", "random")
    ids = loaded.tokenizer(["a cat"])
    assert ids.shape == (1, 64)
    assert ids.max() < 256000
    assert loaded.sigmoid == (10.0, -10.0)


def test_every_pretrained_tag_has_a_place_to_come_from():
    for backbone, tag in open_clip.list_pretrained():
        pretrained = open_clip.get_pretrained_cfg(backbone, tag)
        assert pretrained.get("hf_hub") or pretrained.get("url"), (backbone, tag)
