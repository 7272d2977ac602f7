// The kernel, for whatever instructions simd.h is compiled for. Included once by each of
// kernel_*.cpp.
//
// A row of a layer needs only k + 1 of the G + k functions of each input, those that do not vanish
// in the cell between two knots in which the input lies, and the base path. There are two ways
// through a layer:
//
//   streamed  few rows: input after input, the k + 2 rows of weights are read and added up
//   grouped   many rows: for each input, the rows of the batch that lie in the same cell need the
//             same weights, which stay in registers for all of them
//
// The k + 1 functions are computed by the triangle of de Boor (A Practical Guide to Splines,
// chapter X), which adds up only what is positive, on the true knots: adapted ones cost no more
// than uniform.
#include "kernel.h"
#include "simd.h"

namespace {

using kan::Activation;
using kan::Layer;
using kan::Task;

constexpr int kRows = 128;      // of a task; accumulators of 64 outputs fill 32 KiB
constexpr int kFeatures = 64;   // inputs whose functions are held at a time
constexpr int kGroupRows = 12;  // from so many on grouping pays
constexpr int kStreamed = 16;   // rows that share the weights of W inputs while they are in L1
constexpr int kScanned = 40;    // knots of a feature that are looked at one after the other
constexpr int kMaxGroups = 64;  // knots of a feature, for which tables are made
constexpr int kTables = 8;      // features whose knots are prepared at a time: what is read as a
                                // vector must have left the store buffer
constexpr int kUnits = 4;       // vectors of outputs at a time, at most

// --- The base activation. ------------------------------------------------------------------------

// exp(a) = scale * (1 + e) for |a| at most 87, after W. Cody and W. Waite: a = n log 2 + r, scale =
// 2^n.
struct Exponential {
  F scale, e;

  explicit Exponential(F a, F low = set(0.0f)) {  // low: what a lacks
    const F n = round(a * set(1.44269504f));
    F r = fma(n, set(-0.693145752f), a);
    r = fma(n, set(-1.42860677e-6f), r) + low;
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    e = fma(p * r, r, r);
    scale = power_of_two(n);
  }
};

inline F exp(F a, F low = set(0.0f)) {
  const Exponential x(min(max(a, set(-87.0f)), set(87.0f)), low);
  return fma(x.e, x.scale, x.scale);
}

// exp(a) - 1 without cancelling.
inline F expm1(F a) {
  const Exponential x(min(max(a, set(-87.0f)), set(87.0f)));
  return fma(x.e, x.scale, x.scale - set(1.0f));
}

// The normal distribution's tail beyond x, for x at least 0: erfc(z) / 2 with z = x / sqrt(2),
// where erfc(z) = t exp(P(t) - z^2) and t = 2 / (2 + z), a form of W. Press and others, Numerical
// Recipes; P was fitted to erfcx by Chebyshev polynomials, to 7e-8. Roundings of x^2 / 2 are kept,
// because exp multiplies them by their size.
inline F normal_tail(F x) {
  const F t = divide(set(2.0f), fma(x, set(0.70710678f), set(2.0f)));
  F p = set(0.15145203471183777f);
  p = fma(p, t, set(-0.7157616019248962f));
  p = fma(p, t, set(1.236920952796936f));
  p = fma(p, t, set(-0.7993643879890442f));
  p = fma(p, t, set(0.0012234296882525086f));
  p = fma(p, t, set(-0.03960790857672691f));
  p = fma(p, t, set(0.047546837478876114f));
  p = fma(p, t, set(0.38415607810020447f));
  p = fma(p, t, set(0.9988940358161926f));
  p = fma(p, t, set(-1.265459418296814f));
  const F square = x * x, half = set(0.5f) * square, a = p - half;
  const F low = (p - (a + half)) - set(0.5f) * lost_by_product(x, x, square);
  return set(0.5f) * t * exp(a, low);
}

inline F activate(Activation activation, F x) {
  const F zero = set(0.0f), one = set(1.0f);
  switch (activation) {
    case Activation::silu:
      return divide(max(x, set(-87.0f)), one + exp(zero - x));  // exp goes no further
    case Activation::gelu: {  // beyond 14 there is nothing left of the tail
      const F tail = normal_tail(min(abs(x), set(14.0f)));
      return max(x, set(-14.0f)) * where(less_equal(zero, x), one - tail, tail);
    }
    case Activation::relu:
      return max(x, zero);
    case Activation::tanh: {
      const F e = expm1(set(-2.0f) * abs(x));
      const F size = divide(zero - e, e + set(2.0f));
      return where(less_equal(zero, x), size, zero - size);
    }
    default:
      return x;
  }
}

// NaN and infinities make an answer NaN, as they do in the recursion.
inline F base(Activation activation, F x) { return fma(set(0.0f), x, activate(activation, x)); }

// --- The functions that do not vanish. -----------------------------------------------------------

// de Boor's triangle. With c the cell of x, left[m] = x - t[c - m] and
// reciprocal(p, j) = 1 / (t[c + 1 + j] - t[c + 1 + j - p]). Takes n[0], the function of order 0,
// and leaves B_{c-k} to B_c in n, times that.
//
// What rises in one function falls in its neighbour: the weights of the two add up to 1, so only
// one is computed. That halves the error of the reciprocals, and needs no distances to the right.
template <int K, typename Reciprocal>
inline void triangle(const F* left, Reciprocal reciprocal, F* n) {
#pragma GCC unroll 5
  for (int p = 1; p <= K; ++p) {
    F risen = set(0.0f);
#pragma GCC unroll 5
    for (int j = 0; j < p; ++j) {
      const F weight = left[p - 1 - j] * reciprocal(p, j);
      const F rises = weight * n[j];
      n[j] = (n[j] - rises) + risen;
      risen = rises;
    }
    n[p] = risen;
  }
}

// --- Many rows, grouped by cell. -----------------------------------------------------------------

struct Group {
  uint8_t cell;
  uint8_t count;
};

template <int K>
struct Block {
  alignas(64) float values[kFeatures][K + 2][kRows];
  alignas(64) float sums[kRows * kUnits * W];
  alignas(64) uint8_t rows[kFeatures][kRows + 128];
  Group groups[kFeatures][kMaxGroups];
  int count[kFeatures];
};

// The knots of one feature, in a row and with K more on either side, so that what belongs to a cell
// is found at the cell's number plus an offset.
template <int K, int Steps>
struct Knots {
  static constexpr int kLength = 1 << Steps;  // more than there are knots
  static constexpr int kVectors = kLength / W;
  static constexpr int kPadded = (K + kLength + K + W) / W * W + W;
  alignas(64) float search[kLength + W];     // knot i at 1 + i, infinite where there is none
  alignas(64) float knots[kPadded];          // of knot i at K + i; beyond the ends they repeat
  alignas(64) float reciprocal[K][kPadded];  // 1 / (t[i + p] - t[i]) at [p - 1][K + i]

  void copy(const Layer& layer, int feature) {
    const int count = layer.functions + K + 1;
    const float* from = layer.knots + feature;
    const I end = set_int(count), in = set_int(layer.in);
    for (int j = 0; j < kLength; j += W) {
      const I i = add(iota(), set_int(j));
      const M there = below(i, end);
      const F t = gather(from, multiply(where(there, i, set_int(count - 1)), in));
      store(knots + K + j, t);
      store(search + 1 + j, where(there, t, set(__builtin_inff())));
    }
    for (int m = 0; m < K; ++m) {
      knots[m] = knots[K];
      knots[K + kLength + m] = knots[K + count - 1];
    }
  }

  void divide_differences(int count) {
    for (int p = 1; p <= K; ++p)
      for (int j = 0; j < K + count; j += W)
        store(reciprocal[p - 1] + j, one_over_difference(load(knots + j + p), load(knots + j)));
  }

  // t[cell + offset], for offsets from 1 - K to 0.
  F knot(I cell, int offset) const { return lookup<kVectors>(knots + K + offset, cell); }
  F one_over(int p, I cell, int offset) const {
    return lookup<kVectors>(reciprocal[p - 1] + K + offset, cell);
  }
};

// Sorts rows by their cells: their numbers into `sorted`, which has room for 128 more than there
// are, and into `groups` the cells that have any, with how many; returns how many cells those are.
#if defined(__AVX512VBMI2__)

constexpr struct RowNumbers {
  alignas(64) uint8_t values[kRows] = {};
  constexpr RowNumbers() {
    for (int r = 0; r < kRows; ++r) values[r] = static_cast<uint8_t>(r);
  }
} kRowNumbers;

// A byte for each row, all rows in two vectors: a seventh less time for a layer of 64 outputs than
// counting takes.
inline int sort_by_cell(const int* cells, int rows, int cell_count, uint8_t* sorted,
                        Group* groups) {
  static_assert(kRows == 128, "two vectors of bytes");
  alignas(64) uint8_t bytes[kRows];
  for (int r = 0; r < kRows; r += W)
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + r),
                    r < rows ? _mm512_cvtepi32_epi8(load_int(cells + r)) : _mm_set1_epi8(-1));
  const I low = _mm512_load_si512(bytes), high = _mm512_load_si512(bytes + 64);
  const I low_rows = _mm512_load_si512(kRowNumbers.values);
  const I high_rows = _mm512_load_si512(kRowNumbers.values + 64);
  int n = 0;
  for (int c = 0; c < cell_count; ++c) {
    const I cell = _mm512_set1_epi8(static_cast<char>(c));
    const __mmask64 in_low = _mm512_cmpeq_epi8_mask(low, cell);
    const __mmask64 in_high = _mm512_cmpeq_epi8_mask(high, cell);
    const int below_64 = __builtin_popcountll(in_low);
    const int here = below_64 + __builtin_popcountll(in_high);
    _mm512_storeu_si512(sorted, _mm512_maskz_compress_epi8(in_low, low_rows));
    _mm512_storeu_si512(sorted + below_64, _mm512_maskz_compress_epi8(in_high, high_rows));
    sorted += here;
    groups[n] = {static_cast<uint8_t>(c), static_cast<uint8_t>(here)};
    n += here > 0;
  }
  return n;
}

#else

inline int sort_by_cell(const int* cells, int rows, int cell_count, uint8_t* sorted,
                        Group* groups) {
  int start[kMaxGroups] = {};
  for (int r = 0; r < rows; ++r) ++start[cells[r]];
  int n = 0, sum = 0;
  for (int c = 0; c < cell_count; ++c) {
    const int here = start[c];
    start[c] = sum;
    sum += here;
    groups[n] = {static_cast<uint8_t>(c), static_cast<uint8_t>(here)};
    n += here > 0;
  }
  for (int r = 0; r < rows; ++r) sorted[start[cells[r]]++] = static_cast<uint8_t>(r);
  return n;
}

#endif

// Some features of all rows, one after the other. Several times faster than a gather for each.
inline void transpose(const float* x, int in, int rows, int features, float (*columns)[kRows]) {
  if (features == kTables) {
    for (int r = 0; r < rows; ++r, x += in)
      for (int i = 0; i < kTables; ++i) columns[i][r] = x[i];
  } else {
    for (int r = 0; r < rows; ++r, x += in)
      for (int i = 0; i < features; ++i) columns[i][r] = x[i];
  }
  for (int r = rows; r < (rows + W - 1) / W * W; ++r)
    for (int i = 0; i < features; ++i) columns[i][r] = 0.0f;
}

template <int K, int Steps>
void evaluate_feature(const Task& task, const Knots<K, Steps>& knots, const float* column,
                      Block<K>& block, int slot) {
  const Layer& layer = *task.layer;
  alignas(64) int cells[kRows];
  const int cell_count = layer.functions + K;
  for (int r = 0; r < task.rows; r += W) {
    const F x = load(column + r);
    I knots_below = set_int(0);  // or at x
#pragma GCC unroll 6
    for (int step = 1 << (Steps - 1); step > 0; step >>= 1) {
      const I probe = add(knots_below, set_int(step));
      const F knot = lookup<Knots<K, Steps>::kVectors>(knots.search, probe);
      knots_below = where(less_equal(knot, x), probe, knots_below);
    }
    const I cell = add(knots_below, set_int(-1));
    const M inside = below(cell, set_int(cell_count));  // not before the first knot, nor behind
    const I c = where(inside, cell, set_int(0));
    F left[K], n[K + 1];
    // Not of numbers that lie outside: huge ones would overflow, and infinity times 0 is no 0.
    for (int m = 0; m < K; ++m) left[m] = zero_unless(inside, x - knots.knot(c, -m));
    n[0] = zero_unless(inside, set(layer.unit));
    triangle<K>(left, [&](int p, int j) { return knots.one_over(p, c, 1 + j - p); }, n);
    for (int m = 0; m <= K; ++m) store(&block.values[slot][m][r], n[m]);
    store(&block.values[slot][K + 1][r], base(layer.activation, x));
    store_int(&cells[r], where(first(task.rows - r), c, set_int(-1)));
  }
  block.count[slot] =
      sort_by_cell(cells, task.rows, cell_count, block.rows[slot], block.groups[slot]);
}

alignas(64) constexpr float kNoWeights[kUnits * W] = {};

// Where the weights of one feature lie, for some outputs.
template <int K>
struct Weights {
  int functions;
  ptrdiff_t step;                     // to the next feature
  const float* base;                  // of the base path
  const float* rows[kMaxGroups + K];  // of function f at [K + f]; K more on either side,
                                      // which the first and last cells lack
  Weights(const Layer& layer, int feature, int output)
      : functions(layer.functions), step(layer.out) {
    const size_t block = static_cast<size_t>(layer.in) * layer.out;
    const float* start = layer.weights + static_cast<size_t>(feature) * layer.out + output;
    for (int f = 0; f < functions; ++f) rows[K + f] = start + layer.block[f] * block;
    for (int m = 0; m < K; ++m) rows[m] = rows[K + functions + m] = kNoWeights;
    base = start + layer.block[functions] * block;
  }

  void next() {
    for (int f = 0; f < functions; ++f) rows[K + f] += step;
    base += step;
  }

  // Asks for what the next feature needs, one of functions + 1 rows at a time: they lie too far
  // apart for the processor to guess. (GCC drops calls of a function that does nothing else.)
  [[gnu::always_inline]] void prefetch(int f, int width) const {
    const float* row = (f < functions ? rows[K + f] : base) + step;
    for (int o = 0; o < width + 15; o += 16) __builtin_prefetch(row + (o < width ? o : width - 1));
  }
};

// `last` says which outputs of the last vector there are.
template <int K, int U>
inline void add_group(float* sums, const float* const* functions, const float* base, bool full,
                      M last, const float (*values)[kRows], const uint8_t* rows, int count) {
  F w[K + 2][U];
#pragma GCC unroll 7
  for (int m = 0; m < K + 2; ++m) {
    const float* from = m <= K ? functions[m] : base;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u)
      w[m][u] = u < U - 1 || full ? load(from + u * W) : load(from + u * W, last);
  }
  for (int s = 0; s < count; ++s) {
    const int r = rows[s];
    float* sum = sums + r * (U * W);
    F y[U];  // summed up before it is added: half the rounding error, a tenth more time
    const F first_value = set(values[0][r]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) y[u] = first_value * w[0][u];
#pragma GCC unroll 7
    for (int m = 1; m < K + 2; ++m) {
      const F value = set(values[m][r]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) y[u] = fma(value, w[m][u], y[u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) store(sum + u * W, load(sum + u * W) + y[u]);
  }
}

template <int K, int U>
void add_block(const Task& task, Block<K>& block, int feature, int features, int output,
               int width) {
  const Layer& layer = *task.layer;
  const bool full = width == U * W;
  const M last = first(width - (U - 1) * W);
  for (int i = 0; i < task.rows * U; ++i) store(block.sums + i * W, set(0.0f));
  Weights<K> weights(layer, feature, output);
  for (int slot = 0; slot < features; ++slot, weights.next()) {
    const uint8_t* rows = block.rows[slot];
    int asked = slot + 1 < features ? 0 : layer.functions + 1;
    for (int g = 0; g < block.count[slot]; ++g) {
      const Group group = block.groups[slot][g];
      if (asked <= layer.functions) weights.prefetch(asked++, width);
      add_group<K, U>(block.sums, weights.rows + group.cell, weights.base, full, last,
                      block.values[slot], rows, group.count);
      rows += group.count;
    }
    while (asked <= layer.functions) weights.prefetch(asked++, width);
  }
  // Sums of some inputs are added up, not all inputs to one sum: an eighth of the rounding error.
  for (int r = 0; r < task.rows; ++r)
    for (int u = 0; u < U; ++u) {
      float* y = task.y + static_cast<size_t>(r) * layer.out + output + u * W;
      F sum = load(block.sums + (r * U + u) * W);
      if (u < U - 1 || full) {
        if (feature > 0) sum = sum + load(y);
        store(y, sum);
      } else {
        if (feature > 0) sum = sum + load(y, last);
        store(y, last, sum);
      }
    }
}

// As many vectors of outputs as leave room for the weights in registers.
template <int K>
constexpr int units() {
  int u = kUnits;
  while ((K + 2) * u + u + 1 > kRegisters) --u;
  return u;
}

template <int K, int Steps>
void run_grouped(const Task& task, void* scratch) {
  Block<K>& block = *static_cast<Block<K>*>(scratch);
  const Layer& layer = *task.layer;
  constexpr int kWidth = units<K>() * W;
  for (int feature = 0; feature < layer.in; feature += kFeatures) {
    const int features = layer.in - feature < kFeatures ? layer.in - feature : kFeatures;
    Knots<K, Steps> knots[kTables];
    alignas(64) float columns[kTables][kRows];
    for (int slot = 0; slot < features; slot += kTables) {
      const int here = features - slot < kTables ? features - slot : kTables;
      for (int i = 0; i < here; ++i) knots[i].copy(layer, feature + slot + i);
      transpose(task.x + feature + slot, layer.in, task.rows, here, columns);
      for (int i = 0; i < here; ++i) knots[i].divide_differences(layer.functions + K + 1);
      for (int i = 0; i < here; ++i)
        evaluate_feature<K, Steps>(task, knots[i], columns[i], block, slot + i);
    }
    for (int output = task.first; output < task.last; output += kWidth) {
      const int width = task.last - output < kWidth ? task.last - output : kWidth;
      switch ((width + W - 1) / W) {
        case 1:
          add_block<K, 1>(task, block, feature, features, output, width);
          break;
        case 2:
          if constexpr (units<K>() >= 2)
            add_block<K, 2>(task, block, feature, features, output, width);
          break;
        case 3:
          if constexpr (units<K>() >= 3)
            add_block<K, 3>(task, block, feature, features, output, width);
          break;
        default:
          if constexpr (units<K>() >= 4)
            add_block<K, 4>(task, block, feature, features, output, width);
      }
    }
  }
}

// --- Few rows, streamed. -------------------------------------------------------------------------

template <int K>
struct Stream {
  alignas(64) float values[kStreamed][K + 2][W];
  alignas(64) int rows[kStreamed][K + 2][W];  // of the weights
};

// The functions of W features, for one row.
template <int K>
inline void evaluate_row(const Layer& layer, const float* x_row, int feature, Stream<K>& stream,
                         int slot) {
  const int knots = layer.functions + K + 1;
  const int here = layer.in - feature;
  const M there = first(here);
  const F x = load(x_row + feature, there);
  I lane = where(there, add(iota(), set_int(feature)), set_int(feature));
  const I in = set_int(layer.in);
  F t[2 * K];                                          // t[c - K + 1] to t[c + K]
  F *const before = t + K - 1, *const behind = t + K;  // backwards from c, forwards from c + 1
  I knots_below = set_int(0);                          // or at x
  if (knots <= kScanned) {
    const float* knot = layer.knots + feature;
    for (int m = 0; m < K; ++m) before[-m] = load(knot, there);
    for (int j = 0; j < knots; ++j, knot += layer.in) {
      const F v = load(knot, there);
      const M passed = less_equal(v, x);
      for (int m = K - 1; m > 0; --m) before[-m] = where(passed, before[1 - m], before[-m]);
      before[0] = where(passed, v, before[0]);
      knots_below = where(passed, set_int(j + 1), knots_below);
    }
    knot -= layer.in;
    for (int m = 0; m < K; ++m) behind[m] = load(knot, there);
    for (int j = knots - 1; j >= 0; --j, knot -= layer.in) {
      const F v = load(knot, there);
      const M passed = less_equal(v, x);
      for (int m = K - 1; m > 0; --m) behind[m] = where(passed, behind[m], behind[m - 1]);
      behind[0] = where(passed, behind[0], v);
    }
  } else {
    int step = 1;
    while (2 * step <= knots) step *= 2;
    for (; step > 0; step >>= 1) {
      const I probe = add(knots_below, set_int(step));
      const M exists = below(add(probe, set_int(-1)), set_int(knots));
      const I at = where(exists, add(probe, set_int(-1)), set_int(0));
      const F knot = gather(layer.knots, add(multiply(at, in), lane));
      knots_below = where(both(exists, less_equal(knot, x)), probe, knots_below);
    }
    for (int m = 0; m < 2 * K; ++m) {
      I at = add(knots_below, set_int(m - K));
      at = where(below(at, set_int(knots)), at, m < K ? set_int(0) : set_int(knots - 1));
      t[m] = gather(layer.knots, add(multiply(at, in), lane));
    }
  }
  const I cell = add(knots_below, set_int(-1));
  const M inside = below(cell, set_int(knots - 1));
  const I c = where(inside, cell, set_int(0));
  F left[K], n[K + 1];
  for (int m = 0; m < K; ++m) left[m] = x - before[-m];
  n[0] = zero_unless(inside, set(layer.unit));
  triangle<K>(left, [&](int p, int j) { return one_over_difference(t[K + j], t[K + j - p]); }, n);
  for (int m = 0; m <= K; ++m) {
    const I function = add(c, set_int(m - K));
    const M exists = below(function, set_int(layer.functions));
    store(stream.values[slot][m], zero_unless(both(inside, exists), n[m]));
    const I block = lookup(layer.block, layer.functions, where(exists, function, set_int(0)));
    store_int(stream.rows[slot][m], add(multiply(block, in), lane));
  }
  store(stream.values[slot][K + 1], base(layer.activation, x));
  store_int(stream.rows[slot][K + 1], add(set_int(layer.block[layer.functions] * layer.in), lane));
}

template <int K, int U>
inline void add_row(const Layer& layer, const Stream<K>& stream, int slot, int features, int output,
                    bool full, M last, bool begin, float* y) {
  F sum[U], other[U];
  for (int u = 0; u < U; ++u) {
    sum[u] = set(0.0f);
    other[u] = set(0.0f);
  }
  for (int l = 0; l < features; ++l) {
#pragma GCC unroll 7
    for (int m = 0; m < K + 2; ++m) {
      const float* w =
          layer.weights + static_cast<size_t>(stream.rows[slot][m][l]) * layer.out + output;
      const F value = set(stream.values[slot][m][l]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const F weight = u < U - 1 || full ? load(w + u * W) : load(w + u * W, last);
        if (m % 2)
          other[u] = fma(value, weight, other[u]);
        else
          sum[u] = fma(value, weight, sum[u]);
      }
    }
  }
  for (int u = 0; u < U; ++u) {
    F all = sum[u] + other[u];
    if (u < U - 1 || full) {
      if (!begin) all = all + load(y + u * W);
      store(y + u * W, all);
    } else {
      if (!begin) all = all + load(y + u * W, last);
      store(y + u * W, last, all);
    }
  }
}

template <int K>
void run_streamed(const Task& task, void* scratch) {
  Stream<K>& stream = *static_cast<Stream<K>*>(scratch);
  const Layer& layer = *task.layer;
  constexpr int kWidth = kUnits * W;
  for (int row = 0; row < task.rows; row += kStreamed) {
    const int rows = task.rows - row < kStreamed ? task.rows - row : kStreamed;
    for (int feature = 0; feature < layer.in; feature += W) {
      const int features = layer.in - feature < W ? layer.in - feature : W;
      for (int r = 0; r < rows; ++r)
        evaluate_row<K>(layer, task.x + static_cast<size_t>(row + r) * layer.in, feature, stream,
                        r);
      for (int output = task.first; output < task.last; output += kWidth) {
        const int width = task.last - output < kWidth ? task.last - output : kWidth;
        const int vectors = (width + W - 1) / W;
        const bool full = width == vectors * W;
        const M last = first(width - (vectors - 1) * W);
        for (int r = 0; r < rows; ++r) {
          float* y = task.y + static_cast<size_t>(row + r) * layer.out + output;
          switch (vectors) {
            case 1:
              add_row<K, 1>(layer, stream, r, features, output, full, last, feature == 0, y);
              break;
            case 2:
              add_row<K, 2>(layer, stream, r, features, output, full, last, feature == 0, y);
              break;
            case 3:
              add_row<K, 3>(layer, stream, r, features, output, full, last, feature == 0, y);
              break;
            default:
              add_row<K, 4>(layer, stream, r, features, output, full, last, feature == 0, y);
          }
        }
      }
    }
  }
}

constexpr size_t kScratchBytes = sizeof(Block<kan::kMaxOrder>) > sizeof(Stream<kan::kMaxOrder>)
                                     ? sizeof(Block<kan::kMaxOrder>)
                                     : sizeof(Stream<kan::kMaxOrder>);

// --- Choosing. -----------------------------------------------------------------------------------

template <int K>
void run_order(const Task& task, void* scratch) {
  const int knots = task.layer->functions + K + 1;
  if (task.rows < kGroupRows || knots >= 64) return run_streamed<K>(task, scratch);
  if (knots < 16) return run_grouped<K, 4>(task, scratch);
  if (knots < 32) return run_grouped<K, 5>(task, scratch);
  run_grouped<K, 6>(task, scratch);
}

void run(const Task& task, void* scratch) {
  switch (task.layer->order) {
    case 1:
      return run_order<1>(task, scratch);
    case 2:
      return run_order<2>(task, scratch);
    case 3:
      return run_order<3>(task, scratch);
    case 4:
      return run_order<4>(task, scratch);
    case 5:
      return run_order<5>(task, scratch);
  }
}

}  // namespace
