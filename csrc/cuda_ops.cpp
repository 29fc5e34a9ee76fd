// CUDA kernels of the ops whose schemas the Python side defines.
//
// Rows with filters (top-k, top-p, min-p), more than 32 positions and rows of more than 2^24
// entries go to the reference. SPECDEC_LIBRARY and SPECDEC_KEY let a test register the same code
// for blocks that run on the host.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "cuda_arguments.h"
#include "cuda_launch.h"

#ifdef SPECDEC_LIBRARY
#define SPECDEC_REGISTER(library) SPECDEC_REGISTER_AS(SPECDEC_LIBRARY, SPECDEC_KEY, library)
#define SPECDEC_REGISTER_AS(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define SPECDEC_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(specdec_fast, CUDA, library)
#endif

namespace specdec::blocks {

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostItems = int64_t{1} << 31;  // the queue counts in 32 bits
constexpr int64_t kManyTiles = 8192;  // from here on a block takes several tiles at once
constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

template <typename... Arguments>
Outputs reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, "reference", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2]), torch::stable::detail::to<Tensor>(stack[3])};
}

template <typename Call, typename Launch>
void run(const Launch& launch, const Call& call, void* counters, size_t bytes, const Tensor& like) {
  void* stream = nullptr;
#ifndef SPECDEC_LIBRARY
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
#endif
  const char* error = launch(call, counters, bytes, stream);
  STD_TORCH_CHECK(error == nullptr, "specdec_fast: ", error);
}

Outputs sample(const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
               const MaybeTensor& top_p, const MaybeTensor& min_p, const Tensor& seed,
               const Tensor& position, const MaybeTensor& offset, int64_t purpose) {
  Tensor kept;
  SampleCall call;
  call.logits = logits_of("logits", logits_, 2, kept);
  call.rows = logits_.size(0);
  call.tiles = call.logits.tiles();
  if (top_k || top_p || min_p || call.tiles > kMostTiles || call.rows * call.tiles > kMostItems) {
    return reference("specdec_fast::sample", logits_, temperature, top_k, top_p, min_p, seed,
                     position, offset, purpose);
  }
  call.temperature = view_of<float>("temperature", temperature, {call.rows}, 1.0f);
  call.seed = view_of<int64_t>("seed", seed, {call.rows});
  call.position = view_of<int64_t>("position", position, {call.rows});
  call.offset = view_of<int64_t>("offset", offset, {call.rows}, 0);
  call.purpose = static_cast<uint32_t>(purpose);
  call.run = call.rows * call.tiles < kManyTiles ? 1 : 4;

  Workspace workspace;
  const size_t queue = workspace.take<uint32_t>(1), arrived = workspace.take<uint32_t>(call.rows);
  const size_t counters = workspace.bytes();
  const size_t measured = workspace.take<Tile>(call.rows * call.tiles);
  workspace.allocate(logits_);
  call.queue = workspace.at<uint32_t>(queue);
  call.arrived = workspace.at<uint32_t>(arrived);
  call.measured = workspace.at<Tile>(measured);

  const Tensor token = new_tensor(logits_, {call.rows}, ScalarType::Long);
  const Tensor log_prob = new_tensor(logits_, {call.rows}, ScalarType::Double);
  const Tensor logsumexp = new_tensor(logits_, {call.rows}, ScalarType::Double);
  const Tensor status = new_tensor(logits_, {call.rows}, ScalarType::Int);
  call.token = pointer<int64_t>(token);
  call.log_prob = pointer<double>(log_prob);
  call.logsumexp = pointer<double>(logsumexp);
  call.status = pointer<int32_t>(status);
  if (call.rows > 0) run(launch_sample, call, call.queue, counters, logits_);
  return {token, log_prob, logsumexp, status};
}

Outputs verify(const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
               const MaybeTensor& top_p, const MaybeTensor& min_p, const Tensor& tokens,
               const Tensor& count, const MaybeTensor& kind, const MaybeTensor& draft_logits,
               const MaybeTensor& draft_temperature, const MaybeTensor& draft_top_k,
               const MaybeTensor& draft_top_p, const MaybeTensor& draft_min_p,
               const MaybeTensor& index, const MaybeTensor& drawn,
               const MaybeTensor& draft_logsumexp, const MaybeTensor& sparse_ids,
               const MaybeTensor& sparse_log_q, const Tensor& seed, const Tensor& start,
               int64_t base, int64_t rule, bool log_probs) {
  Tensor kept, draft_kept, index_kept;
  VerifyCall call;
  call.logits = logits_of("logits", logits_, 3, kept);
  call.rows = logits_.size(0);
  call.positions = logits_.size(1);
  call.drafted = tokens.size(1);
  call.base = base;
  call.rule = static_cast<Rule>(rule);
  call.tiles = call.logits.tiles();
  call.draft_tiles = 0;
  call.map = {nullptr, 0};
  if (draft_logits) {
    call.draft_logits = logits_of("draft_logits", *draft_logits, 3, draft_kept);
    STD_TORCH_CHECK(draft_logits->size(0) == call.rows && draft_logits->size(1) == call.drafted,
                    "draft_logits must have the rows and positions of tokens");
    if (rule != kMatch) call.draft_tiles = call.draft_logits.tiles();
    if (index) {
      index_kept = torch::stable::contiguous(*index);
      call.map = {view_of<int32_t>("index", index_kept, {call.draft_logits.width}).data,
                  call.draft_logits.width};
    }
  }
  const int64_t all = call.rows * call.positions * (call.tiles + call.draft_tiles);
  const bool filtered = top_k || top_p || min_p || draft_top_k || draft_top_p || draft_min_p;
  if (filtered || call.positions > kMostPositions || call.tiles > kMostTiles || all > kMostItems) {
    return reference("specdec_fast::verify", logits_, temperature, top_k, top_p, min_p, tokens,
                     count, kind, draft_logits, draft_temperature, draft_top_k, draft_top_p,
                     draft_min_p, index, drawn, draft_logsumexp, sparse_ids, sparse_log_q, seed,
                     start, base, rule, log_probs);
  }
  const int64_t rows = call.rows, drafted = call.drafted;
  call.listed = sparse_ids ? sparse_ids->size(2) : 0;
  const LawKind usual = draft_logits ? kCompact : sparse_ids ? kSparse : kPoint;
  call.temperature = view_of<float>("temperature", temperature, {rows}, 1.0f);
  call.tokens = view_of<int64_t>("tokens", tokens, {rows, drafted});
  call.count = view_of<int64_t>("count", count, {rows});
  call.kind = view_of<int32_t>("kind", kind, {rows, drafted}, usual);
  call.draft_temperature = view_of<float>("draft_temperature", draft_temperature, {rows}, 1.0f);
  call.drawn = view_of<int64_t>("drawn", drawn, {rows, drafted}, kNone);
  call.draft_logsumexp =
      view_of<double>("draft_logsumexp", draft_logsumexp, {rows, drafted}, kUnknown);
  call.sparse_ids = view_of<int64_t>("sparse_ids", sparse_ids, {rows, drafted, call.listed}, kNone);
  call.sparse_log_q =
      view_of<double>("sparse_log_q", sparse_log_q, {rows, drafted, call.listed}, 0.0);
  call.seed = view_of<int64_t>("seed", seed, {rows});
  call.start = view_of<int64_t>("start", start, {rows});
  call.run = all < kManyTiles ? 1 : 4;

  Workspace workspace;
  const size_t state = workspace.take<uint64_t>(rows), queue = workspace.take<uint32_t>(1);
  const size_t arrived = workspace.take<uint32_t>(rows * call.positions);
  const size_t counters = workspace.bytes();
  const size_t measured = workspace.take<Tile>(rows * call.positions * call.tiles);
  const size_t draft_measured = workspace.take<Tile>(rows * drafted * call.draft_tiles);
  const size_t decided = workspace.take<Decision>(rows * call.positions);
  const size_t rest = workspace.take<Rest>(rows * call.tiles);
  workspace.allocate(logits_);
  call.state = workspace.at<uint64_t>(state);
  call.queue = workspace.at<uint32_t>(queue);
  call.arrived = workspace.at<uint32_t>(arrived);
  call.measured = workspace.at<Tile>(measured);
  call.draft_measured = workspace.at<Tile>(draft_measured);
  call.decided = workspace.at<Decision>(decided);
  call.rest = workspace.at<Rest>(rest);

  const Tensor accepted = new_tensor(logits_, {rows}, ScalarType::Long);
  const Tensor token = new_tensor(logits_, {rows}, ScalarType::Long);
  const Tensor log_prob =
      new_tensor(logits_, {rows, log_probs ? call.positions : 0}, ScalarType::Double);
  const Tensor status = new_tensor(logits_, {rows}, ScalarType::Int);
  call.accepted = pointer<int64_t>(accepted);
  call.token = pointer<int64_t>(token);
  call.log_prob = log_probs ? pointer<double>(log_prob) : nullptr;
  call.status = pointer<int32_t>(status);
  if (rows > 0) run(launch_verify, call, call.state, counters, logits_);
  return {accepted, token, log_prob, status};
}

}  // namespace

}  // namespace specdec::blocks

SPECDEC_REGISTER(library) {
  library.impl("sample", TORCH_BOX(&specdec::blocks::sample));
  library.impl("verify", TORCH_BOX(&specdec::blocks::verify));
}
