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
#define ROWS 2                               // of 128 positions that a warp takes of a tile
#define ITEMS (4 * ROWS)                     // positions of a thread
#define TILE (THREADS * ITEMS)
#define SPAN 4                               // tiles that a block counts before it asks what comes before them: 32 bits a thread
#define PLAN_KEY 0    // the bits of the k-th largest that are known, the others zero
#define PLAN_NEED 1   // how many of those that share them are wanted
#define PLAN_SHARE 2  // how many do
#define PLAN_LISTED 3 // entries that `collect` copies; -1: too many
#define PLAN_LIMIT 4  // how many of the first kind `emit` writes at most
#define PLAN_CLAIM 5  // spans of tiles claimed by collect, emit

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
            __align__(16) WORK four[4];
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

// The sum at a position of a tile, as load_tile says.
__device__ __forceinline__ WORK sum_at(const Sums& s, const Cut& cut, i64 tile, i64 at) {
    const i64 j = to_global(at, cut);
    if (j >= cut.numel) return (WORK)0;
    if (s.m) {
        const i64 begin = s.starts[tile], i = begin + search(s.index + begin, s.starts[tile + 1] - begin, at, true);
        if (i > begin && s.index[i - 1] == at) return s.value[i - 1];
    }
    return s.x[j];
}

// How many bits of `bits` (item i of tile p of a span = bit ITEMS p + i) there are in the span; before: in lane l how
// many there are before those of warp l % WARPS in tile l / WARPS. scratch: (32,) shared. Barriers.
__device__ __forceinline__ u32 rank_in_span(u32 bits, u32& before, u32* scratch) {
    const u32 lane = threadIdx.x & 31;
    u64 counts = 0;  // 16 bits for each tile
    for (int p = 0; p < SPAN; p++) counts |= (u64)__popc(bits >> (ITEMS * p) & ((1u << ITEMS) - 1)) << (16 * p);
    for (int by = 16; by; by /= 2) counts += __shfl_xor_sync(ALL, counts, by);
    __syncthreads();  // whoever read scratch last has done so
    if (lane < SPAN) scratch[lane * WARPS + threadIdx.x / 32] = (u32)(counts >> (16 * lane)) & 0xFFFF;
    __syncthreads();
    const u32 own = scratch[lane], inclusive = warp_inclusive(own);
    before = inclusive - own;
    return __shfl_sync(ALL, inclusive, 31);
}

// How many bits of a tile (item i = bit i) the warp has before this lane's item 0 of a row: of row 1 in the upper half,
// of row 0 in the lower one.
__device__ __forceinline__ u32 rank_in_warp(u32 bits) {
    const u32 below = (1u << (threadIdx.x & 31)) - 1;
    u32 before = 0, total = 0;
    for (int r = 0; r < ROWS; r++) {
        u32 mine = total;
        for (int e = 0; e < 4; e++) {
            const u32 set = __ballot_sync(ALL, (int)(bits >> (4 * r + e) & 1));
            mine += (u32)__popc(set & below), total += (u32)__popc(set);
        }
        before |= mine << (16 * r);
    }
    return before;
}

// How many bits the warp has before item i of this lane.
__device__ __forceinline__ u32 rank_of(u32 bits, u32 before, int i) {
    return (before >> (16 * (i / 4)) & 0xFFFF) + (u32)__popc(bits >> (i & 4) & ((1u << (i & 3)) - 1));
}

// look_back by the first `lists` warps, of a count each: many, others. Status words of the second come behind `spans`
// of the first. shared: a word for each. A barrier; another one has to come before the next call.
__device__ __forceinline__ void earlier_spans(u64* status, i64 spans, i64 span, int lists, u64 many, u64 others,
                                              u64* shared) {
    const u32 warp = threadIdx.x / 32;
    if (warp < (u32)lists) {
        const u64 before = look_back(status + warp * spans, span, warp ? others : many);
        if ((threadIdx.x & 31) == 0) shared[warp] = before;
    }
    __syncthreads();
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

// Copies the sums of a block from the boundary's bin on, in the order of their positions. A span of tiles is looked at
// twice: what is taken of it is read again, from the cache, since all of it would not fit into registers.
KERNEL collect(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot, i64 block,
               i64 blocks, i64 tile, i64 rounds, i64 numel, i64* plan, u64* status, i64* listed_index,
               WORK* listed_value) {
    __shared__ WORK room[TILE];
    __shared__ u32 scratch[32];
    __shared__ u64 words[2];
    const i64 listed = plan[PLAN_LISTED];
    if (listed < 0) return;
    const Key least = (Key)plan[PLAN_KEY];
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    u64* counter = (u64*)plan + PLAN_CLAIM;
    u64 ahead = claim_ahead(counter);
    for (;;) {
        const i64 span = claim_tile(counter, words, ahead), start = span * SPAN;
        if (start * TILE >= s.length) break;
        u32 bits = 0, lower;
#pragma unroll 1
        for (int p = 0; p < SPAN; p++) {
            if ((start + p) * TILE >= s.length) break;
            WORK v[ITEMS];
            load_tile(s, cut, start + p, v, room);
            for (int i = 0; i < ITEMS; i++)
                if (key_of(v[i]) >= least && (start + p) * TILE + place_of(i / 4, i % 4) < s.length)
                    bits |= 1u << (ITEMS * p + i);
        }
        const u32 total = rank_in_span(bits, lower, scratch);
        earlier_spans(status, 0, span, 1, total, 0, words + 1);
#pragma unroll 1
        for (int p = 0; p < SPAN; p++, bits >>= ITEMS) {
            const u32 before = rank_in_warp(bits);
            const i64 first = (i64)words[1] + __shfl_sync(ALL, lower, p * WARPS + (int)threadIdx.x / 32);
            for (u32 left = bits & ((1u << ITEMS) - 1); left; left &= left - 1) {
                const int i = __ffs((int)left) - 1;
                const i64 at = first + rank_of(bits, before, i), place = (start + p) * TILE + place_of(i / 4, i % 4);
                if (at >= listed) break;
                listed_index[at] = place;
                listed_value[at] = sum_at(s, cut, start + p, place);
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
// key: taken from the plan if negative. out_index, out_value: (k,); the latter may be null. claim: which word of the plan
// counts spans. status: two zeroed words for each of `spans`.
KERNEL emit(const WORK* x, const i64* index, const WORK* value, const i64* starts, i64 m, const i64* slot, i64 block,
            i64 blocks, i64 tile, i64 rounds, i64 numel, i64* plan, const i64* listed_index, const WORK* listed_value,
            i64 key, i64 filling, i64 claim, u64* status, i64 spans, i64 k, i64* out_index, WORK* out_value) {
    __shared__ WORK room[TILE];
    __shared__ u32 scratch[32];
    __shared__ u64 words[3];
    const Cut cut = cut_of(slot, block, blocks, tile, rounds, numel);
    const Sums s = {x, index, value, starts, m, rounds * tile};
    const i64 listed = plan[PLAN_LISTED], items = listed < 0 ? s.length : listed;
    const i64 need = plan[PLAN_NEED], limit = plan[PLAN_LIMIT];
    const Key bound = (Key)(key < 0 ? plan[PLAN_KEY] : key);
    u64* counter = (u64*)plan + claim;
    u64 ahead = claim_ahead(counter);
    for (;;) {
        const i64 span = claim_tile(counter, words, ahead), start = span * SPAN;
        if (start * TILE >= items) break;
        u32 larger = 0, other = 0, lower_larger, lower_other;
#pragma unroll 1
        for (int p = 0; p < SPAN; p++) {
            if ((start + p) * TILE >= items) break;
            WORK v[ITEMS];
            load_rest(s, cut, listed, listed_value, start + p, v, room);
            for (int i = 0; i < ITEMS; i++) {
                const Key mine = key_of(v[i]);
                const bool inside = (start + p) * TILE + place_of(i / 4, i % 4) < items;
                if (inside && mine > bound) larger |= 1u << (ITEMS * p + i);
                if (inside && (filling ? mine <= bound : mine == bound)) other |= 1u << (ITEMS * p + i);
            }
        }
        const u32 many = rank_in_span(larger, lower_larger, scratch);
        const u32 others = rank_in_span(other, lower_other, scratch);
        earlier_spans(status, spans, span, 2, many, others, words + 1);
#pragma unroll 1
        for (int p = 0; p < SPAN; p++, larger >>= ITEMS, other >>= ITEMS) {
            const u32 before_larger = rank_in_warp(larger), before_other = rank_in_warp(other);
            const int from = p * WARPS + (int)threadIdx.x / 32;
            const i64 first = (i64)words[1] + __shfl_sync(ALL, lower_larger, from);
            const i64 first_other = (i64)words[2] + __shfl_sync(ALL, lower_other, from);
            const u32 wanted = (first < limit ? larger : 0) | (first_other < need ? other : 0);
            for (u32 left = wanted & ((1u << ITEMS) - 1); left; left &= left - 1) {
                const int i = __ffs((int)left) - 1;
                const i64 a = first + rank_of(larger, before_larger, i), b = first_other + rank_of(other, before_other, i);
                const bool is_larger = larger >> i & 1;
                const i64 at = (a < limit ? a : limit) + (b < need ? b : need);
                if ((is_larger ? a >= limit : b >= need) || at >= k) continue;
                const i64 place = (start + p) * TILE + place_of(i / 4, i % 4);
                out_index[at] = listed < 0 ? place : listed_index[place];
                if (!out_value) continue;
                if (filling && !is_larger)
                    out_value[at] = 0;
                else
                    out_value[at] = listed < 0 ? sum_at(s, cut, start + p, place) : listed_value[place];
            }
        }
    }
}
