"""The golden files in ``tests/goldens`` all agree; the command says so when something does not."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.__main__ import main
from tests.parity.runner import checks, files

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("path", files([str(GOLDENS)]), ids=lambda path: path.stem)
def test_golden(path):
    results = [check for _, check in checks(path)]
    assert results
    assert [check for check in results if not check.ok] == []


def altered(folder: Path, source: Path, **tensors: torch.Tensor) -> Path:
    """A copy of a golden file with some tensors replaced or added."""
    with safe_open(source, "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata()
    save_file(content | tensors, folder / source.name, metadata)
    return folder / source.name


def test_command_fails_on_a_wrong_tensor(tmp_path, capsys):
    source = GOLDENS / "AB_text_encoder.safetensors"
    with safe_open(source, "pt") as file:
        text = file.get_tensor("out64.text")
    text[1, 2] += 1e-4 * text.abs().max()
    path = altered(tmp_path, source, **{"out64.text": text})
    assert main([str(source)]) == 0
    assert main([str(path)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_command_fails_on_a_tensor_nobody_compares(tmp_path):
    path = altered(tmp_path, GOLDENS / "AB_text_encoder.safetensors", **{"out.more": torch.zeros(2)})
    assert main([str(path)]) == 1


def test_command_fails_without_a_runner(tmp_path, capsys):
    with safe_open(GOLDENS / "AB_text_encoder.safetensors", "pt") as file:
        meta = file.metadata()["meta"].replace("AB_text_encoder", "Z_unheard_of")
    save_file({"in.x": torch.zeros(1)}, tmp_path / "a.safetensors", {"meta": meta})
    assert main([str(tmp_path)]) == 1
    assert "'Z_unheard_of' has no runner" in capsys.readouterr().out


def test_the_file_name_does_not_matter(tmp_path):
    shutil.copy(GOLDENS / "AB_text_encoder.safetensors", tmp_path / "renamed.safetensors")
    assert main([str(tmp_path)]) == 0


def test_no_paths_or_no_files(tmp_path):
    assert main([]) == 2
    with pytest.raises(FileNotFoundError, match="no golden file"):
        main([str(tmp_path)])
