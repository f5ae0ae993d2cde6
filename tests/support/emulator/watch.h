// Looks at every access of the kernel to memory: the compiler calls the functions below as it does for ThreadSanitizer.
//
// Two accesses to one word race unless both read, both are atomic, one thread makes them or something orders them: a
// barrier of the block, __syncwarp within a warp (no other warp intrinsic orders memory), or between blocks an atomic
// operation behind __threadfence that is seen before another fence. A volatile access counts as atomic. Whoever comes
// first is no excuse: races are found in whatever order threads ran. An access outside of the arguments' tensors, of
// shared memory and of a thread's own is an error, too. Of a kernel's many launches only
// some are looked at, and of these the first accesses; not all that was accessed is remembered.
#pragma once
#include <cstdint>
#include <unordered_map>
#include <vector>

#define UNWATCHED __attribute__((noinline, no_sanitize("thread", "undefined")))
#define UNWATCHED_INLINE __attribute__((always_inline, no_sanitize("thread", "undefined")))

namespace watch {

struct Who {
    unsigned block, thread, epoch, warp_epoch;  // epochs: barriers that were passed
};
struct Mark {
    Who who;
    unsigned char bytes;  // of the word, as bits; 0: no access yet
    bool atomic;
};
struct Cell {
    uintptr_t place;
    unsigned launch;
    Mark write, read[2];  // the last ones; reads by two threads
};
const long PATIENT = 1 << 19;                // accesses
const unsigned EAGER = 16, EVERY_SO_MANY = 8;  // launches
const uintptr_t CELLS = 1 << 16;  // words that are remembered; of two with one cell the one that was touched last
struct Range {
    uintptr_t begin, end;
};
typedef std::vector<unsigned> Clock;  // by block: epochs of it that came before

inline bool on, looking;  // while the text runs; in this launch
inline unsigned launch;
inline long accesses;
inline const char* found;
inline char text[200];
inline Range own, shared;  // fibers' stacks; shared memory, whose marks are each block's own
inline Range* tensors;
inline int tensor_count;
inline Cell cells[CELLS];
inline std::unordered_map<uintptr_t, Clock> released;
inline std::unordered_map<unsigned, Clock> seen;  // by block
Who now();                                        // whoever runs

struct Aside {  // not the text itself
    const bool before;
    UNWATCHED Aside() : before(on) { on = false; }
    UNWATCHED ~Aside() { on = before; }
};

UNWATCHED inline void report(const char* what, uintptr_t at, bool write, const Mark* other) {
    const Who w = now();
    if (found) return;
    if (other)
        std::snprintf(text, sizeof text, "%s: block %u thread %u %s what block %u thread %u %s, %s memory", what, w.block,
                      w.thread, write ? "writes" : "reads", other->who.block, other->who.thread,
                      other->atomic ? "changed atomically" : "touched",
                      at >= shared.begin && at < shared.end ? "shared" : "global");
    else
        std::snprintf(text, sizeof text, "%s: block %u thread %u %s", what, w.block, w.thread, write ? "writes" : "reads");
    found = text;
}

UNWATCHED inline bool ordered(const Mark& before, const Who& w) {
    const Who& b = before.who;
    if (b.block == w.block)
        return b.thread == w.thread || b.epoch < w.epoch || (b.thread / 32 == w.thread / 32 && b.warp_epoch < w.warp_epoch);
    const auto clock = seen.find(w.block);
    return clock != seen.end() && clock->second[b.block] > b.epoch;
}

UNWATCHED_INLINE inline bool clash(const Mark& m, const Who& w, unsigned char bytes, bool atomic) {
    return (m.bytes & bytes) && !(m.atomic && atomic) && !(m.who.block == w.block && m.who.thread == w.thread) &&
           !ordered(m, w);
}

UNWATCHED_INLINE inline void word(const Who& w, uintptr_t at, unsigned char bytes, bool write, bool atomic) {
    // Blocks take turns in one piece of shared memory.
    const uintptr_t block = at >= shared.begin && at < shared.end ? w.block + 1 : 0, place = at / 4 + (block << 46);
    Cell& cell = cells[(place + (place >> 16) * 0x9E37 + block * 0x79B1) % CELLS];
    if (cell.launch != launch || cell.place != place) cell = Cell{place, launch};
    if (clash(cell.write, w, bytes, atomic)) report("race", at, write, &cell.write);
    if (write)
        for (Mark& m : cell.read)
            if (clash(m, w, bytes, atomic)) report("race", at, write, &m);
    const Mark mine = {w, bytes, atomic};
    if (write) {
        cell.write = mine;
    } else {
        Mark& first = cell.read[0];
        if (first.bytes && (first.who.block != w.block || first.who.thread != w.thread)) cell.read[1] = first;
        first = mine;
    }
}

UNWATCHED inline void access(const void* p, size_t size, bool write, bool atomic) {
    const uintptr_t begin = (uintptr_t)p, end = begin + size;
    if (!on || !size || (begin >= own.begin && begin < own.end) || ++accesses > PATIENT) return;
    const Aside aside;
    bool inside = begin >= shared.begin && end <= shared.end;
    for (int i = 0; i < tensor_count && !inside; i++) inside = begin >= tensors[i].begin && end <= tensors[i].end;
    if (!inside) {
        report("an access outside of all tensors", begin, write, nullptr);
        return;
    }
    const Who w = now();
    for (uintptr_t at = begin & ~(uintptr_t)3; at < end; at += 4) {
        unsigned char bytes = 15;
        if (at < begin) bytes &= 15 << (begin - at);
        if (at + 4 > end) bytes &= 15 >> (at + 4 - end);
        word(w, at, bytes, write, atomic);
    }
}

// An atomic operation of whoever has passed a fence tells what came before it, and reads what others told.
UNWATCHED inline void atomic(const void* p, size_t size, bool fenced, std::vector<uintptr_t>& heard, unsigned blocks) {
    access(p, size, true, true);
    const Aside aside;
    const Who w = now();
    if (released.count((uintptr_t)p)) heard.push_back((uintptr_t)p);
    if (!fenced) return;
    Clock &told = released[(uintptr_t)p], &own_clock = seen[w.block];
    told.resize(blocks), own_clock.resize(blocks);
    for (unsigned b = 0; b < blocks; b++) told[b] = std::max(told[b], b == w.block ? w.epoch + 1 : own_clock[b]);
}

UNWATCHED inline void fence(std::vector<uintptr_t>& heard, unsigned blocks) {
    const Aside aside;
    Clock& clock = seen[now().block];
    clock.resize(blocks);
    for (const uintptr_t p : heard)
        for (unsigned b = 0; b < blocks; b++) clock[b] = std::max(clock[b], released[p][b]);
    heard.clear();
}

UNWATCHED inline void begin(unsigned launches_before) {
    looking = launches_before < EAGER || launches_before % EVERY_SO_MANY == 0;
    launch++, accesses = 0, found = nullptr;
    released.clear(), seen.clear();
}

}  // namespace watch

#define WATCHED(name, size, write, atomic) \
    extern "C" UNWATCHED void __tsan_##name(void* p) { watch::access(p, size, write, atomic); }
#define WATCHED_SIZE(n)                    \
    WATCHED(read##n, n, false, false)      \
    WATCHED(write##n, n, true, false)      \
    WATCHED(unaligned_read##n, n, false, false)  \
    WATCHED(unaligned_write##n, n, true, false)  \
    WATCHED(volatile_read##n, n, false, true)    \
    WATCHED(volatile_write##n, n, true, true)
WATCHED_SIZE(1)
WATCHED_SIZE(2)
WATCHED_SIZE(4)
WATCHED_SIZE(8)
WATCHED_SIZE(16)
extern "C" UNWATCHED void __tsan_read_range(void* p, unsigned long n) { watch::access(p, n, false, false); }
extern "C" UNWATCHED void __tsan_write_range(void* p, unsigned long n) { watch::access(p, n, true, false); }
extern "C" UNWATCHED void __tsan_init() {}
// Of variables that are made on first use, by the header's own functions.
extern "C" UNWATCHED unsigned char __tsan_atomic8_load(const unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
