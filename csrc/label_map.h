// label_map on the CPU: the job, the geometry of windows, grid and output, and a thread's memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace fastzs::label_map {

constexpr int SIGMOID = 0, SOFTMAX = 1, NONE = 2;
constexpr int MAX_PRUNED_K = 8;  // for larger top_k all classes are evaluated
constexpr int GROUP = 16;         // arrays over classes and pixels are padded to whole groups, for vectors of any width
constexpr int MAX_LEFT = 24;      // a block with more classes left is halved, ...
constexpr int MAX_DEPTH = 6;      // ... so often less one at most, ...
constexpr int LEAST_H = 4, LEAST_W = 8;  // ... and not below this
// Of a tile's nodes. A smaller tile would read the nodes at its border again, which costs more than the third level.
constexpr int64_t CACHE_FLOATS = 1 << 20;

struct Job {
  int64_t window_count, classes, h, w;
  const int64_t* windows;  // [window_count, 4]: top, left, height, width
  int64_t image_h, image_w, out_h, out_w;  // image: where windows are averaged
  int activation;
  const float* penalty;  // [classes] or null
  float threshold;       // -infinity for none; what is below it gets the label `classes`
  int64_t top_k;
  void* labels;  // [top_k, out_h, out_w], int16 if wide, else uint8
  bool wide;
  float* scores;  // [top_k, out_h, out_w] or null
  int64_t tile_h, tile_w, block_h, block_w;

  bool resized() const { return image_h != out_h || image_w != out_w; }
};

inline int64_t whole_groups(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP; }

// A rectangle of the output: rows [r0, r1), columns [c0, c1).
struct Block {
  int64_t r0, r1, c0, c1;
};

// ---- geometry ---------------------------------------------------------------------------------------------------

// Where the centre of row i lies in a window of n nodes over rows [start, start + length): between nodes lo and lo + 1,
// at weight. In doubles, for a map may be thousands wide.
inline int axis_position(int64_t i, int64_t start, int64_t length, int64_t n, float* weight) {
  const double centre = static_cast<double>(i - start) + 0.5;
  double position = centre * static_cast<double>(n) / static_cast<double>(length) - 0.5;
  position = position < 0 ? 0 : position;
  position = position > n - 1 ? n - 1 : position;
  const int lo = static_cast<int>(position);
  *weight = static_cast<float>(position - lo);
  return lo;
}

// The second bilinear step along an axis: output row i lies between image rows low and low + 1, at part.
inline int64_t tap_of(int64_t image, int64_t out, int64_t i, float* part) {
  if (image == out) {
    *part = 0;
    return i;
  }
  double position = (static_cast<double>(i) + 0.5) * static_cast<double>(image) / static_cast<double>(out) - 0.5;
  position = position < 0 ? 0 : position;
  position = position > image - 1 ? image - 1 : position;
  const int64_t low = static_cast<int64_t>(position);
  *part = static_cast<float>(position - static_cast<double>(low));
  return low;
}

// The nodes of a window that image rows [first, last] interpolate; false if the window holds none of these rows.
inline bool node_range(
    int64_t first, int64_t last, int64_t start, int64_t length, int64_t n, int* base, int* count) {
  if (first < start) first = start;
  if (last > start + length - 1) last = start + length - 1;
  if (first > last) return false;
  float weight;
  *base = axis_position(first, start, length, n, &weight);
  const int end = axis_position(last, start, length, n, &weight) + 1;
  *count = (end < n - 1 ? end : static_cast<int>(n) - 1) - *base + 1;
  return true;
}

// ---- scratch ----------------------------------------------------------------------------------------------------

// Where some image rows (or columns) lie among a window's nodes: row i, for first <= i < last, between lo and lo + 1.
struct Axis {
  int first, last;
  int* lo;
  float* weight;

  // For image rows [from, from + n); lo counts from node base.
  void fill(int64_t from, int64_t n, int64_t start, int64_t length, int64_t nodes, int base) {
    first = static_cast<int>(std::max<int64_t>(start - from, 0));
    last = static_cast<int>(std::min<int64_t>(start + length - from, n));
    for (int i = first; i < last; ++i) lo[i] = axis_position(from + i, start, length, nodes, &weight[i]) - base;
  }
};

// A window over a tile: its nodes there, classes innermost, and where the tile's image rows and columns lie in it.
struct View {
  int64_t window;
  int row0, col0, rows, cols;  // nodes [row0, row0 + rows) x [col0, col0 + cols)
  float* nodes;                // [rows, cols, stride]
  Axis y, x;
};

// The second bilinear step along an axis: output i lies between image rows low[i] and low[i] + 1, at part[i].
struct Taps {
  int* low;
  float* part;
};

// A window over a block.
struct Cover {
  const View* view;
  Axis y, x;         // of the block's lists
  int* ends;         // columns ends[k] to ends[k + 1] lie between the k-th node they need and the next; null if few do
  int* inside;       // [pitch_x]: -1 in the columns it covers, 0 in others
  int marks;         // how many
  float* at_marks;   // [marks, stride]: every class's logits
  float* largest;    // softmax only, [ny, nx]: the largest logit of each pixel
  float* inverse;    // softmax only, [ny, nx]: one over the sum of exponentials
};

// One thread's memory: what a tile needs, not what the picture has. Grows when a tile needs more.
struct Scratch {
  std::vector<View> view_list;
  std::vector<Cover> cover_list;
  std::vector<float> floats;
  std::vector<int> ints;

  int end_y, end_x;     // the image's last row and column, counted from the tile's first
  int ny, nx, pitch_x;  // image rows and columns under the block at hand, the columns in whole groups

  // Parts of the above, laid out by prepare.
  View* views;
  Cover* covers;
  int view_count;
  float magnitude;  // of the nodes in the views, infinity if there is NaN
  float *nodes, *turn, *at_marks, *total, *penalty, *high, *axis_weight, *mark_weight, *largest, *inverse, *share;
  float *rows, *line, *z, *best, *part_y, *part_x;
  Taps taps_y, taps_x;  // of the tile's output rows and columns
  int *list_y, *list_x, *beaten, *taken, *chosen, *axis_lo, *ends, *inside, *mark_lo, *label, *low_y, *high_y, *low_x, *high_x;

  // For a tile: lists the windows over it, makes room, and fills in where everything lies.
  void prepare(const Job& job, const Block& tile) {
    const int64_t stride = whole_groups(job.classes), more = job.resized() ? 1 : 0;
    float part;
    // Image rows y0 to y1 and columns x0 to x1, all inclusive, are read.
    const int64_t y0 = tap_of(job.image_h, job.out_h, tile.r0, &part);
    const int64_t y1 = std::min(tap_of(job.image_h, job.out_h, tile.r1 - 1, &part) + more, job.image_h - 1);
    const int64_t x0 = tap_of(job.image_w, job.out_w, tile.c0, &part);
    const int64_t x1 = std::min(tap_of(job.image_w, job.out_w, tile.c1 - 1, &part) + more, job.image_w - 1);
    const int64_t tile_rows = y1 - y0 + 1, tile_cols = x1 - x0 + 1;
    end_y = static_cast<int>(job.image_h - 1 - y0), end_x = static_cast<int>(job.image_w - 1 - x0);
    view_list.clear();
    for (int64_t n = 0; n < job.window_count; ++n) {
      const int64_t* place = job.windows + 4 * n;
      View view;
      view.window = n;
      if (node_range(y0, y1, place[0], place[2], job.h, &view.row0, &view.rows) &&
          node_range(x0, x1, place[1], place[3], job.w, &view.col0, &view.cols))
        view_list.push_back(view);
    }
    const int64_t ny_max = job.resized() ? 2 * job.block_h : job.block_h;
    const int64_t nx_max = whole_groups(job.resized() ? 2 * job.block_w : job.block_w) + GROUP;
    const int64_t count = static_cast<int64_t>(view_list.size()), width = whole_groups(job.block_w);
    const int64_t pixels = job.block_h * width;
    int64_t node_count = 0, mark_count = 0, widest = 0;
    for (const View& view : view_list) {
      const int64_t view_rows = view.rows, view_cols = view.cols;
      node_count += view_rows * view_cols;
      mark_count += std::min(view_rows + 1, ny_max) * std::min(view_cols + 1, nx_max);
      widest = std::max(widest, view_cols);
    }
    const int64_t softmax = job.activation == SOFTMAX ? count * ny_max * nx_max : 0;
    const int64_t axes = (count + 1) * (ny_max + nx_max);
    cover_list.resize(static_cast<size_t>(count) + 1);
    // Laid out twice: once to count, once over the memory.
    for (const bool real : {false, true}) {
      int64_t f = 0, i = 0;
      const auto floats_of = [&](int64_t n) {
        f += n;
        return real ? floats.data() + (f - n) : nullptr;
      };
      const auto ints_of = [&](int64_t n) {
        i += n;
        return real ? ints.data() + (i - n) : nullptr;
      };
      nodes = floats_of(node_count * stride);
      turn = floats_of((widest + 1) * GROUP);
      at_marks = floats_of(mark_count * stride);
      total = floats_of(stride);
      penalty = floats_of(stride);
      high = floats_of(stride);
      axis_weight = floats_of(axes);
      mark_weight = floats_of(ny_max + nx_max);
      largest = floats_of(softmax);
      inverse = floats_of(softmax);
      share = floats_of(ny_max * nx_max);
      rows = floats_of(ny_max * nx_max);
      line = floats_of(2 * (nx_max + GROUP));
      z = floats_of(ny_max * std::max(nx_max, width) + GROUP);
      best = floats_of(job.top_k * pixels);
      taps_y.part = floats_of(job.tile_h);
      taps_x.part = floats_of(job.tile_w);
      float* weights = floats_of(count * (tile_rows + tile_cols));
      part_y = floats_of(job.block_h);
      part_x = floats_of(width);
      taps_y.low = ints_of(job.tile_h);
      taps_x.low = ints_of(job.tile_w);
      list_y = ints_of(ny_max);
      list_x = ints_of(nx_max);
      int* los = ints_of(count * (tile_rows + tile_cols));
      beaten = ints_of(stride);
      taken = ints_of(stride);
      chosen = ints_of(stride * MAX_DEPTH);
      axis_lo = ints_of(axes);
      ends = ints_of(axes);
      inside = ints_of((count + 1) * nx_max);
      mark_lo = ints_of(ny_max + nx_max);
      label = ints_of(job.top_k * pixels);
      low_y = ints_of(job.block_h);
      high_y = ints_of(job.block_h);
      low_x = ints_of(width);
      high_x = ints_of(width);
      if (real) {
        float* next = nodes;
        for (View& view : view_list) {
          const int64_t* place = job.windows + 4 * view.window;
          view.nodes = next;
          next += static_cast<int64_t>(view.rows) * view.cols * stride;
          view.y.lo = los, view.y.weight = weights, los += tile_rows, weights += tile_rows;
          view.x.lo = los, view.x.weight = weights, los += tile_cols, weights += tile_cols;
          view.y.fill(y0, tile_rows, place[0], place[2], job.h, view.row0);
          view.x.fill(x0, tile_cols, place[1], place[3], job.w, view.col0);
        }
      } else {
        floats.resize(std::max(floats.size(), static_cast<size_t>(f)));
        ints.resize(std::max(ints.size(), static_cast<size_t>(i)));
      }
    }
    views = view_list.data(), covers = cover_list.data(), view_count = static_cast<int>(count);
    for (int64_t i = 0; i < tile.r1 - tile.r0; ++i)
      taps_y.low[i] = static_cast<int>(tap_of(job.image_h, job.out_h, tile.r0 + i, &taps_y.part[i]) - y0);
    for (int64_t i = 0; i < tile.c1 - tile.c0; ++i)
      taps_x.low[i] = static_cast<int>(tap_of(job.image_w, job.out_w, tile.c0 + i, &taps_x.part[i]) - x0);
  }
};

}  // namespace fastzs::label_map
