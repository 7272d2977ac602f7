// The kernel for AVX2 with FMA.
#include "kernel.inl"

namespace {
bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

const kan::Kernel kan::kAvx2 = {"avx2", available, kScratchBytes, kRows, run};
