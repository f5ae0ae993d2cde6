// The sorted list of a block's sums that are not as compensation left them: what `select.cu` lays over the vector. WORK:
// dtype. Nothing is ever taken out of a list: of entries with one index the last one counts.
#include "common.cuh"

#define BINS 2048  // of magnitudes, as in select.cu
#define TILE 2048  // positions, likewise

#define BIN_SHIFT (8 * (int)sizeof(WORK) - 12)  // of the top 11 bits below the sign

// starts[t] = the first entry of tile t; tiles + 1 of them.
KERNEL tile_starts(const i64* index, i64 m, i64 tiles, i64* starts) {
    for (i64 t = first_item(); t <= tiles; t += stride()) starts[t] = t < tiles ? search(index, m, t * TILE, false) : m;
}

// Puts entries into a block's sorted list: index and value of m old ones, then more and extra of m new ones.
//
// A new entry is what was there (in the list, or else in x) plus extra. mode 0: before a selection; hist, unless null,
// follows, and flags say NONFINITE and DAMAGED. 1: after it; finite sums stay finite. 2: minus extra, and no flags.
KERNEL absorb(const WORK* x, const i64* index, const WORK* value, i64 m, const i64* more, const WORK* extra,
              i64 new_entries, const i64* slot, i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel, i64 mode,
              u8* flags, u64* hist, i64* out_index, WORK* out_value) {
    __shared__ u32 changes[BINS];  // modulo 2^32; most magnitudes are in a few bins, where global atomics would queue up
    for (u32 b = threadIdx.x; b < BINS; b += THREADS) changes[b] = 0;
    __syncthreads();
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const i64 length = rounds * tile;
    u32 bad = 0;
    for (i64 i = first_item(); i < m + new_entries; i += stride()) {
        if (i < m) {
            const i64 to = i + search(more, new_entries, index[i], false);
            out_index[to] = index[i], out_value[to] = value[i];
            continue;
        }
        const i64 j = i - m, at = more[j], after = search(index, m, at, true), to = j + after;
        const bool inside = at >= 0 && at < length;
        const i64 where = inside ? to_global(at, cut) : numel;
        WORK sum = 0;
        if (where < numel) {
            const WORK old = after > 0 && index[after - 1] == at ? value[after - 1] : x[where];
            const WORK change = mode == 2 ? -extra[j] : extra[j];
            sum = plus(old, change);
            if (mode == 1 && !is_finite(sum) && is_finite(old) && is_finite(change))
                sum = sum > 0 ? largest(sum) : -largest(sum);
            if (mode != 2 && !is_finite(sum)) bad |= NONFINITE;
            if (mode == 0 && hist) {
                const u32 was = (u32)(key_of(old) >> BIN_SHIFT), is = (u32)(key_of(sum) >> BIN_SHIFT);
                if (was != is && was) atomicAdd(changes + was, ALL);  // minus one
                if (was != is && is) atomicAdd(changes + is, 1u);
            }
        }
        if (!inside && mode != 2) bad |= DAMAGED;
        out_index[to] = at, out_value[to] = sum;
    }
    bad = block_or(bad);  // a barrier
    if (threadIdx.x == 0) raise_flag(flags, bad);
    if (mode == 0 && hist)
        for (u32 b = threadIdx.x; b < BINS; b += THREADS)
            if (changes[b]) atomicAdd(hist + b, (u64)(i64)(int)changes[b]);
}

// out = sums at wanted positions: those that the list has. Elsewhere they are the same already.
KERNEL settle(WORK* x, const i64* index, const WORK* value, i64 m, const i64* wanted, i64 k, const i64* slot, i64 block,
              i64 blocks, i64 tile, i64 rounds, i64 numel) {
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    for (i64 i = first_item(); i < k; i += stride()) {
        const i64 at = wanted[i];
        if (at < 0 || at >= rounds * tile) continue;
        const i64 where = to_global(at, cut), after = search(index, m, at, true);
        if (where < numel && after > 0 && index[after - 1] == at) x[where] = value[after - 1];
    }
}
