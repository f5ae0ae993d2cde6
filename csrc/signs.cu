// Signs of vectors as bitmaps, and back. GRAD: what is looked at; WORK: what is written.

#include "common.cuh"

#define PACK (16 / sizeof(WORK))  // numbers that are read or written at once
#define STRETCH 8192              // elements whose magnitudes a block adds up on its own

struct __align__(16) Numbers {
    WORK at[PACK];
};

__device__ __forceinline__ bool is_negative(GRAD x) { return (bits_of(x) >> (8 * sizeof(GRAD) - 1)) & 1; }

// A warp takes 32 words of 32 elements: lane l reads element l of each word, and keeps what the warp finds of word l.
// Eight loads are on their way at once. present may be null; where it is not, rule is to be 0.
KERNEL pack_signs(const GRAD* x, i64 n, i64 rule, i64 seed, i64 first, u32* out, u32* present, u8* flags) {
    const u32 lane = threadIdx.x & 31, key = mix((u32)seed);
    u32 bad = 0;
    for (i64 tile = first_item() / 32; tile * 1024 < n; tile += stride() / 32) {
        const i64 left = n - tile * 1024;
        const u32 room = left < 1024 ? (u32)left : 1024;
        const GRAD* from = x + tile * 1024 + lane;
        u32 minus = 0, some = 0;
#pragma unroll 1
        for (u32 j = 0; j < 32; j += 8) {
            GRAD part[8];
#pragma unroll
            for (u32 i = 0; i < 8; i++) part[i] = 32 * (j + i) + lane < room ? from[32 * (j + i)] : GRAD();
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                const u32 m = __ballot_sync(ALL, is_negative(part[i])), s = __ballot_sync(ALL, is_nonzero(part[i]));
                bad |= is_finite(part[i]) ? 0 : NONFINITE;
                if (lane == j + i) {
                    minus = m;
                    some = s;
                }
            }
        }
        if (32 * lane < room) {
            const u32 elements = room - 32 * lane;
            const u32 used = elements < 32 ? (1u << elements) - 1 : ALL;
            const i64 word = tile * 32 + lane;
            out[word] = (minus & some) | (ruled(rule, (u32)first + (u32)word, key) & ~some & used);
            if (present) present[word] = some;
        }
    }
    bad = block_or(bad);
    if (threadIdx.x == 0) raise_flag(flags, bad);
}

__device__ __forceinline__ WORK number(u32 minus, u32 may, u32 bit, WORK scale) {
    return !(may >> bit & 1) ? (WORK)0 : minus >> bit & 1 ? -scale : scale;
}

// out = (or, if adding, out +=) -scale where a bit of words is 1, scale where it is 0; 0 where present is not null and 0.
KERNEL signs(const u32* words, const u32* present, const WORK* scale, WORK* out, i64 n, i64 adding) {
    const WORK worth = *scale;
    const i64 packs = aligned(out) ? n / (i64)PACK : 0;
    for (i64 i = first_item(); i < packs; i += stride()) {
        const i64 word = i * (i64)PACK / 32;
        const u32 bit = (u32)(i * (i64)PACK % 32), minus = words[word], may = present ? present[word] : ALL;
        Numbers* to = (Numbers*)out + i;
        Numbers sum;
        if (adding) sum = *to;
#pragma unroll
        for (u32 j = 0; j < PACK; j++) {
            const WORK value = number(minus, may, bit + j, worth);
            sum.at[j] = adding ? sum.at[j] + value : value;
        }
        *to = sum;
    }
    for (i64 i = packs * (i64)PACK + first_item(); i < n; i += stride()) {
        const WORK value = number(words[i / 32], present ? present[i / 32] : ALL, (u32)(i % 32), worth);
        out[i] = adding ? out[i] + value : value;
    }
}

// Adds up one number of each thread, in an order that never changes; the sum is in sums[0]. Barriers.
__device__ __forceinline__ void block_sum(double value, double* sums) {
    __syncthreads();
    sums[threadIdx.x] = value;
    for (u32 half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
}

// The sum of magnitudes of every STRETCH elements: which block does it makes no difference.
KERNEL absolute_sums(const GRAD* x, i64 n, double* part) {
    __shared__ double sums[THREADS];
    for (i64 s = blockIdx.x; s * STRETCH < n; s += gridDim.x) {
        const i64 left = n - s * STRETCH;
        const u32 room = left < STRETCH ? (u32)left : STRETCH;
        const GRAD* from = x + s * STRETCH;
        double sum = 0;
#pragma unroll 8
        for (u32 i = threadIdx.x; i < room; i += THREADS) sum += fabs((double)widen(from[i]));
        block_sum(sum, sums);
        if (threadIdx.x == 0) part[s] = sums[0];
    }
}

// The sum of all of them, by one block.
KERNEL total(const double* part, i64 count, double* out) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (i64 i = threadIdx.x; i < count; i += THREADS) sum += part[i];
    block_sum(sum, sums);
    if (threadIdx.x == 0) *out = sums[0];
}
