import sys
from pathlib import Path

import pytest
import torch

import fastzs
from fastzs.models.matching import assign
from fastzs.needed import MissingPackage, check_installed, needed

SENTENCE = r"^scarves need wool, which is not installed: pip install 'fastzs\[yarn\]'$"


def test_what_is_missing_is_said_with_the_remedy():
    with pytest.raises(MissingPackage, match=SENTENCE):
        check_installed("fastzs_has_no_such_module", "wool", "scarves", "yarn")
    with pytest.raises(MissingPackage, match=SENTENCE):
        needed("fastzs_has_no_such_module.fine", "wool", "scarves", "yarn")
    assert needed("json.decoder", "json", "files", "none").JSONDecoder


def test_what_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import fastzs_has_no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    check_installed("half_a_package", "wool", "scarves", "yarn")
    assert "half_a_package" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="No module named 'fastzs_has_no_such_module'"):
        needed("half_a_package", "wool", "scarves", "yarn")


def test_matching_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"need SciPy, which is not installed: pip install 'fastzs\[two-stage\]'"):
        assign(torch.zeros(2, 3), torch.zeros(2, 4, 4), torch.tensor([0]), torch.ones(1, 4, 4, dtype=torch.bool), 1, 1)


def test_nothing_else_words_it():
    package = Path(fastzs.__file__).parent
    files = {path.name for path in package.rglob("*.py") if "which is not installed" in path.read_text()}
    assert files == {"needed.py"}
