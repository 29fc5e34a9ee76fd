// What the machine can do, before any kernel of ours is judged by it. Prints one JSON object.
//
//     nvcc -std=c++17 -O3 -arch=native first.cu -o first && ./first [repetitions] [megabytes]
//
// launches     an empty kernel and a chain of four, replayed in a graph, and the chain launched one
//              by one: microseconds a graph or chain
// copy         a device copy, bytes read and written
// read         a stream that is only read (bfloat16), its sum taken
// exponential  the same with one exponential an entry, a tile's maximum subtracted first
// philox       the same with one Philox block an entry
// clusters     a row pair of 128256 bfloat16 entries held by clusters of 1 to 8 blocks: read once,
//              maximum and sum of exponentials merged through distributed shared memory; at B = 1
//              and 8, microseconds a launch in a graph
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../kernels/cuda/philox.cuh"

namespace cg = cooperative_groups;

#define CHECK(call)                                                  \
  do {                                                               \
    const cudaError_t error = (call);                                \
    if (error != cudaSuccess) {                                      \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
      exit(1);                                                       \
    }                                                                \
  } while (0)

constexpr int kThreads = 512;
constexpr int kWidth = 128256;

__global__ void empty() {}

// Eight bfloat16 entries of a 16-byte load.
struct Eight {
  float at[8];
  __device__ explicit Eight(const uint4& word) {
    const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
    for (int i = 0; i < 4; ++i) {
      at[2 * i] = __uint_as_float(parts[i] << 16);
      at[2 * i + 1] = __uint_as_float(parts[i] & 0xffff0000u);
    }
  }
  __device__ float peak() const {
    float found = at[0];
    for (int i = 1; i < 8; ++i) found = fmaxf(found, at[i]);
    return found;
  }
};

enum Work { kRead, kExponential, kPhilox };

template <Work work>
__global__ void stream(const uint4* data, int64_t words, float* out) {
  float sum = 0.0f;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += step) {
    const Eight entries(__ldcs(data + i));
    const float peak = work == kExponential ? entries.peak() : 0.0f;
    for (int j = 0; j < 8; ++j) {
      if (work == kRead) sum += entries.at[j];
      if (work == kExponential) sum += exp2f((entries.at[j] - peak) * 1.4426950f);
      if (work == kPhilox) {
        const auto block = specdec::philox4x32_10(specdec::philox_counter(i, j, 0, 0),
                                                  static_cast<uint32_t>(words), 1u);
        sum += entries.at[j] * static_cast<float>(block.word[0]);
      }
    }
  }
  if (sum == 12345.678f) *out = sum;  // nothing is optimised away, hardly anything is written
}

__device__ float block_reduce(float value, bool take_peak, float* room) {
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, step);
    value = take_peak ? fmaxf(value, other) : value + other;
  }
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  float result = room[0];
  for (unsigned i = 1; i < blockDim.x / 32; ++i) {
    result = take_peak ? fmaxf(result, room[i]) : result + room[i];
  }
  __syncthreads();
  return result;
}

// One cluster a pair of rows: each block keeps its part of both in shared memory, and the peaks and
// sums are read from the other blocks' shared memory. Launched with clusters of one block as well.
__global__ void pair(const uint4* rows, int words, float* out) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ uint4 kept[];
  __shared__ float room[kThreads / 32], shared[2];
  const cg::cluster_group cluster = cg::this_cluster();
  const int ranks = cluster.num_blocks(), rank = cluster.block_rank();
  const int each = (words + ranks - 1) / ranks, from = rank * each;
  const int count = max(0, min(each, words - from));
  const int64_t b = blockIdx.x / ranks;
  float total = 0.0f;
  for (int row = 0; row < 2; ++row) {
    const uint4* data = rows + (2 * b + row) * words + from;
    uint4* own = kept + row * each;
    float peak = -INFINITY;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      own[i] = data[i];
      peak = fmaxf(peak, Eight(own[i]).peak());
    }
    peak = block_reduce(peak, true, room);
    if (threadIdx.x == 0) shared[0] = peak;
    cluster.sync();
    for (int r = 0; r < ranks; ++r) peak = fmaxf(peak, *cluster.map_shared_rank(shared, r));
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const Eight entries(own[i]);
      for (int j = 0; j < 8; ++j) sum += exp2f((entries.at[j] - peak) * 1.4426950f);
    }
    sum = block_reduce(sum, false, room);
    if (threadIdx.x == 0) shared[1] = sum;
    cluster.sync();
    float whole = 0.0f;
    for (int r = 0; r < ranks; ++r) whole += *cluster.map_shared_rank(shared + 1, r);
    total += peak + log2f(whole);
    cluster.sync();
  }
  if (rank == 0 && threadIdx.x == 0) out[b] = total;
#endif
}

template <typename Run>
double median_microseconds(int repetitions, cudaStream_t stream, const Run& run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < repetitions + 3; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    run();
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 3) times.push_back(milliseconds);
  }
  std::sort(times.begin(), times.end());
  return 1e3 * times[times.size() / 2];
}

template <typename Body>
cudaGraphExec_t graph_of(cudaStream_t stream, const Body& body) {
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&ready, graph, 0));
  return ready;
}

// Microseconds of one launch of a cluster kernel in a graph of many, or a negative number.
double cluster_microseconds(int size, int batch, const uint4* rows, int words, float* out,
                            int repetitions, cudaStream_t stream) {
  const int each = (words + size - 1) / size;
  const size_t shared = size_t{2} * each * sizeof(uint4);
  if (cudaFuncSetAttribute(pair, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared)) != cudaSuccess) {
    cudaGetLastError();
    return -1.0;  // the rows do not fit in so few blocks
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(batch * size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  constexpr int kLaunches = 20;
  const cudaGraphExec_t graph = graph_of(stream, [&] {
    for (int i = 0; i < kLaunches; ++i) {
      CHECK(cudaLaunchKernelEx(&config, pair, rows, words, out));
    }
  });
  return median_microseconds(repetitions, stream, [&] { CHECK(cudaGraphLaunch(graph, stream)); }) /
         kLaunches;
}

int main(int count, char** words_given) {
  const int repetitions = count > 1 ? atoi(words_given[1]) : 100;
  const int64_t bytes = int64_t{count > 2 ? atoi(words_given[2]) : 2048} << 20;
  cudaDeviceProp facts;
  CHECK(cudaGetDeviceProperties(&facts, 0));
  cudaStream_t stream_;
  CHECK(cudaStreamCreate(&stream_));
  printf("{\"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d, ",
         facts.name, facts.major, facts.minor, facts.multiProcessorCount);
  printf("\"l2_bytes\": %d, \"shared_bytes_a_block\": %zu,\n", facts.l2CacheSize,
         facts.sharedMemPerBlockOptin);

  const auto launches = [&](int number) {
    for (int i = 0; i < number; ++i) empty<<<1, 32, 0, stream_>>>();
  };
  const cudaGraphExec_t one = graph_of(stream_, [&] { launches(1); });
  const cudaGraphExec_t four = graph_of(stream_, [&] { launches(4); });
  const cudaGraphExec_t hundred = graph_of(stream_, [&] { launches(100); });
  const auto replay = [&](cudaGraphExec_t graph) {
    return median_microseconds(repetitions, stream_,
                               [&] { CHECK(cudaGraphLaunch(graph, stream_)); });
  };
  const double replayed_one = replay(one), replayed_four = replay(four);
  const double each = (replay(hundred) - replayed_one) / 99.0;
  const double apart = median_microseconds(repetitions, stream_, [&] { launches(4); });
  printf(" \"graph_of_one_us\": %.3f, \"graph_of_four_us\": %.3f, ", replayed_one, replayed_four);
  printf("\"each_further_in_a_graph_us\": %.3f, \"four_without_a_graph_us\": %.3f,\n", each, apart);

  uint4 *source, *target;
  float* out;
  CHECK(cudaMalloc(&source, bytes));
  CHECK(cudaMalloc(&target, bytes));
  CHECK(cudaMalloc(&out, 4096 * sizeof(float)));
  CHECK(cudaMemset(source, 0x3c, bytes));
  const int64_t words = bytes / sizeof(uint4);
  const int blocks = facts.multiProcessorCount * (facts.maxThreadsPerMultiProcessor / kThreads);
  const double copied = median_microseconds(repetitions, stream_, [&] {
    CHECK(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToDevice, stream_));
  });
  const double read = median_microseconds(repetitions, stream_, [&] {
    stream<kRead><<<blocks, kThreads, 0, stream_>>>(source, words, out);
  });
  const double exponential = median_microseconds(repetitions, stream_, [&] {
    stream<kExponential><<<blocks, kThreads, 0, stream_>>>(source, words, out);
  });
  const double philox = median_microseconds(repetitions, stream_, [&] {
    stream<kPhilox><<<blocks, kThreads, 0, stream_>>>(source, words, out);
  });
  CHECK(cudaGetLastError());
  const double rate = 2.0 * bytes / copied / 1e3;
  printf(" \"copy_gigabytes_per_second\": %.1f, ", rate);
  printf("\"read_gigabytes_per_second\": %.1f, ", bytes / read / 1e3);
  printf("\"exponential_gigabytes_per_second\": %.1f, ", bytes / exponential / 1e3);
  printf("\"philox_gigabytes_per_second\": %.1f,\n", bytes / philox / 1e3);

  printf(" \"clusters\": [");
  if (facts.major >= 9) {
    const int row_words = kWidth * 2 / static_cast<int>(sizeof(uint4));
    bool first = true;
    for (const int batch : {1, 8}) {
      for (int size = 1; size <= 8; ++size) {
        const double time =
            cluster_microseconds(size, batch, source, row_words, out, repetitions, stream_);
        printf("%s{\"batch\": %d, \"size\": %d, \"us\": ", first ? "" : ", ", batch, size);
        first = false;
        if (time < 0.0) {
          printf("null}");
        } else {
          printf("%.3f}", time);
        }
      }
    }
  }
  printf("]}\n");
  return 0;
}
