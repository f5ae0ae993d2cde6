// Values as int8 with a scale for each group, stochastic rounding to bfloat16, and the checksum. WORK: float, double.

#include "common.cuh"

#define GROUP 32
#define SCALE_BIAS 134
#define EACH 4  // loads that a thread has on their way at once

__device__ __forceinline__ double power(int exponent) { return from_bits((u64)(exponent + 1023) << 52); }

// To nearest even; finite values stay finite.
__device__ __forceinline__ float single(float x) { return x; }
__device__ __forceinline__ float single(double x) {
    const float most = largest(0.0f), cut = (float)x;
    return is_finite(cut) || !is_finite(x) ? cut : x > 0 ? most : -most;
}

// The scale byte of a group, from the bits of its largest finite magnitude.
__device__ __forceinline__ u32 scale_of(u32 bits) {
    const u32 exponent = bits >> 23;
    return exponent ? exponent + 1 : bits >> 22;
}

// A warp takes EACH groups at a time. seed: below 0 for rounding to nearest.
KERNEL quantize(const WORK* value, i64 k, u8* scale, signed char* code, i64 seed, WORK* decoded) {
    const u32 lane = threadIdx.x & 31, key = mix((u32)seed);
    for (i64 group = first_item() / 32 * EACH; group * GROUP < k; group += stride() / 32 * EACH) {
        float x[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = (group + j) * GROUP + lane;
            x[j] = at < k ? single(value[at]) : 0;
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            u32 most = is_finite(x[j]) ? key_of(x[j]) : 0;
#pragma unroll
            for (int by = 16; by; by /= 2) {
                const u32 other = __shfl_xor_sync(ALL, most, by);
                if (other > most) most = other;
            }
            const i64 at = (group + j) * GROUP + lane;
            const u32 byte = scale_of(most);
            double exact = (double)x[j] * power(SCALE_BIAS - (int)byte);
            exact = seed < 0 ? rint(exact) : floor(exact + noise((u32)at, key) * (1.0 / 4294967296.0));
            const int number = exact != exact ? 0 : exact > 127 ? 127 : exact < -127 ? -127 : (int)exact;
            if (at < k) {
                if (lane == 0) scale[group + j] = (u8)byte;
                code[at] = (signed char)number;
                decoded[at] = (WORK)(number * power((int)byte - SCALE_BIAS));
            }
        }
    }
}

KERNEL dequantize(const u8* scale, const signed char* code, i64 k, WORK* out, u8* flags) {
    u32 bad = 0;
    for (i64 base = (i64)blockIdx.x * THREADS * EACH + threadIdx.x; base < k; base += stride() * EACH) {
        int number[EACH];
        u32 byte[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = base + j * THREADS;
            number[j] = at < k ? code[at] : 0;
            byte[j] = at < k ? scale[at / GROUP] : 0;
        }
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = base + j * THREADS;
            if (number[j] < -127) bad = DAMAGED;
            const int kept = number[j] < -127 ? -127 : number[j];
            if (at < k) out[at] = (WORK)(kept * power((int)byte[j] - SCALE_BIAS));
        }
    }
    bad = block_or(bad);
    if (threadIdx.x == 0) raise_flag(flags, bad);
}

// The discarded half of each magnitude plus 16 random bits carry into the kept half, or not.
KERNEL round_stochastic(const u32* x, i64 n, i64 seed, u16* out) {
    const u32 key = mix((u32)seed);
    for (i64 base = (i64)blockIdx.x * THREADS * EACH + threadIdx.x; base < n; base += stride() * EACH) {
        u32 word[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) word[j] = base + j * THREADS < n ? x[base + j * THREADS] : 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = base + j * THREADS;
            if (at >= n) continue;
            const u32 magnitude = word[j] & 0x7FFFFFFFu;
            u32 kept = (magnitude + (noise((u32)at, key) >> 16)) >> 16;
            if (kept > 0x7F7F) kept = 0x7F7F;
            if (magnitude >= 0x7F800000u) kept = magnitude > 0x7F800000u ? 0x7FC0 : 0x7F80;
            out[at] = (u16)(kept | (word[j] >> 16 & 0x8000));
        }
    }
}

// Adds to a zeroed word; word 3, where the sum is to be stored, counts as 0.
KERNEL checksum(const u32* words, i64 count, u32* out) {
    __shared__ u32 scratch[WARPS];
    u32 sum = 0;
    for (i64 base = (i64)blockIdx.x * THREADS * EACH + threadIdx.x; base < count; base += stride() * EACH) {
        u32 word[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) word[j] = base + j * THREADS < count ? words[base + j * THREADS] : 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = base + j * THREADS;
            if (at < count) sum += mix((at == 3 ? 0 : word[j]) ^ ((u32)at * 0x9E3779B9u));
        }
    }
    u32 all;
    block_exclusive(sum, scratch, all);
    if (threadIdx.x == 0) atomicAdd(out, all);
}
