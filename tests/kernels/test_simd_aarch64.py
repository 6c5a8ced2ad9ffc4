"""csrc/simd.h on 64-bit Arm: compiled for NEON and run under an emulator. Needs a cross compiler and qemu-user."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
missing = [tool for tool in (COMPILER, EMULATOR, DISASSEMBLER) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")

# What cpu.h gives, without torch's headers; then every 16-bit number there and back, and the errors simd.h states.
PROGRAM = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#define FASTZS_INLINE inline __attribute__((always_inline))
namespace torch { namespace headeronly { struct BFloat16 { uint16_t x; }; struct Half { uint16_t x; }; } }
#include "simd.h"
using V = fastzs::Simd<4>;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

int main() {
  double exponential = 0, logarithm = 0;
  for (float x = -80; x <= 0; x += 0.01f) {
    float y[4];
    V::store(y, V::exp_negative(V::splat(x)));
    exponential = std::fmax(exponential, std::fabs(y[1] / std::exp((double)x) - 1));
  }
  for (float x = 1e-6f; x <= 1; x *= 1.01f) {
    float y[4];
    V::store(y, V::log1p_unit(V::splat(x)));
    logarithm = std::fmax(logarithm, std::fabs(y[2] / std::log1p((double)x) - 1));
  }
  int wrong = 0;
  for (int n = 0; n < 65536; ++n) {
    Half half[4] = {{(uint16_t)n}, {1}, {2}, {3}}, half_again[4];
    float value[4];
    V::store(value, V::load(half));
    V::store(half_again, V::load(half));
    __fp16 native;
    __builtin_memcpy(&native, half, 2);
    const float wanted = native;
    wrong += wanted == wanted ? value[0] != wanted || half_again[0].x != n : value[0] == value[0];
    BFloat16 brain[4] = {{(uint16_t)n}, {1}, {2}, {3}}, brain_again[4];
    V::store(brain_again, V::load(brain));
    wrong += (n & 0x7fff) <= 0x7f80 && brain_again[0].x != n;
  }
  std::printf("%g %g %d %g\n", exponential, logarithm, wrong, V::sum(V::splat(1.5f)));
}
"""


def test_arithmetic_and_conversions(tmp_path):
    (tmp_path / "simd.h").write_text((CSRC / "simd.h").read_text().replace('#include "cpu.h"', ""))
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-O2", "-ffp-contract=fast", "-Wno-psabi", "-static", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([EMULATOR, "./main"], cwd=tmp_path, check=True, capture_output=True, text=True)
    exponential, logarithm, wrong, total = (float(word) for word in done.stdout.split())
    assert exponential < 4e-7  # measured 7.8e-8
    assert logarithm < 4e-7  # measured 3.0e-7
    assert wrong == 0
    assert total == 6
    code = subprocess.run([DISASSEMBLER, "-d", "main"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "fmla\tv" in code  # vectors, not one float after the other
