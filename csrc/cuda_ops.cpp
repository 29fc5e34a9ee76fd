// CUDA kernels of the ops whose schemas the Python side defines.
//
// More than 32 positions and rows of more than 2^24 entries go to the reference. SPECDEC_LIBRARY
// and SPECDEC_KEY let a test register the same code for blocks that run on the host.
#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "cuda_arguments.h"
#include "cuda_launch.h"
#include "torch_call.h"

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

template <typename Result>
Result from_stack(const StableIValue* stack) {
  if constexpr (std::is_same_v<Result, Tensor>)
    return torch::stable::detail::to<Tensor>(stack[0]);
  else
    return {
        torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
        torch::stable::detail::to<Tensor>(stack[2]), torch::stable::detail::to<Tensor>(stack[3])};
}

template <typename Result, typename... Arguments>
Result reference(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  succeeded(torch_call_dispatcher(op, "reference", stack.data(), TORCH_ABI_VERSION));
  return from_stack<Result>(stack.data());
}

// Launches on the current stream of a tensor's device.
template <typename Launch>
void run(const Tensor& like, const Launch& launch) {
  void* stream = nullptr;
#ifndef SPECDEC_LIBRARY
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  succeeded(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
#endif
  const char* error = launch(stream);
  STD_TORCH_CHECK(error == nullptr, "specdec_fast: ", error);
}

Filters filters_of(const MaybeTensor& top_k, const MaybeTensor& top_p, const MaybeTensor& min_p,
                   int64_t rows) {
  return {view_of<int32_t>("top_k", top_k, {rows}, 0), view_of<float>("top_p", top_p, {rows}, 1.0f),
          view_of<float>("min_p", min_p, {rows}, 0.0f)};
}

bool too_large(const SampleCall& call) {
  return call.tiles > kMostTiles || call.rows * call.tiles > kMostItems;
}

// Memory and outputs of a call whose inputs are set, and the call itself; cuts go to `cut` if
// given.
Outputs draw_rows(SampleCall& call, Cut* cut, const Tensor& like) {
  call.run = call.rows * call.tiles < kManyTiles ? 1 : 4;
  Workspace workspace;
  const size_t queue = workspace.take<uint32_t>(1), arrived = workspace.take<uint32_t>(call.rows);
  const size_t counters = workspace.bytes();
  const size_t measured = workspace.take<Tile>(call.rows * call.tiles);
  workspace.allocate(like);
  call.queue = workspace.at<uint32_t>(queue);
  call.arrived = workspace.at<uint32_t>(arrived);
  call.measured = workspace.at<Tile>(measured);
  call.cut = cut;

  const Tensor token = new_tensor(like, {call.rows}, ScalarType::Long);
  const Tensor log_prob = new_tensor(like, {call.rows}, ScalarType::Double);
  const Tensor logsumexp = new_tensor(like, {call.rows}, ScalarType::Double);
  const Tensor status = new_tensor(like, {call.rows}, ScalarType::Int);
  call.token = pointer<int64_t>(token);
  call.log_prob = pointer<double>(log_prob);
  call.logsumexp = pointer<double>(logsumexp);
  call.status = pointer<int32_t>(status);
  if (call.rows > 0) {
    run(like, [&](void* stream) { return launch_sample(call, call.queue, counters, stream); });
  }
  return {token, log_prob, logsumexp, status};
}

Outputs sample(const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
               const MaybeTensor& top_p, const MaybeTensor& min_p, const Tensor& seed,
               const Tensor& position, const MaybeTensor& offset, int64_t purpose) {
  Tensor kept;
  SampleCall call;
  call.logits = logits_of("logits", logits_, 2, kept);
  call.rows = logits_.size(0);
  call.tiles = call.logits.tiles();
  if (too_large(call)) {
    return reference<Outputs>("specdec_fast::sample", logits_, temperature, top_k, top_p, min_p,
                              seed, position, offset, purpose);
  }
  call.temperature = view_of<float>("temperature", temperature, {call.rows}, 1.0f);
  call.filters = filters_of(top_k, top_p, min_p, call.rows);
  call.seed = view_of<int64_t>("seed", seed, {call.rows});
  call.position = view_of<int64_t>("position", position, {call.rows});
  call.offset = view_of<int64_t>("offset", offset, {call.rows}, 0);
  call.purpose = static_cast<uint32_t>(purpose);
  return draw_rows(call, nullptr, logits_);
}

// A draw says what a row's probabilities are made of.
Tensor softmax(const Tensor& logits_, const MaybeTensor& temperature, const MaybeTensor& top_k,
               const MaybeTensor& top_p, const MaybeTensor& min_p) {
  Tensor kept;
  SampleCall draw;
  draw.logits = logits_of("logits", logits_, 2, kept);
  draw.rows = logits_.size(0);
  draw.tiles = draw.logits.tiles();
  if (too_large(draw)) {
    return reference<Tensor>("specdec_fast::softmax", logits_, temperature, top_k, top_p, min_p);
  }
  draw.temperature = view_of<float>("temperature", temperature, {draw.rows}, 1.0f);
  draw.filters = filters_of(top_k, top_p, min_p, draw.rows);
  draw.purpose = kTarget;
  const Tensor cuts = new_tensor(logits_, {draw.rows}, ScalarType::Double);
  static_assert(sizeof(Cut) == sizeof(double), "one word a row");
  const Outputs drawn = draw_rows(draw, reinterpret_cast<Cut*>(pointer<double>(cuts)), logits_);

  Tensor result = new_tensor(logits_, {draw.rows, draw.logits.width}, ScalarType::Double);
  const SoftmaxCall call{draw.logits, draw.temperature,       draw.rows,      draw.tiles,
                         draw.token,  draw.log_prob,          draw.logsumexp, draw.status,
                         draw.cut,    pointer<double>(result)};
  if (draw.rows > 0) run(logits_, [&](void* stream) { return launch_softmax(call, stream); });
  return result;
}

Masses masses_of(const Tensor& q) {
  const bool single = q.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(q.dim() == 2 && (single || q.scalar_type() == ScalarType::Double),
                  "q must be [N, K] float32 or float64");
  return {q.const_data_ptr(), single, q.stride(0), q.stride(1)};
}

Tensor project(const Tensor& q, const Tensor& row_start, const Tensor& column) {
  ProjectCall call;
  call.q = masses_of(q);
  call.rows = q.size(0);
  call.entries = q.size(1);
  call.width = row_start.size(0) - 1;
  call.listed = column.size(0);
  call.row_start = view_of<int32_t>("row_start", row_start, {call.width + 1});
  call.column = view_of<int32_t>("column", column, {call.listed});
  Tensor result = new_tensor(q, {call.rows, call.width}, ScalarType::Double);
  call.out = pointer<double>(result);
  if (call.rows * call.width > 0) {
    run(q, [&](void* stream) { return launch_project(call, stream); });
  }
  return result;
}

Tensor range_sums(const Tensor& q, const MaybeTensor& order, const Tensor& low,
                  const Tensor& high) {
  RangeSumsCall call;
  call.q = masses_of(q);
  call.rows = q.size(0);
  call.entries = q.size(1);
  call.length = order ? order->size(0) : call.entries;
  call.ranges = low.size(1);
  call.order = view_of<int32_t>("order", order, {call.length}, 0);
  call.low = view_of<int64_t>("low", low, {call.rows, call.ranges});
  call.high = view_of<int64_t>("high", high, {call.rows, call.ranges});
  const Tensor edge = new_tensor(q, {call.rows, call.length + 1}, ScalarType::Double);
  Tensor result = new_tensor(q, {call.rows, call.ranges}, ScalarType::Double);
  call.edge = pointer<double>(edge);
  call.out = pointer<double>(result);
  if (call.rows > 0) run(q, [&](void* stream) { return launch_range_sums(call, stream); });
  return result;
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
    call.map = {nullptr, call.draft_logits.width};
    if (index) {
      index_kept = torch::stable::contiguous(*index);
      call.map = {view_of<int32_t>("index", index_kept, {call.draft_logits.width}).data,
                  call.draft_logits.width};
    }
  }
  const int64_t all = call.rows * call.positions * (call.tiles + call.draft_tiles);
  if (call.positions > kMostPositions || call.tiles > kMostTiles || call.draft_tiles > kMostTiles ||
      all > kMostItems) {
    return reference<Outputs>("specdec_fast::verify", logits_, temperature, top_k, top_p, min_p,
                              tokens, count, kind, draft_logits, draft_temperature, draft_top_k,
                              draft_top_p, draft_min_p, index, drawn, draft_logsumexp, sparse_ids,
                              sparse_log_q, seed, start, base, rule, log_probs);
  }
  const int64_t rows = call.rows, drafted = call.drafted;
  call.listed = sparse_ids ? sparse_ids->size(2) : 0;
  const LawKind usual = draft_logits ? kCompact : sparse_ids ? kSparse : kPoint;
  call.temperature = view_of<float>("temperature", temperature, {rows}, 1.0f);
  call.tokens = view_of<int64_t>("tokens", tokens, {rows, drafted});
  call.count = view_of<int64_t>("count", count, {rows});
  call.kind = view_of<int32_t>("kind", kind, {rows, drafted}, usual);
  call.draft_temperature = view_of<float>("draft_temperature", draft_temperature, {rows}, 1.0f);
  call.filters = filters_of(top_k, top_p, min_p, rows);
  call.draft_filters = filters_of(draft_top_k, draft_top_p, draft_min_p, rows);
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
  const size_t cut = workspace.take<Cut>(rows * call.positions);
  const size_t draft_cut = workspace.take<Cut>(rows * drafted);
  const size_t outcome = workspace.take<Outcome>(rows * call.positions);
  const size_t rest = workspace.take<Rest>(rows * call.tiles);
  workspace.allocate(logits_);
  call.state = workspace.at<uint64_t>(state);
  call.queue = workspace.at<uint32_t>(queue);
  call.arrived = workspace.at<uint32_t>(arrived);
  call.measured = workspace.at<Tile>(measured);
  call.draft_measured = workspace.at<Tile>(draft_measured);
  call.decided = workspace.at<Decision>(decided);
  call.cut = workspace.at<Cut>(cut);
  call.draft_cut = workspace.at<Cut>(draft_cut);
  call.outcome = workspace.at<Outcome>(outcome);
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
  if (rows > 0) {
    run(logits_, [&](void* stream) { return launch_verify(call, call.state, counters, stream); });
  }
  return {accepted, token, log_prob, status};
}

}  // namespace

}  // namespace specdec::blocks

SPECDEC_REGISTER(library) {
  library.impl("sample", TORCH_BOX(&specdec::blocks::sample));
  library.impl("verify", TORCH_BOX(&specdec::blocks::verify));
  library.impl("softmax", TORCH_BOX(&specdec::blocks::softmax));
  library.impl("project", TORCH_BOX(&specdec::blocks::project));
  library.impl("range_sums", TORCH_BOX(&specdec::blocks::range_sums));
}
