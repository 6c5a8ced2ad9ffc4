"""Where results are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FASTZS_CACHE``, else ``$XDG_CACHE_HOME/fastzs``, else ``~/.cache/fastzs``.

    For an account without a home folder the name stays ``~``: what cannot be written there is not kept.
    """
    if folder := os.environ.get("FASTZS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastzs"
