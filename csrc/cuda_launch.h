// Between the ops (host code on torch's stable ABI) and the kernels (torch-free).
#pragma once

#include <cstddef>

#include "../kernels/cuda/call.cuh"

namespace specdec::blocks {

// Zeroes the counters and runs the blocks on a stream; what went wrong, or null.
const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void* stream);
const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void* stream);

}  // namespace specdec::blocks
