// The few words of CUDA that the text uses, for a C++ compiler: threads of a block are fibers on one CPU thread.
//
// Several blocks are under way at a time, and who goes on when is drawn at random from a seed. Barriers and warp
// intrinsics are real: whoever comes waits for the others. A block in which all wait for one that has ended, lanes that
// meet in different intrinsics, and blocks that only spin are errors. Shared memory starts as rubbish.
#pragma once
#define SPARCOMM_EMULATED
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "watch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
#define __shared__ static __attribute__((section("cuda_shared")))
#define __constant__ static const

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }

namespace emulator {

const int BLOCK = 256, WARP = 32, RESIDENT = 3;
const size_t STACK = 64 << 10;
const long PATIENCE = 100000;  // rounds in which nobody does anything but spin

struct Index { unsigned x; };
struct Block;
enum State { READY, SPINNING, WAITING, ENDED };

struct Fiber {
    void* stack;
    Block* block;
    Index thread;
    State state;
    long long result;
    bool fenced;                    // since this thread passed a fence
    std::vector<uintptr_t> heard;  // words of other blocks that it read since then
};

struct Warp {
    int arrived, kind;
    unsigned synchronised;
    long long value[WARP];
    int argument[WARP];
};

struct Block {
    Index index;
    Fiber fiber[BLOCK];
    Warp warp[BLOCK / WARP];
    int at_barrier, barrier_kind, sum, live;
    unsigned barriers;
    bool any, all;
    std::vector<char> shared;
};

inline Fiber* current;
inline void* scheduler;
inline Index grid;
inline const char* trouble;
inline void (*body)(void**);
inline void** arguments;
inline unsigned long long randomness;

inline unsigned draw(unsigned below) {
    randomness = randomness * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((randomness >> 33) % below);
}

extern "C" void sparcomm_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.hidden sparcomm_switch
.globl sparcomm_switch
.type sparcomm_switch,@function
sparcomm_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
inline void* prepared(char* top, void (*entry)()) {
    void** sp = (void**)top;  // aligned to 16 bytes; at entry of a function it has to be 8 off
    *--sp = nullptr;
    *--sp = (void*)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden sparcomm_switch
.globl sparcomm_switch
.type sparcomm_switch,%function
sparcomm_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
inline void* prepared(char* top, void (*entry)()) {
    void** sp = (void**)(top - 160);
    std::memset(sp, 0, 160);
    sp[11] = (void*)entry;
    return sp;
}
#endif

UNWATCHED inline void pause(State state) {
    current->state = state;
    sparcomm_switch(&current->stack, scheduler);
}

UNWATCHED inline void enter() {
    body(arguments);
    pause(ENDED);
}

// A barrier of all threads of a block. kind 0: nothing, 1: or, 2: and, 3: count.
UNWATCHED inline int barrier(int kind, int predicate) {
    Block& b = *current->block;
    if (b.at_barrier == 0) b.barrier_kind = kind, b.any = false, b.all = true, b.sum = 0;
    if (b.barrier_kind != kind) trouble = "threads of a block met in different barriers";
    b.any |= predicate != 0, b.all &= predicate != 0, b.sum += predicate != 0;
    if (++b.at_barrier < BLOCK) {
        pause(WAITING);
        return (int)current->result;
    }
    const int result = kind == 1 ? b.any : kind == 2 ? b.all : b.sum;
    b.at_barrier = 0, b.barriers++;
    for (Fiber& f : b.fiber)
        if (&f != current) f.state = READY, f.result = result;
    return result;
}

enum { BALLOT = 1, ANY, EVERY, SHUFFLE, UP, DOWN, XOR, MATCH, SYNC };

// An intrinsic of all 32 lanes of a warp: each gets its own result.
UNWATCHED inline long long together(unsigned mask, int kind, long long value, int argument) {
    Block& b = *current->block;
    Warp& w = b.warp[current->thread.x / WARP];
    const int lane = current->thread.x % WARP;
    if (mask != 0xFFFFFFFFu) trouble = "a warp intrinsic with a mask of fewer than all lanes";
    if (w.arrived == 0) w.kind = kind;
    if (w.kind != kind) trouble = "lanes of a warp met in different intrinsics";
    w.value[lane] = value, w.argument[lane] = argument;
    if (++w.arrived < WARP) {
        pause(WAITING);
        return current->result;
    }
    w.arrived = 0, w.synchronised += kind == SYNC;
    unsigned ballot = 0;
    for (int i = 0; i < WARP; i++) ballot |= (unsigned)(w.value[i] != 0) << i;
    Fiber* first = current - lane;
    for (int i = 0; i < WARP; i++) {
        const int a = w.argument[i];
        long long r = 0;
        int from = i;
        if (kind == BALLOT) r = ballot;
        if (kind == ANY) r = ballot != 0;
        if (kind == EVERY) r = ballot == 0xFFFFFFFFu;
        if (kind == SHUFFLE) from = a & 31;
        if (kind == UP) from = i - a >= 0 ? i - a : i;
        if (kind == DOWN) from = i + a < WARP ? i + a : i;
        if (kind == XOR) from = (i ^ a) < WARP ? i ^ a : i;
        if (kind >= SHUFFLE && kind <= XOR) r = w.value[from];
        if (kind == MATCH)
            for (int j = 0; j < WARP; j++) r |= (long long)(w.value[j] == w.value[i]) << j;
        first[i].result = r;
        if (i != lane) first[i].state = READY;
    }
    return current->result;
}

template <class T> inline T shuffled(unsigned mask, int kind, T value, int argument) {
    static_assert(sizeof(T) <= 8, "");
    long long raw = 0;
    std::memcpy(&raw, &value, sizeof(T));
    raw = together(mask, kind, raw, argument);
    std::memcpy(&value, &raw, sizeof(T));
    return value;
}

extern "C" char __start_cuda_shared[], __stop_cuda_shared[];
static __attribute__((section("cuda_shared"), used)) char something;  // so that the section exists

// Runs one kernel to its end. Returns what went wrong, or null.
UNWATCHED inline const char* run(void (*kernel)(void**), void** args, unsigned blocks, unsigned long long seed,
                                 unsigned launches_before) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> guard(one_at_a_time);
    static char* stacks = (char*)mmap(nullptr, RESIDENT * BLOCK * STACK, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    static Block* pool = new Block[RESIDENT];
    const size_t shared = __stop_cuda_shared - __start_cuda_shared;
    watch::begin(launches_before);
    watch::own = {(uintptr_t)stacks, (uintptr_t)stacks + RESIDENT * BLOCK * STACK};
    watch::shared = {(uintptr_t)__start_cuda_shared, (uintptr_t)__stop_cuda_shared};
    body = kernel, arguments = args, trouble = nullptr, randomness = seed * 0x9E3779B97F4A7C15ull + 1;
    grid.x = blocks;
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; i++) order[i] = i;
    if (seed)
        for (unsigned i = blocks; i > 1; i--) std::swap(order[i - 1], order[draw(i)]);
    unsigned next = 0;
    std::vector<int> resident;
    const auto begin = [&](int place) {
        Block& b = pool[place];
        b.index.x = order[next++];
        b.at_barrier = 0, b.live = BLOCK;
        b.shared.assign(shared, (char)0xA5);
        b.barriers = 0;
        for (Warp& w : b.warp) w.arrived = 0, w.synchronised = 0;
        for (int i = 0; i < BLOCK; i++) {
            Fiber& f = b.fiber[i];
            f.block = &b, f.thread.x = i, f.state = READY, f.fenced = false, f.heard.clear();
            f.stack = prepared(stacks + ((size_t)place * BLOCK + i + 1) * STACK, enter);
        }
    };
    for (int place = 0; place < RESIDENT && next < blocks; place++) begin(place), resident.push_back(place);
    int loaded = -1;
    long idle = 0;
    while (!resident.empty()) {
        const int at = draw(resident.size()), place = resident[at];
        Block& b = pool[place];
        if (loaded != place) {
            if (loaded >= 0) std::memcpy(pool[loaded].shared.data(), __start_cuda_shared, shared);
            std::memcpy(__start_cuda_shared, b.shared.data(), shared);
            loaded = place;
        }
        const int rounds = 1 + draw(8);
        for (int round = 0; round < rounds && b.live; round++) {
            const unsigned start = seed ? draw(BLOCK) : 0, step = seed ? 2 * draw(BLOCK / 2) + 1 : 1;
            bool ran = false, spun = false;
            for (unsigned i = 0; i < BLOCK && !trouble; i++) {
                Fiber& f = b.fiber[(start + i * step) % BLOCK];
                if (f.state != READY && f.state != SPINNING) continue;
                (f.state == READY ? ran : spun) = true;
                current = &f;
                watch::on = watch::looking;
                sparcomm_switch(&scheduler, f.stack);
                watch::on = false;
                if (watch::found) trouble = watch::found;
                b.live -= f.state == ENDED;
            }
            if (trouble) return trouble;
            if (!ran && !spun && b.live) return "threads wait at a barrier that others never come to";
            idle = ran ? 0 : idle + 1;
            if (idle > PATIENCE) return "blocks wait for each other for ever";
            if (!ran) break;
        }
        if (!b.live) {
            loaded = -1;
            if (next < blocks)
                begin(place);
            else
                resident.erase(resident.begin() + at);
        }
    }
    return nullptr;
}

// What each atomic operation begins with.
UNWATCHED inline void atomically(const void* p, size_t size) {
    watch::atomic(p, size, current->fenced, current->heard, grid.x);
}
UNWATCHED inline void fence() {
    current->fenced = true;
    watch::fence(current->heard, grid.x);
}

template <class... A, size_t... I>
UNWATCHED inline void unpack(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    static_assert(((sizeof(A) == 8) && ...), "arguments of kernels have 8 bytes");
    kernel(*(A*)args[I]...);
}
template <class... A> UNWATCHED inline void call(void (*kernel)(A...), void** args) {
    unpack(kernel, args, std::index_sequence_for<A...>{});
}
template <class... A> constexpr int count(void (*)(A...)) { return sizeof...(A); }

}  // namespace emulator

UNWATCHED inline watch::Who watch::now() {
    const emulator::Fiber& f = *emulator::current;
    return {f.block->index.x, f.thread.x, f.block->barriers, f.block->warp[f.thread.x / emulator::WARP].synchronised};
}

#include "words_of_cuda.h"
