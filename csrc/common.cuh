// What all kernels share. No header is included anywhere, so that NVRTC needs nothing but this text.
//
// Kernels are grid-stride loops over blocks of THREADS threads. Arguments have 8 bytes: pointers, i64 and double.
// dtypes are macros (WORK, GRAD, ...), so a text is compiled once for each combination that is used.
// Integer atomics only: results depend neither on the order of blocks nor on that of threads.
#pragma once

#define THREADS 256
#define WARPS (THREADS / 32)
#define ALL 0xFFFFFFFFu
// Blocks that a multiprocessor is to hold at once: so many registers a thread may use. A text may say another number.
#ifndef RESIDENT
#define RESIDENT 4
#endif
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

struct half16 {
    u16 bits;
};
struct bfloat16 {
    u16 bits;
};

#define NONFINITE 1u  // as in wire.py
#define DAMAGED 2u

#ifndef SPARCOMM_EMULATED
// Lets other warps go on, inside a loop that waits for another block.
__device__ __forceinline__ void spin() { __nanosleep(32); }
#endif

__device__ __forceinline__ i64 first_item() { return (i64)blockIdx.x * THREADS + threadIdx.x; }
__device__ __forceinline__ i64 stride() { return (i64)gridDim.x * THREADS; }

// ---- numbers -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u64 bits_of(double x) { return (u64)__double_as_longlong(x); }
__device__ __forceinline__ u16 bits_of(half16 x) { return x.bits; }
__device__ __forceinline__ u16 bits_of(bfloat16 x) { return x.bits; }
__device__ __forceinline__ float from_bits(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double from_bits(u64 bits) { return __longlong_as_double((i64)bits); }

// IEEE bits without the sign: NaN > inf > finite.
__device__ __forceinline__ u32 key_of(float x) { return bits_of(x) & 0x7FFFFFFFu; }
__device__ __forceinline__ u64 key_of(double x) { return bits_of(x) & 0x7FFFFFFFFFFFFFFFull; }

__device__ __forceinline__ bool is_finite(float x) { return key_of(x) < 0x7F800000u; }
__device__ __forceinline__ bool is_finite(double x) { return key_of(x) < 0x7FF0000000000000ull; }
__device__ __forceinline__ bool is_finite(half16 x) { return (x.bits & 0x7C00) != 0x7C00; }
__device__ __forceinline__ bool is_finite(bfloat16 x) { return (x.bits & 0x7F80) != 0x7F80; }

// Whether it is no zero of either sign; NaN is none.
__device__ __forceinline__ bool is_nonzero(float x) { return key_of(x) != 0; }
__device__ __forceinline__ bool is_nonzero(double x) { return key_of(x) != 0; }
__device__ __forceinline__ bool is_nonzero(half16 x) { return (x.bits & 0x7FFF) != 0; }
__device__ __forceinline__ bool is_nonzero(bfloat16 x) { return (x.bits & 0x7FFF) != 0; }

// The exact value, as float (double of double).
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return from_bits((u32)x.bits << 16); }
__device__ __forceinline__ float widen(half16 x) {
    const u32 sign = (u32)(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000u | (rest & 0x3FF) << 13);
    if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + 0x38000000u));
    // Subnormal: a multiple of 2^-24, exact in float32.
    return from_bits(sign | bits_of((float)rest * 5.9604644775390625e-8f));
}

// To nearest, ties to even; what is too large becomes inf, NaN the quiet one of its sign.
__device__ __forceinline__ bfloat16 narrow_bfloat16(float x) {
    const u32 bits = bits_of(x);
    bfloat16 out;
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        out.bits = (u16)((bits >> 16 & 0x8000) | 0x7FC0);
    else
        out.bits = (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    return out;
}
__device__ __forceinline__ half16 narrow_half(float x) {
    const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFFu;
    u32 out;
    if (rest > 0x7F800000u) {
        out = 0x7E00;
    } else if (rest >= 0x477FF000u) {  // 65520 and more round to inf
        out = 0x7C00;
    } else if (rest >= 0x38800000u) {  // 2^-14: normal
        out = (rest - 0x38000000u + 0xFFF + (rest >> 13 & 1)) >> 13;
    } else if (rest < 0x33000000u) {  // below 2^-25
        out = 0;
    } else {
        const u32 shift = 126 - (rest >> 23), mantissa = (rest & 0x7FFFFFu) | 0x800000u;  // 14 to 24
        const u32 kept = mantissa >> shift, cut = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
        out = kept + (cut > half || (cut == half && (kept & 1)) ? 1 : 0);
    }
    half16 result;
    result.bits = (u16)(sign | out);
    return result;
}

// A GPU's own conversions between these make one NaN of all; a CPU's keep the sign, and what there is room for.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) {
    const u64 bits = bits_of(x);
    if (x == x) return (float)x;
    return from_bits((u32)(bits >> 32 & 0x80000000u) | 0x7FC00000u | (u32)(bits >> 29 & 0x3FFFFFu));
}
__device__ __forceinline__ double to_double(float x) {
    const u32 bits = bits_of(x);
    if (x == x) return (double)x;
    return from_bits((u64)(bits & 0x80000000u) << 32 | 0x7FF8000000000000ull | (u64)(bits & 0x3FFFFFu) << 29);
}

// Casts as torch does, from the working dtype; float64 goes by way of float32 to 16 bits.
__device__ __forceinline__ void cast(float x, float& out) { out = x; }
__device__ __forceinline__ void cast(float x, double& out) { out = to_double(x); }
__device__ __forceinline__ void cast(double x, double& out) { out = x; }
__device__ __forceinline__ void cast(double x, float& out) { out = to_float(x); }
__device__ __forceinline__ void cast(float x, half16& out) { out = narrow_half(x); }
__device__ __forceinline__ void cast(double x, half16& out) { out = narrow_half(to_float(x)); }
__device__ __forceinline__ void cast(float x, bfloat16& out) { out = narrow_bfloat16(x); }
__device__ __forceinline__ void cast(double x, bfloat16& out) { out = narrow_bfloat16(to_float(x)); }

__device__ __forceinline__ float largest(float) { return from_bits(0x7F7FFFFFu); }
__device__ __forceinline__ double largest(double) { return from_bits((u64)0x7FEFFFFFFFFFFFFFull); }

// A sum whose NaN has the bits that CPUs give it, since NaNs are ordered by them, too.
__device__ __forceinline__ float plus(float a, float b) {
    const float sum = a + b;
    if (sum == sum) return sum;
    const u32 kept = key_of(a) > 0x7F800000u ? bits_of(a) : key_of(b) > 0x7F800000u ? bits_of(b) : 0xFFC00000u;
    return from_bits(kept | 0x00400000u);
}
__device__ __forceinline__ double plus(double a, double b) {
    const double sum = a + b;
    if (sum == sum) return sum;
    const u64 inf = 0x7FF0000000000000ull;
    const u64 kept = key_of(a) > inf ? bits_of(a) : key_of(b) > inf ? bits_of(b) : 0xFFF8000000000000ull;
    return from_bits(kept | (u64)1 << 51);
}

// A bijection of words in which every input bit reaches every output bit; the random words of positions, with
// key = mix(seed). Both as in kernels/bits.py.
__device__ __forceinline__ u32 mix(u32 w) {
    w = (w ^ (w >> 16)) * 0x7FEB352Du;
    w = (w ^ (w >> 15)) * 0x846CA68Bu;
    return w ^ (w >> 16);
}
__device__ __forceinline__ u32 noise(u32 place, u32 key) { return mix(mix(place ^ key) + key); }

// What a rule says at the 32 positions of a bitmap's word; rules are numbered as in kernels/interface_bits.py.
__device__ __forceinline__ u32 ruled(i64 rule, u32 word, u32 key) {
    return rule == 2 ? noise(word, key) : rule == 1 ? ALL : 0;
}

__device__ __forceinline__ bool aligned(const void* p) { return ((u64)p & 15) == 0; }

// ---- a layout's positions ----------------------------------------------------------------------------------------

// One block of a layout. slot may be null: one block, the vector itself.
struct Cut {
    const i64* slot;
    i64 block, blocks, tile, numel;
    int shift;  // of tile, if that is a power of two; -1: there is one round; -2: neither
};

__device__ __forceinline__ Cut cut_of(const i64* slot, i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel) {
    Cut cut;
    cut.slot = slot, cut.block = block, cut.blocks = blocks, cut.tile = tile, cut.numel = numel;
    cut.shift = rounds <= 1 ? -1 : (tile & (tile - 1)) == 0 ? __ffsll(tile) - 1 : -2;
    return cut;
}

// Layout.to_global of a position in [0, length); padding maps to numel or more. A division takes longer than a load.
__device__ __forceinline__ i64 to_global(i64 local, const Cut& cut) {
    if (!cut.slot) return local;
    const i64 turn = cut.shift >= 0 ? local >> cut.shift : cut.shift == -1 ? 0 : local / cut.tile;
    return (turn * cut.blocks + cut.slot[turn * cut.blocks + cut.block]) * cut.tile + (local - turn * cut.tile);
}
__device__ __forceinline__ i64 to_global(i64 local, const i64* slot, i64 block, i64 blocks, i64 tile) {
    const i64 turn = local / tile;
    return (turn * blocks + slot[turn * blocks + block]) * tile + (local - turn * tile);
}

// Whether four positions from local on lie side by side in the vector.
__device__ __forceinline__ bool side_by_side(i64 local, const Cut& cut) {
    if (!cut.slot || cut.shift >= 2) return true;
    return cut.shift == -1 ? local + 3 < cut.tile : local % cut.tile + 3 < cut.tile;
}

// The first place in a sorted list whose index is not below (or, if `after`, above) a bound.
__device__ __forceinline__ i64 search(const i64* index, i64 m, i64 bound, bool after) {
    i64 low = 0, high = m;
    while (low < high) {
        const i64 middle = (low + high) / 2;
        if (index[middle] < bound || (after && index[middle] == bound))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// ---- a block of threads ------------------------------------------------------------------------------------------

// ORs bits into the byte of flags. Aligned words are what atomics work on: the other three bytes stay as they are.
__device__ __forceinline__ void raise_flag(u8* flags, u32 bits) {
    const u64 at = (u64)flags;
    if (bits) atomicOr((u32*)(at & ~(u64)3), bits << (8 * (u32)(at & 3)));
}

// The OR of all threads' bits, of which there are two, for all of them. A barrier.
__device__ __forceinline__ u32 block_or(u32 bits) {
    const u32 low = __syncthreads_or((int)(bits & 1)) ? 1 : 0;
    return low | (__syncthreads_or((int)(bits & 2)) ? 2 : 0);
}

__device__ __forceinline__ u32 warp_inclusive(u32 value) {
    const u32 lane = threadIdx.x & 31;
    for (u32 by = 1; by < 32; by *= 2) {
        const u32 before = __shfl_up_sync(ALL, value, by);
        if (lane >= by) value += before;
    }
    return value;
}

// The sum of the values of all threads before this one; total is that of all. scratch: (WARPS,), shared. Barriers.
__device__ __forceinline__ u32 block_exclusive(u32 value, u32* scratch, u32& total) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const u32 inclusive = warp_inclusive(value);
    __syncthreads();  // whoever read scratch last has done so
    if (lane == 31) scratch[warp] = inclusive;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) before += scratch[w];
        all += scratch[w];
    }
    total = all;
    return before + inclusive - value;
}

// ---- tiles in order ----------------------------------------------------------------------------------------------

// A block's first claim of a tile: to be made by its first thread, before `claim_tile`.
__device__ __forceinline__ u64 claim_ahead(u64* counter) { return threadIdx.x == 0 ? atomicAdd(counter, 1ull) : 0; }

// The tile that was claimed last, for all threads of the block; the next one is claimed meanwhile, so that nobody waits
// for the counter. Tiles that are claimed in order can wait for earlier ones: whoever has those goes through them in
// order, too. Barriers.
__device__ __forceinline__ i64 claim_tile(u64* counter, u64* shared, u64& ahead) {
    __syncthreads();
    if (threadIdx.x == 0) *shared = ahead, ahead = atomicAdd(counter, 1ull);
    __syncthreads();
    return (i64)*shared;
}

// Decoupled look-back (Merrill & Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back", 2016): the sum
// of the totals of all earlier tiles. Called by one warp of a block, all 32 lanes, with the tile's own total
// below 2^62; all of them get the result. status: a zeroed word per tile. State and sum share one word, so that no
// fence is needed: 0 = nothing yet, 1 = the tile's own total, 2 = that of all tiles up to it.
__device__ __forceinline__ u64 look_back(u64* status, i64 tile, u64 total) {
    const u32 lane = threadIdx.x & 31;
    const u64 payload = ((u64)1 << 62) - 1, sum = (u64)2 << 62, own = (u64)1 << 62;
    if (lane == 0) atomicExch(status + tile, (tile ? own : sum) | total);
    u64 before = 0;
    for (i64 end = tile; end > 0; end -= 32) {  // lane l looks at tile end - 1 - l
        const i64 at = end - 1 - lane;
        u64 word = sum;
        if (at >= 0) {
            const volatile u64* place = status + at;  // past the multiprocessor's own cache, which would not see changes
            word = *place;
            while (!(word >> 62)) {
                spin();
                word = *place;
            }
        }
        const u32 known = __ballot_sync(ALL, (word >> 62) == 2);
        const u32 nearest = known ? (u32)__ffs((int)known) - 1 : 31;
        u64 value = lane <= nearest && at >= 0 ? word & payload : 0;
        for (u32 by = 16; by; by /= 2) value += __shfl_xor_sync(ALL, value, (int)by);
        before += value;
        if (known) break;
    }
    if (tile && lane == 0) atomicExch(status + tile, sum | (before + total));
    return before;
}
