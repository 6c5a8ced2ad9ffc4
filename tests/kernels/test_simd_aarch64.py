"""csrc/simd.h and the products' tiles on 64-bit Arm: compiled for NEON and run under an emulator.

Needs a cross compiler and qemu-user.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER, EMULATOR, DISASSEMBLER = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
missing = [tool for tool in (COMPILER, EMULATOR, DISASSEMBLER) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}")

# What cpu.h gives, without torch's headers.
HEAD = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#define FASTZS_INLINE inline __attribute__((always_inline))
#define FASTZS_INLINE_LAMBDA __attribute__((always_inline))
namespace torch { namespace headeronly { struct BFloat16 { uint16_t x; }; struct Half { uint16_t x; }; } }
#include "simd.h"
"""
# Every 16-bit number there and back, and the errors simd.h states.
ARITHMETIC = r"""
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


# The largest error of each tile against sums of doubles.
TILES = r"""
namespace fastzs { FASTZS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; } }
#include "attention_tiles.h"
#include "linear_tiles.h"
using namespace fastzs;
constexpr int N = VECTORS<4> * 4, ROWS = 6, DEPTH = 50, PANEL = linear::PANEL, STRIDE = attention::STRIDE;

extern "C" __attribute__((noinline)) void attention_tile(const float* a, const float* b, int64_t depth, float* c) {
  attention::add_product<4, false, STRIDE, 1>(VECTORS<4>, a, b, N, depth, c, N);
}
extern "C" __attribute__((noinline)) void linear_tile(const float* a, const float* b, int64_t depth, char* c) {
  linear::tile<4, linear::Kind::floats, false, false>(a, STRIDE, b, depth, c, c, c);
}

float number(int i) { return (i * 37 % 101) / 50.0f - 1; }

int main() {
  static float a[ROWS * STRIDE], b[DEPTH * PANEL], c[ROWS * N], sums[ROWS * PANEL];
  for (float& x : a) x = number(&x - a);
  for (float& x : b) x = number(&x - b + 7);
  for (float& x : sums) x = number(&x - sums + 3);
  attention_tile(a, b, DEPTH, c);
  linear_tile(a, b, DEPTH, reinterpret_cast<char*>(sums));
  double first = 0, second = 0;
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < N; ++n) {
      double dense = 0, panel = number(r * PANEL + n + 3);
      for (int k = 0; k < DEPTH; ++k) dense += (double)a[r * STRIDE + k] * b[k * N + n];
      for (int k = 0; k < DEPTH; ++k) panel += (double)a[r * STRIDE + k] * b[k * PANEL + n];
      first = std::fmax(first, std::fabs(c[r * N + n] - dense));
      second = std::fmax(second, std::fabs(sums[r * PANEL + n] - panel));
    }
  std::printf("%g %g\n", first, second);
}
"""


def run(folder, program):
    """The numbers that a program prints, and its machine code."""
    for name in ("simd.h", "attention_tiles.h", "linear_tiles.h"):
        text = (CSRC / name).read_text()
        (folder / name).write_text(text.replace('#include "cpu.h"', "").replace('#include "memory.h"', ""))
    (folder / "main.cpp").write_text(HEAD + program)
    command = [COMPILER, "-std=c++17", "-O3", "-ffp-contract=fast", "-Wno-psabi", "-static", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([EMULATOR, "./main"], cwd=folder, check=True, capture_output=True, text=True)
    code = subprocess.run([DISASSEMBLER, "-d", "main"], cwd=folder, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()], code.stdout


def test_arithmetic_and_conversions(tmp_path):
    (exponential, logarithm, wrong, total), code = run(tmp_path, ARITHMETIC)
    assert exponential < 4e-7  # measured 7.8e-8
    assert logarithm < 4e-7  # measured 3.0e-7
    assert wrong == 0
    assert total == 6
    assert "fmla\tv" in code  # vectors, not one float after the other


def test_sums_of_a_tile_stay_in_the_32_registers(tmp_path):
    found, code = run(tmp_path, TILES)
    eps = 2.0**-24
    assert max(found) < 4 * 50**0.5 * eps * 50  # 50 products of at most 1
    for name in ("attention_tile", "linear_tile"):
        body = code.split(f"<{name}>:")[1].split("\n\n")[0].splitlines()
        places = {line.split(":")[0].strip(): i for i, line in enumerate(body) if ":" in line}
        loops = []
        for i, line in enumerate(body):
            target = re.search(r"\tb\.\w+\t(\w+) <", line)
            if target and places.get(target[1], i) < i:
                loops.append(body[places[target[1]] : i])
        loop = max(loops, key=len)
        assert sum("\tfmla\t" in line for line in loop) == 24
        assert not [line for line in loop if "[sp" in line]
