// label_map on the CPU.
//
// Two things keep the work small.
// - Classes are compared over whole blocks. Between low-resolution nodes the difference of two classes' logits is
//   bilinear, so over a block it takes its extremes at the block's corners and where node lines cross it: its marks.
//   A class that is below one other class at all marks of all windows over the block, and is calibrated no less, is
//   below it at every pixel: it cannot win and is left out. Scores of unlike calibrations are compared by their
//   bounds. Both tests keep a margin above rounding, so leaving out is exact. Where many classes are left the block
//   is halved and they are compared again.
// - What is left, often two or three of hundreds, is evaluated pixel by pixel: logits, activation, mean over the
//   windows, second bilinear step, best.
// Tiles of the output share nothing but the inputs. A tile first turns the nodes under it so that classes are
// innermost; then a vector holds as many classes as it has lanes when classes are compared, and as many pixels when
// pixels are evaluated.
#include "label_map.h"

#include <optional>

#include "cpu.h"
#include "simd.h"
#include "threads.h"

namespace fastzs::label_map {
namespace {

// ---- arithmetic -----------------------------------------------------------------------------------------------------

template <int LANES>
struct Math : Simd<LANES> {
  using F = typename Simd<LANES>::F;
  using I = typename Simd<LANES>::I;
  using U = typename Vectors<LANES>::U;

  static FASTZS_INLINE I load_int(const int* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static FASTZS_INLINE void store_int(int* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
  static FASTZS_INLINE I splat_int(int x) { return x - I{}; }

  // e^x, relative error 2e-7, between e^-87 and e^87. NaN stays NaN.
  static FASTZS_INLINE F exponential(F x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    F t = x * 1.44269504f;
    t = t < -126.0f ? Simd<LANES>::splat(-126.0f) : t;
    t = t > 126.0f ? Simd<LANES>::splat(126.0f) : t;
    const F shifted = t + to_integer;
    const F f = t - (shifted - to_integer);
    F p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (F)(((U)shifted + 127u) << 23);  // unsigned: NaN may overflow
  }

  // 1 / x for 1 <= x < 2^127: a guess from the exponent and three steps of Newton, quicker than dividing.
  static FASTZS_INLINE F inverse(F x) {
    F y = (F)(0x7ef311c7 - (I)x);
    y = y * (2.0f - x * y);
    y = y * (2.0f - x * y);
    return y + y * (1.0f - x * y);
  }

  // from[index], where index ascends by at most 2 LANES - 1. Two vectors from index[0] on are read.
  static FASTZS_INLINE F pick(const float* from, const int* index) {
#if defined(__GNUC__) && !defined(__clang__)
    if constexpr (LANES > 4) {  // one permute with AVX-512, three instructions with AVX2
      const float* at = from + index[0];
      return __builtin_shuffle(Simd<LANES>::load(at), Simd<LANES>::load(at + LANES), load_int(index) - index[0]);
    }
#endif
    F v;
    for (int l = 0; l < LANES; ++l) v[l] = from[index[l]];
    return v;
  }

  static FASTZS_INLINE F sigmoid(F x) { return inverse(1.0f + exponential(-x)); }
};

// ---- marks ----------------------------------------------------------------------------------------------------------

// Positions along an axis between which everything is linear: first, last and node lines between, or all if fewer.
FASTZS_INLINE int axis_marks(const Axis& axis, int* lo, float* weight) {
  const int a = axis.first, b = axis.last - 1;
  const int lines = axis.lo[b] - axis.lo[a];
  int n = 0;
  if (lines + 2 >= b - a + 1) {
    for (int i = a; i <= b; ++i, ++n) lo[n] = axis.lo[i], weight[n] = axis.weight[i];
    return n;
  }
  lo[n] = axis.lo[a], weight[n++] = axis.weight[a];
  for (int i = 1; i <= lines; ++i) lo[n] = axis.lo[a] + i, weight[n++] = 0.0f;
  lo[n] = axis.lo[b], weight[n++] = axis.weight[b];
  return n;
}

// The classes in question (ids, or all) at the marks of a window, [marks, pitch]; adds the sum over them to s.total.
template <int LANES>
FASTZS_INLINE void fill_marks(Scratch& s, Cover& cover, int stride, const int* ids, int n, int pitch) {
  using M = Math<LANES>;
  const View& view = *cover.view;
  const int rows = axis_marks(cover.y, s.mark_lo, s.mark_weight);
  const int* lo_x = s.mark_lo + rows;
  const float* weight_x = s.mark_weight + rows;
  const int cols = axis_marks(cover.x, s.mark_lo + rows, s.mark_weight + rows);
  cover.marks = rows * cols;
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < cols; ++k) {
      const int y0 = s.mark_lo[r], y1 = y0 + 1 < view.rows ? y0 + 1 : y0;
      const int x0 = lo_x[k], x1 = x0 + 1 < view.cols ? x0 + 1 : x0;
      const float wy = s.mark_weight[r], wx = weight_x[k];
      const float w00 = (1 - wy) * (1 - wx), w01 = (1 - wy) * wx, w10 = wy * (1 - wx), w11 = wy * wx;
      const float* n00 = view.nodes + (static_cast<int64_t>(y0) * view.cols + x0) * stride;
      const float* n01 = view.nodes + (static_cast<int64_t>(y0) * view.cols + x1) * stride;
      const float* n10 = view.nodes + (static_cast<int64_t>(y1) * view.cols + x0) * stride;
      const float* n11 = view.nodes + (static_cast<int64_t>(y1) * view.cols + x1) * stride;
      float* out = cover.at_marks + static_cast<int64_t>(r * cols + k) * pitch;
      if (ids == nullptr) {
        for (int j = 0; j < pitch; j += LANES) {
          const auto value = w00 * M::load(n00 + j) + w01 * M::load(n01 + j) + w10 * M::load(n10 + j) +
              w11 * M::load(n11 + j);
          M::store(out + j, value);
          M::store(s.total + j, M::load(s.total + j) + value);
        }
      } else {
        for (int j = 0; j < n; ++j) {
          const int c = ids[j];
          out[j] = w00 * n00[c] + w01 * n01[c] + w10 * n10[c] + w11 * n11[c];
          s.total[j] += out[j];
        }
      }
    }
}

// ---- leaving classes out --------------------------------------------------------------------------------------------

// The position of the largest of s.total[0..n) that is a number and not yet taken; -1 if none is.
template <int LANES>
FASTZS_INLINE int largest_total(const Scratch& s, int n) {
  using M = Math<LANES>;
  auto best = M::splat(-INFINITY);
  auto at = M::splat_int(-1), here = M::splat_int(0);
  for (int l = 0; l < LANES; ++l) here[l] = l;
  for (int j = 0; j < n; j += LANES, here += LANES) {  // places above n are taken
    const auto value = M::load(s.total + j);
    const auto better = (value > best) & (M::load_int(s.taken + j) == 0);
    at = better ? here : at;
    best = better ? value : best;
  }
  int found = -1;
  float most = -INFINITY;
  for (int l = 0; l < LANES; ++l)
    if (at[l] >= 0 && (best[l] > most || (best[l] == most && at[l] < found))) most = best[l], found = at[l];
  return found;
}

// Counts in s.beaten, for each class in question, whether the rival is above it at every mark by more than the margin.
template <int LANES>
FASTZS_INLINE void compare(const Job& job, Scratch& s, int count, int pitch, int rival, float margin) {
  using M = Math<LANES>;
  const float of_rival = job.penalty == nullptr ? 0.0f : s.penalty[rival];
  for (int j = 0; j < pitch; j += LANES) {
    auto lead = M::splat(-INFINITY);
    for (int v = 0; v < count; ++v) {
      const float* at = s.covers[v].at_marks;
      for (int m = 0; m < s.covers[v].marks; ++m, at += pitch) {
        const auto d = M::load(at + j) - at[rival];  // NaN by the class's own nodes: it loses there, no lead
        lead = d > lead ? d : lead;
      }
    }
    auto beaten = lead < -margin;
    if (job.penalty != nullptr) beaten = beaten & (of_rival <= M::load(s.penalty + j));
    M::store_int(s.beaten + j, M::load_int(s.beaten + j) - beaten);
  }
}

// Leaves out by the bounds of the scores over the block: of the mean if all windows cover all of it, else of any one.
template <int LANES>
FASTZS_INLINE void compare_bounds(const Job& job, Scratch& s, int count, bool all_full, int pitch, float margin) {
  using M = Math<LANES>;
  const float share = all_full ? 1.0f / static_cast<float>(count) : 1.0f;
  float floor = -INFINITY;
  for (int j = 0; j < pitch; j += LANES) {
    auto high = M::splat(all_full ? 0.0f : -INFINITY), low = M::splat(all_full ? 0.0f : INFINITY);
    for (int v = 0; v < count; ++v) {
      auto top = M::splat(-INFINITY), bottom = M::splat(INFINITY);
      const float* at = s.covers[v].at_marks;
      for (int m = 0; m < s.covers[v].marks; ++m, at += pitch) {
        const auto x = M::load(at + j);
        top = x > top ? x : top;
        bottom = x >= bottom ? bottom : x;  // NaN makes it NaN, or the next lower number, ...
        bottom = x == x ? bottom : M::splat(-INFINITY);  // ... so it is made the lowest here
      }
      if (job.activation == SIGMOID) {
        const auto nowhere = bottom == -INFINITY;
        top = M::sigmoid(top), bottom = nowhere ? bottom : M::sigmoid(bottom);
      }
      if (all_full) {
        high += top * share, low += bottom * share;
      } else {
        high = top > high ? top : high, low = bottom < low ? bottom : low;
      }
    }
    if (job.penalty != nullptr) high -= M::load(s.penalty + j), low -= M::load(s.penalty + j);
    M::store(s.high + j, high);
    low = M::load_int(s.taken + j) < 2 ? low : M::splat(-INFINITY);  // not a class
    for (int l = 0; l < LANES; ++l) floor = low[l] > floor ? low[l] : floor;
  }
  const float slack = job.activation == SIGMOID ? 4e-6f : 4 * margin;
  for (int j = 0; j < pitch; j += LANES) {
    const auto beaten = M::load(s.high + j) + slack < floor;
    M::store_int(s.beaten + j, M::load_int(s.beaten + j) - beaten);
  }
}

// Of the n classes in question (ids, or 0..n) those that may be among the best top_k somewhere in the block,
// ascending, by their positions in the question; returns how many.
template <int LANES>
FASTZS_INLINE int candidates(
    const Job& job, Scratch& s, int count, bool all_full, const int* ids, int n, int pitch, float margin, int* chosen) {
  const int k = static_cast<int>(job.top_k);
  for (int j = 0; j < pitch; ++j) s.beaten[j] = 0, s.taken[j] = j < n ? 0 : 2;
  if (job.penalty != nullptr)
    for (int j = 0; j < n; ++j) s.penalty[j] = job.penalty[ids == nullptr ? j : ids[j]];
  if (k <= MAX_PRUNED_K) {
    for (int i = 0; i < k + 1; ++i) {
      const int rival = largest_total<LANES>(s, n);
      if (rival < 0) break;
      s.taken[rival] = 1;
      compare<LANES>(job, s, count, pitch, rival, margin);
    }
    if (job.penalty != nullptr) {
      // Classes calibrated least are beaten only by their like: the largest of them is a rival too.
      float least = INFINITY;
      for (int j = 0; j < n; ++j) least = s.penalty[j] < least ? s.penalty[j] : least;
      for (int j = 0; j < n; ++j) s.taken[j] |= s.penalty[j] > least;
      const int rival = largest_total<LANES>(s, n);
      if (rival >= 0) compare<LANES>(job, s, count, pitch, rival, margin);
    }
    if (k == 1 && job.activation != SOFTMAX && (job.penalty != nullptr || count > 1))
      compare_bounds<LANES>(job, s, count, all_full, pitch, margin);
  }
  int left = 0;
  for (int j = 0; j < n; ++j)
    if (s.beaten[j] < k) chosen[left++] = j;
  return left;
}

// ---- pixels ---------------------------------------------------------------------------------------------------------

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

// ---- blocks and tiles -----------------------------------------------------------------------------------------------

// The grid rows that n output rows read, ascending, and where in the list each output row's two are.
FASTZS_INLINE int list_axis(
    const Taps& taps, int from, int n, bool resized, int end, int* list, int* low, int* high, float* part) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    const int at = taps.low[from + i];
    part[i] = taps.part[from + i];
    if (count == 0 || at > list[count - 1]) list[count++] = at;
    low[i] = list[count - 1] == at ? count - 1 : count - 2;
    const int next = resized && at < end ? at + 1 : at;
    if (next > list[count - 1]) list[count++] = next;
    high[i] = next == at ? low[i] : low[i] + 1;
  }
  return count;
}

FASTZS_INLINE void axis_part(Axis& part, const Axis& axis, const int* list, int n) {
  int a = 0, b = n;
  while (a < n && list[a] < axis.first) ++a;
  while (b > a && list[b - 1] >= axis.last) --b;
  part.first = a, part.last = b;
  for (int i = a; i < b; ++i) part.lo[i] = axis.lo[list[i]], part.weight[i] = axis.weight[list[i]];
}

// The windows over a block and where its grid rows and columns lie in them. Returns how many; all_full if each covers
// the whole block. The block counts from the tile's first row and column.
FASTZS_INLINE int find_covers(const Job& job, Scratch& s, const Block& block, bool* all_full) {
  const int r0 = static_cast<int>(block.r0), rows = static_cast<int>(block.r1 - block.r0);
  const int c0 = static_cast<int>(block.c0), cols = static_cast<int>(block.c1 - block.c0);
  s.ny = list_axis(s.taps_y, r0, rows, job.resized(), s.end_y, s.list_y, s.low_y, s.high_y, s.part_y);
  s.nx = list_axis(s.taps_x, c0, cols, job.resized(), s.end_x, s.list_x, s.low_x, s.high_x, s.part_x);
  s.pitch_x = static_cast<int>(whole_groups(s.nx));
  int count = 0;
  *all_full = true;
  for (int v = 0; v < s.view_count; ++v) {
    Cover& cover = s.covers[count];
    cover.view = &s.views[v];
    const int64_t used = static_cast<int64_t>(count) * (s.ny + s.pitch_x + GROUP);
    cover.y.lo = s.axis_lo + used, cover.y.weight = s.axis_weight + used;
    cover.x.lo = cover.y.lo + s.ny, cover.x.weight = cover.y.weight + s.ny;
    axis_part(cover.y, cover.view->y, s.list_y, s.ny);
    axis_part(cover.x, cover.view->x, s.list_x, s.nx);
    if (cover.y.first >= cover.y.last || cover.x.first >= cover.x.last) continue;
    const int left = cover.x.lo[cover.x.first], stretches = cover.x.lo[cover.x.last - 1] - left + 1;
    cover.ends = nullptr;
    if (cover.x.last - cover.x.first >= 4 * stretches) {
      cover.ends = s.ends + used;
      for (int i = cover.x.first, node = -1; i < cover.x.last; ++i)
        while (node < cover.x.lo[i] - left) cover.ends[++node] = i;
      cover.ends[stretches] = cover.x.last;
    }
    cover.inside = s.inside + static_cast<int64_t>(count) * s.pitch_x;
    for (int i = 0; i < s.pitch_x; ++i) cover.inside[i] = cover.x.first <= i && i < cover.x.last ? -1 : 0;
    *all_full = *all_full && cover.y.last - cover.y.first == s.ny && cover.x.last - cover.x.first == s.nx;
    ++count;
  }
  return count;
}

// Evaluates the n classes ids, ascending, at every pixel of the block and writes its labels.
template <int LANES>
FASTZS_INLINE void label_pixels(
    const Job& job, Scratch& s, const Block& tile, const Block& block, int count, int stride, const int* ids, int n) {
  using M = Math<LANES>;
  const int rows = static_cast<int>(block.r1 - block.r0), cols = static_cast<int>(block.c1 - block.c0);
  const int width = static_cast<int>(whole_groups(cols));
  const int64_t step = static_cast<int64_t>(rows) * width;
  const bool resized = job.resized();
  // One over how many windows cover each pixel.
  for (int i = 0; i < s.ny * s.pitch_x; i += LANES) M::store(s.share + i, M::splat(0.0f));
  for (int v = 0; v < count; ++v)
    for (int y = s.covers[v].y.first, i = y * s.pitch_x; y < s.covers[v].y.last; ++y)
      for (int k = 0; k < s.pitch_x; k += LANES, i += LANES) {
        const auto inside = M::load_int(s.covers[v].inside + k);
        M::store(s.share + i, M::load(s.share + i) + (inside != 0 ? M::splat(1.0f) : M::splat(0.0f)));
      }
  for (int i = 0; i < s.ny * s.pitch_x; i += LANES) M::store(s.share + i, 1.0f / M::load(s.share + i));
  for (int i = cols; i < width; ++i) s.low_x[i] = s.low_x[cols - 1], s.high_x[i] = s.high_x[cols - 1];
  for (int64_t i = 0; i < job.top_k * step; ++i) s.best[i] = -INFINITY, s.label[i] = job.top_k == 1 ? 0 : -1;
  float *scores = s.rows, *best = s.best;
  int* label = s.label;
  const int64_t k = job.top_k;
  for (int j = 0; j < n; ++j) {
    const int c = ids[j];
    scores_of<LANES>(job, s, count, stride, c, scores);
    if (!resized) {
      take_best<LANES>(scores, static_cast<int>(step), c, k, step, best, label);
      continue;
    }
    float *mixed = s.line, *z = s.z;
    for (int r = 0; r < rows; ++r) {
      const float w1 = s.part_y[r], w0 = 1.0f - w1;
      const float* a = scores + s.low_y[r] * s.pitch_x;
      const float* b = scores + s.high_y[r] * s.pitch_x;
      for (int i = 0; i < s.pitch_x; i += LANES) M::store(mixed + i, w0 * M::load(a + i) + w1 * M::load(b + i));
      for (int i = 0; i < width; i += LANES) {
        // An output column reads two of the listed grid columns, so those of a vector are within two vectors.
        const auto low = M::pick(mixed, s.low_x + i), high = M::pick(mixed, s.high_x + i);
        M::store(z + r * width + i, low + M::load(s.part_x + i) * (high - low));
      }
    }
    take_best<LANES>(z, static_cast<int>(step), c, k, step, best, label);
  }
  for (int64_t j = 0; j < job.top_k; ++j)
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (j * job.out_h + tile.r0 + block.r0 + r) * job.out_w + tile.c0 + block.c0;
      for (int i = 0; i < cols; ++i) {
        const float score = s.best[j * step + r * width + i];
        const int label = score < job.threshold ? static_cast<int>(job.classes) : s.label[j * step + r * width + i];
        if (job.wide) {
          static_cast<int16_t*>(job.labels)[at + i] = static_cast<int16_t>(label);
        } else {
          static_cast<uint8_t*>(job.labels)[at + i] = static_cast<uint8_t>(label);
        }
        if (job.scores != nullptr) job.scores[at + i] = score;
      }
    }
}

// Cuts a block in two, or returns false if it is too small.
FASTZS_INLINE bool halve(const Block& block, Block* first, Block* second) {
  const int64_t high = block.r1 - block.r0, wide = block.c1 - block.c0;
  *first = *second = block;
  if (wide > LEAST_W && (wide > 2 * high || high <= LEAST_H)) {
    first->c1 = second->c0 = block.c0 + (wide + 1) / 2;
  } else if (high > LEAST_H) {
    first->r1 = second->r0 = block.r0 + (high + 1) / 2;
  } else {
    return false;
  }
  return true;
}

// A block of the output: compares all classes, then, if many are left, those in its halves, and so on.
template <int LANES>
FASTZS_INLINE void label_block(
    const Job& job, Scratch& s, const Block& tile, const Block& whole, int stride, float margin) {
  // Blocks to do; those cut from one have the same depth, and the classes in question for them are chosen[depth - 1].
  Block todo[MAX_DEPTH + 1] = {whole};
  int depths[MAX_DEPTH + 1] = {0}, left[MAX_DEPTH + 1];
  for (int top = 1; top > 0;) {
    const Block block = todo[--top];
    const int depth = depths[top];
    int* chosen = s.chosen + static_cast<int64_t>(depth) * stride;
    const int* ids = depth == 0 ? nullptr : chosen - stride;
    const int n = depth == 0 ? static_cast<int>(job.classes) : left[depth - 1];
    const int pitch = static_cast<int>(whole_groups(n));
    bool all_full;
    const int count = find_covers(job, s, block, &all_full);
    for (int j = 0; j < pitch; ++j) s.total[j] = 0.0f;
    float* at_marks = s.at_marks;
    for (int v = 0; v < count; ++v) {
      s.covers[v].at_marks = at_marks;
      fill_marks<LANES>(s, s.covers[v], stride, ids, n, pitch);
      at_marks += static_cast<int64_t>(s.covers[v].marks) * pitch;
    }
    left[depth] = candidates<LANES>(job, s, count, all_full, ids, n, pitch, margin, chosen);
    if (job.activation == SOFTMAX) normalisers<LANES>(job, s, count, left[depth], stride, pitch, chosen);
    if (ids != nullptr)
      for (int j = 0; j < left[depth]; ++j) chosen[j] = ids[chosen[j]];
    Block first, second;
    if (job.activation != SOFTMAX && left[depth] > MAX_LEFT && depth + 1 < MAX_DEPTH && halve(block, &first, &second)) {
      todo[top] = second, depths[top++] = depth + 1;
      todo[top] = first, depths[top++] = depth + 1;
    } else {
      label_pixels<LANES>(job, s, tile, block, count, stride, chosen, left[depth]);
    }
  }
}

// Copies nodes into the view, classes innermost; what is not finite becomes NaN. Returns the largest magnitude,
// infinity if there is NaN: with it as margin no class is left out.
template <int LANES, typename T>
FASTZS_INLINE float view_fill(const Job& job, const T* logits, const View& view, int stride, float* turn) {
  using M = Math<LANES>;
  auto largest = M::splat(0.0f);
  const int64_t plane = job.h * job.w;
  const T* maps = logits + view.window * job.classes * plane;
  for (int c0 = 0; c0 < stride; c0 += LANES) {
    const int have = job.classes - c0 < LANES ? static_cast<int>(job.classes - c0) : LANES;
    for (int r = 0; r < view.rows; ++r) {
      // Planes are often a power of two apart, so rows are read one after the other and turned in a small buffer.
      const T* from = maps + c0 * plane + (view.row0 + r) * job.w + view.col0;
      for (int l = 0; l < have; ++l)
        for (int i = 0; i < view.cols; ++i) turn[i * LANES + l] = static_cast<float>(from[l * plane + i]);
      for (int l = have; l < LANES; ++l)
        for (int i = 0; i < view.cols; ++i) turn[i * LANES + l] = 0.0f;
      float* to = view.nodes + static_cast<int64_t>(r) * view.cols * stride + c0;
      for (int i = 0; i < view.cols; ++i, to += stride) {
        auto x = M::load(turn + i * LANES);
        x += x - x;
        M::store(to, x);
        const auto size = x < 0.0f ? -x : x;
        largest = size <= largest ? largest : (x == x ? size : M::splat(INFINITY));
      }
    }
  }
  float most = 0;
  for (int l = 0; l < LANES; ++l) most = largest[l] > most ? largest[l] : most;
  return most;
}

template <typename T>
struct Fill {
  const Job* job;
  Scratch* scratch;
  const T* logits;  // [window_count, classes, h, w], contiguous
};

template <int LANES, typename T>
FASTZS_INLINE void fill_views(const Fill<T>& fill) {
  Scratch& s = *fill.scratch;
  s.magnitude = 0;
  for (int v = 0; v < s.view_count; ++v) {
    const int stride = static_cast<int>(whole_groups(fill.job->classes));
    const float most = view_fill<LANES>(*fill.job, fill.logits, s.views[v], stride, s.turn);
    s.magnitude = most > s.magnitude ? most : s.magnitude;
  }
}

struct Tile {
  const Job* job;
  Scratch* scratch;
  Block block;
};

template <int LANES>
FASTZS_INLINE void tile_blocks(const Tile& tile) {
  const Job& job = *tile.job;
  const int stride = static_cast<int>(whole_groups(job.classes));
  const float margin = 2e-6f * tile.scratch->magnitude;
  const int64_t rows = tile.block.r1 - tile.block.r0, cols = tile.block.c1 - tile.block.c0;
  for (int64_t r = 0; r < rows; r += job.block_h)
    for (int64_t c = 0; c < cols; c += job.block_w) {
      const int64_t r1 = r + job.block_h, c1 = c + job.block_w;
      const Block block{r, r1 < rows ? r1 : rows, c, c1 < cols ? c1 : cols};
      label_block<LANES>(job, *tile.scratch, tile.block, block, stride, margin);
    }
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
FASTZS_MULTIVERSION(run_fill, fill_views, Fill<float>)
FASTZS_MULTIVERSION(run_fill, fill_views, Fill<BFloat16>)
FASTZS_MULTIVERSION(run_fill, fill_views, Fill<Half>)
FASTZS_MULTIVERSION(run_tile, tile_blocks, Tile)

// Tiles share the nodes under them between blocks; they shrink until those fit the cache.
void choose_tiles(Job& job) {
  job.tile_h = std::min<int64_t>(32, job.out_h);
  job.tile_w = std::min<int64_t>(128, job.out_w);
  const int64_t* place = job.windows;
  const double nodes_y = static_cast<double>(job.image_h * job.h) / static_cast<double>(job.out_h * place[2]);
  const double nodes_x = static_cast<double>(job.image_w * job.w) / static_cast<double>(job.out_w * place[3]);
  while (job.tile_h * job.tile_w > 1) {
    const double nodes = (job.tile_h * nodes_y + 2) * (job.tile_w * nodes_x + 2);
    if (nodes * job.classes <= CACHE_FLOATS) break;
    if (job.tile_h > 1 && job.tile_w <= 4 * job.tile_h) {
      job.tile_h /= 2;
    } else {
      job.tile_w /= 2;
    }
  }
  job.block_h = std::min<int64_t>(8, job.tile_h);
  job.block_w = std::min<int64_t>(32, job.tile_w);
}

Block tile_at(const Job& job, int64_t index) {
  const int64_t across = (job.out_w + job.tile_w - 1) / job.tile_w;
  const int64_t r0 = index / across * job.tile_h, c0 = index % across * job.tile_w;
  return {r0, std::min(r0 + job.tile_h, job.out_h), c0, std::min(c0 + job.tile_w, job.out_w)};
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void label_map_cpu(
    const Tensor& logits, const Tensor& windows, int64_t image_h, int64_t image_w, int64_t activation,
    const std::optional<Tensor>& penalty, double threshold, Tensor labels,
    std::optional<Tensor> scores) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.is_contiguous(), "label_map: logits must be contiguous [W, C, h, w]");
  STD_TORCH_CHECK(windows.is_contiguous() && windows.numel() == 4 * logits.size(0), "label_map: windows is not [W, 4]");
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous(), "label_map: labels must be contiguous [k, H', W']");
  Job job;
  job.window_count = logits.size(0), job.classes = logits.size(1), job.h = logits.size(2), job.w = logits.size(3);
  job.windows = windows.const_data_ptr<int64_t>();
  job.image_h = image_h, job.image_w = image_w;
  job.top_k = labels.size(0), job.out_h = labels.size(1), job.out_w = labels.size(2);
  job.activation = static_cast<int>(activation);
  job.penalty = penalty.has_value() ? penalty->const_data_ptr<float>() : nullptr;
  job.threshold = static_cast<float>(threshold);
  job.labels = labels.mutable_data_ptr();
  job.wide = labels.scalar_type() == ScalarType::Short;
  job.scores = scores.has_value() ? scores->mutable_data_ptr<float>() : nullptr;
  choose_tiles(job);
  const Isa isa = cpu_isa();
  const int64_t tiles = ((job.out_h + job.tile_h - 1) / job.tile_h) * ((job.out_w + job.tile_w - 1) / job.tile_w);
  dispatch_floating(logits, "label_map", [&](const auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* values = static_cast<const T*>(logits.const_data_ptr());
    // One part of an image is busier than another, so tiles take unlike times.
    share_out(tiles, [&](Queue& queue) {
      Scratch scratch;
      for (int64_t i; queue.next(i);) {
        const Block tile = tile_at(job, i);
        scratch.prepare(job, tile);
        run_fill(isa, Fill<T>{&job, &scratch, values});
        run_tile(isa, Tile{&job, &scratch, tile});
      }
    });
  });
}

}  // namespace
}  // namespace fastzs::label_map

STABLE_TORCH_LIBRARY_FRAGMENT(fastzs, m) {
  m.def(
      "label_map_cpu(Tensor logits, Tensor windows, int image_h, int image_w, int activation, "
      "Tensor? penalty, float threshold, Tensor(a!) labels, Tensor(b!)? scores) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastzs, CPU, m) {
  m.impl("label_map_cpu", TORCH_BOX(&fastzs::label_map::label_map_cpu));
}
