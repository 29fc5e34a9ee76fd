// The kernels and their launch: as many blocks as the device holds at once, one launch an op.
#include <cuda_runtime.h>

#include "../kernels/cuda/sample.cuh"
#include "../kernels/cuda/verify.cuh"
#include "cuda_launch.h"

namespace specdec::blocks {

namespace {

constexpr int kResident = 3;  // blocks a multiprocessor: 80 registers a thread, nothing spills

__global__ void __launch_bounds__(kThreads, kResident)
    verify_kernel(const __grid_constant__ VerifyCall call) {
  __shared__ Desk desk;
  verify_block(call, desk);
}

__global__ void __launch_bounds__(kThreads, kResident)
    sample_kernel(const __grid_constant__ SampleCall call) {
  __shared__ Desk desk;
  sample_block(call, desk);
}

template <typename Call>
const char* launch(void (*kernel)(Call), const Call& call, uint32_t items, void* counters,
                   size_t bytes, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  }
  if (error == cudaSuccess) error = cudaMemsetAsync(counters, 0, bytes, stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const uint32_t most = static_cast<uint32_t>(processors) * (resident > 0 ? resident : 1);
  const uint32_t blocks = items < most ? items : most;
  kernel<<<blocks, kThreads, 0, stream>>>(call);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void* stream) {
  return launch(verify_kernel, call, items(call), counters, bytes, stream);
}

const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void* stream) {
  return launch(sample_kernel, call, items(call), counters, bytes, stream);
}

}  // namespace specdec::blocks
