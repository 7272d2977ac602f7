// The kernel for AVX-512 as since Ice Lake and Zen 4, which sorts bytes.
#include "kernel.inl"

namespace {
bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2");
}
}  // namespace

const kan::Kernel kan::kAvx512Vbmi2 = {"avx512vbmi2", available, kScratchBytes, kRows, run};
