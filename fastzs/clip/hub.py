"""Files of the Hugging Face hub: from its cache, else fetched; without a network, a sentence at once."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from fastzs.clip.state import WeightsError


def file(what: str, repository: str, names: Sequence[str]) -> Path:
    """The first of ``names`` that the hub's cache has, else that can be fetched.

    Args:
        what: what the files are of, for messages.

    Raises:
        WeightsError: there is no network, no such repository, none of the files in it, or no right to read it.
    """
    if (cached := in_cache(repository, names)) is not None:
        return cached
    if not online():
        raise cannot_fetch(what, names[0], repository, "no network")
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise cannot_fetch(what, name, repository, _reason(error)) from error
    raise WeightsError(f"{what}: the repository {repository} has none of {', '.join(names)}")


def in_cache(repository: str, names: Sequence[str]) -> Path | None:
    """The first of ``names`` that the hub's cache has."""
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    return None


def optional_file(what: str, repository: str, name: str) -> Path | None:
    """A file that the repository may lack.

    Raises:
        WeightsError: it is not in the cache, and the hub cannot be asked.
    """
    if (cached := in_cache(repository, (name,))) is not None:
        return cached
    if not online():
        return None
    try:
        return Path(hf_hub_download(repository, name))
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise cannot_fetch(what, name, repository, _reason(error)) from error


def online() -> bool:
    """Whether the hub can be asked at all: its name resolves, or a proxy is set that may know it."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its licence on the hub and log in with 'hf auth login'"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: 'hf auth login'"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
    )


def cannot_fetch(what: str, filename: str, where: str, reason: str) -> WeightsError:
    """The error that says what to do: a path to weights can be passed, other files are looked for in the cache."""
    problem = f"{filename} of {what} is not in the cache and could not be fetched ({reason})"
    if filename.endswith(".json"):
        return WeightsError(
            f"{problem}; run 'hf download {where}' on a machine with a network and copy its cache to "
            f"{huggingface_hub.constants.HF_HUB_CACHE}"
        )
    return WeightsError(
        f"{problem}; on a machine with a network fetch {filename} from {where} and pass its path as weights, or use "
        "weights='shapes' (drawn shapes only) or weights='random' (no meaning, only the path) now"
    )
