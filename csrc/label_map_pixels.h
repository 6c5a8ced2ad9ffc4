// label_map on the CPU: a class's scores at every pixel of a block, and the best of them.
#pragma once

#include "label_map_math.h"

namespace fastzs::label_map {

// The logits of one class along the two node rows around a grid row, at the block's grid columns.
struct Lines {
  int lo, hi;         // the rows, -1 for none yet
  float *low, *high;  // right for x.first <= i < x.last; a whole vector may be written from the last
};

FASTZS_INLINE float node_of(const View& view, int row, int col, int stride, int c) {
  const int last = view.cols - 1;
  return view.nodes[(static_cast<int64_t>(row) * view.cols + (col < last ? col : last)) * stride + c];
}

template <int LANES>
FASTZS_INLINE void fill_line(const Cover& cover, int stride, int c, int row, float* line) {
  using M = Math<LANES>;
  const View& view = *cover.view;
  const int* index = cover.x.lo;
  const float* weight = cover.x.weight;
  const int first = cover.x.first, last = cover.x.last;
  if (cover.ends == nullptr) {
    for (int i = first; i < last; ++i) {
      const float start = node_of(view, row, index[i], stride, c);
      line[i] = start + (node_of(view, row, index[i] + 1, stride, c) - start) * weight[i];
    }
    return;
  }
  // Whole vectors from node to node, each stretch overwriting what the one before wrote too much.
  const int left = index[first], stretches = index[last - 1] - left + 1;
  float start = node_of(view, row, left, stride, c);
  for (int k = 0; k < stretches; ++k) {
    const float end = node_of(view, row, left + k + 1, stride, c), step = end - start;
    for (int i = cover.ends[k]; i < cover.ends[k + 1]; i += LANES)
      M::store(line + i, start + step * M::load(weight + i));
    start = end;
  }
}

// Moves the lines to grid row y, which rises from call to call: most often they are there already.
template <int LANES>
FASTZS_INLINE void move_lines(const Cover& cover, int stride, int c, int y, Lines& lines) {
  const int lo = cover.y.lo[y], hi = lo + 1 < cover.view->rows ? lo + 1 : lo;
  if (lo == lines.lo) return;
  float* const spare = lines.low;
  lines.low = lines.high, lines.high = spare;
  if (lo != lines.hi) fill_line<LANES>(cover, stride, c, lo, lines.low);
  fill_line<LANES>(cover, stride, c, hi, lines.high);
  lines.lo = lo, lines.hi = hi;
}

FASTZS_INLINE Lines no_lines(const Scratch& s) { return {-1, -1, s.line, s.line + s.pitch_x + GROUP}; }

// Logits of a grid row, weight between its lines, from column k on.
template <int LANES>
FASTZS_INLINE auto logits_at(const Lines& lines, float weight, int k) {
  const auto low = Math<LANES>::load(lines.low + k);
  return low + weight * (Math<LANES>::load(lines.high + k) - low);
}

// Softmax: the largest logit and the inverse sum of exponentials at each pixel of each window.
template <int LANES>
FASTZS_INLINE void normalisers(
    const Job& job, Scratch& s, int count, int left, int stride, int pitch, const int* chosen) {
  using M = Math<LANES>;
  const int classes = static_cast<int>(job.classes);
  for (int v = 0; v < count; ++v) {
    Cover& cover = s.covers[v];
    cover.largest = s.largest + static_cast<int64_t>(v) * s.ny * s.pitch_x;
    cover.inverse = s.inverse + static_cast<int64_t>(v) * s.ny * s.pitch_x;
    float sure = -INFINITY;  // some class is at least so high everywhere
    for (int n = 0; n < left; ++n) {
      float low = INFINITY;
      for (int m = 0; m < cover.marks; ++m) {
        const float x = cover.at_marks[static_cast<int64_t>(m) * pitch + chosen[n]];
        low = x == x ? (x < low ? x : low) : -INFINITY;
      }
      sure = low > sure ? low : sure;
    }
    const int begin = cover.y.first * s.pitch_x, end = cover.y.last * s.pitch_x;
    float *largest = cover.largest, *sum = cover.inverse;
    for (int i = begin; i < end; ++i) largest[i] = -INFINITY, sum[i] = 0;
    for (int n = 0; n < left; ++n) {
      Lines lines = no_lines(s);
      for (int y = cover.y.first; y < cover.y.last; ++y) {
        move_lines<LANES>(cover, stride, chosen[n], y, lines);
        const float weight = cover.y.weight[y];
        float* most = largest + y * s.pitch_x;
        for (int k = 0; k < s.pitch_x; k += LANES) {
          const auto x = logits_at<LANES>(lines, weight, k), before = M::load(most + k);
          M::store(most + k, x > before ? x : before);
        }
      }
    }
    for (int c = 0; c < classes; ++c) {
      bool counts = false;  // a class 30 below adds less than 1e-13 of the sum
      for (int m = 0; m < cover.marks; ++m) {
        const float x = cover.at_marks[static_cast<int64_t>(m) * pitch + c];
        counts = counts || !(x < sure - 30.0f);
      }
      if (!counts) continue;
      Lines lines = no_lines(s);
      for (int y = cover.y.first; y < cover.y.last; ++y) {
        move_lines<LANES>(cover, stride, c, y, lines);
        const float weight = cover.y.weight[y];
        for (int k = 0, i = y * s.pitch_x; k < s.pitch_x; k += LANES, i += LANES) {
          const auto x = logits_at<LANES>(lines, weight, k);
          M::store(sum + i, M::load(sum + i) + M::exponential(x - M::load(largest + i)));
        }
      }
    }
    for (int i = begin; i < end; ++i) sum[i] = 1.0f / sum[i];
  }
}

// Adds a window's scores of class c to out, [ny, pitch_x], where the window covers the block's grid.
template <int LANES, int ACTIVATION>
FASTZS_INLINE void add_scores(const Scratch& s, const Cover& cover, int stride, int c, float* out) {
  using M = Math<LANES>;
  const bool whole_rows = cover.x.first == 0 && cover.x.last == s.nx;
  Lines lines = no_lines(s);
  for (int y = cover.y.first; y < cover.y.last; ++y) {
    move_lines<LANES>(cover, stride, c, y, lines);
    const float weight = cover.y.weight[y];
    for (int k = 0, i = y * s.pitch_x; k < s.pitch_x; k += LANES, i += LANES) {
      auto x = logits_at<LANES>(lines, weight, k);
      if constexpr (ACTIVATION == SIGMOID) x = M::sigmoid(x);
      if constexpr (ACTIVATION == SOFTMAX)
        x = M::exponential(x - M::load(cover.largest + i)) * M::load(cover.inverse + i);
      if (!whole_rows) x = M::load_int(cover.inside + k) != 0 ? x : M::splat(0.0f);
      M::store(out + i, M::load(out + i) + x);
    }
  }
}

// The mean scores of class c over the block's grid, [ny, pitch_x].
template <int LANES>
FASTZS_INLINE void scores_of(const Job& job, const Scratch& s, int count, int stride, int c, float* out) {
  using M = Math<LANES>;
  const int size = s.ny * s.pitch_x;
  for (int i = 0; i < size; i += LANES) M::store(out + i, M::splat(0.0f));
  for (int v = 0; v < count; ++v) {
    switch (job.activation) {
      case SIGMOID: add_scores<LANES, SIGMOID>(s, s.covers[v], stride, c, out); break;
      case SOFTMAX: add_scores<LANES, SOFTMAX>(s, s.covers[v], stride, c, out); break;
      default: add_scores<LANES, NONE>(s, s.covers[v], stride, c, out);
    }
  }
  if (count == 1 && job.penalty == nullptr) return;
  const float penalty = job.penalty == nullptr ? 0.0f : job.penalty[c];
  for (int i = 0; i < size; i += LANES) M::store(out + i, M::load(out + i) * M::load(s.share + i) - penalty);
}

// Puts the scores of class c, n pixels, where they are among the best so far, rank after rank step apart.
template <int LANES>
FASTZS_INLINE void take_best(const float* score, int n, int c, int64_t k, int64_t step, float* best, int* label) {
  using M = Math<LANES>;
  for (int i = 0; i < n; i += LANES) {
    auto x = M::load(score + i);
    if (k == 1) {
      const auto most = M::load(best + i);
      const auto better = x > most;
      M::store(best + i, better ? x : most);
      M::store_int(label + i, better ? M::splat_int(c) : M::load_int(label + i));
      continue;
    }
    x = x == x ? x : M::splat(-INFINITY);
    auto id = M::splat_int(c), better = M::splat_int(0);
    for (int64_t j = 0; j < k; ++j) {
      const auto most = M::load(best + j * step + i);
      const auto of = M::load_int(label + j * step + i);
      // below 0: still empty; what was moved down is a lower class than its equals there, so it moves those too
      better = better | (x > most) | (of < 0);
      M::store(best + j * step + i, better ? x : most);
      M::store_int(label + j * step + i, better ? id : of);
      x = better ? most : x, id = better ? of : id;
    }
  }
}

}  // namespace fastzs::label_map
