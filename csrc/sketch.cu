// Keys hashed into tables. VALUE: float or double, of estimates and of tables of floats; those of integers are u32.
// Tables are flat here, row after row: cell c = r * columns + bucket has the width lanes from c * width on.

#include "common.cuh"

#define NEAR 8    // rows whose values are held in registers
#define SHORT 16  // keys of a cell that are sorted by insertion

struct Place {
    i64 cell;
    u32 odd;  // 1 where the sign is -1
};

__device__ __forceinline__ u32 key_of_row(i64 seed, i64 row) { return mix((u32)seed + (u32)row * 0x9E3779B9u); }

// Where a key goes in a row; in bounds whatever the key.
__device__ __forceinline__ Place hashed(i64 key, i64 seed, i64 row, i64 columns) {
    const u32 word = noise((u32)key, key_of_row(seed, row));
    const Place place = {row * columns + (i64)((u64)word * (u64)columns >> 32), word & 1};
    return place;
}

__device__ __forceinline__ i64 divided(i64 item, i64 width) { return width == 1 ? item : item / width; }

// ---- tables ------------------------------------------------------------------------------------------------------

// counts: zeros.
KERNEL occupancy(const i64* key, i64 k, i64 seed, i64 rows, i64 columns, u32* counts) {
    for (i64 i = first_item(); i < k; i += stride())
        for (i64 r = 0; r < rows; r++) atomicAdd(counts + hashed(key[i], seed, r, columns).cell, 1u);
}

// table: zeros. Modulo 2^32, so that the order makes no difference.
KERNEL sketch_integers(
    const i64* key, const u32* value, i64 k, i64 width, i64 seed, i64 rows, i64 columns, u32* table
) {
    for (i64 i = first_item(); i < k * width; i += stride()) {
        const i64 number = divided(i, width), lane = i - number * width;
        for (i64 r = 0; r < rows; r++) {
            const Place at = hashed(key[number], seed, r, columns);
            atomicAdd(table + at.cell * width + lane, at.odd ? 0u - value[i] : value[i]);
        }
    }
}

// Lists each cell's keys, in any order: their numbers, and the signs in the lowest bits. ends: where the cells' lists
// end; afterwards, where they begin.
KERNEL list_keys(const i64* key, i64 k, i64 seed, i64 rows, i64 columns, u64* ends, u32* list) {
    for (i64 i = first_item(); i < k; i += stride())
        for (i64 r = 0; r < rows; r++) {
            const Place at = hashed(key[i], seed, r, columns);
            list[atomicAdd(ends + at.cell, ~(u64)0) - 1] = (u32)i << 1 | at.odd;
        }
}

// Lets entry `at` of a heap of so many sink to where it belongs.
__device__ __forceinline__ void sink(u32* heap, i64 at, i64 count) {
    const u32 sinking = heap[at];
    for (;;) {
        i64 child = 2 * at + 1;
        if (child >= count) break;
        if (child + 1 < count && heap[child + 1] > heap[child]) child++;
        if (heap[child] <= sinking) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = sinking;
}

// Sorts each cell's list. A bucket holds few keys, but for tables with hardly any columns.
KERNEL sort_lists(const i64* begin, const int* counts, i64 cells, u32* list) {
    for (i64 c = first_item(); c < cells; c += stride()) {
        u32* own = list + begin[c];
        const i64 count = counts[c];
        if (count <= SHORT) {
            for (i64 i = 1; i < count; i++) {
                const u32 moving = own[i];
                i64 at = i;
                for (; at > 0 && own[at - 1] > moving; at--) own[at] = own[at - 1];
                own[at] = moving;
            }
            continue;
        }
        for (i64 i = count / 2 - 1; i >= 0; i--) sink(own, i, count);
        for (i64 left = count - 1; left > 0; left--) {
            const u32 top = own[0];
            own[0] = own[left];
            own[left] = top;
            sink(own, 0, left);
        }
    }
}

// Sums up each lane of each cell in the order of its list, from 0.
KERNEL sum_lists(
    const VALUE* value, i64 width, const i64* begin, const int* counts, i64 cells, const u32* list, VALUE* table
) {
    for (i64 i = first_item(); i < cells * width; i += stride()) {
        const i64 cell = divided(i, width), lane = i - cell * width;
        const u32* own = list + begin[cell];
        const i64 count = counts[cell];
        VALUE sum = 0;
        for (i64 j = 0; j < count; j++) {
            const VALUE x = value[(i64)(own[j] >> 1) * width + lane];
            sum += own[j] & 1 ? -x : x;
        }
        table[i] = sum;
    }
}

// ---- estimates ---------------------------------------------------------------------------------------------------

// What a row says of a key's lane.
__device__ __forceinline__ VALUE said(const VALUE* table, i64 key, i64 lane, i64 width, i64 seed, i64 row, i64 columns) {
    const Place at = hashed(key, seed, row, columns);
    const VALUE x = table[at.cell * width + lane];
    return at.odd ? -x : x;
}

__device__ __forceinline__ bool less(VALUE x, VALUE y) { return x < y || (y != y && x == x); }

// Whether x comes before y in a stable sort, NaN last.
__device__ __forceinline__ bool before(VALUE x, VALUE y, bool earlier) {
    return less(x, y) || (earlier && !less(y, x));
}

// Medians: the values before which there are as many as there should be. Few rows are kept in registers, of more each
// is read again for each comparison.
KERNEL estimate_median(
    const VALUE* table, const i64* key, i64 k, i64 width, i64 seed, i64 rows, i64 columns, VALUE* out
) {
    const i64 lower = (rows - 1) / 2, upper = rows / 2;
    for (i64 i = first_item(); i < k * width; i += stride()) {
        const i64 number = divided(i, width), lane = i - number * width, own = key[number];
        VALUE low = 0, high = 0;
        if (rows <= NEAR) {
            VALUE x[NEAR];
#pragma unroll
            for (int r = 0; r < NEAR; r++) x[r] = r < rows ? said(table, own, lane, width, seed, r, columns) : (VALUE)0;
#pragma unroll
            for (int r = 0; r < NEAR; r++) {
                if (r >= rows) continue;
                int place = 0;
#pragma unroll
                for (int s = 0; s < NEAR; s++) place += s != r && s < rows && before(x[s], x[r], s < r);
                if (place == lower) low = x[r];
                if (place == upper) high = x[r];
            }
        } else {
            for (i64 r = 0; r < rows; r++) {
                const VALUE x = said(table, own, lane, width, seed, r, columns);
                i64 place = 0;
                for (i64 s = 0; s < rows; s++)
                    place += s != r && before(said(table, own, lane, width, seed, s, columns), x, s < r);
                if (place == lower) low = x;
                if (place == upper) high = x;
            }
        }
        out[i] = rows % 2 ? low : (low + high) * (VALUE)0.5;
    }
}

// Means, of values over their cells' counts where these are given; a count below 1 adds nothing.
KERNEL estimate_mean(
    const VALUE* table, const i64* key, i64 k, i64 width, i64 seed, i64 rows, i64 columns, const int* counts, VALUE* out
) {
    for (i64 i = first_item(); i < k * width; i += stride()) {
        const i64 number = divided(i, width), lane = i - number * width;
        VALUE sum = 0;
        for (i64 r = 0; r < rows; r++) {
            const Place at = hashed(key[number], seed, r, columns);
            const int shared = counts ? counts[at.cell] : 1;
            if (shared < 1) continue;
            const VALUE x = table[at.cell * width + lane];
            sum += (at.odd ? -x : x) / (VALUE)shared;
        }
        out[i] = sum / (VALUE)rows;
    }
}

// ---- peeling -----------------------------------------------------------------------------------------------------
// A key's state: 0 = in the table, r + 1 = alone in row r when this round began, -1 = taken in an earlier round.
// Finding reads counts, taking changes them: what a round finds depends on no order. found: zeros, one word a round of
// a batch; after a round that found nothing the others of its batch do nothing.

KERNEL find_alone(
    const i64* key, i64 k, i64 seed, i64 rows, i64 columns, const u32* counts, int* state, u32* found, i64 round
) {
    if (round && !found[round - 1]) return;
    u32 some = 0;
    for (i64 i = first_item(); i < k; i += stride()) {
        if (state[i]) {
            state[i] = -1;
            continue;
        }
        for (i64 r = 0; r < rows; r++)
            if (counts[hashed(key[i], seed, r, columns).cell] == 1) {
                state[i] = (int)r + 1;
                some = 1;
                break;
            }
    }
    some = block_or(some);
    if (threadIdx.x == 0 && some) atomicOr(found + round, 1u);
}

KERNEL take_alone(
    const i64* key, i64 k, i64 width, i64 seed, i64 rows, i64 columns, u32* counts, u32* table, const int* state,
    const u32* found, i64 round, u32* value
) {
    if (!found[round]) return;
    for (i64 i = first_item(); i < k * width; i += stride()) {
        const i64 number = divided(i, width), lane = i - number * width;
        if (state[number] <= 0) continue;
        const Place alone = hashed(key[number], seed, state[number] - 1, columns);
        const u32 there = atomicAdd(table + alone.cell * width + lane, 0u);
        const u32 mine = alone.odd ? 0u - there : there;
        value[i] = mine;
        for (i64 r = 0; r < rows; r++) {
            const Place at = hashed(key[number], seed, r, columns);
            atomicAdd(table + at.cell * width + lane, at.odd ? mine : 0u - mine);
            if (lane == 0) atomicAdd(counts + at.cell, ALL);
        }
    }
}

// ---- fixed point -------------------------------------------------------------------------------------------------

KERNEL to_fixed(const VALUE* value, i64 k, double scale, double limit, int* out, u8* beyond) {
    u32 some = 0;
    for (i64 i = first_item(); i < k; i += stride()) {
        const double x = rint((double)value[i] * scale);
        some |= !(fabs(x) <= limit);
        out[i] = x != x ? 0 : (int)(x > limit ? limit : x < -limit ? -limit : x);
    }
    some = block_or(some);
    if (threadIdx.x == 0) raise_flag(beyond, some);
}

KERNEL from_fixed(const int* fixed, i64 k, double scale, VALUE* out) {
    for (i64 i = first_item(); i < k; i += stride()) out[i] = (VALUE)(fixed[i] * scale);
}
