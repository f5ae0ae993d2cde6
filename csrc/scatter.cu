// Values written to their positions in blocks, as another dtype. WORK: theirs, OUT: that of the vector.
#include "common.cuh"

// out[index] = value, of up to eight lists: those of blocks from `first` on. ends: entries of the lists so far.
KERNEL scatter(
    OUT* out, const i64* slot, i64 first, i64 blocks, i64 tile, i64 rounds, i64 numel, i64 entries,
    const i64* index0, const WORK* value0, i64 end0, const i64* index1, const WORK* value1, i64 end1,
    const i64* index2, const WORK* value2, i64 end2, const i64* index3, const WORK* value3, i64 end3,
    const i64* index4, const WORK* value4, i64 end4, const i64* index5, const WORK* value5, i64 end5,
    const i64* index6, const WORK* value6, i64 end6, const i64* index7, const WORK* value7) {
    Cut cut = cut_of(slot, first, blocks, tile, rounds, numel);
#pragma unroll 1
    for (i64 i = first_item(); i < entries; i += stride()) {
        const i64* index = index0;
        const WORK* value = value0;
        i64 begin = 0;
        cut.block = first;
#define LIST(n, end) if (i >= end) index = index##n, value = value##n, begin = end, cut.block = first + n;
        LIST(1, end0) LIST(2, end1) LIST(3, end2) LIST(4, end3) LIST(5, end4) LIST(6, end5) LIST(7, end6)
#undef LIST
        const i64 at = index[i - begin];
        if (at < 0 || at >= tile * rounds) continue;
        const i64 j = to_global(at, cut);
        if (j < numel) cast(value[i - begin], out[j]);
    }
}
