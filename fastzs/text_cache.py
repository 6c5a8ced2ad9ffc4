"""Text vectors of phrases, each encoded once: kept in memory, and on disk for the next run.

A phrase's vector depends on the weights, the prompt templates and the phrase alone, so a new list of names costs only
the phrases that were never asked for. What cannot be read or kept is encoded again; a cache never ends a run.
"""

import hashlib
import json
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.cache import cache_folder
from fastzs.clip import Clip
from fastzs.clip.text import TextEncoder
from fastzs.progress import ProgressBar
from fastzs.trace import traced

log = logging.getLogger(__name__)
MOST = 1 << 15  # phrases kept in memory: 64 MB of vectors that are 512 wide
AT_ONCE = 256  # texts in a batch of the text tower
QUIET = 2000  # texts that are encoded without a progress bar
ASKED = 500  # phrases in a query, below SQLite's limit of parameters
LONG = 60  # letters of a text that may be more than a text tower reads
SECONDS = 5  # to wait for another process that writes

VERSION = 1  # to be raised with a change of code that changes text vectors

_memory: OrderedDict[tuple[str, str], Tensor] = OrderedDict()


def encode(clip: Clip, templates: Sequence[str], phrases: Sequence[str]) -> Tensor:
    """Text vectors [phrases, D], fp32, of unit length: the normalised mean over the templates.

    They come from memory, then from the folder of :func:`fastzs.cache.cache_folder`, then from the text tower, which is
    not even loaded unless it is needed.

    Raises:
        WeightsError: the weights have no text tower.
    """
    group = hashlib.sha256(json.dumps([VERSION, clip.fingerprint, list(templates)]).encode()).hexdigest()
    found = {phrase: _memory[group, phrase] for phrase in phrases if (group, phrase) in _memory}
    path = cache_folder() / "text" / f"{group}.sqlite"
    if missing := [phrase for phrase in dict.fromkeys(phrases) if phrase not in found]:
        found |= _read(path, missing, clip.embed_dim)
    if missing := [phrase for phrase in missing if phrase not in found]:
        with torch.inference_mode(False), torch.no_grad():  # cached vectors may take part in training
            rows = _run_tower(clip, templates, missing).clone()
        _write(path, missing, rows)
        found |= dict(zip(missing, rows, strict=True))
    for phrase in phrases:
        _memory[group, phrase] = found[phrase]
        _memory.move_to_end((group, phrase))
    while len(_memory) > MOST:
        _memory.popitem(last=False)
    return torch.stack([found[phrase] for phrase in phrases])


@traced("model.text")
def _run_tower(clip: Clip, templates: Sequence[str], phrases: Sequence[str]) -> Tensor:
    encoder, rows = clip.text(), []
    at_once = max(1, AT_ONCE // len(templates))
    with ProgressBar("encoding names", "name", shown=len(phrases) * len(templates) >= QUIET) as progress:
        progress.start(len(phrases))
        for start in range(0, len(phrases), at_once):
            some = phrases[start : start + at_once]
            texts = [template.replace("{}", phrase) for phrase in some for template in templates]
            _warn_of_cuts(encoder, texts)
            vectors = encoder.encode(texts).cpu().unflatten(0, (len(some), len(templates)))
            rows.append(F.normalize(vectors.mean(1), dim=-1))
            progress.advance(len(some))
    return torch.cat(rows)


def _warn_of_cuts(encoder: TextEncoder, texts: Sequence[str]) -> None:
    """Say which texts are longer than the tower reads: without their last word they are the same to it."""
    long = [text for text in texts if len(text) > LONG and " " in text]
    if not long:
        return
    shorter = [text.rpartition(" ")[0] for text in long]
    same = (encoder.tokenizer(long) == encoder.tokenizer(shorter)).all(1)
    if cut := [text for text, equal in zip(long, same.tolist(), strict=True) if equal]:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        log.warning("the text tower reads only the beginning of %r%s", f"{cut[0][:57]}...", more)


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=SECONDS)
    connection.execute("CREATE TABLE IF NOT EXISTS vectors (phrase TEXT PRIMARY KEY, vector BLOB NOT NULL)")
    return connection


def _read(path: Path, phrases: Sequence[str], width: int) -> dict[str, Tensor]:
    """Those of the phrases that are kept in a file."""
    found: dict[str, Tensor] = {}
    try:
        if not path.is_file():
            return found
        with closing(_open(path)) as connection:
            for start in range(0, len(phrases), ASKED):
                some = phrases[start : start + ASKED]
                marks = ",".join("?" * len(some))
                query = f"SELECT phrase, vector FROM vectors WHERE phrase IN ({marks})"
                for phrase, blob in connection.execute(query, some):
                    vector = torch.from_numpy(np.frombuffer(blob, "<f4").astype(np.float32))
                    if vector.shape == (width,) and vector.isfinite().all():
                        found[phrase] = vector
    except sqlite3.DatabaseError as error:
        log.warning("%s is damaged (%s) and will be written again", path, error)
        if not isinstance(error, sqlite3.OperationalError):  # which are locks and the like: another process may have it
            _discard(path)
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read: %s", path, error)
    return found


def _write(path: Path, phrases: Sequence[str], vectors: Tensor) -> None:
    rows = [(phrase, row.numpy().astype("<f4").tobytes()) for phrase, row in zip(phrases, vectors, strict=True)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(_open(path)) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
    except (OSError, sqlite3.Error, UnicodeEncodeError) as error:
        log.warning("text vectors are not kept: %s", error)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)
