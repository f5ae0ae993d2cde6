// Bitmaps: bit i % 32 of word i / 32 is position i, and unused bits of the last word are zero.
#include "common.cuh"

// Four bytes that are not zero, as four bits.
__device__ __forceinline__ u32 nibble(u32 bytes) {
    const u32 some = ((((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes) >> 7) & 0x01010101u;
    return (some * 0x10204080u) >> 28;
}

// A thread makes a word from two loads, where 32 bytes are there and begin where such loads may.
KERNEL pack(const u8* mask, i64 m, u32* out, i64 words) {
    const bool whole = aligned(mask);
    for (i64 word = first_item(); word < words; word += stride()) {
        u32 bits = 0;
        if (whole && 32 * word + 32 <= m) {
            const uint4* from = (const uint4*)(mask + 32 * word);
            const uint4 low = from[0], high = from[1];
            bits = nibble(low.x) | nibble(low.y) << 4 | nibble(low.z) << 8 | nibble(low.w) << 12;
            bits |= (nibble(high.x) | nibble(high.y) << 4 | nibble(high.z) << 8 | nibble(high.w) << 12) << 16;
        } else {
            for (i64 i = 0; i < 32 && 32 * word + i < m; i++) bits |= (u32)(mask[32 * word + i] != 0) << i;
        }
        out[word] = bits;
    }
}

// Four bits as four bytes.
__device__ __forceinline__ u32 bytes(u32 bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }

KERNEL unpack(const u32* words, i64 count, u8* out, i64 m) {
    const bool whole = aligned(out);
    for (i64 word = first_item(); word < count; word += stride()) {
        const u32 bits = words[word];
        if (whole && 32 * word + 32 <= m) {
            uint4* to = (uint4*)(out + 32 * word);
            uint4 half;
            half.x = bytes(bits), half.y = bytes(bits >> 4);
            half.z = bytes(bits >> 8), half.w = bytes(bits >> 12);
            to[0] = half;
            half.x = bytes(bits >> 16), half.y = bytes(bits >> 20);
            half.z = bytes(bits >> 24), half.w = bytes(bits >> 28);
            to[1] = half;
        } else {
            for (i64 i = 0; i < 32 && 32 * word + i < m; i++) out[32 * word + i] = (u8)((bits >> i) & 1);
        }
    }
}

// total: zero.
KERNEL popcount(const u32* words, i64 count, u64* total) {
    u64 found = 0;
    for (i64 i = first_item(); i < count; i += stride()) found += __popc(words[i]);
    for (int step = 16; step; step >>= 1) found += __shfl_xor_sync(ALL, found, step);
    if ((threadIdx.x & 31) == 0 && found) atomicAdd(total, found);
}

KERNEL rank(const u32* words, i64 count, const i64* prefix, const i64* index, i64 k, i64* out) {
    for (i64 i = first_item(); i < k; i += stride()) {
        const i64 position = index[i];
        i64 found = 0;
        if (position >= 32 * count) {
            found = prefix[count - 1] + __popc(words[count - 1]);
        } else if (position > 0) {
            const i64 at = position >> 5;
            found = prefix[at] + __popc(words[at] & ((1u << (position & 31)) - 1));
        }
        out[i] = found;
    }
}

// The OR of so many rows, which lie `apart` words apart: four words at a time where all of them may be loaded so.
// out may be a row: each thread has read all of a place before it writes there.
KERNEL unite(const u32* rows, i64 apart, i64 count, u32* out, i64 words) {
    const bool whole = aligned(rows) && aligned(out) && (apart & 3) == 0;
    const i64 fours = whole ? words >> 2 : 0;
    for (i64 i = first_item(); i < fours; i += stride()) {
        uint4 all = ((const uint4*)rows)[i];
        for (i64 r = 1; r < count; r++) {
            const uint4 row = ((const uint4*)(rows + r * apart))[i];
            all.x |= row.x, all.y |= row.y, all.z |= row.z, all.w |= row.w;
        }
        ((uint4*)out)[i] = all;
    }
    for (i64 i = 4 * fours + first_item(); i < words; i += stride()) {
        u32 all = 0;
        for (i64 r = 0; r < count; r++) all |= rows[r * apart + i];
        out[i] = all;
    }
}
