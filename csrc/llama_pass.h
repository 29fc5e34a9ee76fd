// The steps of one forward pass of a Llama-like model, shared by a team of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "pass.h"
#include "team.h"

namespace specdec {

// Bytes of weights a thread takes at once: a microsecond or two; and for more inputs than a few,
// which are read again for every piece (kBlock of pass_product.h), as long as every thread has
// several
constexpr int64_t kPiece = 1 << 15, kLargePiece = 73728, kFewInputs = 8, kFewPieces = 4;
constexpr int64_t kSharedLanes = 4;   // inputs from which on threads share what is done to each
constexpr int64_t kMostQueries = 48;  // of one head that share a piece of attention
// Floats of attention before its parts are merged: lanes are taken by so many
constexpr int64_t kMostSums = 1 << 22;
constexpr int64_t kMostMatrices = 3;  // that read the same inputs

// A buffer whose start suits vectors; what it holds at first does not matter
template <class Entry>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) { reserve(n); }
  Entry* data() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(held_.get());
    return reinterpret_cast<Entry*>((at + 63) / 64 * 64);
  }
  Entry* operator+(int64_t n) { return data() + n; }

  // Makes room for n entries; what was held may be lost.
  void reserve(int64_t n) {
    if (n <= size_) return;
    held_.reset(new char[n * sizeof(Entry) + 64]);
    size_ = n;
  }

 private:
  std::unique_ptr<char[]> held_;
  int64_t size_ = 0;
};

struct Matrix {
  const void* weight;
  Form form;
  const float* scale;   // null: 1
  const float* offset;  // null: 0
  int64_t rows, columns;

  int64_t row_bytes() const { return columns * (form == kPacked ? 1 : form == kHalf ? 2 : 4); }
};

// Inputs of one product, converted as the weights ask for
class Inputs {
 public:
  Inputs(const PassKernels& kernels, Buffer<char>& room, int64_t bytes)
      : kernels_(kernels), held_(room) {
    held_.reserve(bytes);
  }

  // The i-th of some inputs, from x [k]; for the same form and k all lie behind one another
  void take(Form form, int64_t i, const float* x, int64_t k) {
    kernels_.prepare(form, x, k, held_ + i * kernels_.room(form, k));
  }

  const void* data() { return held_.data(); }

 private:
  const PassKernels& kernels_;
  Buffer<char>& held_;
};

struct Shape {
  int64_t heads, kv_heads, dim;
  float scaling, epsilon;
};

// Where the lanes of a pass stand: row of the cache, column, and columns of that row that are
// hidden padding. In a tree a lane's column is how much text stands before it, and several lanes
// may have the same: then it is written to another `place`, and what it sees from the column `fork`
// on lies at the places of its `path`, the last of which is its own.
struct Lanes {
  int64_t count;
  const int64_t *row, *column, *hidden;
  const int64_t *place = nullptr, *fork = nullptr;
  const int64_t* const* path = nullptr;
};

struct Stored {
  void *keys, *values;
  bool half;
  int64_t capacity, window;
};

// What a pass works in. A thread keeps it for its next pass: fresh pages of memory would cost as
// much as the work in them.
struct Desk {
  Buffer<char> inputs;
  Buffer<float> x, normal, added, fused, seen, opened, gated, partial;
};

class Pass {
 public:
  Pass(Team& team, const PassKernels& kernels, const Shape& shape, const Lanes& lanes,
       Buffer<float>& partial)
      : team_(team), kernels_(kernels), shape_(shape), lanes_(lanes), partial_(partial) {}

  void normalise(const float* x, const float* weight, float* y, int64_t n) const {
    kernels_.normalise(x, weight, y, n, shape_.epsilon);
  }

  void add(float* x, const float* more, int64_t n) const { kernels_.add(x, more, n); }

  // body(i) for each of m inputs, shared where that is worth calling others for
  template <class Body>
  void each(int64_t m, const Body& body) const {
    if (m >= kSharedLanes) return team_.share(m, body);
    for (int64_t i = 0; i < m; ++i) body(i);
  }

  // y [m, sum of rows] of m prepared inputs by matrices that read the same ones, outputs side by
  // side
  void apply(std::initializer_list<const Matrix*> matrices, const void* x, float* y,
             int64_t m) const {
    std::array<Cut, kMostMatrices> cuts;
    int64_t rows = 0, pieces = 0, number = 0;
    for (const Matrix* matrix : matrices) {
      const int64_t at_once = rows_of(*matrix, m), count = (matrix->rows + at_once - 1) / at_once;
      cuts[number++] = {matrix, at_once, pieces, y + rows};
      rows += matrix->rows;
      pieces += count;
    }
    team_.share(pieces, [&](int64_t piece) {
      int64_t i = number - 1;
      while (piece < cuts[i].first) --i;
      part(cuts[i], piece - cuts[i].first, x, m, rows);
    });
  }

  // y [m, n] = silu(opened) * up of opened [m, n | n], or GELU's curve in its place, and done(i)
  // for each of m
  template <class Done>
  void gate(bool curved, const float* opened, float* y, int64_t m, int64_t n,
            const Done& done) const {
    const auto apply = curved ? kernels_.curve : kernels_.gate;
    const auto some = [&](int64_t i, int64_t begin, int64_t end) {
      const float* at = opened + 2 * i * n + begin;
      apply(at, at + n, y + i * n + begin, end - begin);
    };
    if (m >= kSharedLanes) {
      team_.share(m, [&](int64_t i) {
        some(i, 0, n);
        done(i);
      });
      return;
    }
    constexpr int64_t kSome = 256;
    const int64_t parts = (n + kSome - 1) / kSome;
    team_.share(m * parts, [&](int64_t piece) {
      const int64_t begin = piece % parts * kSome;
      some(piece / parts, begin, std::min(begin + kSome, n));
    });
    for (int64_t i = 0; i < m; ++i) done(i);
  }

  // Turns queries and keys of `fused [m, queries | keys | values]`, writes keys and values into the
  // cache, and attends: out [m, heads * dim], and done(i) for each of m
  template <class Done>
  void attend(float* fused, const Stored& stored, const float* rotations, const float* norms,
              float* out, const Done& done) const {
    const Shape& s = shape_;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.dim;
    each(lanes_.count, [&](int64_t i) {
      float* lane = fused + i * width;
      for (int64_t h = 0; norms && h < s.heads + s.kv_heads; ++h) {
        const float* weight = norms + (h < s.heads ? 0 : s.dim);
        kernels_.normalise(lane + h * s.dim, weight, lane + h * s.dim, s.dim, s.epsilon);
      }
      const float* turn =
          rotations + std::max<int64_t>(lanes_.column[i] - lanes_.hidden[i], 0) * 2 * s.dim;
      kernels_.rotate(lane, s.heads + s.kv_heads, turn, turn + s.dim, s.dim);
      for (int64_t h = 0; h < s.kv_heads; ++h) {
        const int64_t column = lanes_.place ? lanes_.place[i] : lanes_.column[i];
        const int64_t at = start(stored, lanes_.row[i], h) + column * s.dim;
        write(lane + (s.heads + h) * s.dim, stored, stored.keys, at);
        write(lane + (s.heads + s.kv_heads + h) * s.dim, stored, stored.values, at);
      }
    });
    int64_t spans = 1;
    for (int64_t i = 0; i < lanes_.count; ++i)
      spans = std::max(spans, lanes_.column[i] / kSpan + 1);
    const int64_t at_once = std::max<int64_t>(kMostSums / (spans * s.heads * (s.dim + 2)), 1);
    for (int64_t i = 0; i < lanes_.count; i += at_once)
      attend_some(fused, stored, i, std::min(i + at_once, lanes_.count), out, done);
  }

 private:
  // What attend does for the lanes [from, to), whose keys and values are written
  template <class Done>
  void attend_some(const float* fused, const Stored& stored, int64_t from, int64_t to, float* out,
                   const Done& done) const {
    const Shape& s = shape_;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.dim, group = s.heads / s.kv_heads;
    const std::vector<Reading> readings = plan(stored.window, from, to);
    int64_t sums = 0, most = 0, seen = 0;
    for (const Reading& reading : readings) {
      const int64_t count = reading.end - reading.begin;
      sums += count * group * (s.dim + 2);
      most = std::max(most, count);
      seen += count * s.kv_heads;
    }
    partial_.reserve(sums * s.kv_heads);
    float* const found = partial_.data();
    // Lanes of a piece share what is read, but every thread needs pieces
    const int64_t some = std::clamp<int64_t>(seen / (kFewPieces * team_.size()), 1,
                                             std::max<int64_t>(kMostQueries / group, 1));
    const int64_t parts = (most + some - 1) / some;
    const int64_t pieces = static_cast<int64_t>(readings.size()) * s.kv_heads * parts;
    team_.share(pieces, [&](int64_t piece) {
      const Reading& reading = readings[piece / parts / s.kv_heads];
      const int64_t head = piece / parts % s.kv_heads;
      const int64_t begin = reading.begin + piece % parts * some,
                    end = std::min(begin + some, reading.end);
      if (begin >= end) return;
      thread_local Buffer<float> scratch;
      thread_local std::vector<Sight> sights;
      scratch.reserve(kernels_.attend_room(end - begin, group, s.dim));
      sights.clear();
      for (int64_t i = begin; i < end; ++i) {
        float* at = found + head * sums + reading.sums + (i - reading.begin) * group * (s.dim + 2);
        sights.push_back({fused + i * width + head * group * s.dim, first(i, stored.window),
                          lanes_.column[i], at, at + group * s.dim, at + group * (s.dim + 1),
                          lanes_.fork ? lanes_.fork[i] : std::numeric_limits<int64_t>::max(),
                          lanes_.path ? lanes_.path[i] : nullptr});
      }
      const int64_t row = start(stored, lanes_.row[begin], head), size = stored.half ? 2 : 4;
      kernels_.attend(stored.half, static_cast<const char*>(stored.keys) + row * size,
                      static_cast<const char*>(stored.values) + row * size, reading.span * kSpan,
                      sights.data(), end - begin, group, s.dim, s.scaling, scratch.data());
    });
    // Spans of a lane come in order, so a sum over them is the same whatever shares the pass
    team_.share(to - from, [&](int64_t lane) {
      const int64_t i = from + lane;
      thread_local std::vector<const float*> parts;
      thread_local std::vector<float> peaks, masses;
      for (int64_t h = 0; h < s.heads; ++h) {
        parts.clear(), peaks.clear(), masses.clear();
        for (const Reading& reading : readings) {
          if (i < reading.begin || i >= reading.end) continue;
          const int64_t g = h % group;
          const float* at =
              found + h / group * sums + reading.sums + (i - reading.begin) * group * (s.dim + 2);
          parts.push_back(at + g * s.dim);
          peaks.push_back(at[group * s.dim + g]);
          masses.push_back(at[group * (s.dim + 1) + g]);
        }
        kernels_.merge(parts.data(), peaks.data(), masses.data(),
                       static_cast<int64_t>(parts.size()), s.dim, out + (i * s.heads + h) * s.dim);
      }
      done(i);
    });
  }

  // Lanes [begin, end) of one row read one span of its columns
  struct Reading {
    int64_t span, begin, end, sums;
  };

  // A matrix in pieces of some rows, the first of which has a number among those of its product,
  // and where its outputs begin
  struct Cut {
    const Matrix* matrix;
    int64_t rows, first;
    float* y;
  };

  int64_t rows_of(const Matrix& matrix, int64_t m) const {
    // Rows of numbers are taken by three or four at once (pass_product.h)
    const int64_t step = matrix.form == kPacked ? kSide : 12;
    const int64_t bytes = std::max<int64_t>(matrix.row_bytes(), 1);
    int64_t rows = kPiece / bytes;
    if (m > kFewInputs) {
      const int64_t several = matrix.rows / (kFewPieces * team_.size());
      rows = std::max(rows, std::min(kLargePiece / bytes, several));
    }
    return std::max<int64_t>(rows / step * step, step);
  }

  void part(const Cut& cut, int64_t piece, const void* x, int64_t m, int64_t stride) const {
    const Matrix& matrix = *cut.matrix;
    const int64_t begin = piece * cut.rows, end = std::min(begin + cut.rows, matrix.rows);
    const char* after =
        static_cast<const char*>(matrix.weight) + (begin + cut.rows) * matrix.row_bytes();
    kernels_.product(matrix.form, matrix.weight, matrix.scale, x, m, matrix.columns, begin, end,
                     cut.y, stride, after);
    if (!matrix.offset) return;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t n = begin; n < end; ++n) cut.y[i * stride + n] += matrix.offset[n];
    }
  }

  // Where a row's columns of one head begin
  int64_t start(const Stored& stored, int64_t row, int64_t head) const {
    return (row * shape_.kv_heads + head) * stored.capacity * shape_.dim;
  }

  void write(const float* x, const Stored& stored, void* to, int64_t at) const {
    if (stored.half) {
      kernels_.narrow(x, static_cast<uint16_t*>(to) + at, shape_.dim);
    } else {
      std::memcpy(static_cast<float*>(to) + at, x, sizeof(float) * shape_.dim);
    }
  }

  // First column that a lane sees
  int64_t first(int64_t i, int64_t window) const {
    // A hidden lane sees itself: nobody reads what it gives, but it must not be NaN
    const int64_t hidden = std::min(lanes_.hidden[i], lanes_.column[i]);
    return window ? std::max(hidden, lanes_.column[i] - window + 1) : hidden;
  }

  // Neighbouring lanes of a row share a reading
  std::vector<Reading> plan(int64_t window, int64_t from, int64_t to) const {
    std::vector<Reading> readings;
    int64_t sums = 0;
    const int64_t each_lane = shape_.heads / shape_.kv_heads * (shape_.dim + 2);
    for (int64_t begin = from, end; begin < to; begin = end) {
      int64_t low = first(begin, window), high = lanes_.column[begin];
      for (end = begin + 1; end < to && lanes_.row[end] == lanes_.row[begin]; ++end) {
        low = std::min(low, first(end, window));
        high = std::max(high, lanes_.column[end]);
      }
      for (int64_t span = low / kSpan; span <= high / kSpan; ++span) {
        const auto sees = [&](int64_t i) {
          return first(i, window) < (span + 1) * kSpan && lanes_.column[i] >= span * kSpan;
        };
        for (int64_t i = begin; i < end;) {
          if (!sees(i)) {
            ++i;
            continue;
          }
          const int64_t lane = i;
          while (i < end && sees(i)) ++i;
          readings.push_back({span, lane, i, sums});
          sums += (i - lane) * each_lane;
        }
      }
    }
    return readings;
  }

  Team& team_;
  const PassKernels& kernels_;
  const Shape& shape_;
  const Lanes& lanes_;
  Buffer<float>& partial_;  // of attention
};

}  // namespace specdec
