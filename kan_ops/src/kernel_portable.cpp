// The kernel for any processor.
#include "kernel.inl"

namespace {
bool available() { return true; }
}  // namespace

const kan::Kernel kan::kPortable = {"portable", available, kScratchBytes, kRows, run};
