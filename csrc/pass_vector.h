// The kernels of pass.h in the compiler's vector types, for the instruction set of the including
// file: SPECDEC_BYTES is the width of a vector register, SPECDEC_DOT is defined where the machine
// multiplies bfloat16 and bytes itself.
//
// Nothing of the standard library is called here: a function template instantiated under a wider
// instruction set could be the copy the linker keeps for every file.

// clang-format off: each builds on the one before
#include "pass_lanes.h"
#include "pass_packed.h"
#include "pass_product.h"
#include "pass_between.h"
#include "pass_attend.h"
// clang-format on

namespace {

constexpr specdec::PassKernels pass_named(const char* name) {
  return {name,  room,   prepare,     product, normalise, add_to, gate,
          curve, rotate, attend_room, attend,  merge,     mix,    narrow_all};
}

}  // namespace
