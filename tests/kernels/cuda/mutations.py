"""Faults put into csrc/*.cu on purpose: every one must be noticed by the tests that run the sources on the host.

"nothing" is the source as it is. What else begins with "same:" changes no result.
"""

from ..mutants import Change

TEMPLATE = "template <class T>\n__device__ float logit_at("
COUNTED = [  # the host's part prints how many logits its kernels interpolated
    (TEMPLATE, f"static long long logits_read = 0;\n{TEMPLATE}"),
    ("  float a = read(map, at.n00)", "  ++logits_read;\n  float a = read(map, at.n00)"),
    (
        "  const cudaError_t error",
        '  fprintf(stderr, "%lld logits\\n", logits_read);\n  logits_read = 0;\n  const cudaError_t error',
    ),
]

SUMS = "template <class Label, bool SQUARE, bool NODES>\n__global__"

MUTATIONS: dict[str, dict[str, list[Change]]] = {
    "mask_loss_cuda.cu": {
        "nothing": [],
        "same: a workspace of one image": [("WORKSPACE = 64 << 20", "WORKSPACE = 1")],
        "no barrier before the last sum": [("  __syncthreads();\n", "")],
        "a lane too few": [("x += LANES) {", "x += LANES + 1) {")],
        "a row of cells too few": [("/ per_block, a.h + 1, a.images)", "/ per_block, a.h, a.images)")],
        "cells past the last are read": [("n < static_cast<int64_t>(a.C) * (a.w + 1);", "true;")],
        "a class's plane has another size": [("+ c * a.logits_stride[1];", "+ c * a.h * a.w;")],
        "the node above the first row": [("max(band - 1, 0) * a.logits_stride[2]", "(band - 1) * a.logits_stride[2]")],
        "half of the lanes are added": [("int step = N / 2;", "int step = N / 4;")],
        "lanes leave before the sums": [("  float focal = 0,", "  if (!exists) return;\n  float focal = 0,")],
        "same: bytes of labels are counted": [
            (SUMS, f"static long long bytes_read = 0;\n{SUMS}"),
            (
                "      const bool hit = label == c;",
                "      bytes_read += sizeof(Label);\n      const bool hit = label == c;",
            ),
            (
                "  const cudaError_t error",
                '  fprintf(stderr, "%lld bytes\\n", bytes_read);\n  bytes_read = 0;\n  const cudaError_t error',
            ),
        ],
        "255 is a class and no label": [("MOST_BYTE_CLASSES = 255", "MOST_BYTE_CLASSES = 256")],
        "the first image's target": [("b * a.target_stride[0] + y", "y")],
        "the first image's labels": [("+ b * a.H * a.W + x;", "+ x;")],
        "a class's nodes begin with the last of the one before": [
            ("blockIdx.x % blocks * THREADS", "(blockIdx.x % blocks + 1) * THREADS")
        ],
        "a chunk's image is the batch's": [
            ("WORKSPACE = 64 << 20", "WORKSPACE = 1"),
            ("nodes[(((a.first_image + image) *", "nodes[(((image) *"),
        ],
        "ignored pixels are of their class": [("label == a.ignore_index ? IGNORED<Label> : label", "label")],
        "two corners are swapped": [("corner[f][1] += upper * wx;", "corner[f][2] += upper * wx;")],
        "every label is a class": [("(label < 0 || label >= a.C)", "false")],
    },
    "pixel_text_logits_cuda.cu": {
        "nothing": [],
        "no barrier after a step's loads": [("    __syncthreads();\n#pragma unroll\n", "#pragma unroll\n")],
        "no barrier before the next loads": [("    }\n    __syncthreads();\n  }\n", "    }\n  }\n")],
        "no barrier before the norms": [("my_squares;\n  __syncthreads();", "my_squares;")],
        "channels past the last": [("pixel < a.pixels && d < a.D ?", "pixel < a.pixels ?")],
        "classes past the last": [("if (c < a.C) write", "write")],
        "pixels past the last": [("if (x >= a.pixels) break;", "")],
        "text is read past its last row": [("c < a.C && d < a.D ?", "d < a.D ?")],
        "features lie row after row": [("pixel / a.w * a.features_stride[2]", "pixel / a.w * a.w")],
        "a row of shared features too many": [("features[k][my_pixel] = f;", "features[k + 1][my_pixel] = f;")],
        "a partial norm is left out": [("k < THREADS / TILE; ++k) square", "k < THREADS / TILE - 1; ++k) square")],
        "every image is the first": [("b * a.features_stride[0] + ", "")],
    },
    "label_map_cuda.cu": {
        "nothing": [],
        "same: every class is evaluated": [("if (K == 1 && a.C > GROUP) {", "if (false) {")],
        "same: logits are counted": COUNTED,
        "same: every logit is counted": [*COUNTED, ("if (K == 1 && a.C > GROUP) {", "if (false) {")],
        "same: many covers and marks are given up": [
            ("MOST_COVERS = 8", "MOST_COVERS = 2"),
            ("MOST_MARKS = 64", "MOST_MARKS = 12"),
        ],
        "a group's classes past the last": [
            ("const int c = ids[g];\n      if (c < 0) continue;", "const int c = ids[g];")
        ],
        "pixels past the last": [("if (r >= a.out_h || x >= a.out_w) return;", "if (r >= a.out_h) return;")],
        "no barrier after the covers": [("cover_count = count;\n  }\n  __syncthreads();", "cover_count = count;\n  }")],
        "no barrier after the marks": [("  __syncthreads();\n  return total;", "  return total;")],
        "no barrier after the tallies": [("tallies[warp] = tally;\n  __syncthreads();", "tallies[warp] = tally;")],
        "no barrier after the rivals": [("  __syncthreads();\n\n  float size = 0,", "  float size = 0,")],
        "no barrier after the choice": [
            ("  }\n  __syncthreads();\n  const int r = first_row", "  }\n  const int r = first_row")
        ],
        "a class above at one mark is left out": [
            ("lead[n] = fmaxf(lead[n], z - of_rival[n][m])", "lead[n] = z - of_rival[n][m]")
        ],
        "calibration is not compared": [("* size && penalties[n] <= penalty)", "* size)")],
        "what is not finite leaves others out": [("total == total ? size : INFINITY", "size")],
        "a window's node lines are no marks": [("lo[last] - lo[first] + 2}", "2}")],
        "marks of another window": [("marks[threadIdx.x] = {window * a.C * a.h * a.w,", "marks[threadIdx.x] = {0,")],
        "places outside a window": [("|| y >= box[2] || u >= box[3]) continue;", ") continue;")],
        "the node below the last row": [("min(y0 + 1, a.h - 1) * a.w", "(y0 + 1) * a.w")],
        "the rows of all windows are the first's": [("row = window * a.span_y + y;", "row = y;")],
        "windows add up": [("float share = 1 / visits;", "float share = 1;")],
        "corners are swapped": [("(tap % 2 ? part_x : 1 - part_x)", "(tap % 2 ? 1 - part_x : part_x)")],
        "a class moved down is dropped": [("better = better || score > best[j]", "better = score > best[j]")],
        "ties go up": [("const bool better = score > best[0];", "const bool better = score >= best[0];")],
        "calibration is dropped": [("mixed[g] - a.penalty[c]", "mixed[g]")],
        "the norm is the next place's": [("a.norm[row * a.span_x + u]", "a.norm[row * a.span_x + u + 1]")],
        "ranks are not pushed down": [("score = other, id = other_id;", "score = other;")],
        "a rank's plane has another size": [("at = j * pixels + n;", "at = j * (pixels - 1) + n;")],
        "scores below the threshold stay": [("best[j] < a.threshold ?", "false ?")],
        "what is not finite is kept": [("a += a - a, b += b - b, c += c - c, d += d - d;", "")],
    },
}
