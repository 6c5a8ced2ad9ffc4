"""``FASTZS_IMPL`` switches backends under the test-suite: a part of it, once per preference, in its own process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

# Left out: long, and no different with another backend.
SLOW = "not (any_shape or little_memory or exports or ranks or compiles or starts_from)"
TESTS = Path(__file__).parent
# Every op that has several backends, and the models and predictors built on them; only what is quick.
OPS = (
    "kernels/test_mask_loss.py",
    "kernels/test_label_map.py",
    "kernels/test_refine.py",
    "kernels/test_key_smoothing.py",
    "kernels/test_pixel_text_logits.py",
    "kernels/test_bridged_attention.py",
)
MODELS = ("models", "test_segmenter.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("impl", "part"), [("reference", OPS + MODELS), ("cpu", OPS)])  # models take the latter anyway
def test_green_with_every_preference(impl, part):
    paths = [str(TESTS / path) for path in part]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SLOW, *paths]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment(FASTZS_IMPL=impl), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
