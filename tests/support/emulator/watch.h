// Looks at every access of the kernel to memory: the compiler calls the functions below as it does for ThreadSanitizer.
//
// Two accesses to one word race unless both read, both are atomic, one thread makes them or something orders them: a
// barrier of the block, __syncwarp within a warp (no other warp intrinsic orders memory), or between blocks an atomic
// operation behind __threadfence that is seen before another fence. A volatile access counts as atomic. Whoever comes
// first is no excuse: races are found in whatever order threads ran. An access outside of the arguments' tensors, of
// shared memory and of a thread's own is an error, too. Only the first accesses of a launch are looked at: PATIENT.
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
    unsigned launch;
    Mark write, read[2];  // the last ones; reads by two threads
};
const long PATIENT = 1 << 19;
const uintptr_t WORDS = 1024;  // of a page
struct Range {
    uintptr_t begin, end;
};
typedef std::vector<unsigned> Clock;  // by block: epochs of it that came before

inline bool on;  // while the text runs
inline unsigned launch;
inline long accesses;
inline const char* found;
inline char text[200];
inline Range own, shared;  // fibers' stacks; shared memory, whose marks are each block's own
inline Range* tensors;
inline int tensor_count;
inline std::unordered_map<uintptr_t, Cell*> pages;
const uintptr_t NEAR_PAGES = 256;
inline uintptr_t near_page[NEAR_PAGES];
inline Cell* near_cells[NEAR_PAGES];
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

UNWATCHED inline Cell* far_cells(uintptr_t page, uintptr_t near) {
    Cell*& cells = pages[page];
    if (!cells) cells = new Cell[WORDS]();
    near_page[near] = page;
    return near_cells[near] = cells;
}
UNWATCHED_INLINE inline Cell* cells_of(uintptr_t page) {
    const uintptr_t near = (page ^ page >> 36) % NEAR_PAGES;
    return near_page[near] == page ? near_cells[near] : far_cells(page, near);
}

UNWATCHED_INLINE inline void word(const Who& w, uintptr_t at, unsigned char bytes, bool write, bool atomic) {
    const uintptr_t number = at / 4;
    // Blocks take turns in one piece of shared memory.
    const uintptr_t place = at >= shared.begin && at < shared.end ? number + ((uintptr_t)(w.block + 1) << 46) : number;
    Cell& cell = cells_of(place / WORDS)[place % WORDS];
    if (cell.launch != launch) cell = Cell(), cell.launch = launch;
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

UNWATCHED inline void begin() {
    launch++, accesses = 0, found = nullptr;
    released.clear(), seen.clear();
    if (pages.size() > 4096) {
        for (auto& page : pages) delete[] page.second;
        pages.clear();
        std::memset(near_page, 0, sizeof near_page);
    }
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
