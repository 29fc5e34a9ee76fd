// A block of threads, on the device or on the host.
//
// Everything above this file is written once: `threads(body)` runs `body(t)` for every thread of
// the block and `sync()` is the barrier. On the host a block's threads take turns, so that a
// phase between two barriers is a loop; with SPECDEC_CONCURRENT they are threads of the host, which
// a race checker can watch, and whoever includes this file says what a barrier is. What a thread
// keeps in registers across a barrier is a PerThread. Code outside of `threads` is uniform: every
// thread of the block runs it on the same values.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "philox.cuh"

#ifndef SPECDEC_THREADS
#define SPECDEC_THREADS 256
#endif

// What runs once a row stays out of line: the loop over tiles keeps its registers.
#if defined(__CUDACC__)
#define SPECDEC_COLD __host__ __device__ __noinline__
#else
#define SPECDEC_COLD inline
#endif

namespace specdec::blocks {

constexpr int kThreads = SPECDEC_THREADS;
constexpr int kWarp = 32;
constexpr int kWarps = (kThreads + kWarp - 1) / kWarp;

#if defined(__CUDA_ARCH__)
#define SPECDEC_CONCURRENT
SPECDEC_HOST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SPECDEC_HOST_DEVICE void sync() { __syncthreads(); }
SPECDEC_HOST_DEVICE uint64_t from_lane(uint64_t word, int distance) {
  return __shfl_xor_sync(0xFFFFFFFFu, static_cast<unsigned long long>(word), distance);
}
#elif defined(SPECDEC_CONCURRENT)
int thread_index();
void sync();
uint64_t from_lane(uint64_t word, int distance);  // of the lane whose number differs by `distance`
#else
inline void sync() {}
#endif

#ifdef SPECDEC_CONCURRENT

template <typename T>
struct PerThread {
  T value;
  SPECDEC_HOST_DEVICE T& operator[](int) { return value; }
};

template <typename Body>
SPECDEC_HOST_DEVICE void threads(const Body& body) {
  body(thread_index());
}

#else

template <typename T>
struct PerThread {
  T value[kThreads];
  T& operator[](int t) { return value[t]; }
};

template <typename Body>
SPECDEC_HOST_DEVICE void threads(const Body& body) {
  for (int t = 0; t < kThreads; ++t) body(t);
}

#endif

// Shared memory for what a block agrees on.
struct Agreement {
  uint64_t word[kWarps];
  uint64_t extra;
};

template <typename T>
SPECDEC_HOST_DEVICE uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "one word");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
SPECDEC_HOST_DEVICE T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

// One thread's answer for all of them.
template <typename Body>
SPECDEC_HOST_DEVICE auto single(Agreement& agreement, const Body& body) -> decltype(body()) {
#ifdef SPECDEC_CONCURRENT
  if (thread_index() == 0) agreement.word[0] = to_word(body());
  sync();
  const auto result = from_word<decltype(body())>(agreement.word[0]);
  sync();
  return result;
#else
  (void)agreement;
  return body();
#endif
}

// All threads' values in one; `combine` must not care about their order.
template <typename T, typename Combine>
SPECDEC_HOST_DEVICE T combined(PerThread<T>& values, Agreement& agreement, const Combine& combine) {
#ifdef SPECDEC_CONCURRENT
  const int t = thread_index();
  T value = values[t];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, from_word<T>(from_lane(to_word(value), distance)));
  }
  if (t % kWarp == 0) agreement.word[t / kWarp] = to_word(value);
  sync();
  value = from_word<T>(agreement.word[0]);
  for (int w = 1; w < kWarps; ++w) value = combine(value, from_word<T>(agreement.word[w]));
  sync();
  return value;
#else
  (void)agreement;
  T value = values[0];
  for (int t = 1; t < kThreads; ++t) value = combine(value, values[t]);
  return value;
#endif
}

// The largest; NaN if there is one.
SPECDEC_HOST_DEVICE float larger(float a, float b) { return a != a || a > b ? a : b; }

SPECDEC_HOST_DEVICE float largest(PerThread<float>& values, Agreement& agreement) {
  return combined(values, agreement, [](float a, float b) { return larger(a, b); });
}

SPECDEC_HOST_DEVICE uint64_t sum(PerThread<uint64_t>& values, Agreement& agreement) {
  return combined(values, agreement, [](uint64_t a, uint64_t b) { return a + b; });
}

// Memory that blocks share. What a thread wrote before publish() is seen by whoever saw the atomic
// operation that came after it.
SPECDEC_HOST_DEVICE void publish() {
#ifdef __CUDA_ARCH__
  __threadfence();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

template <typename T>
SPECDEC_HOST_DEVICE T atomic_add(T* target, T value) {
#ifdef __CUDA_ARCH__
  return atomicAdd(target, value);
#else
  return __atomic_fetch_add(target, value, __ATOMIC_SEQ_CST);
#endif
}

// To a word of shared memory, where devices add 32 bits at a time.
SPECDEC_HOST_DEVICE void add_shared(uint64_t* target, uint64_t value) {
#ifdef __CUDA_ARCH__
  unsigned* half = reinterpret_cast<unsigned*>(target);
  const unsigned low = static_cast<unsigned>(value);
  const unsigned carry = atomicAdd(half, low) > ~low;
  const unsigned high = static_cast<unsigned>(value >> 32) + carry;
  if (high != 0) atomicAdd(half + 1, high);
#else
  __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
#endif
}

SPECDEC_HOST_DEVICE uint64_t atomic_or(uint64_t* target, uint64_t value) {
#ifdef __CUDA_ARCH__
  return atomicOr(reinterpret_cast<unsigned long long*>(target), value);
#else
  return __atomic_fetch_or(target, value, __ATOMIC_SEQ_CST);
#endif
}

// Reads past the first-level cache, which other blocks' writes do not reach.
template <typename T>
SPECDEC_HOST_DEVICE T read_shared(const T* source) {
#ifdef __CUDA_ARCH__
  return __ldcg(source);
#else
  T value;
  __atomic_load(source, &value, __ATOMIC_ACQUIRE);
  return value;
#endif
}

// For a loop that waits for another block: ptxas takes a loop of weak loads, as read_shared() makes
// them, for one that ends, and leaves it out.
SPECDEC_HOST_DEVICE uint32_t read_awaited(const uint32_t* source) {
#ifdef __CUDA_ARCH__
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
#else
  return read_shared(source);
#endif
}

}  // namespace specdec::blocks
