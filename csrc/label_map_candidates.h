// label_map on the CPU: which classes may win in a block, by their logits at its marks.
#pragma once

#include "label_map_math.h"

namespace fastzs::label_map {

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

}  // namespace fastzs::label_map
