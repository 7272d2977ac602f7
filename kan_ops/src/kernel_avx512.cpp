// The kernel for AVX-512 as since Skylake.
#include "kernel.inl"

namespace {
bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace

const kan::Kernel kan::kAvx512 = {"avx512", available, kScratchBytes, kRows, run};
