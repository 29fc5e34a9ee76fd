// Between the ops (host code on torch's stable ABI) and the kernels (torch-free).
#pragma once

#include <cstddef>

#include "../kernels/cuda/call.cuh"
#include "../kernels/cuda/maps.cuh"

namespace specdec::blocks {

// Zeroes the counters and runs the blocks on a stream; what went wrong, or null.
const char* launch_verify(const VerifyCall& call, void* counters, size_t bytes, void* stream);
const char* launch_sample(const SampleCall& call, void* counters, size_t bytes, void* stream);

const char* launch_softmax(const SoftmaxCall& call, void* stream);
const char* launch_project(const ProjectCall& call, void* stream);
const char* launch_range_sums(const RangeSumsCall& call, void* stream);

}  // namespace specdec::blocks
