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
#include <optional>

#include "label_map_candidates.h"
#include "label_map_pixels.h"
#include "threads.h"

namespace fastzs::label_map {
namespace {

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
  STD_TORCH_CHECK(logits.dim() == 4 && logits.is_contiguous(),
      "label_map: expected contiguous logits [W, C, h, w], got ", describe(logits));
  STD_TORCH_CHECK(windows.is_contiguous() && windows.numel() == 4 * logits.size(0),
      "label_map: expected contiguous windows [", logits.size(0), ", 4], got ", describe(windows));
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous(),
      "label_map: expected contiguous labels [k, H', W'], got ", describe(labels));
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
