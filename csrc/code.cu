// Codes of sorted indices, and whatever else needs to know how many ones come before a word.
//
// A sum over all that comes before takes two kernels. Both cut their list into the same chunks, a multiple of THREADS
// each: the first writes what each chunk adds up to, the second adds up the chunks before its own and goes on from
// there. No block waits for another, and the lists are short next to the vectors they were selected from.
//
// Decoders trust nothing: every access is bounded by sizes, not by what words say.
#include "common.cuh"

// What kernels of one decoding tell each other: words that `count_ones` zeroes. LEFT: blocks that are done; BAD: these
// are not the words of a code. Sums over the gaps of a Golomb-Rice code: HIGH: gap >> 30; LOW: the other 30 bits; MORE:
// unary bits that one low bit more would save; FEWER: those that the last one has saved; ODD: a gap cannot be.
enum { LEFT, BAD, HIGH, LOW, MORE, FEWER, ODD, STATE };

// The sum over the block up to each thread's own value, without it; total: with all of them. Wraps modulo 2^64.
__device__ __forceinline__ u64 sum_up_to(u64 value, u64* scratch, u64& total) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u64 sum = value;
    for (u32 step = 1; step < 32; step <<= 1) {
        const u64 other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    u64 before = 0, all = 0;
    for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) before += scratch[w];
        all += scratch[w];
    }
    __syncthreads();  // scratch may be used again
    total = all;
    return before + sum - value;
}

// What all chunks before this one add up to, and (total) all there are. The same for all threads.
__device__ __forceinline__ u64 sum_of_chunks(const u64* sums, i64 chunk, i64 chunks, u64* scratch, u64& total) {
    u64 before = 0, after = 0, sum;
    for (i64 i = threadIdx.x; i < chunks; i += THREADS) {
        if (i < chunk) before += sums[i];
        else after += sums[i];
    }
    sum_up_to(before, scratch, sum);
    before = sum;
    sum_up_to(after, scratch, sum);
    total = before + sum;
    return before;
}

// `width` (0 to 63) bits from bit `at` on, all inside words.
__device__ __forceinline__ u64 field(const u32* words, i64 at, i64 width) {
    if (width == 0) return 0;
    const u32* from = words + (at >> 5);
    const i64 shift = at & 31;
    u64 value = (u64)(from[0] >> shift);
    if (shift + width > 32) value |= (u64)from[1] << (32 - shift);
    if (shift + width > 64) value |= (u64)from[2] << (64 - shift);
    return value & (((u64)1 << width) - 1);
}

// Word `at` of a list, without the first `skip` bits of all.
__device__ __forceinline__ u32 load(const u32* words, i64 at, i64 skip) {
    return at ? words[at] : words[0] & (ALL << skip);
}

// The number of which an entry's low bits are stored: the index, or the gap before it.
__device__ __forceinline__ u64 number(const i64* index, i64 i, bool gaps) {
    return gaps ? (u64)index[i] - (i ? (u64)index[i - 1] : ~(u64)0) - 1 : (u64)index[i];
}

// Word `at` of what the low bits of all numbers are, one after the other, from bit `skip` on.
__device__ __forceinline__ u32 gather_fields(const i64* index, i64 k, i64 low, bool gaps, i64 skip, i64 at) {
    const i64 bit = 32 * at - skip;  // of all fields', the one at bit 0 of this word
    const u64 mask = ((u64)1 << low) - 1;
    u32 word = 0;
    for (i64 i = bit > 0 ? bit / low : 0; i < k && i * low < bit + 32; i++) {
        const u64 value = number(index, i, gaps) & mask;
        const i64 shift = i * low - bit;
        word |= (u32)(shift >= 0 ? value << shift : value >> -shift);
    }
    return word;
}

// Sets bit `place` of words, for each lane of a warp; none where place is outside [0, limit). One atomic operation for
// neighbours that set bits of one word, as most do.
__device__ __forceinline__ void mark(u32* words, u64 place, i64 limit) {
    const u32 lane = threadIdx.x & 31;
    const bool inside = place < (u64)limit;
    const i64 word = inside ? (i64)(place >> 5) : -1;
    u32 bits = inside ? 1u << (place & 31) : 0;
    for (u32 step = 1; step < 32; step <<= 1) {
        const i64 other = __shfl_down_sync(ALL, word, step);
        const u32 more = __shfl_down_sync(ALL, bits, step);
        if (other == word) bits |= more;  // beyond the last lane that is the lane's own
    }
    const i64 previous = __shfl_up_sync(ALL, word, 1);
    if (inside && (lane == 0 || previous != word)) atomicOr(words + word, bits);
}

// Elias-Fano: low bits to the words before `split`, and after them, where all is zero, a one for each index. With
// step 0 and no low bits a bitmap. limit: bits that there are for ones.
KERNEL encode(const i64* index, i64 k, i64 low, i64 step, u32* out, i64 split, i64 limit) {
    for (i64 at = first_item(); at < split; at += stride()) out[at] = gather_fields(index, k, low, false, 0, at);
    for (i64 first = first_item() & ~(i64)31; first < k; first += stride()) {
        const i64 i = first + (threadIdx.x & 31);
        // A negative index is beyond any limit: nothing is written outside, whatever is asked for.
        const bool some = i < k && index[i] >= 0;
        mark(out + split, some ? ((u64)index[i] >> low) + (u64)(step * i) : ~(u64)0, limit);
    }
}

// sums: the ones in each chunk of words, but for the first `skip` bits.
KERNEL count_ones(const u32* words, i64 count, i64 skip, i64 chunk, u64* sums, i64 chunks, u64* state) {
    __shared__ u64 scratch[WARPS];
    if (blockIdx.x == 0 && threadIdx.x < STATE) state[threadIdx.x] = 0;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        const i64 end = count < (c + 1) * chunk ? count : (c + 1) * chunk;
        u64 found = 0, total;
        for (i64 at = c * chunk + threadIdx.x; at < end; at += THREADS) found += __popc(load(words, at, skip));
        sum_up_to(found, scratch, total);
        if (threadIdx.x == 0) sums[c] = total;
    }
}

KERNEL prefix(const u32* words, i64 count, i64 chunk, const u64* sums, i64 chunks, i64* out) {
    __shared__ u64 scratch[WARPS];
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        u64 total;
        u64 before = sum_of_chunks(sums, c, chunks, scratch, total);
        for (i64 first = c * chunk; first < (c + 1) * chunk && first < count; first += THREADS) {
            const i64 at = first + threadIdx.x;
            const u64 own = sum_up_to(at < count ? __popc(words[at]) : 0, scratch, total);
            if (at < count) out[at] = (i64)(before + own);
            before += total;
        }
    }
}

// Indices by the ones of `words` without the first `skip` bits: the place of the i-th, less step * i, above the i-th of
// the fields of `low` bits in `lows`, after which `unused` bits are zero. `sums` is from count_ones. Sets state[BAD]
// unless these are k, increasing, below m, by ones below limit; then the last block to be done writes 0, 1, ... and the
// flag, unless flags is null.
KERNEL decode(const u32* words, i64 count, i64 skip, i64 chunk, const u64* sums, i64 chunks, u64* state,
              const u32* lows, i64 low, i64 unused, i64 step, i64 k, i64 m, i64 limit, i64* out, u8* flags) {
    __shared__ u64 scratch[WARPS];
    u32 bad = blockIdx.x == 0 && field(lows, k * low, unused) != 0;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        u64 total;
        u64 before = sum_of_chunks(sums, c, chunks, scratch, total);
        if (total != (u64)k) bad = 1;
        for (i64 first = c * chunk; first < (c + 1) * chunk && first < count; first += THREADS) {
            const i64 at = first + threadIdx.x;
            const u32 ones = at < count ? load(words, at, skip) : 0;
            i64 i = (i64)(before + sum_up_to(__popc(ones), scratch, total));
            before += total;
            for (u32 left = ones; left; left &= left - 1, i++) {
                const i64 bit = __ffs((int)left) - 1, place = 32 * at + bit - skip;
                if (i >= k || place >= limit) {
                    bad = 1;
                    break;
                }
                const u64 rest = field(lows, i * low, low), value = (u64)(place - step * i) << low | rest;
                // Only ones side by side have equal high parts.
                if (step && (bit ? ones >> (bit - 1) & 1 : at && words[at - 1] >> 31))
                    bad |= rest <= field(lows, (i - 1) * low, low);
                bad |= value >= (u64)m;
                out[i] = (i64)value;
            }
        }
    }
    bad = block_or(bad);
    if (threadIdx.x == 0 && bad) atomicOr(state + BAD, (u64)1);
    if (!flags) return;
    __threadfence();
    __syncthreads();
    if (!block_or(threadIdx.x == 0 && atomicAdd(state + LEFT, (u64)1) == (u64)gridDim.x - 1)) return;
    __threadfence();
    if (!block_or(threadIdx.x == 0 && atomicOr(state + BAD, (u64)0) != 0)) return;
    for (i64 i = threadIdx.x; i < k; i += THREADS) out[i] = i;
    if (threadIdx.x == 0) raise_flag(flags, DAMAGED);
}

// Golomb-Rice: counts[b]: the gaps in which bit b is one, for all b below 64; counts[64]: 1 unless the indices increase
// from 0 to below m. All zero before.
KERNEL count_gaps(const i64* index, i64 k, i64 m, i64 bits, u64* counts) {
    const u32 lane = threadIdx.x & 31;
    u64 low = 0, high = 0;  // of bits `lane` and `lane + 32`
    bool bad = false;
    for (i64 first = first_item() & ~(i64)31; first < k; first += stride()) {
        const i64 i = first + lane;
        u64 gap = 0;
        if (i < k) {
            gap = number(index, i, true);
            bad |= index[i] < 0 || index[i] >= m || (i && index[i] <= index[i - 1]);
        }
        for (u32 bit = 0; bit < bits; bit++) {
            const u32 found = __popc(__ballot_sync(ALL, (gap >> bit) & 1));
            if (bit == lane) low += found;
            if (bit == lane + 32) high += found;
        }
    }
    if (low) atomicAdd(counts + lane, low);
    if (high) atomicAdd(counts + lane + 32, high);
    if (bad) atomicOr(counts + 64, (u64)1);
}

// sums: what the gaps of each chunk of indices have above their low bits.
KERNEL sum_highs(const i64* index, i64 k, i64 low, i64 chunk, u64* sums, i64 chunks) {
    __shared__ u64 scratch[WARPS];
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        const i64 end = k < (c + 1) * chunk ? k : (c + 1) * chunk;
        u64 sum = 0, total;
        for (i64 i = c * chunk + threadIdx.x; i < end; i += THREADS) sum += number(index, i, true) >> low;
        sum_up_to(sum, scratch, total);
        if (threadIdx.x == 0) sums[c] = total;
    }
}

// The code of indices that increase, where all is zero; ones go from bit `start` up to `limit`.
KERNEL rice_encode(const i64* index, i64 k, i64 low, i64 header, i64 start, i64 limit, i64 chunk, const u64* sums,
                   i64 chunks, u32* out) {
    __shared__ u64 scratch[WARPS];
    if (low) {
        for (i64 at = first_item(); 32 * at < start; at += stride()) {
            atomicOr(out + at, gather_fields(index, k, low, true, header, at));
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) atomicOr(out, (u32)low);
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        u64 total;
        u64 before = (u64)start + sum_of_chunks(sums, c, chunks, scratch, total);
        for (i64 first = c * chunk; first < (c + 1) * chunk && first < k; first += THREADS) {
            const i64 i = first + threadIdx.x;
            const u64 high = i < k ? number(index, i, true) >> low : 0;
            const u64 own = before + sum_up_to(high, scratch, total) + high + (u64)i;
            mark(out, i < k ? own : ~(u64)0, limit);
            before += total;
        }
    }
}

__device__ __forceinline__ void add_up(u64* total, u64 value) {
    for (int by = 16; by; by /= 2) value += __shfl_xor_sync(ALL, value, by);
    if ((threadIdx.x & 31) == 0 && value) atomicAdd(total, value);
}

// Looks at the gaps that k places of ones and the fields from bit `header` of `words` on are: writes what the fields of
// each chunk add up to, and adds to `state` what tells whether an encoder wrote them. start: where places count from.
// Where state[BAD] is set there are no k places.
KERNEL rice_sums(const u32* words, i64 header, i64 low, i64 k, i64 start, i64 count, i64 m, const i64* places,
                 i64 chunk, u64* sums, i64 chunks, u64* state) {
    __shared__ u64 scratch[WARPS];
    if (state[BAD]) return;
    u64 high = 0, rest = 0, more = 0, fewer = 0, odd = 0;
    // The last word must hold a one.
    if (first_item() == 0) odd = (start + places[k - 1]) >> 5 != count - 1;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        const i64 end = k < (c + 1) * chunk ? k : (c + 1) * chunk;
        u64 sum = 0, total;
        for (i64 i = c * chunk + threadIdx.x; i < end; i += THREADS) {
            const u64 unary = number(places, i, true), own = field(words, header + i * low, low);
            const u64 gap = unary << low | own;
            odd |= unary > (u64)m >> low;
            sum += own;
            high += gap >> 30;
            rest += gap & ((1 << 30) - 1);
            more += (unary + 1) >> 1;
            fewer += ((gap >> (low ? low - 1 : 0)) + 1) >> 1;
        }
        sum_up_to(sum, scratch, total);
        if (threadIdx.x == 0) sums[c] = total;
    }
    add_up(state + HIGH, high);
    add_up(state + LOW, rest);
    add_up(state + MORE, more);
    add_up(state + FEWER, fewer);
    add_up(state + ODD, odd);
}

// Turns places of ones into indices.
KERNEL rice_indices(const u32* words, i64 header, i64 low, i64 k, i64 chunk, const u64* sums, i64 chunks,
                    const u64* state, i64* out) {
    __shared__ u64 scratch[WARPS];
    if (state[BAD]) return;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        u64 total;
        u64 before = sum_of_chunks(sums, c, chunks, scratch, total);
        for (i64 first = c * chunk; first < (c + 1) * chunk && first < k; first += THREADS) {
            const i64 i = first + threadIdx.x;
            const u64 own = i < k ? field(words, header + i * low, low) : 0;
            const u64 sum = before + sum_up_to(own, scratch, total) + own;
            if (i < k) out[i] = (i64)(((u64)(out[i] - i) << low) + sum + (u64)i);
            before += total;
        }
    }
}
