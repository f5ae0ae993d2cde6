// Bitmaps of the keys of a vector that hold anything: key j is elements j * width to (j + 1) * width. GRAD: its dtype.
#include "common.cuh"

// Keys of one element: a warp looks at as many elements at a time as it has lanes, and writes as many words.
KERNEL elements(const GRAD* x, i64 n, u32* out, i64 words) {
    const i64 lane = threadIdx.x & 31;
    for (i64 first = first_item() & ~(i64)31; first < words; first += stride()) {
        u32 mine = 0;
#pragma unroll 8
        for (int j = 0; j < 32; j++) {
            const i64 at = 32 * (first + j) + lane;
            const u32 bits = __ballot_sync(ALL, at < n && is_nonzero(x[at]));
            if (lane == j) mine = bits;
        }
        if (first + lane < words) out[first + lane] = mine;
    }
}

// Short keys: a warp makes one word of 32 keys from `width` looks at 32 elements side by side.
KERNEL short_keys(const GRAD* x, i64 n, i64 width, u32* out, i64 words) {
    const i64 lane = threadIdx.x & 31;
    for (i64 word = first_item() >> 5; word < words; word += stride() >> 5) {
        const i64 begin = lane * width, end = begin + width;  // this lane's key
        bool found = false;
        for (i64 seen = 0; seen < 32 * width; seen += 32) {
            const i64 at = 32 * width * word + seen + lane;
            const u32 bits = __ballot_sync(ALL, at < n && is_nonzero(x[at]));
            const i64 low = begin > seen ? begin - seen : 0;
            const i64 high = end < seen + 32 ? end - seen : 32;
            if (low < high) found |= ((bits >> low) & (ALL >> (32 - (high - low)))) != 0;
        }
        const u32 keys = __ballot_sync(ALL, found);
        if (lane == 0) out[word] = keys;
    }
}

// Long keys: a warp looks at one of them, up to its first elements that are not zero. out: zeros.
KERNEL long_keys(const GRAD* x, i64 n, i64 width, u32* out, i64 keys) {
    const i64 lane = threadIdx.x & 31;
    for (i64 key = first_item() >> 5; key < keys; key += stride() >> 5) {
        const i64 begin = key * width, end = n - begin < width ? n : begin + width;
        u32 bits = 0;
        for (i64 at = begin; at < end && !bits; at += 128) {  // the same for all lanes
            bool found = false;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const i64 here = at + 32 * j + lane;
                found |= here < end && is_nonzero(x[here]);
            }
            bits = __ballot_sync(ALL, found);
        }
        if (lane == 0 && bits) atomicOr(out + (key >> 5), 1u << (key & 31));
    }
}
