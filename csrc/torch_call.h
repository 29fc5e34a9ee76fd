// Calls of torch's C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

// Torch's own macro for this has one name in 2.11 and another in 2.13.
inline void succeeded(AOTITorchError code) {
  STD_TORCH_CHECK(code == AOTI_TORCH_SUCCESS, "a call of torch failed");
}
