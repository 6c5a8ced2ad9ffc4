"""Hostile and odd inputs, see :mod:`tests.mischief`."""

import pytest

from tests.mischief.__main__ import run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_case_ends_as_it_should(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    count, problems = run(tmp_path)
    assert count >= 150
    assert not problems, "\n".join(problems)
