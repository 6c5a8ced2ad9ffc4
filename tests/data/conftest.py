import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What data sets remember of their checks stays in the test."""
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path_factory.mktemp("cache")))
