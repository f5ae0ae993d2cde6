// The k largest sums of a block, exactly: radix selection on the IEEE bits, stable, the lowest position first. WORK: dtype.
//
// A block's sums are the vector `x`, in which a short sorted list (index, value) replaces what something was merged into;
// of entries with one index the last one counts. A histogram of the top 11 bits comes with `compensate`. `boundary` finds
// the bin in which the k-th largest lies, `collect` copies what is in it or above, in order; where that is too much for
// its buffer, as among equals, the passes that follow go through the whole block instead. `refine` counts the next bits
// of what may still be the k-th largest, `emit` writes what is above it, and of what equals it the first few.
//
// Source of the steps: AIR Top-K (Zhang et al., "Parallel Top-K Algorithms on GPU", SC'23) for staying on the device;
// the list of replaced sums, the order and the fallback are ours.
#define RESIDENT (sizeof(WORK) == 4 ? 4 : 2)
#include "common.cuh"

#define BINS 2048
#define ROWS 2                               // of 128 positions that a warp takes of a tile: more would not fit into registers
#define ITEMS (4 * ROWS)                     // positions of a thread
#define TILE (THREADS * ITEMS)
#define PLAN_KEY 0    // the bits of the k-th largest that are known, the others zero
#define PLAN_NEED 1   // how many of those that share them are wanted
#define PLAN_SHARE 2  // how many do
#define PLAN_LISTED 3 // entries that `collect` copies; -1: too many
#define PLAN_LIMIT 4  // how many of the first kind `emit` writes at most
#define PLAN_CLAIM 5  // tiles claimed by collect, emit

typedef decltype(key_of((WORK)0)) Key;
#define KEY_BITS (8 * (int)sizeof(Key) - 1)

// What a block's sums are made of.
struct Sums {
    const WORK* x;
    const i64* index;   // (m,) sorted
    const WORK* value;  // (m,)
    const i64* starts;  // (tiles + 1,) the first entry of each tile
    i64 m, length;
};

// Where in a tile item e of row r of this thread lies.
__device__ __forceinline__ i64 place_of(int r, int e) {
    return (i64)(threadIdx.x / 32) * (ROWS * 128) + r * 128 + (threadIdx.x & 31) * 4 + e;
}

// This thread's items of a tile; zero for padding and beyond the block. room: (TILE,) shared. Barriers, if m > 0.
__device__ __forceinline__ void load_tile(const Sums& s, const Cut& cut, i64 tile, WORK v[ITEMS], WORK* room) {
    const i64 base = tile * TILE;
    const bool vectors = aligned(s.x);
    for (int r = 0; r < ROWS; r++) {
        const i64 at = base + place_of(r, 0);
        const i64 first = at < s.length ? to_global(at, cut) : cut.numel;
        if (vectors && at + 4 <= s.length && side_by_side(at, cut) && first % 4 == 0 && first + 4 <= cut.numel) {
            const uint4* p = (const uint4*)(s.x + first);
            WORK four[4];
            for (int i = 0; i < (int)(sizeof(four) / sizeof(uint4)); i++) ((uint4*)four)[i] = p[i];
            for (int e = 0; e < 4; e++) v[4 * r + e] = four[e];
        } else {
            for (int e = 0; e < 4; e++) {
                const i64 j = at + e < s.length ? to_global(at + e, cut) : cut.numel;
                v[4 * r + e] = j < cut.numel ? s.x[j] : (WORK)0;
            }
        }
    }
    if (s.m == 0) return;
    const i64 begin = s.starts[tile], end = s.starts[tile + 1];
    if (begin >= end) return;
    for (int r = 0; r < ROWS; r++)
        for (int e = 0; e < 4; e++) room[place_of(r, e)] = v[4 * r + e];
    __syncthreads();
    for (i64 i = begin + threadIdx.x; i < end; i += THREADS) {
        const i64 at = s.index[i];
        const bool last = i + 1 >= s.m || s.index[i + 1] != at;
        if (last && at >= base && at < base + TILE && at < s.length && to_global(at, cut) < cut.numel)
            room[at - base] = s.value[i];
    }
    __syncthreads();
    for (int r = 0; r < ROWS; r++)
        for (int e = 0; e < 4; e++) v[4 * r + e] = room[place_of(r, e)];
    __syncthreads();
}

// For each of this warp's lanes: how many bits of `bits` (item i = bit i) there are before its item 0 of each row, in
// before[r], and in all of them.
__device__ __forceinline__ u32 rank_in_warp(u32 bits, u32 before[ROWS]) {
    const u32 below = (1u << (threadIdx.x & 31)) - 1;
    u32 total = 0;
    for (int r = 0; r < ROWS; r++) {
        u32 mine = total;
        for (int e = 0; e < 4; e++) {
            const u32 set = __ballot_sync(ALL, (int)(bits >> (4 * r + e) & 1));
            mine += (u32)__popc(set & below), total += (u32)__popc(set);
        }
        before[r] = mine;
    }
    return total;
}

// How many bits there are before this thread's item 0 of each row in the tile, in before[r], and in the tile. scratch:
// (WARPS,) shared. Barriers.
__device__ __forceinline__ u32 rank_in_tile(u32 bits, u32 before[ROWS], u32* scratch) {
    const u32 own = rank_in_warp(bits, before), warp = threadIdx.x / 32;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = own;
    __syncthreads();
    u32 earlier = 0, total = 0;
    for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) earlier += scratch[w];
        total += scratch[w];
    }
    for (int r = 0; r < ROWS; r++) before[r] += earlier;
    return total;
}

__device__ __forceinline__ u32 set_before(u32 bits, int r, int e) { return (u32)__popc(bits >> (4 * r) & ((1u << e) - 1)); }

// look_back by the first warp, for all threads. shared: one word. Barriers.
__device__ __forceinline__ u64 earlier_tiles(u64* status, i64 tile, u64 total, u64* shared) {
    if (threadIdx.x < 32) {
        const u64 before = look_back(status, tile, total);
        if (threadIdx.x == 0) *shared = before;
    }
    __syncthreads();
    const u64 result = *shared;
    __syncthreads();
    return result;
}

// One thread: what a selection starts with.
KERNEL prepare(i64* plan, i64 need, i64 share, i64 listed, i64 limit) {
    if (first_item() == 0)
        plan[PLAN_NEED] = need, plan[PLAN_SHARE] = share, plan[PLAN_LISTED] = listed, plan[PLAN_LIMIT] = limit;
}

// hist (BINS,) += how many magnitudes of a block are in each bin but 0.
KERNEL histogram(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot,
                 i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel, u64* hist) {
    __shared__ u32 counts[BINS];
    __shared__ WORK room[TILE];
    for (u32 b = threadIdx.x; b < BINS; b += THREADS) counts[b] = 0;
    __syncthreads();
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    for (i64 t = blockIdx.x; t * TILE < s.length; t += gridDim.x) {
        WORK v[ITEMS];
        load_tile(s, cut, t, v, room);
        for (int i = 0; i < ITEMS; i++) {
            const u32 bin = (u32)(key_of(v[i]) >> (KEY_BITS - 11));
            if (bin) atomicAdd(counts + bin, 1u);
        }
    }
    __syncthreads();
    for (u32 b = threadIdx.x; b < BINS; b += THREADS)
        if (counts[b]) atomicAdd(hist + b, (u64)counts[b]);
}

// One block of threads: goes down the bins until as many are in them as are wanted, and writes down where that was.
//
// hist: (2^bits,), of which bin 0 counts for what is missing in PLAN_SHARE. shift: where these bits lie in a key. room:
// how many entries `collect` may copy; 0: this is not its boundary.
KERNEL boundary(const u64* hist, i64* plan, i64 bits, i64 shift, i64 room) {
    __shared__ u64 totals[THREADS];
    const int bins = 1 << (int)bits, each = (bins + THREADS - 1) / THREADS;
    const int high = bins - (int)threadIdx.x * each;  // this thread has the bins high - 1, ..., high - each
    u64 own = 0;
    for (int b = high - 1; b >= high - each && b > 0; b--) own += hist[b];
    totals[threadIdx.x] = own;
    const i64 need = plan[PLAN_NEED], share = plan[PLAN_SHARE];
    __syncthreads();
    u64 above = 0, all = 0;
    for (u32 t = 0; t < THREADS; t++) {
        if (t < threadIdx.x) above += totals[t];
        all += totals[t];
    }
    const i64 rest = share - (i64)all;  // in bin 0
    __syncthreads();
    i64 found = -1, inside = 0;
    for (int b = high - 1; b >= high - each && b >= 0; b--) {
        const i64 here = b ? (i64)hist[b] : rest;
        if ((i64)above < need && (i64)above + here >= need) {
            found = b, inside = here;
            break;
        }
        above += here;
    }
    if (found < 0) return;  // at most one thread goes on
    plan[PLAN_KEY] |= found << shift;
    plan[PLAN_NEED] = need - (i64)above;
    plan[PLAN_SHARE] = inside;
    if (room) plan[PLAN_LISTED] = (i64)above + inside <= room ? (i64)above + inside : -1;
}

// Copies the sums of a block from the boundary's bin on, in the order of their positions.
KERNEL collect(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot, i64 block,
               i64 blocks, i64 tile, i64 rounds, i64 numel, i64* plan, u64* status, i64* listed_index,
               WORK* listed_value) {
    __shared__ WORK room[TILE];
    __shared__ u32 scratch[WARPS];
    __shared__ u64 word;
    if (plan[PLAN_LISTED] < 0) return;
    const i64 listed = plan[PLAN_LISTED];
    const Key least = (Key)plan[PLAN_KEY];
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    for (;;) {
        const i64 t = claim_tile((u64*)plan + PLAN_CLAIM, &word);
        if (t * TILE >= s.length) break;
        WORK v[ITEMS];
        load_tile(s, cut, t, v, room);
        u32 bits = 0, before[ROWS];
        for (int r = 0; r < ROWS; r++)
            for (int e = 0; e < 4; e++)
                if (key_of(v[4 * r + e]) >= least && t * TILE + place_of(r, e) < s.length) bits |= 1u << (4 * r + e);
        const u32 total = rank_in_tile(bits, before, scratch);
        const i64 first = (i64)earlier_tiles(status, t, total, &word);
        for (int r = 0; r < ROWS; r++)
            for (int e = 0; e < 4; e++) {
                const i64 at = first + before[r] + set_before(bits, r, e);
                if ((bits >> (4 * r + e) & 1) && at < listed) {
                    listed_index[at] = t * TILE + place_of(r, e);
                    listed_value[at] = v[4 * r + e];
                }
            }
    }
}

// This thread's items of a tile of what is left to look at: the list that was collected, or else all of the block.
__device__ __forceinline__ void load_rest(const Sums& s, const Cut& cut, i64 listed, const WORK* listed_value, i64 tile,
                                          WORK v[ITEMS], WORK* room) {
    if (listed < 0) {
        load_tile(s, cut, tile, v, room);
        return;
    }
    for (int r = 0; r < ROWS; r++)
        for (int e = 0; e < 4; e++) {
            const i64 at = tile * TILE + place_of(r, e);
            v[4 * r + e] = at < listed ? listed_value[at] : (WORK)0;
        }
}

// hist (2^bits,) += the next bits of those that share the known ones, but for those whose next bits are zero.
KERNEL refine(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot, i64 block,
              i64 blocks, i64 tile, i64 rounds, i64 numel, const i64* plan, const WORK* listed_value, u64* hist,
              i64 bits, i64 shift) {
    __shared__ u32 counts[BINS];
    __shared__ WORK room[TILE];
    const u32 bins = 1u << (int)bits;
    for (u32 b = threadIdx.x; b < bins; b += THREADS) counts[b] = 0;
    __syncthreads();
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    const i64 listed = plan[PLAN_LISTED], items = listed < 0 ? s.length : listed;
    const Key known = (Key)plan[PLAN_KEY] >> (int)(shift + bits);
    for (i64 t = blockIdx.x; t * TILE < items; t += gridDim.x) {
        WORK v[ITEMS];
        load_rest(s, cut, listed, listed_value, t, v, room);
        for (int i = 0; i < ITEMS; i++) {
            const Key key = key_of(v[i]);
            const u32 bin = (u32)(key >> (int)shift) & (bins - 1);
            const bool inside = t * TILE + place_of(i / 4, i % 4) < items;
            if (bin && inside && key >> (int)(shift + bits) == known) atomicAdd(counts + bin, 1u);
        }
    }
    __syncthreads();
    for (u32 b = threadIdx.x; b < bins; b += THREADS)
        if (counts[b]) atomicAdd(hist + b, (u64)counts[b]);
}

// Adds to plan[PLAN_SHARE] how many magnitudes of a block are above a threshold.
KERNEL count_above(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot,
                   i64 block, i64 blocks, i64 tile, i64 rounds, i64 numel, i64 threshold, i64* plan) {
    __shared__ WORK room[TILE];
    __shared__ u64 total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    u32 own = 0;
    for (i64 t = blockIdx.x; t * TILE < s.length; t += gridDim.x) {
        WORK v[ITEMS];
        load_tile(s, cut, t, v, room);
        for (int i = 0; i < ITEMS; i++) own += key_of(v[i]) > (Key)threshold;  // never padding, which is zero
    }
    for (int by = 16; by; by /= 2) own += __shfl_xor_sync(ALL, own, by);
    if ((threadIdx.x & 31) == 0) atomicAdd(&total, (u64)own);
    __syncthreads();
    if (threadIdx.x == 0 && total) atomicAdd((u64*)plan + PLAN_SHARE, total);
}

// One thread: how many others have to fill up where fewer than k were counted above a threshold.
KERNEL fill_up(i64* plan, i64 k) {
    if (first_item() == 0) plan[PLAN_NEED] = k > plan[PLAN_SHARE] ? k - plan[PLAN_SHARE] : 0;
}

// Writes positions and sums, in order, of two kinds: the first PLAN_LIMIT above a key, and the first PLAN_NEED of those
// that equal it or, if `filling`, of all others, as zeros.
//
// key: taken from the plan if negative. out_index, out_value: (k,); either may be null. claim: which word of the plan
// counts tiles. status: two zeroed words for each tile.
KERNEL emit(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot, i64 block,
            i64 blocks, i64 tile, i64 rounds, i64 numel, i64* plan, const i64* listed_index, const WORK* listed_value,
            i64 key, i64 filling, i64 claim, u64* status, i64 tiles, i64 k, i64* out_index, WORK* out_value) {
    __shared__ WORK room[TILE];
    __shared__ u32 scratch[WARPS];
    __shared__ u64 word;
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    const i64 listed = plan[PLAN_LISTED], items = listed < 0 ? s.length : listed;
    const i64 need = plan[PLAN_NEED], limit = plan[PLAN_LIMIT];
    const Key bound = (Key)(key < 0 ? plan[PLAN_KEY] : key);
    for (;;) {
        const i64 t = claim_tile((u64*)plan + claim, &word);
        if (t * TILE >= items) break;
        WORK v[ITEMS];
        load_rest(s, cut, listed, listed_value, t, v, room);
        u32 larger = 0, other = 0, before_larger[ROWS], before_other[ROWS];
        for (int r = 0; r < ROWS; r++)
            for (int e = 0; e < 4; e++) {
                const Key mine = key_of(v[4 * r + e]);
                const bool inside = t * TILE + place_of(r, e) < items;
                if (inside && mine > bound) larger |= 1u << (4 * r + e);
                if (inside && (filling ? mine <= bound : mine == bound)) other |= 1u << (4 * r + e);
            }
        const u32 many = rank_in_tile(larger, before_larger, scratch);
        const u32 others = rank_in_tile(other, before_other, scratch);
        const i64 first = (i64)earlier_tiles(status, t, many, &word);
        const i64 first_other = (i64)earlier_tiles(status + tiles, t, others, &word);
        for (int r = 0; r < ROWS; r++)
            for (int e = 0; e < 4; e++) {
                const i64 a = first + before_larger[r] + set_before(larger, r, e);
                const i64 b = first_other + before_other[r] + set_before(other, r, e);
                const bool is_larger = (larger >> (4 * r + e) & 1) && a < limit;
                const bool is_other = (other >> (4 * r + e) & 1) && b < need;
                const i64 at = (a < limit ? a : limit) + (b < need ? b : need);
                if ((is_larger || is_other) && at < k) {
                    const i64 place = t * TILE + place_of(r, e);
                    out_index[at] = listed < 0 ? place : listed_index[place];
                    if (out_value) out_value[at] = is_other && filling ? (WORK)0 : v[4 * r + e];
                }
            }
    }
}
