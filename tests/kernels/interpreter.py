"""Triton's interpreter has to be chosen before Triton is imported, so a file runs again in a process where it is."""

import os
import subprocess
import sys

import pytest

from tests.processes import environment

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1")


def run_interpreted(path: str) -> None:
    """Run the tests of one file in the interpreter and require that some ran and all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow", path]
    done = subprocess.run(command, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture
def tf32(monkeypatch):
    """Products that ask for tf32 cut both sides to its 10 bits after the leading one, as tensor cores do.

    The interpreter itself multiplies fp32 whatever is asked for.
    """
    import numpy as np
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact = InterpreterBuilder.create_dot

    def cut(handle):
        return TensorHandle((handle.data.view(np.int32) & np.int32(-(1 << 13))).view(np.float32), handle.dtype)

    def create_dot(self, a, b, d, input_precision, *rest):
        if input_precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = cut(a), cut(b)
        return exact(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
