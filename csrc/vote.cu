// Votes between bitmaps, counted in planes: bit i of plane d is bit d of how many said yes at bit i of a word.

#include "common.cuh"

struct Ballot {
    const u32* rows;
    i64 step;  // words from one row to the next
    const u32* present;  // or null: all vote everywhere
    i64 present_step;
    i64 count;
};

// Adds two rows to the planes: a full adder, and a carry through all planes. Without branches and with fixed places,
// so that planes stay in registers.
template <int DEPTH>
__device__ __forceinline__ void add_pair(u32 (&plane)[DEPTH], u32 a, u32 b) {
    const u32 half = plane[0] ^ a;
    u32 carry = (plane[0] & a) | (half & b);
    plane[0] = half ^ b;
#pragma unroll
    for (int d = 1; d < DEPTH; d++) {
        const u32 both = plane[d] & carry;
        plane[d] ^= carry;
        carry = both;
    }
}

// Counts who says yes at a word.
template <int DEPTH>
__device__ __forceinline__ void count_all(const Ballot& b, i64 word, u32 (&plane)[DEPTH]) {
    for (i64 r = 0; r < b.count; r += 8) {
        u32 part[8];
#pragma unroll
        for (int j = 0; j < 8; j++) part[j] = r + j < b.count ? b.rows[(r + j) * b.step + word] : 0;
#pragma unroll
        for (int j = 0; j < 8; j += 2) add_pair(plane, part[j], part[j + 1]);
    }
}

// Counts 2 for yes, 1 for no vote, 0 for no. Returns where anybody votes.
template <int DEPTH>
__device__ __forceinline__ u32 count_present(const Ballot& b, i64 word, u32 (&plane)[DEPTH]) {
    u32 anybody = 0;
    for (i64 r = 0; r < b.count; r += 4) {
        u32 part[4], may[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool inside = r + j < b.count;
            part[j] = inside ? b.rows[(r + j) * b.step + word] : 0;
            may[j] = inside ? b.present[(r + j) * b.present_step + word] : ALL;  // a no where there is no row
            anybody |= inside ? may[j] : 0;
        }
#pragma unroll
        for (int j = 0; j < 4; j++) add_pair(plane, part[j] & may[j], part[j] | ~may[j]);
    }
    return anybody;
}

// A thread counts a word at a time. All its reads of a word come before its writes: out may be one of the rows.
template <int DEPTH>
__device__ __forceinline__ void decide(
    const Ballot& b, i64 words, i64 rule, u32 key, u32 first, u32* out, u32* voted
) {
    const u32 threshold = (u32)(b.present ? b.count : b.count / 2);
    const bool can_tie = b.present || b.count % 2 == 0;
    for (i64 i = first_item(); i < words; i += stride()) {
        u32 plane[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) plane[d] = 0;
        u32 anybody = ALL;
        if (b.present)
            anybody = count_present(b, i, plane);
        else
            count_all(b, i, plane);
        u32 more = 0, tie = ALL;
#pragma unroll
        for (int d = DEPTH - 1; d >= 0; d--) {
            const u32 bound = threshold >> d & 1 ? ALL : 0;
            more |= tie & plane[d] & ~bound;
            tie &= ~(plane[d] ^ bound);
        }
        if (can_tie) more |= tie & ruled(rule, first + (u32)i, key);
        out[i] = more & anybody;
        if (voted) voted[i] = anybody;
    }
}

// For numbers up to 15: rows, or twice as many where only some vote. rows and present: `step` words from one to the next.
KERNEL vote_4(
    const u32* rows, i64 step, const u32* present, i64 present_step, i64 count, i64 words, i64 rule, i64 seed, i64 first,
    u32* out, u32* voted
) {
    decide<4>({rows, step, present, present_step, count}, words, rule, mix((u32)seed), (u32)first, out, voted);
}

// For numbers up to 255: rows, or twice as many where only some vote.
KERNEL vote_8(
    const u32* rows, i64 step, const u32* present, i64 present_step, i64 count, i64 words, i64 rule, i64 seed, i64 first,
    u32* out, u32* voted
) {
    decide<8>({rows, step, present, present_step, count}, words, rule, mix((u32)seed), (u32)first, out, voted);
}

// For numbers up to 131071: rows, or twice as many where only some vote.
KERNEL vote_17(
    const u32* rows, i64 step, const u32* present, i64 present_step, i64 count, i64 words, i64 rule, i64 seed, i64 first,
    u32* out, u32* voted
) {
    decide<17>({rows, step, present, present_step, count}, words, rule, mix((u32)seed), (u32)first, out, voted);
}
