"""Folders that transformers' CLIPModel and SiglipModel were saved in, against transformers itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastzs import clip
from fastzs.clip import WeightsError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "photo", "of", "cat", "dog", "grey", "."]
TEXT = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 9,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 8}
KINDS = {
    "clip": ("CLIP", {}, {}, {"projection_dim": 24}),
    "clip-gelu": ("CLIP", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}, {"projection_dim": 24}),
    "siglip": ("Siglip", {"projection_size": 48}, {}, {}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def tokenizer():
    """A tokenizer of whole words that ends a text as SigLIP's and CLIP's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture
def saved(kind, tmp_path):
    """A model with random weights, and the folder that it and its tokenizer are saved in."""
    name, text, vision, options = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=VISION | vision, **options)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim < 2 and "logit" not in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif parameter.ndim == 3:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return model, tmp_path


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.inference_mode()
def test_gives_the_same_embeddings(saved, kind):
    model, folder = saved
    loaded = clip.load(weights=folder)
    images = torch.randn(2, 3, 32, 32)
    wanted = tensor(model.get_image_features(pixel_values=images))
    assert wanted.std() > 0
    torch.testing.assert_close(loaded.vision()(images), wanted, rtol=1e-4, atol=1e-5)
    texts = ["a photo of a cat", "dog"]
    ids = tokenizer()(texts, padding="max_length", max_length=9, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(loaded.text().tokenizer(texts), ids)
    wanted = torch.nn.functional.normalize(tensor(model.get_text_features(input_ids=ids)), dim=-1)
    torch.testing.assert_close(loaded.text().encode(texts), wanted, rtol=1e-4, atol=1e-5)
    if kind == "siglip":
        assert loaded.sigmoid == pytest.approx((model.logit_scale.exp().item(), model.logit_bias.item()))
        assert loaded.mean == [0.5] * 3
        assert torch.equal(loaded.text().tokenizer(["A Photo, of: a CAT!"]), ids[:1])
    else:
        assert loaded.sigmoid is None


def test_long_texts_keep_their_end(saved):
    ids = clip.load(weights=saved[1]).text().tokenizer(["cat " * 20])
    assert ids.shape == (1, 9)
    assert ids[0].tolist() == [WORDS.index("cat")] * 8 + [1]


def test_dense_features_of_any_size(saved):
    tower = clip.load(weights=saved[1]).vision()
    with torch.inference_mode():
        tokens, grid = tower.trunk(torch.randn(1, 3, 20, 45))
        assert tower.dense(tokens, grid, "kk+gaussian").shape == (1, tower.output_dim, 3, 6)


def test_weights_in_parts_and_in_torchs_format(saved):
    _, folder = saved
    with torch.inference_mode():
        images = torch.randn(1, 3, 32, 32)
        wanted = clip.load(weights=folder).vision()(images)
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        torch.testing.assert_close(clip.load(weights=folder).vision()(images), wanted)
        names = sorted(state)
        parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
        for part, keys in parts.items():
            save_file({key: state[key] for key in keys}, folder / part)
        index = {"weight_map": {key: part for part, keys in parts.items() for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        torch.testing.assert_close(clip.load(weights=folder).vision()(images), wanted)


def test_what_is_wrong_is_named(saved, kind):
    _, folder = saved
    path = folder / "model.safetensors"
    state = load_file(path)
    gone = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    save_file({key: value for key, value in state.items() if key != gone} | {"extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=f"missing: {gone}; unexpected: extra"):
        clip.load(weights=folder).vision()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"no tokenizer\.json in it; save the tokenizer"):
        clip.load(weights=folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(WeightsError, match="model_type is 'bert'; expected 'clip' or 'siglip'"):
        clip.load(weights=folder)
    config["text_config"]["hidden_act"] = "relu6"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="text_config has hidden_act='relu6'"):
        clip.load(weights=folder)


WITHOUT = """
import sys
sys.modules["transformers"] = None  # importing it fails, as where it is not installed
import torch
from fastzs import clip
loaded = clip.load(weights=sys.argv[1])
torch.save([loaded.text().encode(["a cat"]), loaded.vision()(torch.ones(1, 3, 32, 32))], sys.argv[2])
"""


@pytest.mark.slow
def test_transformers_is_not_needed(saved, tmp_path):
    _, folder = saved
    subprocess.run([sys.executable, "-c", WITHOUT, folder, tmp_path / "out.pt"], check=True, cwd=Path.cwd())
    text, image = torch.load(tmp_path / "out.pt")
    loaded = clip.load(weights=folder)
    torch.testing.assert_close(text, loaded.text().encode(["a cat"]))
    torch.testing.assert_close(image, loaded.vision()(torch.ones(1, 3, 32, 32)))
