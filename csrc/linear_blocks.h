// Linear layers on the CPU: a thread takes a block of rows through everything: layer norm, rounding to the units that
// are multiplied (of int8 with a scale per row), the product with all outputs, activation, the second layer, residual,
// layer norm. What lies between never leaves its caches.
#pragma once

#include "linear_rows.h"

#include <algorithm>
#include <type_traits>

namespace fastzs::linear {

using torch::headeronly::BFloat16;

struct Layer {
  const void* weight;  // see linear_tiles.h
  const float *bias, *scale, *sum;  // [outputs up to whole panels]; int8: of a weight's unit, and the sum of its bytes
  int64_t inputs, outputs, activation;

  int64_t padded() const { return round_up(outputs, PANEL); }
};

template <typename T, typename O>
struct Job {
  const T* x;         // [rows, inputs of the first layer]
  const O* residual;  // [rows, outputs of the last layer], or null
  O* out;
  void* hidden;  // null, or [rows, outputs of the first layer] before its activation, fp32 or bf16 as the weights:
  bool slopes;   // written; or given, and the first layer's results are multiplied by the activation's slopes there
  int64_t rows, block_rows, layers;  // block_rows: at most, a multiple of ROWS
  Layer layer[2];
  Norm before, after;
  const O* normed;  // null, or [rows, outputs of the last layer]: results are gradients of the norm `after` of these
};

template <typename T, typename O>
struct Blocks {
  const Job<T, O>* job;
  int64_t begin, end;  // of the tiles, ROWS rows each
  float* memory;
};

// Of a row of units: not a power of two, whose lines would collide.
FASTZS_INLINE int64_t unit_stride(int64_t inputs, int step) { return round_up((inputs + step - 1) / step, 16) + 16; }

// How much memory a thread wants, in floats.
template <typename T, typename O>
int64_t memory_of(const Job<T, O>& job, int step) {
  int64_t count = round_up(std::max(job.layer[0].inputs, job.layer[job.layers - 1].outputs), 16);
  count += job.block_rows * (PANEL + 1);
  for (int64_t i = 0; i < job.layers; ++i) {
    count += job.block_rows * (unit_stride(job.layer[i].inputs, step) + job.layer[i].padded() + 16);
  }
  return count + 8 * 16;
}

// Rows of units times a layer, a panel of outputs at a time; give(r, n, y, columns) gets what comes out of a row before
// the activation, a panel's vectors y, of which the first columns are outputs.
template <int LANES, Kind KIND, bool NATIVE, typename Give>
FASTZS_INLINE void apply(
    const Layer& layer, const typename Product<LANES, KIND, NATIVE>::Unit* units, int64_t stride, int64_t rows,
    const float* scales, float* sums, const Give& give) {
  using V = Simd<LANES>;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  const int64_t rounded = round_up(rows, ROWS), depth = (layer.inputs + STEP<KIND> - 1) / STEP<KIND>;
  const auto* weight = static_cast<const Unit*>(layer.weight);
  for (int64_t n = 0; n < layer.outputs; n += PANEL) {
    int32_t start[PANEL] = {};
    if constexpr (KIND == Kind::bytes)  // a row's bytes are 128 too large
      for (int c = 0; c < PANEL; ++c) start[c] = -128 * static_cast<int32_t>(layer.sum[n + c]);
    const int columns = layer.outputs - n < PANEL ? static_cast<int>(layer.outputs - n) : PANEL;
    const auto finish = [&](int64_t tile) FASTZS_INLINE_LAMBDA {
      const int64_t end = rows - tile < ROWS ? rows : tile + ROWS;
      for (int64_t r = tile; r < end; ++r) {
        typename V::F y[PANEL_VECTORS<LANES>];
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS<LANES>; ++v) {
          const int c = v * LANES;
          if constexpr (KIND == Kind::bytes) {
            typename V::I sum;
            __builtin_memcpy(&sum, sums + r * PANEL + c, sizeof sum);
            y[v] = __builtin_convertvector(sum, typename V::F) * (V::load(layer.scale + n + c) * scales[r]);
          } else {
            y[v] = V::load(sums + r * PANEL + c);
          }
          y[v] += V::load(layer.bias + n + c);
        }
        give(r, n, y, columns);
      }
    };
    multiply<LANES, KIND, NATIVE>(
        units, stride, rounded, weight + n * depth, depth, reinterpret_cast<const char*>(start),
        reinterpret_cast<char*>(sums), finish);
  }
}

template <int LANES, Kind KIND, bool NATIVE, bool ROUNDS, typename T, typename O>
FASTZS_INLINE void take_blocks(const Blocks<T, O>& a) {
  using V = Simd<LANES>;
  using F = typename V::F;
  using Unit = typename Product<LANES, KIND, NATIVE>::Unit;
  constexpr bool ROUGH = KIND != Kind::floats;
  constexpr int VS = PANEL_VECTORS<LANES>;
  using Hidden = std::conditional_t<KIND == Kind::pairs, BFloat16, float>;
  const Job<T, O>& job = *a.job;
  const Layer &first = job.layer[0], &last = job.layer[job.layers - 1];
  const int64_t stride = unit_stride(first.inputs, STEP<KIND>), last_stride = unit_stride(last.inputs, STEP<KIND>);
  const int64_t wide = last.padded() + 16, hidden_wide = first.padded() + 16;
  float* memory = a.memory;
  float* row = take(memory, round_up(first.inputs > last.outputs ? first.inputs : last.outputs, 16));
  float* sums = take(memory, job.block_rows * PANEL);
  float* scales = take(memory, job.block_rows);
  auto* units = reinterpret_cast<Unit*>(take(memory, job.block_rows * stride));
  float* results = take(memory, job.block_rows * wide);  // for a layer norm
  auto* hidden_units = reinterpret_cast<Unit*>(job.layers == 2 ? take(memory, job.block_rows * last_stride) : nullptr);
  float* hidden = job.layers == 2 ? take(memory, job.block_rows * hidden_wide) : nullptr;

  const int64_t tiles = a.end - a.begin, most = job.block_rows / ROWS, blocks = (tiles + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = (a.begin + tiles * block / blocks) * ROWS, end = (a.begin + tiles * (block + 1) / blocks) * ROWS;
    const int64_t rows = (end < job.rows ? end : job.rows) - at;
    for (int64_t r = rows; r < round_up(rows, ROWS); ++r) {
      __builtin_memset(units + r * stride, 0, stride * sizeof(Unit));
      if (job.layers == 2) __builtin_memset(hidden_units + r * last_stride, 0, last_stride * sizeof(Unit));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = job.x + (at + r) * first.inputs;
      for (int64_t k = 0; k < first.inputs; k += LANES)
        V::store(row + k, V::load(x + k, 1, first.inputs - k), first.inputs - k);
      if (job.before.weight != nullptr) normalise<LANES>(row, first.inputs, job.before);
      scales[r] = to_units<LANES, KIND, ROUNDS>(row, first.inputs, units + r * stride);
    }
    if (job.layers == 2) {
      Hidden* kept = job.hidden == nullptr ? nullptr : static_cast<Hidden*>(job.hidden) + at * first.outputs;
      const auto finish = [&](int64_t r, int64_t n, F (&y)[VS], int columns) FASTZS_INLINE_LAMBDA {
        if (job.slopes) {
          F x[VS];
          get_panel<LANES>(kept + r * first.outputs + n, x, columns);
          with_activation(first.activation, [&](Activation activation) FASTZS_INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int v = 0; v < VS; ++v) y[v] *= slope<LANES, ROUGH>(x[v], activation);
          });
        } else {
          if (kept != nullptr) put_panel<LANES, ROUNDS>(kept + r * first.outputs + n, y, columns);
          activate_panel<LANES, ROUGH>(y, first.activation);
        }
        if constexpr (KIND == Kind::bytes) {  // the row's largest number must be known
          put_panel<LANES, false>(hidden + r * hidden_wide + n, y, PANEL);
        } else {
          const int whole = static_cast<int>(round_up(columns, LANES));  // zeros behind, for units of several numbers
          put_panel<LANES, ROUNDS>(reinterpret_cast<Hidden*>(hidden_units + r * last_stride) + n, y, whole);
        }
      };
      apply<LANES, KIND, NATIVE>(first, units, stride, rows, scales, sums, finish);
      if constexpr (KIND == Kind::bytes) {
        for (int64_t r = 0; r < rows; ++r) {
          Unit* to = hidden_units + r * last_stride;
          scales[r] = to_units<LANES, KIND, ROUNDS>(hidden + r * hidden_wide, last.inputs, to);
        }
      }
    }
    const Unit* from = job.layers == 2 ? hidden_units : units;
    const O* residual = job.residual != nullptr && job.normed == nullptr ? job.residual + at * last.outputs : nullptr;
    const auto finish = [&](int64_t r, int64_t n, F (&y)[VS], int columns) FASTZS_INLINE_LAMBDA {
      activate_panel<LANES, ROUGH>(y, last.activation);
      if (residual != nullptr) {
        F x[VS];
        get_panel<LANES>(residual + r * last.outputs + n, x, columns);
#pragma GCC unroll 4
        for (int v = 0; v < VS; ++v) y[v] += x[v];
      }
      if (job.after.weight != nullptr) {
        put_panel<LANES, false>(results + r * wide + n, y, PANEL);
      } else {
        put_panel<LANES, ROUNDS>(job.out + (at + r) * last.outputs + n, y, columns);
      }
    };
    apply<LANES, KIND, NATIVE>(last, from, last_stride, rows, scales, sums, finish);
    if (job.after.weight == nullptr) continue;
    for (int64_t r = 0; r < rows; ++r) {
      float* result = results + r * wide;
      const int64_t to = (at + r) * last.outputs;
      if (job.normed == nullptr) {
        normalise<LANES>(result, last.outputs, job.after);
      } else {
        for (int64_t n = 0; n < last.outputs; n += LANES)
          V::store(row + n, V::load(job.normed + to + n, 1, last.outputs - n), last.outputs - n);
        normalise_backward<LANES>(result, row, last.outputs, job.after);
      }
      for (int64_t n = 0; n < last.outputs; n += LANES) {
        const int64_t left = last.outputs - n;
        auto y = V::load(result + n, 1, left);
        if (job.residual != nullptr && job.normed != nullptr) y += V::load(job.residual + to + n, 1, left);
        put<LANES, ROUNDS>(job.out + to + n, y, left);
      }
    }
  }
}

}  // namespace fastzs::linear
