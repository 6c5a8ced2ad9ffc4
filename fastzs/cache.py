"""Where results are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FASTZS_CACHE``, else ``$XDG_CACHE_HOME/fastzs``, else ``~/.cache/fastzs``.

    For an account without a home folder, a place below a file that is none: what cannot be written there is not kept.
    """
    if folder := os.environ.get("FASTZS_CACHE"):
        return Path(os.path.expanduser(folder))
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "fastzs"
    home = os.path.expanduser("~")
    return Path(os.devnull if home == "~" else home, ".cache", "fastzs")
