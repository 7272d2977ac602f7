// Random layers on every kernel that this processor has, against the recursion in double. Built
// with sanitizers (CMakeLists.txt): every buffer has exactly the size that the kernel may touch.
//
//   kan_ops_fuzz [seconds [seed]]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "kernel.h"

namespace {

using Random = std::mt19937_64;

int any(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

double activate(kan::Activation activation, double x) {
  switch (activation) {
    case kan::Activation::silu:
      return x / (1 + std::exp(-x));
    case kan::Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case kan::Activation::relu:
      return std::max(x, 0.0);
    case kan::Activation::tanh:
      return std::tanh(x);
    default:
      return x;
  }
}

// All functions of one input, by the recursion of Cox and de Boor.
std::vector<double> evaluate(const std::vector<double>& t, int order, double x) {
  std::vector<double> b(t.size() - 1);
  for (size_t i = 0; i < b.size(); ++i) b[i] = t[i] <= x && x < t[i + 1];
  for (int p = 1; p <= order; ++p) {
    for (size_t i = 0; i + 1 < b.size(); ++i)
      b[i] = (x - t[i]) / (t[i + p] - t[i]) * b[i] +
             (t[i + p + 1] - x) / (t[i + p + 1] - t[i + 1]) * b[i + 1];
    b.pop_back();
  }
  return b;
}

struct Case {
  kan::Layer layer;
  std::vector<float> knots, weights, x;
  std::vector<int> block;
  int rows;

  explicit Case(Random& random) {
    std::normal_distribution<float> normal;
    layer.order = any(random, kan::kMinOrder, kan::kMaxOrder);
    const int grid = any(random, 0, 3) ? any(random, 1, 12) : any(random, 1, 90);
    layer.functions = grid + layer.order;
    layer.in = any(random, 0, 3) ? any(random, 1, 20) : any(random, 1, 150);
    layer.out = any(random, 0, 3) ? any(random, 1, 40) : any(random, 1, 300);
    layer.unit = any(random, 0, 1) ? 1.0f : 0.75f;
    layer.activation = static_cast<kan::Activation>(any(random, 0, 4));
    rows = any(random, 0, 1) ? any(random, 1, 20) : any(random, 1, 128);

    const int count = layer.functions + layer.order + 1;
    knots.resize(static_cast<size_t>(count) * layer.in);
    const bool adapted = any(random, 0, 1);
    for (int i = 0; i < layer.in; ++i)
      for (int j = 0; j < count; ++j) {
        const double moved = adapted ? std::uniform_real_distribution<>(-0.45, 0.45)(random) : 0.0;
        knots[static_cast<size_t>(j) * layer.in + i] =
            static_cast<float>((j - layer.order + moved) * 2 / grid - 1);
      }
    weights.resize(static_cast<size_t>(layer.functions + 1) * layer.in * layer.out);
    for (float& weight : weights) weight = normal(random);
    block.resize(static_cast<size_t>(layer.functions) + 1);
    for (size_t f = 0; f < block.size(); ++f) block[f] = static_cast<int>(f);
    std::shuffle(block.begin(), block.end() - 1, random);
    x.resize(static_cast<size_t>(rows) * layer.in);
    const float spread = any(random, 0, 1) ? 0.5f : 3.0f;
    for (size_t i = 0; i < x.size(); ++i) {
      const int kind = any(random, 0, 40);
      x[i] = spread * normal(random);
      if (kind < 8)
        x[i] = knots[static_cast<size_t>(any(random, 0, count - 1)) * layer.in + i % layer.in];
      if (kind == 8) x[i] *= 1e30f;
      if (kind == 9 && layer.activation == kan::Activation::tanh) x[i] = std::copysign(3e38f, x[i]);
    }
    if (!any(random, 0, 4)) {
      const float strange[] = {std::numeric_limits<float>::quiet_NaN(),
                               std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity()};
      x[static_cast<size_t>(any(random, 0, static_cast<int>(x.size()) - 1))] =
          strange[any(random, 0, 2)];
    }
    layer.knots = knots.data();
    layer.weights = weights.data();
    layer.block = block.data();
  }

  // What is right for an output, and by how much it may be missed.
  void answer(int row, int output, const std::vector<std::vector<double>>& values, double* right,
              double* allowed) const {
    *right = *allowed = 0;
    for (int i = 0; i < layer.in; ++i) {
      const float at = x[static_cast<size_t>(row) * layer.in + i];
      for (int f = 0; f <= layer.functions; ++f) {
        const size_t line = static_cast<size_t>(block[static_cast<size_t>(f)]) * layer.in + i;
        const double weight = weights[line * layer.out + output];
        double value = f < layer.functions ? layer.unit * values[i][static_cast<size_t>(f)]
                                           : activate(layer.activation, at);
        *right += std::isfinite(at) ? weight * value : std::numeric_limits<double>::quiet_NaN();
        *allowed += std::abs(weight) * (5e-7 * std::abs(value) + (f < layer.functions ? 2e-7 : 0));
      }
    }
  }
};

bool check(const Case& one, const kan::Kernel& kernel, Random& random) {
  const kan::Layer& layer = one.layer;
  const int first = layer.out > 64 && any(random, 0, 1) ? 64 : 0;
  const int last = layer.out > 128 && any(random, 0, 1) ? 128 : layer.out;
  std::vector<float> y(static_cast<size_t>(one.rows) * layer.out, 7.0f);
  std::unique_ptr<void, decltype(&std::free)> scratch(
      std::aligned_alloc(64, (kernel.scratch_bytes + 63) / 64 * 64), &std::free);
  kernel.run({&layer, one.x.data(), y.data(), one.rows, first, last}, scratch.get());
  const int row = any(random, 0, one.rows - 1);
  std::vector<std::vector<double>> values;
  for (int i = 0; i < layer.in; ++i) {
    std::vector<double> t;
    for (size_t j = static_cast<size_t>(i); j < one.knots.size(); j += layer.in)
      t.push_back(one.knots[j]);
    values.push_back(evaluate(t, layer.order, one.x[static_cast<size_t>(row) * layer.in + i]));
  }
  for (int output = 0; output < layer.out; ++output) {
    const float found = y[static_cast<size_t>(row) * layer.out + output];
    double right = 7, allowed = 0;
    if (output >= first && output < last) one.answer(row, output, values, &right, &allowed);
    const bool same = std::isnan(right) ? std::isnan(found) : std::abs(found - right) <= allowed;
    if (!same) {
      std::printf("%s: in %d, out %d, order %d, functions %d, rows %d: y[%d][%d] is %g, not %g\n",
                  kernel.name, layer.in, layer.out, layer.order, layer.functions, one.rows, row,
                  output, found, right);
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
  const unsigned long long seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  std::vector<const kan::Kernel*> kernels;
  for (const kan::Kernel* kernel : kan::kKernels)
    if (kernel->available()) kernels.push_back(kernel);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  Random random(seed);
  long layers = 0;
  for (; std::chrono::steady_clock::now() < end; ++layers) {
    const Case one(random);
    for (const kan::Kernel* kernel : kernels)
      if (!check(one, *kernel, random)) {
        std::printf("seed %llu, layer %ld\n", seed, layers);
        return 1;
      }
  }
  std::printf("%ld layers right on", layers);
  for (const kan::Kernel* kernel : kernels) std::printf(" %s", kernel->name);
  std::printf("\n");
  return 0;
}
