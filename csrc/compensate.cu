// Gradient + residual, in one pass that also counts magnitudes; and samples of that sum. GRAD, WORK: dtypes.
#include "common.cuh"

#define BINS 2048  // the top 11 bits below the sign, as in select.cu
#define LANES 4    // elements that a thread takes at once

__device__ __forceinline__ u32 bin_of(float x) { return key_of(x) >> 20; }
__device__ __forceinline__ u32 bin_of(double x) { return (u32)(key_of(x) >> 52); }

// Four values side by side; p is aligned to the size of four.
__device__ __forceinline__ void load4(const float* p, float v[LANES]) {
    const float4 four = *(const float4*)p;
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
__device__ __forceinline__ void load4(const double* p, double v[LANES]) {
    const double2 low = ((const double2*)p)[0], high = ((const double2*)p)[1];
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}
__device__ __forceinline__ void load4(const half16* p, half16 v[LANES]) {
    const uint2 four = *(const uint2*)p;
    v[0].bits = (u16)four.x, v[1].bits = (u16)(four.x >> 16), v[2].bits = (u16)four.y, v[3].bits = (u16)(four.y >> 16);
}
__device__ __forceinline__ void load4(const bfloat16* p, bfloat16 v[LANES]) {
    const uint2 four = *(const uint2*)p;
    v[0].bits = (u16)four.x, v[1].bits = (u16)(four.x >> 16), v[2].bits = (u16)four.y, v[3].bits = (u16)(four.y >> 16);
}
__device__ __forceinline__ void store4(float* p, const float v[LANES]) {
    *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store4(double* p, const double v[LANES]) {
    ((double2*)p)[0] = make_double2(v[0], v[1]), ((double2*)p)[1] = make_double2(v[2], v[3]);
}

// out = grad + residual, hist += how many magnitudes are in each bin of each block of the layout, but for bin 0.
//
// residual: null for zeros. out: null if grad, of dtype WORK, is only looked at. hist: (blocks, BINS), or null. slot:
// (rounds, blocks). The grid has a multiple of `blocks` blocks; each goes through pieces of one block of the layout, so
// that it counts in shared memory. Bin 0, zeros mostly, is what is left of a block's positions.
KERNEL compensate(const GRAD* grad, const WORK* residual, WORK* out, u8* flags, u64* hist, const i64* slot, i64 numel,
                  i64 blocks, i64 tile, i64 rounds) {
    __shared__ u32 counts[BINS];
    for (u32 b = threadIdx.x; b < BINS; b += THREADS) counts[b] = 0;
    __syncthreads();
    const i64 block = blockIdx.x % blocks, chunk = blockIdx.x / blocks, chunks = gridDim.x / blocks;
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const i64 length = rounds * tile, piece = (i64)THREADS * LANES;
    const bool vectors = ((u64)grad % (LANES * sizeof(GRAD)) % 16) == 0 && aligned(residual) && aligned(out);
    u32 bad = 0;
    for (i64 at = chunk * piece + (i64)threadIdx.x * LANES; at < length; at += chunks * piece) {
        WORK sum[LANES];
        const bool whole = at + LANES <= length && side_by_side(at, cut);
        const i64 first = to_global(at, cut);
        if (vectors && whole && first % LANES == 0 && first + LANES <= numel) {
            GRAD g[LANES];
            load4(grad + first, g);
            for (int e = 0; e < LANES; e++) sum[e] = widen(g[e]);
            if (residual) {
                WORK r[LANES];
                load4(residual + first, r);
                for (int e = 0; e < LANES; e++) sum[e] = plus(sum[e], r[e]);
            }
            if (out) store4(out + first, sum);
        } else {
            for (int e = 0; e < LANES; e++) {
                const i64 j = at + e < length ? to_global(at + e, cut) : numel;
                sum[e] = 0;
                if (j < numel) {  // padding comes last
                    sum[e] = widen(grad[j]);
                    if (residual) sum[e] = plus(sum[e], residual[j]);
                    if (out) out[j] = sum[e];
                }
            }
        }
        for (int e = 0; e < LANES; e++) {
            const u32 bin = bin_of(sum[e]);
            bad |= is_finite(sum[e]) ? 0 : NONFINITE;
            if (hist && bin) atomicAdd(counts + bin, 1u);
        }
    }
    bad = block_or(bad);
    if (threadIdx.x == 0) raise_flag(flags, bad);
    if (hist)
        for (u32 b = threadIdx.x; b < BINS; b += THREADS)
            if (counts[b]) atomicAdd(hist + block * BINS + b, (u64)counts[b]);
}

// One element of grad + residual of each of `count` shares of n elements; all, if n is not more than that.
KERNEL sample(const GRAD* grad, const WORK* residual, i64 n, i64 count, WORK* out) {
    const i64 most = n < count ? n : count;
    for (i64 i = first_item(); i < most; i += stride()) {
        i64 at = i;
        if (n > count) {
            const u64 chance = (u64)i * 0x9E3779B97F4A7C15ull >> 40;  // 24 bits
            // i n / count in parts, which do not overflow.
            const u64 within = (u64)i * (u64)(n % count) + ((u64)(chance * (u64)n) >> 24);
            at = i * (n / count) + (i64)(within / (u64)count);
        }
        const WORK x = widen(grad[at]);
        out[i] = residual ? plus(x, residual[at]) : x;
    }
}
