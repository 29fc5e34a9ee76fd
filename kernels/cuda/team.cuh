// Blocks that work on one row together: a thread-block cluster, whose blocks read each other's
// shared memory, or one block alone.
//
// A row's tiles are dealt out to the blocks of a team, each of which gets a run of neighbours.
// Everything else is worked out by every block for itself, from the same integers, so that all come
// to the same answer and branch alike. On the host whoever includes this file says how the blocks
// of a cluster meet and where another one's memory lies.
#pragma once

#include "block.cuh"

namespace specdec::blocks {

#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SPECDEC_CLUSTERS
#endif
SPECDEC_HOST_DEVICE void cluster_sync() {
#ifdef SPECDEC_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// What lies in another block's shared memory where `own` lies in this one's.
SPECDEC_HOST_DEVICE char* remote_memory(char* own, int rank) {
#ifdef SPECDEC_CLUSTERS
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
  return reinterpret_cast<char*>(there);
#else
  return own;  // no clusters: every team is one block
#endif
}
#else
void cluster_sync();
char* remote_memory(char* own, int rank);
#endif

template <typename T>
SPECDEC_HOST_DEVICE T* remote(T* own, int rank) {
  return reinterpret_cast<T*>(remote_memory(reinterpret_cast<char*>(own), rank));
}

struct Team {
  int rank, size;

  // The barrier of all threads of all blocks.
  SPECDEC_HOST_DEVICE void meet() const { size == 1 ? sync() : cluster_sync(); }
  // How many of `count` things in a row are a block's own; the last blocks may have fewer.
  SPECDEC_HOST_DEVICE int share(int count) const { return (count + size - 1) / size; }
  SPECDEC_HOST_DEVICE int begin(int count) const {
    const int first = rank * share(count);
    return first < count ? first : count;
  }
  SPECDEC_HOST_DEVICE int end(int count) const {
    const int last = (rank + 1) * share(count);
    return last < count ? last : count;
  }
};

// One item a tile: in global memory, or each in the shared memory of the block that has the tile.
template <typename T>
struct PerTile {
  static_assert(sizeof(T) == 16 && alignof(T) == 16, "read at once");
  T* own;
  int share;  // of a block; 0: they lie in global memory

  // Past the first-level cache, which other blocks' writes do not reach.
  SPECDEC_HOST_DEVICE T read(int i) const {
    if (share > 0) return remote(own, i / share)[i % share];
#ifdef __CUDA_ARCH__
    const uint4 words = __ldcg(reinterpret_cast<const uint4*>(own + i));
    T item;
    memcpy(&item, &words, sizeof(T));
    return item;
#else
    return own[i];
#endif
  }
  // By one thread of the block that has the tile.
  SPECDEC_HOST_DEVICE void write(int i, const T& item) const {
    own[share > 0 ? i % share : i] = item;
  }
};

}  // namespace specdec::blocks
