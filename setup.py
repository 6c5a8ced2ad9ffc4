"""Builds the extension ``fastzs._C`` from ``csrc/``: every ``*.cpp``, and every ``*.cu`` where there is CUDA.

``FASTZS_BUILD`` says what to build: ``auto`` (default; what this machine can, never failing the install), ``0``
(nothing), ``cpu`` or ``cuda`` (that, or fail). What was built, or why not, is written to ``fastzs/_build.json``
beside the library, for ``fastzs doctor``.
"""

import importlib.util
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LIBRARY = "fastzs._C"
SETUPTOOLS = 77  # the oldest that reads pyproject.toml's licence, as build-system.requires has it
PYTHON = "cp311"  # the oldest Python; the library uses the stable ABI, so one wheel serves all later ones
# The oldest LibTorch the library runs under: only the stable ABI of that version is used.
TORCH_TARGET = "0x020b000000000000"
# Without a GPU to ask and without TORCH_CUDA_ARCH_LIST: A100, H100 and B200, the last also as PTX for later ones.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CXX_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
CXX_FLAGS += [f"-fmacro-prefix-map={ROOT}/="]  # errors name csrc/FILE, wherever it was built


def cuda_home() -> str | None:
    """The CUDA toolkit, judged by its files: an nvcc on PATH may be a wrapper that lies elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for home in candidates:
        if home and (Path(home) / "bin/nvcc").exists() and (Path(home) / "include/cuda_runtime.h").exists():
            return str(home)
    return None


def why_no_cuda() -> str | None:
    """None if the CUDA part can be built, else the reason. A visible GPU is not needed."""
    import torch

    if not list(ROOT.glob("csrc/*.cu")):
        return "csrc has no CUDA sources"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cuda_home() is None:
        return "no CUDA toolkit found; CUDA_HOME names one"
    return None


def extension(cuda: bool):
    """The extension for setuptools, with or without its CUDA part."""
    import torch
    from torch.utils import cpp_extension

    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h"))
    options = {"py_limited_api": True, "depends": headers}
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
    if not cuda:
        return cpp_extension.CppExtension(
            LIBRARY, sources, define_macros=macros, extra_compile_args={"cxx": CXX_FLAGS}, **options
        )
    cpp_extension.CUDA_HOME = cuda_home()
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cu"))
    built = cpp_extension.CUDAExtension(
        LIBRARY,
        sources,
        define_macros=[*macros, ("USE_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-lineinfo"]},
        **options,
    )
    # The library needs no CUDA library to load, so it also loads where torch has none, and with any CUDA runtime. What
    # it does want of torch's CUDA part, the current stream, it finds through libtorch.so, which nothing else asks for.
    built.libraries = [name for name in built.libraries if name not in ("cudart", "c10_cuda", "torch_cuda")]
    built.libraries += ["cudart_static", "rt", "dl", "pthread"]
    built.extra_link_args = ["-Wl,--no-as-needed", "-ltorch"]
    return built


def build_command(wanted: str, no_cuda: str | None):
    """The ``build_ext`` command: builds, falls back where ``wanted`` is auto, and writes the report."""

    import torch
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            self.report["library"] = Path(self.get_ext_fullpath(LIBRARY)).exists()
            path = Path(self.get_ext_fullpath(LIBRARY)).parent / "_build.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.report, indent=1) + "\n")
            print(f"fastzs: built {self.report}", file=sys.stderr)

        def build_extensions(self):
            self.report = {"torch": torch.__version__, "cpu": "built", "cuda": no_cuda or "built"}
            try:
                super().build_extensions()
                return
            except Exception as error:
                if wanted != "auto":
                    raise
                traceback.print_exc()
                self.report["cuda" if no_cuda is None else "cpu"] = f"failed to build: {first_line(error)}"
            if no_cuda is None:
                self.extensions[:] = [extension(cuda=False)]
                self.extensions[0].optional = True
                try:
                    super().build_extensions()
                except Exception as error:
                    traceback.print_exc()
                    self.report["cpu"] = f"failed to build: {first_line(error)}"

    return Build


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def build_options() -> dict:
    """Arguments of ``setup`` that build what ``FASTZS_BUILD`` asks for."""
    wanted = os.environ.get("FASTZS_BUILD", "auto")
    if wanted not in ("auto", "0", "cpu", "cuda"):
        raise SystemExit(f"FASTZS_BUILD={wanted!r} is unknown; use auto, 0, cpu or cuda")
    if wanted == "0":
        return {}
    if importlib.util.find_spec("torch") is None:  # a build without isolation where torch is not installed
        if wanted == "auto":
            print("fastzs: no torch to build against, so no extension is built", file=sys.stderr)
            return {}
        raise SystemExit(f"FASTZS_BUILD={wanted} needs torch in the environment that builds")
    no_cuda = why_no_cuda() if wanted != "cpu" else "FASTZS_BUILD=cpu"
    if wanted == "cuda" and no_cuda:
        raise SystemExit(f"FASTZS_BUILD=cuda cannot build: {no_cuda}")
    built = extension(cuda=no_cuda is None)
    built.optional = wanted == "auto"
    return {
        "ext_modules": [built],
        "cmdclass": {"build_ext": build_command(wanted, no_cuda)},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON}},
    }


def packages() -> list[str]:
    """Every package: those of fastzs/, and those of kernels/, which are installed as fastzs.kernels."""
    kernels = find_packages(str(ROOT), include=["kernels", "kernels.*"])
    return find_packages(str(ROOT), include=["fastzs", "fastzs.*"]) + [f"fastzs.{name}" for name in kernels]


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < SETUPTOOLS:
        raise SystemExit(
            f"expected setuptools {SETUPTOOLS} or newer, got {setuptools.__version__}: run "
            f"pip install -U 'setuptools>={SETUPTOOLS}', or build without --no-build-isolation"
        )
    setup(packages=packages(), package_dir={"fastzs.kernels": "kernels"}, **build_options())
