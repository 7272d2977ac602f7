// What the kernel asks of a processor, for the instructions that this file is compiled for.
//
// F is a vector of W floats, I of as many int32, M one bool for each. Everything is inline and has
// internal linkage: the same source is compiled four times into one library, and the linker must
// not take a function of one for that of another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define KAN_SIMD_AVX512
#elif defined(__AVX2__)
#include <immintrin.h>
#define KAN_SIMD_AVX2
#endif

namespace {

#if defined(KAN_SIMD_AVX512)

constexpr int W = 16;
constexpr int kRegisters = 32;
using F = __m512;
using I = __m512i;
using M = __mmask16;

inline F set(float v) { return _mm512_set1_ps(v); }
inline I set_int(int v) { return _mm512_set1_epi32(v); }
inline I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline I load_int(const int* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store_int(int* p, I v) { _mm512_storeu_si512(p, v); }
inline M first(int n) { return n >= W ? M(0xffff) : M((1u << n) - 1); }
inline F load(const float* p, M m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, M m, F v) { _mm512_mask_storeu_ps(p, m, v); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline F power_of_two(F n) { return _mm512_scalef_ps(set(1.0f), n); }
// a / b to within a rounding, for b far from the ends of the range; a division takes four times as
// long.
inline F divide(F a, F b) {
  const F rough = _mm512_rcp14_ps(b);
  const F reciprocal = fma(_mm512_fnmadd_ps(b, rough, set(1.0f)), rough, rough);
  const F quotient = a * reciprocal;
  return fma(_mm512_fnmadd_ps(quotient, b, a), reciprocal, quotient);
}
inline F lost_by_product(F a, F b, F product) { return _mm512_fmsub_ps(a, b, product); }
// 1 / (a - b), rounded nearly once: by Newton's step with what a - b itself loses (D. Knuth).
inline F one_over_difference(F a, F b) {
  const F d = a - b;
  const F subtracted = a - d;
  const F lost = (a - (d + subtracted)) + (subtracted - b);
  const F rough = _mm512_rcp14_ps(d);
  const F finer = fma(_mm512_fnmadd_ps(d, rough, set(1.0f)), rough, rough);
  return fma(_mm512_fnmadd_ps(lost, finer, _mm512_fnmadd_ps(d, finer, set(1.0f))), finer, finer);
}
inline M less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline M below(I a, I b) { return _mm512_cmplt_epu32_mask(a, b); }  // unsigned
inline M both(M a, M b) { return a & b; }
inline F where(M m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
inline I where(M m, I a, I b) { return _mm512_mask_blend_epi32(m, b, a); }
inline F zero_unless(M m, F a) { return _mm512_maskz_mov_ps(m, a); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline F gather(const float* p, I i) {  // GCC 12 warns of the one without a mask
  return _mm512_mask_i32gather_ps(set(0.0f), 0xffff, i, p, 4);
}

inline I gather(const int* p, I i) {
  return _mm512_mask_i32gather_epi32(set_int(0), 0xffff, i, p, 4);
}
// Of a table with so many entries.
inline I lookup(const int* table, int entries, I i) {
  if (entries > W) return gather(table, i);
  const I held = _mm512_maskz_loadu_epi32((1u << entries) - 1, table);
  return _mm512_maskz_permutexvar_epi32(0xffff, i, held);
}

// Tables in registers: a permutation instead of a gather.
template <int Vectors>
inline F lookup(const float* table, I i) {
  if constexpr (Vectors == 1) return _mm512_permutexvar_ps(i, load(table));
  if constexpr (Vectors == 2) return _mm512_permutex2var_ps(load(table), i, load(table + W));
  return gather(table, i);
}

#elif defined(KAN_SIMD_AVX2)

constexpr int W = 8;
constexpr int kRegisters = 16;
using F = __m256;
using I = __m256i;
using M = __m256i;

inline F set(float v) { return _mm256_set1_ps(v); }
inline I set_int(int v) { return _mm256_set1_epi32(v); }
inline I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline I load_int(const int* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void store_int(int* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline M first(int n) { return _mm256_cmpgt_epi32(set_int(n), iota()); }
inline F load(const float* p, M m) { return _mm256_maskload_ps(p, m); }
inline void store(float* p, M m, F v) { _mm256_maskstore_ps(p, m, v); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F power_of_two(F n) {  // n from -126 to 127
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), set_int(127)), 23));
}
inline F divide(F a, F b) { return a / b; }
inline F lost_by_product(F a, F b, F product) { return _mm256_fmsub_ps(a, b, product); }
inline F one_over_difference(F a, F b) {  // as above
  const F d = a - b;
  const F subtracted = a - d;
  const F lost = (a - (d + subtracted)) + (subtracted - b);
  const F near = set(1.0f) / d;
  return fma(_mm256_fnmadd_ps(lost, near, _mm256_fnmadd_ps(d, near, set(1.0f))), near, near);
}
inline M less_equal(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
inline M below(I a, I b) {
  return _mm256_andnot_si256(_mm256_cmpeq_epi32(a, b),
                             _mm256_cmpeq_epi32(_mm256_min_epu32(a, b), a));
}
inline M both(M a, M b) { return _mm256_and_si256(a, b); }
inline F where(M m, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(m)); }
inline I where(M m, I a, I b) { return _mm256_blendv_epi8(b, a, m); }
inline F zero_unless(M m, F a) { return _mm256_and_ps(_mm256_castsi256_ps(m), a); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
inline F gather(const float* p, I i) { return _mm256_i32gather_ps(p, i, 4); }
inline I lookup(const int* table, int, I i) { return _mm256_i32gather_epi32(table, i, 4); }
template <int Vectors>
inline F lookup(const float* table, I i) {
  if constexpr (Vectors != 2) return gather(table, i);
  const F low = _mm256_permutevar8x32_ps(load(table), i);
  const F high = _mm256_permutevar8x32_ps(load(table + W), i);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}

#else  // the compiler's own vectors: any processor

constexpr int W = 4;
constexpr int kRegisters = 16;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
using M = I;
typedef uint32_t U __attribute__((vector_size(16)));

inline F set(float v) { return F{v, v, v, v}; }
inline I set_int(int v) { return I{v, v, v, v}; }
inline I iota() { return I{0, 1, 2, 3}; }
inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline I load_int(const int* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline void store_int(int* p, I v) { std::memcpy(p, &v, sizeof v); }
inline M first(int n) { return iota() < set_int(n); }
inline F load(const float* p, M m) {
  F v = set(0.0f);
  for (int l = 0; l < W; ++l)
    if (m[l]) v[l] = p[l];
  return v;
}
inline void store(float* p, M m, F v) {
  for (int l = 0; l < W; ++l)
    if (m[l]) p[l] = v[l];
}
inline F fma(F a, F b, F c) { return a * b + c; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F abs(F a) { return max(a, -a); }
inline F round(F a) {
  const F big = set(12582912.0f);  // 1.5 * 2^23: from there on floats are whole
  return (a + big) - big;
}
inline F power_of_two(F n) {
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  F v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline F divide(F a, F b) { return a / b; }
inline F lost_by_product(F a, F b, F product) {
  typedef double D __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(a, D) * __builtin_convertvector(b, D) -
                                     __builtin_convertvector(product, D),
                                 F);
}
inline F one_over_difference(F a, F b) {
  typedef double D __attribute__((vector_size(32)));
  return __builtin_convertvector(
      1.0 / (__builtin_convertvector(a, D) - __builtin_convertvector(b, D)), F);
}
inline M less_equal(F a, F b) { return a <= b; }
inline M below(I a, I b) { return (M)((U)a < (U)b); }
inline M both(M a, M b) { return a & b; }
inline F where(M m, F a, F b) { return m ? a : b; }
inline I where(M m, I a, I b) { return m ? a : b; }
inline F zero_unless(M m, F a) { return m ? a : set(0.0f); }
inline I add(I a, I b) { return a + b; }
inline I multiply(I a, I b) { return a * b; }
inline F gather(const float* p, I i) { return F{p[i[0]], p[i[1]], p[i[2]], p[i[3]]}; }
inline I lookup(const int* table, int, I i) {
  return I{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
}
template <int>
inline F lookup(const float* table, I i) {
  return gather(table, i);
}

#endif

}  // namespace
