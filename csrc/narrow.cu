// Values in a narrower dtype. WORK: float or double; WIRE: float, bfloat16 or half16.

#include "common.cuh"

#define EACH 4  // loads that a thread has on their way at once

__device__ __forceinline__ float most(float) { return largest(0.0f); }
__device__ __forceinline__ float most(bfloat16) { return from_bits(0x7F7F0000u); }
__device__ __forceinline__ float most(half16) { return 65504; }

// To nearest even, by way of float32; finite values stay finite. decoded: what a receiver reads.
KERNEL narrow(const WORK* value, i64 k, WIRE* out, WORK* decoded) {
    const float limit = most(WIRE());
    for (i64 base = (i64)blockIdx.x * THREADS * EACH + threadIdx.x; base < k; base += stride() * EACH) {
        WORK x[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) x[j] = base + j * THREADS < k ? value[base + j * THREADS] : (WORK)0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const i64 at = base + j * THREADS;
            if (at >= k) continue;
            float cut = to_float(x[j]);
            if (is_finite(x[j])) cut = cut > limit ? limit : cut < -limit ? -limit : cut;
            WIRE short_;
            cast(cut, short_);
            out[at] = short_;
            cast(widen(short_), decoded[at]);
        }
    }
}
