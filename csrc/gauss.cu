// Gaussian-k's threshold: mean + z deviation of a vector, then halved or raised by how many magnitudes exceed it.
// Shi et al., arXiv 1911.08772. WORK: dtype. Sums are made in an order that depends on n only.
#include "common.cuh"

#define PARTS 1024    // of a vector, each summed by one block
#define EACH 8        // loads that a thread has on their way at once
#define THRESHOLD 0   // words of the state: what came of the last adjustment
#define COUNTED 1     // what was counted for last
#define LEFT 2        // adjustments that are left; 0: it stays

struct Moments {
    double total, square;
};

// The sum over all threads, the same for all of them. scratch: (2 * WARPS,) shared. Barriers.
__device__ __forceinline__ Moments summed(Moments own, double* scratch) {
    for (int by = 16; by; by /= 2) {
        own.total += __shfl_xor_sync(ALL, own.total, by);
        own.square += __shfl_xor_sync(ALL, own.square, by);
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = own.total, scratch[WARPS + threadIdx.x / 32] = own.square;
    __syncthreads();
    Moments all = {0, 0};
    for (int w = 0; w < WARPS; w++) all.total += scratch[w], all.square += scratch[WARPS + w];
    return all;
}

// Of x - x[0], so that what all elements share does not drown what they differ in; elements begin, begin + THREADS, ...
__device__ __forceinline__ Moments moments_of(const WORK* x, i64 begin, i64 end) {
    const WORK first = x[0];
    const double shift = (double)first;
    Moments own = {0, 0};
    for (i64 base = begin + threadIdx.x; base < end; base += EACH * THREADS) {
        WORK part[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) part[j] = base + j * THREADS < end ? x[base + j * THREADS] : first;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const double d = (double)part[j] - shift;
            if (base + j * THREADS < end) own.total += d, own.square += d * d;
        }
    }
    return own;
}

__device__ __forceinline__ double threshold_of(const WORK* x, i64 n, double z, Moments all) {
    const double mean = all.total / (double)n, variance = all.square / (double)n - mean * mean;
    return mean + (double)x[0] + z * sqrt(variance > 0 || variance != variance ? variance : 0);
}

// How the threshold goes on after `found` magnitudes exceeded it; false: it stays for good.
__device__ __forceinline__ bool adjust(double& threshold, double found, double wanted, double doubt) {
    if (found < 2 * wanted / 3 - doubt)
        threshold *= 0.5;
    else if (found > 4 * wanted / 3 + doubt)
        threshold *= 1.5;
    else
        return false;
    return true;
}

// What the magnitudes that exceed a threshold exceed, too, in their own dtype: many GPUs are slow at doubles.
__device__ __forceinline__ double bound_of(double threshold, double) { return threshold; }
__device__ __forceinline__ float bound_of(double threshold, float) {
    if (threshold < 0) return -1;
    const float near = (float)threshold;
    return (double)near > threshold ? from_bits(bits_of(near) - 1) : near;  // down; from inf to the largest
}

// How many magnitudes of this thread's elements exceed a threshold: elements begin, begin + step, ...
__device__ __forceinline__ u32 exceeding(const WORK* x, i64 begin, i64 n, i64 step, double threshold) {
    const WORK bound = bound_of(threshold, (WORK)0);
    u32 found = 0;
    for (i64 base = begin; base < n; base += EACH * step) {
        WORK part[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) part[j] = base + j * step < n ? x[base + j * step] : (WORK)0;
#pragma unroll
        for (int j = 0; j < EACH; j++) found += base + j * step < n && fabs(part[j]) > bound;
    }
    return found;
}

// All of it by one block of threads, for a vector that one block is soon through with. out: (2,) as in the interface.
KERNEL gaussian_small(const WORK* x, i64 n, double z, double wanted, double doubt, i64 times, double* out) {
    __shared__ double scratch[2 * WARPS];
    __shared__ u64 found;
    double threshold = threshold_of(x, n, z, summed(moments_of(x, 0, n), scratch)), counted = threshold;
    for (i64 t = 0; t < times; t++) {
        __syncthreads();
        if (threadIdx.x == 0) found = 0;
        __syncthreads();
        const u32 own = exceeding(x, threadIdx.x, n, THREADS, threshold);
        if (own) atomicAdd(&found, (u64)own);
        __syncthreads();
        counted = threshold;
        if (!adjust(threshold, (double)found, wanted, doubt)) break;  // alike for all threads
    }
    if (threadIdx.x == 0) out[0] = counted, out[1] = threshold;
}

// partial (2, PARTS): the sums of each part.
KERNEL moments(const WORK* x, i64 n, double* partial) {
    __shared__ double scratch[2 * WARPS];
    const i64 part = (n + PARTS - 1) / PARTS, begin = (i64)blockIdx.x * part;
    const Moments all = summed(moments_of(x, begin, begin + part < n ? begin + part : n), scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = all.total, partial[PARTS + blockIdx.x] = all.square;
}

// One block: the first threshold, from the parts.
KERNEL begin(const WORK* x, i64 n, double z, i64 times, const double* partial, double* state) {
    __shared__ double scratch[2 * WARPS];
    Moments own = {0, 0};
    for (int i = threadIdx.x; i < PARTS; i += THREADS) own.total += partial[i], own.square += partial[PARTS + i];
    const double threshold = threshold_of(x, n, z, summed(own, scratch));
    if (threadIdx.x == 0) state[COUNTED] = state[THRESHOLD] = threshold, state[LEFT] = (double)times;
}

// found += how many magnitudes exceed the threshold, if that may still change.
KERNEL count(const WORK* x, i64 n, const double* state, u64* found) {
    __shared__ u64 total;
    if (state[LEFT] <= 0) return;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    const double threshold = state[THRESHOLD];
    u32 own = exceeding(x, first_item(), n, stride(), threshold);
    for (int by = 16; by; by /= 2) own += __shfl_xor_sync(ALL, own, by);
    if ((threadIdx.x & 31) == 0 && own) atomicAdd(&total, (u64)own);
    __syncthreads();
    if (threadIdx.x == 0 && total) atomicAdd(found, total);
}

// One thread: what comes of a count.
KERNEL adjusted(double* state, const u64* found, double wanted, double doubt) {
    if (first_item() || state[LEFT] <= 0) return;
    state[COUNTED] = state[THRESHOLD];
    state[LEFT] = adjust(state[THRESHOLD], (double)*found, wanted, doubt) ? state[LEFT] - 1 : 0;
}
