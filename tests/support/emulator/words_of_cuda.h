// What the text calls without any header: places, barriers, warp intrinsics, atomics and arithmetic.
#pragma once

namespace emulator {
UNWATCHED inline Index thread_index() { return current->thread; }
UNWATCHED inline Index block_index() { return current->block->index; }
UNWATCHED inline Index grid_size() { return grid; }
}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define gridDim (emulator::grid_size())
#define blockDim (emulator::Index{emulator::BLOCK})

inline void spin() { emulator::pause(emulator::SPINNING); }
inline void __syncthreads() { emulator::barrier(0, 0); }
inline int __syncthreads_or(int p) { return emulator::barrier(1, p); }
inline int __syncthreads_and(int p) { return emulator::barrier(2, p); }
inline int __syncthreads_count(int p) { return emulator::barrier(3, p); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulator::together(mask, emulator::SYNC, 0, 0); }
inline unsigned __ballot_sync(unsigned m, int p) { return (unsigned)emulator::together(m, emulator::BALLOT, p, 0); }
inline int __any_sync(unsigned m, int p) { return (int)emulator::together(m, emulator::ANY, p, 0); }
inline int __all_sync(unsigned m, int p) { return (int)emulator::together(m, emulator::EVERY, p, 0); }
template <class T> T __shfl_sync(unsigned m, T v, int from) { return emulator::shuffled(m, emulator::SHUFFLE, v, from); }
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned by) { return emulator::shuffled(m, emulator::UP, v, by); }
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned by) { return emulator::shuffled(m, emulator::DOWN, v, by); }
template <class T> T __shfl_xor_sync(unsigned m, T v, int by) { return emulator::shuffled(m, emulator::XOR, v, by); }
template <class T> unsigned __match_any_sync(unsigned m, T v) {
    return (unsigned)emulator::together(m, emulator::MATCH, (long long)v, 0);
}
inline void __threadfence() { emulator::fence(); }

#define ATOMIC(name, change)                                                   \
    template <class T> UNWATCHED T name(T* p, typename std::common_type<T>::type v) { \
        emulator::atomically(p, sizeof(T));                                    \
        const T old = *p;                                                      \
        *p = (T)(change);                                                      \
        return old;                                                            \
    }
typedef unsigned long long emulated_word;
ATOMIC(atomicAdd, (emulated_word)old + (emulated_word)v)
ATOMIC(atomicSub, (emulated_word)old - (emulated_word)v)
ATOMIC(atomicOr, old | v)
ATOMIC(atomicAnd, old & v)
ATOMIC(atomicXor, old ^ v)
ATOMIC(atomicMax, old > v ? old : v)
ATOMIC(atomicMin, old < v ? old : v)
ATOMIC(atomicExch, v)
template <class T> UNWATCHED T atomicCAS(T* p, T compare, T v) {
    emulator::atomically(p, sizeof(T));
    const T old = *p;
    if (old == compare) *p = v;
    return old;
}

template <class To, class From> inline To emulated_cast(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }
inline unsigned __float_as_uint(float x) { return emulated_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_cast<float>(x); }
inline float __int_as_float(int x) { return emulated_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_cast<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
using std::fabs;
using std::floor;
using std::ldexp;
using std::rint;
using std::sqrt;
