// Scaled dot-product attention, forward and backward, for bf16 and f16; the formulas stand in params/attention.h.
//
// Parallelisation: four warps to a block, and each holds its rows of every product from start to end, so that a product
// that is the next one's left factor never leaves its registers.
//   Forward: a block takes 64 or 128 rows, which are [query heads that share keys, queries], holds their queries in
//   shared memory and visits keys and values in tiles, which cp.async brings ahead. Where there are fewer blocks than
//   multiprocessors (decoding), several blocks take a part of the keys each, and a second kernel combines what they
//   leave in the workspace.
//   Backward: a kernel computes delta; one for dq visits the keys as forward does; one for dk and dv takes 64 or 128
//   keys and visits the queries of all heads that share them, with both products transposed. Both compute the scores,
//   7 products instead of 5, so that nothing is added by atomics or waits for a turn. dmask has a kernel of its own (2
//   products more), whose blocks own a tile of it each and visit whatever shares that tile.
//   Tiles that the window hides are not visited; only tiles that it crosses pay for it.
// Work: forward 4 B H L S D FLOP, backward 14, dmask 4 more; half of it under a causal mask. q, k, v and out must move
// once; keys and values come from L2 once per block of rows. Bound by the products, or with few queries by the bytes.
// Numerics: products with fp32 sums; scores, softmax and statistics in fp32; P and dS are rounded to T as factors of
// the next product. Fixed order of additions: equal bits from run to run on a device.
// Variants: plain, and with everything (mask, softcap, ALiBi, dropout, a scale that is not positive), whose parts are
// uniform branches. Window, sinks, grouped heads, packed sequences and dlse are in both.
// Limits: D and Dv up to 256, multiples of 8; addresses and strides multiples of 16 bytes, the last dimension dense.
// Both are padded with zeros, on chip, to the next of 32, 64, 96, 128, 192 and 256 that holds the larger one. L and S
// of a sequence, and the queries of a group of heads, below 2^29. At most 99 KB of shared memory to a block.
// Papers: Dao 2023 (FlashAttention-2); Milakov and Gimelshein 2018 (softmax in one pass).
#include "attention.h"

#include <algorithm>
#include <stdexcept>

#include "attention_bwd.cuh"
#include "attention_fwd.cuh"

namespace pyops {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t kMaxSharedBytes = 99 * 1024;  // of a block where a multiprocessor has least (8.6, 8.9, 12.0)

dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error("attention: the call needs more than 2^31 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Calls f(integral_constant<int, kD>) with the compiled head size that holds both.
template <typename T, typename F>
void with_head_size(const AttentionParams<T>& p, F f) {
  const int64_t D = std::max(p.D, p.Dv);
  if (D <= 32) return f(std::integral_constant<int, 32>());
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 96) return f(std::integral_constant<int, 96>());
  if (D <= 128) return f(std::integral_constant<int, 128>());
  if (D <= 192) return f(std::integral_constant<int, 192>());
  if (D <= 256) return f(std::integral_constant<int, 256>());
  throw std::runtime_error("attention: the head size must be at most 256");
}

// Whether the kernels without masks, softcap, ALiBi and dropout serve the call. They take the maximum before scaling.
template <typename T>
bool is_plain(const AttentionParams<T>& p) {
  return p.mask_kind == AttentionMask::none && p.softcap == 0 && p.slopes == nullptr && p.seed == nullptr &&
         p.scale > 0 && p.scale < FLT_MAX;
}

// Whether four neighbouring keys of the mask are one aligned access.
template <typename T>
bool whole_masks(const AttentionParams<T>& p) {
  const size_t element = p.mask_kind == AttentionMask::boolean ? 1 : p.mask_kind == AttentionMask::same ? 2 : 4;
  return p.mask_stride[3] == 1 && p.max_k % 4 == 0 && p.mask_stride[0] % 4 == 0 && p.mask_stride[1] % 4 == 0 &&
         p.mask_stride[2] % 4 == 0 && reinterpret_cast<uintptr_t>(p.mask) % (4 * element) == 0;
}

template <typename T>
AttentionGrid make_grid(const AttentionParams<T>& p, int64_t tiles, int64_t splits) {
  return {int(tiles), int(splits), int(p.Hk), int(p.H / p.Hk), whole_masks(p)};
}

template <typename T>
int64_t rows_per_key_head(const AttentionParams<T>& p) {
  return p.H / p.Hk * p.max_q;
}

template <typename T>
bool few_queries(const AttentionParams<T>& p) {
  return rows_per_key_head(p) <= 64;
}

// Parts of the keys. More than one where there are too few blocks for the device.
template <typename T>
int64_t fwd_splits(const AttentionParams<T>& p) {
  const int64_t blocks =
      p.B * p.Hk * ceil_div(rows_per_key_head(p), few_queries(p) || std::max(p.D, p.Dv) > 128 ? 64 : 128);
  const int64_t multiprocessors = multiprocessor_count();
  if (blocks >= multiprocessors) return 1;
  return std::clamp<int64_t>(p.max_k / 128, 1, std::min<int64_t>(2 * multiprocessors / blocks, 64));
}

// Blocks that add up dmask where it is small.
int64_t max_mask_blocks() { return 2 * multiprocessor_count(); }

template <typename T, int kD, bool kPlain, bool kSmall>
void launch_fwd(const AttentionFwdParams<T>& p, stream_t stream) {
  using Plan = FwdPlan<kD, kPlain, kSmall>;
  using Storage = FwdStorage<T, kD, Plan>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const AttentionGrid grid = make_grid(p, ceil_div(rows_per_key_head(p), Plan::kQueries), fwd_splits(p));
  launch("attention_fwd_kernel", attention_fwd_kernel<T, kD, kPlain, kSmall>,
         grid_of(p.B * p.Hk * grid.tiles * grid.splits), dim3(kAttentionThreads), sizeof(Storage), stream, p, grid);
  if (grid.splits > 1) {
    launch("attention_fwd_combine_kernel", attention_fwd_combine_kernel<T>,
           grid_of(ceil_div(row_count(p) * kRowLanes, kAttentionThreads)), dim3(kAttentionThreads), 0, stream, p, grid);
  }
}

template <typename T, int kD>
void fwd(const AttentionFwdParams<T>& p, stream_t stream) {
  constexpr bool kLarge = kD > 128;  // whose tiles are small always
  // Backward must find these scores again to the bit, and has no plain kernels for large heads.
  if (is_plain(p) && (kLarge ? !p.differentiated : !few_queries(p))) return launch_fwd<T, kD, true, kLarge>(p, stream);
  if (kLarge || few_queries(p)) return launch_fwd<T, kD, false, true>(p, stream);
  launch_fwd<T, kD, false, kLarge>(p, stream);
}

template <typename T, int kD, bool kPlain>
void launch_dq(const AttentionBwdParams<T>& p, stream_t stream) {
  using Storage = DqStorage<T, kD>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const AttentionGrid grid = make_grid(p, ceil_div(rows_per_key_head(p), DqPlan<kD>::kQueries), 1);
  launch("attention_bwd_dq_kernel", attention_bwd_dq_kernel<T, kD, kPlain>, grid_of(p.B * p.Hk * grid.tiles),
         dim3(kAttentionThreads), sizeof(Storage), stream, p, grid);
}

template <typename T, int kD, bool kPlain, KeyGradient kWhich>
void launch_dkv(const AttentionBwdParams<T>& p, stream_t stream) {
  using Plan = DkvPlan<kD, kPlain, kWhich>;
  using Storage = DkvStorage<T, kD, Plan>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const AttentionGrid grid = make_grid(p, ceil_div(p.max_k, Plan::kKeys), 1);
  launch("attention_bwd_dkv_kernel", attention_bwd_dkv_kernel<T, kD, kPlain, kWhich>, grid_of(p.B * p.Hk * grid.tiles),
         dim3(kAttentionThreads), sizeof(Storage), stream, p, grid);
}

template <typename T, int kD, bool kPlain>
void bwd(const AttentionBwdParams<T>& p, stream_t stream) {
  if (p.dq != nullptr) launch_dq<T, kD, kPlain>(p, stream);
  if constexpr (kD > 128) {
    if (p.dk != nullptr) launch_dkv<T, kD, kPlain, KeyGradient::of_keys>(p, stream);
    if (p.dv != nullptr) launch_dkv<T, kD, kPlain, KeyGradient::of_values>(p, stream);
  } else if (p.dk != nullptr || p.dv != nullptr) {
    launch_dkv<T, kD, kPlain, KeyGradient::both>(p, stream);
  }
}

template <typename T>
void bwd_dmask(const AttentionBwdParams<T>& p, stream_t stream) {
  static_assert(sizeof(MaskStorage<T>) <= kMaxSharedBytes);
  MaskGrid grid{};
  const int tiles = int(ceil_div(p.max_q, kMaskTile));
  const auto divide = [](bool shared, int64_t size, int& own, int& common) {
    own = shared ? 1 : int(size);
    common = shared ? int(size) : 1;
  };
  divide(p.dmask_stride[0] == 0, p.B, grid.batches, grid.shared_batches);
  divide(p.dmask_stride[1] == 0, p.H, grid.heads, grid.shared_heads);
  divide(p.dmask_stride[2] == 0, tiles, grid.query_tiles, grid.shared_tiles);
  grid.whole_masks = whole_masks(p);
  grid.key_tiles = int(ceil_div(p.max_k, kMaskTile));
  const int64_t blocks = grid.tiles(), items = int64_t(grid.shared_tiles) * grid.shared_heads * grid.shared_batches;
  grid.parts = int(std::clamp<int64_t>(max_mask_blocks() / blocks, 1, items));
  launch("attention_bwd_dmask_kernel", attention_bwd_dmask_kernel<T>, grid_of(blocks * grid.parts),
         dim3(kAttentionThreads), sizeof(MaskStorage<T>), stream, p, grid);
  if (grid.parts == 1) return;
  const int64_t elements = int64_t(grid.batches) * grid.heads * (p.dmask_stride[2] == 0 ? 1 : p.max_q) * p.max_k;
  launch("attention_bwd_dmask_reduce_kernel", attention_bwd_dmask_reduce_kernel<T>,
         grid_of(ceil_div(elements, kAttentionThreads)), dim3(kAttentionThreads), 0, stream, p, grid);
}

}  // namespace

template <typename T>
void attention_fwd_cuda(const AttentionFwdParams<T>& p, stream_t stream) {
  with_head_size(p, [&](auto head_size) { fwd<T, head_size>(p, stream); });
}

template <typename T>
int64_t attention_fwd_workspace_cuda(const AttentionFwdParams<T>& p) {
  const int64_t splits = fwd_splits(p);
  return splits == 1 ? 0 : splits * row_count(p) * (p.Dv + 2);
}

template <typename T>
void attention_bwd_cuda(const AttentionBwdParams<T>& p, stream_t stream) {
  launch("attention_bwd_rows_kernel", attention_bwd_rows_kernel<T>,
         grid_of(ceil_div(row_count(p) * kRowLanes, kAttentionThreads)), dim3(kAttentionThreads), 0, stream, p);
  with_head_size(p, [&](auto head_size) {
    constexpr bool kPlain = head_size <= 128;  // large head sizes have the general kernels only
    if (kPlain && is_plain(p) && !few_queries(p)) return bwd<T, head_size, kPlain>(p, stream);  // as forward chose
    bwd<T, head_size, false>(p, stream);
  });
  if (p.dmask != nullptr) bwd_dmask(p, stream);
}

template <typename T>
int64_t attention_bwd_workspace_cuda(const AttentionBwdParams<T>& p) {
  const bool additive = p.mask_kind == AttentionMask::same || p.mask_kind == AttentionMask::wide;
  return row_count(p) * int64_t(sizeof(RowStats) / sizeof(float)) +
         (additive ? max_mask_blocks() * kMaskTile * kMaskTile : 0);
}

#define PYOPS_INSTANTIATE(T)                                                      \
  template void attention_fwd_cuda<T>(const AttentionFwdParams<T>&, stream_t);    \
  template int64_t attention_fwd_workspace_cuda<T>(const AttentionFwdParams<T>&); \
  template void attention_bwd_cuda<T>(const AttentionBwdParams<T>&, stream_t);    \
  template int64_t attention_bwd_workspace_cuda<T>(const AttentionBwdParams<T>&);
PYOPS_INSTANTIATE(bf16)
PYOPS_INSTANTIATE(f16)

}  // namespace pyops
