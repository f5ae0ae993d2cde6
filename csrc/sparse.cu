// Loops over sparse positions: reading and changing a few elements of a vector, and sums of sorted lists.
//
// WORK: the dtype of values.
// Positions of one list are distinct, so that no two threads touch one element. Whatever a position says, only
// elements inside the vector are touched: `place` is the only way to them.
#include "common.cuh"

#define PADDING (-1)
#define OUTSIDE (-2)

// The global position of a local one; PADDING or OUTSIDE (both negative) where there is nothing to touch.
__device__ __forceinline__ i64 place(i64 at, i64 length, const Cut& cut) {
    if (at < 0 || at >= length) return OUTSIDE;
    const i64 j = to_global(at, cut);
    return j < cut.numel ? j : PADDING;
}

KERNEL gather(
    const WORK* x, const i64* index, i64 k, const i64* slot, i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel,
    WORK* out) {
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    for (i64 i = first_item(); i < k; i += stride()) {
        const i64 j = place(index[i], tile * rounds, cut);
        out[i] = j >= 0 ? x[j] : (WORK)0;
    }
}

KERNEL subtract(
    WORK* x, const i64* index, i64 k, const i64* slot, i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel,
    const WORK* value) {
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    for (i64 i = first_item(); i < k; i += stride()) {
        const i64 j = place(index[i], tile * rounds, cut);
        if (j >= 0) x[j] -= value[i];
    }
}

KERNEL add(
    WORK* x, const i64* index, i64 k, const i64* slot, i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel,
    const WORK* value, u8* flags) {
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    u32 seen = 0;
    for (i64 i = first_item(); i < k; i += stride()) {
        const i64 j = place(index[i], tile * rounds, cut);
        if (j >= 0) {
            const WORK sum = plus(x[j], value[i]);
            x[j] = sum;
            if (!is_finite(sum)) seen |= NONFINITE;
        } else if (j == OUTSIDE) {
            seen |= DAMAGED;
        }
    }
    seen = block_or(seen);
    if (threadIdx.x == 0) raise_flag(flags, seen);
}

// Bitmap of the entries of b that a has, too.
KERNEL common(const i64* a, i64 a_count, const i64* b, i64 b_count, u32* both) {
    const i64 lane = threadIdx.x & 31;
    for (i64 word = first_item() >> 5; word < (b_count + 31) >> 5; word += stride() >> 5) {
        const i64 j = 32 * word + lane;
        bool found = false;
        if (j < b_count) {
            const i64 at = search(a, a_count, b[j], false);
            found = at < a_count && a[at] == b[j];
        }
        const u32 bits = __ballot_sync(ALL, found);
        if (lane == 0) both[word] = bits;
    }
}

// The union of two sorted lists, with the sums of values. both, before: what `common` wrote, and its prefix sums.
// Each entry finds its place in the result alone: its own rank, that in the other list, less what both have before it.
KERNEL merge_sum(
    const i64* a, const WORK* a_value, i64 a_count, const i64* b, const WORK* b_value, i64 b_count, const u32* both,
    const i64* before, i64* index, WORK* value) {
    for (i64 i = first_item(); i < a_count + b_count; i += stride()) {
        const bool first = i < a_count;
        const i64 own = first ? i : i - a_count;
        const i64 here = first ? a[own] : b[own];
        const i64 other = first ? search(b, b_count, here, false) : search(a, a_count, here, false);
        const i64 rank = first ? other : own;  // in b
        i64 shared = 0;
        bool twice = false;
        if (rank < b_count) {
            const u32 bits = both[rank >> 5] >> (rank & 31);
            twice = (bits & 1) && (!first || b[rank] == here);
            shared = before[rank >> 5] + __popc(both[rank >> 5] & ((1u << (rank & 31)) - 1));
        } else if (b_count > 0) {
            shared = before[(b_count - 1) >> 5] + __popc(both[(b_count - 1) >> 5]);
        }
        if (twice && !first) continue;  // the one in a writes it
        const i64 at = own + other - shared;
        index[at] = here;
        value[at] = first ? (twice ? plus(a_value[own], b_value[rank]) : a_value[own]) : b_value[own];
    }
}
