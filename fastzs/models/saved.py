"""Trained models as ``save_pretrained`` and ``push_to_hub`` write them: a folder with the settings and the weights."""

import difflib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import try_to_load_from_cache

from fastzs.checkpoints import check_digests
from fastzs.clip.hub import online as _online
from fastzs.clip.state import WeightsError, file_fingerprint
from fastzs.files import is_web_address, read_text
from fastzs.renamed import current_options

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL = "model"  # the key of the class's name
FILES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".safetensors")
OF_TRAINING = re.compile(r"last|best|step_\d+")
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_file_name(place: str | Path) -> bool:
    """Whether a checkpoint is meant as a single file, there or not, rather than as a folder or hub id.

    Raises:
        WeightsError: it is a web address.
    """
    if is_web_address(place):
        raise WeightsError(f"checkpoint {place}: this is a web address; download the file and give its path")
    return Path(place).is_file() or Path(place).suffix.lower() in FILES


def find(place: str | Path, **hub: Any) -> Path:
    """The folder of a saved model: itself, or where the hub's cache has it.

    Args:
        hub: arguments of :func:`huggingface_hub.hf_hub_download`, such as ``revision``.

    Raises:
        WeightsError: there is no such folder, and it is no hub id, or the hub does not have it or cannot be reached.
    """
    folder = Path(place)
    if folder.is_dir():
        return folder
    name = str(place).removeprefix("hf-hub:")
    # "runs/x" could be both: what begins with a folder that is here, or ends as a training's do, is meant as a folder
    local = Path(name.split("/")[0]).exists() or OF_TRAINING.fullmatch(Path(name).name)
    if not HUB_ID.fullmatch(name) or (local and not str(place).startswith("hf-hub:")):
        raise WeightsError(f"checkpoint {place}: there is no such file or folder{_near(folder)}")
    cached = [try_to_load_from_cache(name, file, **_cache(hub)) for file in (CONFIG, WEIGHTS)]
    if all(isinstance(path, str) for path in cached):
        return Path(str(cached[0])).parent
    neither = f"checkpoint {place}: there is no such folder here, and as a hub id it"
    if not _online():
        raise WeightsError(f"{neither} is not in the cache and cannot be fetched without a network")
    try:
        paths = [Path(huggingface_hub.hf_hub_download(name, file, **hub)) for file in (CONFIG, WEIGHTS)]
    except Exception as error:
        raise WeightsError(f"{neither} cannot be fetched: {_sentence(error)}") from error
    return paths[0].parent


def read_config(folder: Path, kind: type) -> dict[str, Any]:
    """The constructor's arguments of a model of a kind.

    Raises:
        WeightsError: there are none, they are of another kind or damaged, or hold what the kind does not know.
    """
    path, config = folder / CONFIG, _read(folder)
    written = config.pop(MODEL, kind.__name__)
    if written != kind.__name__:
        raise WeightsError(f"checkpoint {folder}: it is a {written}, not a {kind.__name__}; load it as that model")
    known = [name for name in inspect.signature(kind).parameters]
    config = current_options(config)
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; nearest known: {near[0]!r}" if near else "; is it a checkpoint of another model?"
            raise WeightsError(f"{path}: {kind.__name__} has no setting {key!r}{hint}")
    return config


def kind_name(folder: Path) -> str | None:
    """Name of the class of a saved model; None of models that were saved before it was written.

    Raises:
        WeightsError: there are no settings, or they are damaged.
    """
    return _read(folder).get(MODEL)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError:
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "it is empty"
        raise WeightsError(
            f"checkpoint {folder}: there is no {CONFIG} in it, so save_pretrained did not write it (there: {there})"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected a mapping of settings, got {type(config).__name__}")
    return config


def fingerprint(folder: Path, config: Mapping[str, Any]) -> str:
    """Identifies a saved model by all that it holds, after checking it against the record that training keeps.

    Raises:
        CheckpointError: a file is not as it was written.
        WeightsError: there are no weights.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise WeightsError(f"checkpoint {folder}: there is no {WEIGHTS} in it")
    digest = check_digests(folder, (CONFIG, WEIGHTS)) if (folder / "checkpoint.json").is_file() else None
    weights = digest[WEIGHTS] if digest else file_fingerprint(path).removeprefix("sha256:")
    return f"sha256:{weights} {json.dumps(config, sort_keys=True)}"


def _cache(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {key: hub[key] for key in ("cache_dir", "revision") if key in hub}


def _near(folder: Path) -> str:
    parent = folder.parent
    there = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, n=1)
    return f"; nearest there: {parent / near[0]}" if near else ""


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
