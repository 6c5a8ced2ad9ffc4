"""The folder in which results are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FASTZS_CACHE``, else ``$XDG_CACHE_HOME/fastzs``, else ``~/.cache/fastzs``.

    For an account without a home folder it is a path that cannot be written, so nothing is kept.
    """
    if folder := os.environ.get("FASTZS_CACHE"):
        return Path(os.path.expanduser(folder))
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "fastzs"
    home = os.path.expanduser("~")
    return Path(os.devnull if home == "~" else home, ".cache", "fastzs")
