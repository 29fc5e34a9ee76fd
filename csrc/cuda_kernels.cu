// The kernels and their launches, one an op: plan.cuh says which of two it is.
#include <cuda_runtime.h>

#include <cstdlib>

#include "../kernels/cuda/cluster.cuh"
#include "../kernels/cuda/maps.cuh"
#include "../kernels/cuda/plan.cuh"
#include "../kernels/cuda/sample.cuh"
#include "../kernels/cuda/verify.cuh"
#include "cuda_launch.h"

namespace specdec::blocks {

namespace {

// Blocks a multiprocessor holds: 80 registers a thread for three, 128 for two, so that nothing
// spills.
constexpr int kResident = 2, kResidentLight = 3;

__global__ void __launch_bounds__(kThreads, kResident)
    verify_kernel(const __grid_constant__ VerifyCall call) {
  __shared__ Desk desk;
  verify_block<false>(call, desk);
}

__global__ void __launch_bounds__(kThreads, kResident)
    verify_filtered_kernel(const __grid_constant__ VerifyCall call) {
  __shared__ Desk desk;
  verify_block<true>(call, desk);
}

__global__ void __launch_bounds__(kThreads, kResidentLight)
    sample_kernel(const __grid_constant__ SampleCall call) {
  __shared__ Desk desk;
  sample_block<false>(call, desk);
}

__global__ void __launch_bounds__(kThreads, kResident)
    sample_filtered_kernel(const __grid_constant__ SampleCall call) {
  __shared__ Desk desk;
  sample_block<true>(call, desk);
}

__device__ Team own_team() {
  Team team{0, 1};
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(team.rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(team.size));
#endif
  return team;
}

extern __shared__ uint4 room[];

__global__ void __launch_bounds__(kThreads, 1)
    verify_team_kernel(const __grid_constant__ VerifyCall call, int64_t bytes) {
  __shared__ Desk desk;
  const Team team = own_team();
  verify_team(call, blockIdx.x / team.size, team, reinterpret_cast<char*>(room), bytes, desk);
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_team_kernel(const __grid_constant__ SampleCall call, int64_t bytes) {
  __shared__ Desk desk;
  const Team team = own_team();
  sample_team(call, blockIdx.x / team.size, team, reinterpret_cast<char*>(room), bytes, desk);
}

__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const __grid_constant__ SoftmaxCall call) {
  softmax_block(call, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kThreads)
    project_kernel(const __grid_constant__ ProjectCall call) {
  project_block(call, blockIdx.x, gridDim.x);
}

__global__ void __launch_bounds__(kThreads, 4)
    range_sums_kernel(const __grid_constant__ RangeSumsCall call) {
  __shared__ Scan scan;
  range_sums_block(call, blockIdx.x, gridDim.x, scan);
}

struct Device {
  int number = 0, processors = 0, major = 0, shared = 0;

  cudaError_t read() {
    cudaError_t error = cudaGetDevice(&number);
    const auto attribute = [&](int* value, cudaDeviceAttr which) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, which, number);
    };
    attribute(&processors, cudaDevAttrMultiProcessorCount);
    attribute(&major, cudaDevAttrComputeCapabilityMajor);
    attribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return error;
  }
};

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

uint32_t grid(int64_t blocks) { return static_cast<uint32_t>(blocks < 1 << 20 ? blocks : 1 << 20); }

// As many blocks as the device holds at once, but no more than there are items.
template <typename Call>
cudaError_t launch_queue(void (*kernel)(Call), const Call& call, uint32_t items,
                         const Device& device, cudaStream_t stream) {
  int resident = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  const uint32_t most = static_cast<uint32_t>(device.processors) * (resident > 0 ? resident : 1);
  const uint32_t blocks = items < most ? items : most;
  kernel<<<blocks, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

// Clusters of `size` blocks, each with all the shared memory that its rows can use. False where the
// device has no room for one.
template <typename Call>
cudaError_t launch_teams(void (*kernel)(Call, int64_t), const Call& call, uint32_t teams, int size,
                         int64_t wanted, const Device& device, cudaStream_t stream, bool& fits) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const int64_t most = device.shared - static_cast<int64_t>(attributes.sharedSizeBytes);
  const int64_t bytes = wanted < most ? wanted : most;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(teams * size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int resident = 0;
  fits = cudaOccupancyMaxActiveClusters(&resident, kernel, &config) == cudaSuccess && resident > 0;
  if (!fits) {
    cudaGetLastError();  // it is no failure of this call
    return cudaSuccess;
  }
  return cudaLaunchKernelEx(&config, kernel, call, bytes);
}

template <typename Call>
const char* launch(void (*queue)(Call), void (*team)(Call, int64_t), const Call& call,
                   uint32_t items, uint32_t teams, const Logits& draft_logits, int draft_tiles,
                   void* counters, size_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  Device device;
  cudaError_t error = device.read();
  if (error == cudaSuccess) error = cudaMemsetAsync(counters, 0, bytes, stream);
  if (error != cudaSuccess) return text_of(error);
  const int size =
      teams == 0 ? 0 : team_size(teams, call.tiles, device.processors, device.major >= 9);
  if (size > 0) {
    bool fits = false;
    const int64_t wanted = Layout::all(call.tiles, draft_tiles, call.logits, draft_logits, size);
    error = launch_teams(team, call, teams, size, wanted, device, stream, fits);
    if (fits || error != cudaSuccess) return text_of(error);
  }
  return text_of(launch_queue(queue, call, items, device, stream));
}

}  // namespace

const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void* stream) {
  const bool filters = call.filters.given() || call.draft_filters.given();
  // Rule block by teams went wrong on an H200: the wait for earlier positions was compiled away. It
  // is there now, but until a GPU has shown that it holds, those teams are there on request alone
  const bool proven = call.rule != kBlockwise || std::getenv(kTeamVariable) != nullptr;
  const uint32_t team_count = proven ? teams(call) : 0;
  return launch(filters ? verify_filtered_kernel : verify_kernel, verify_team_kernel, call,
                items(call), team_count, call.draft_logits, call.draft_tiles, counters, bytes,
                stream);
}

const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void* stream) {
  return launch(call.filters.given() ? sample_filtered_kernel : sample_kernel, sample_team_kernel,
                call, items(call), static_cast<uint32_t>(call.rows), call.logits, 0, counters,
                bytes, stream);
}

const char* launch_softmax(const SoftmaxCall& call, void* stream) {
  softmax_kernel<<<grid(call.rows * call.tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      call);
  return text_of(cudaGetLastError());
}

const char* launch_project(const ProjectCall& call, void* stream) {
  const int64_t blocks = (call.rows * call.width + kThreads - 1) / kThreads;
  project_kernel<<<grid(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  return text_of(cudaGetLastError());
}

const char* launch_range_sums(const RangeSumsCall& call, void* stream) {
  range_sums_kernel<<<grid(call.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(call);
  return text_of(cudaGetLastError());
}

}  // namespace specdec::blocks
