#include "kv/growing_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/decode.h"
#include "attention/prefill.h"
#include "attention/products.h"
#include "common/error.h"

namespace ph::kv {

PagePool::PagePool(uint32_t pages) : holders_(pages, 0), free_(pages) {
  for (uint32_t i = 0; i < pages; ++i) free_[i] = pages - 1 - i;
}

uint32_t PagePool::take() {
  const uint32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  return page;
}

void PagePool::drop(uint32_t page) {
  if (--holders_[page] == 0) free_.push_back(page);
}

DeviceMemory::DeviceMemory(ph_device& device, uint64_t bytes)
    : device_(device), data_(allocate(device, std::max<uint64_t>(bytes, 16))), bytes_(bytes) {}

DeviceMemory::~DeviceMemory() {
  try {
    release(device_, data_);
  } catch (const Error&) {
    // A GPU that has failed takes its memory with it; later calls report that.
  }
}

namespace {

using unsigned_long = unsigned long long;

void require(bool condition, const char* field, double value, const char* range) {
  if (condition) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot create the kv cache as %s must be %s: current value is %g",
              field, range, value);
}

const ph_kv_cache_config& checked_config(const ph_kv_cache_config& config) {
  require(config.layers >= 1 && config.layers <= 4096, "layers", config.layers, "1 to 4096");
  require(config.kv_heads >= 1 && config.kv_heads <= 1024, "kv_heads", config.kv_heads, "1 to 1024");
  require(config.query_heads % config.kv_heads == 0 && config.query_heads >= config.kv_heads &&
              config.query_heads <= 16 * config.kv_heads,
          "query_heads", config.query_heads, "1 to 16 times kv_heads");
  require(config.head_dim == 64 || config.head_dim == 96 || config.head_dim == 128 || config.head_dim == 256,
          "head_dim", config.head_dim, "64, 96, 128 or 256");
  require(config.dtype == PH_F16 || config.dtype == PH_BF16, "dtype", config.dtype, "f16 or bf16");
  if (config.query_dtype != config.dtype && !attention::takes_queries(config.query_dtype)) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot create the kv cache as query_dtype must be its dtype, or f32 on the CPU: current value is %u",
        config.query_dtype);
  }
  require(config.sequences >= 1 && config.sequences <= 65536, "sequences", config.sequences, "1 to 65536");
  require(config.residual >= kMostQueries && config.residual <= 65536, "residual", config.residual,
          "8 to 65536");
  require(config.sinks <= 65536, "sinks", config.sinks, "0 to 65536");
  require(config.splits <= 1024, "splits", config.splits, "0 to 1024");
  require(config.tokens >= 1 && config.tokens < 1ull << 31, "tokens", static_cast<double>(config.tokens),
          "1 to 2^31 - 1");
  require(config.step_tokens >= 1 && config.step_tokens < 1ull << 31, "step_tokens",
          static_cast<double>(config.step_tokens), "1 to 2^31 - 1");
  require(config.pool_bytes >= kPageBytes && config.pool_bytes / kPageBytes < UINT32_MAX, "pool_bytes",
          static_cast<double>(config.pool_bytes), "at least a page of 65536 bytes, and below 2^48");
  return config;
}

TilePart make_part(const ph_kv_cache_config& config, uint32_t quantizer, uint32_t bits, float rel,
                   const char* part) {
  TilePart made{};
  made.quantizer = quantizer;
  if (quantizer == PH_KV_CACHE_RAW16) return made;
  if (quantizer == PH_KV_CACHE_PACKKV) {
    // 1/254 as a float32 may come out of a caller's double a little low.
    if (!(rel >= 1.0f / 254.0f && rel <= 1.0f)) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot create the kv cache as rel of the %s must be 1/254 to 1: current value is %g", part,
                  static_cast<double>(rel));
    }
    // Two roundings and the scale's own may make one code more than the range has steps.
    made.code_limit = std::min(255u, static_cast<uint32_t>(std::ceil(1.0f / rel)) + 1);
    made.base_bits = made.code_limit <= 15 && config.head_dim % 64 == 0 ? 4 : 8;
    made.rel = rel;
  } else if (quantizer == PH_KV_CACHE_FIXED || quantizer == PH_KV_CACHE_KIVI) {
    if (bits < 1 || bits > 8) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot create the kv cache as bits of the %s must be 1 to 8: current value is %u", part,
                  bits);
    }
    made.code_limit = (1u << bits) - 1;
    made.width = bits;
  } else {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot create the kv cache as the quantizer of the %s must be packkv, fixed, raw16 or kivi: current "
        "value is %u",
        part, quantizer);
  }
  return made;
}

std::vector<TileShape> make_shapes(const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs) {
  std::vector<TileShape> shapes(config.layers);
  for (uint32_t layer = 0; layer < config.layers; ++layer) {
    const ph_kv_cache_codec& codec = codecs[layer];
    shapes[layer] = {config.kv_heads,
                     config.head_dim,
                     config.dtype,
                     {make_part(config, codec.key_quantizer, codec.key_bits, codec.key_rel, "keys"),
                      make_part(config, codec.value_quantizer, codec.value_bits, codec.value_rel, "values")}};
  }
  return shapes;
}

std::vector<uint32_t> make_windows(const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs) {
  std::vector<uint32_t> windows(config.layers);
  for (uint32_t layer = 0; layer < config.layers; ++layer) windows[layer] = codecs[layer].window;
  return windows;
}

// A product of sizes in bytes, which has to be one that memory can have.
uint64_t product(std::initializer_list<uint64_t> factors) {
  uint64_t bytes = 1;
  for (const uint64_t factor : factors) {
    if (__builtin_mul_overflow(bytes, factor, &bytes) || bytes >= 1ull << 62)
      throw Error(PH_ERROR_OUT_OF_MEMORY,
                  "Cannot create the kv cache: a part of it would take 2^62 bytes or more");
  }
  return bytes;
}

uint64_t divide_up(uint64_t value, uint64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace

namespace {

CacheView make_view(const ph_kv_cache_config& config, const std::vector<TileShape>& shapes) {
  CacheView view{};
  view.layers = config.layers;
  view.sequences = config.sequences;
  view.heads = config.kv_heads;
  view.head_dim = config.head_dim;
  view.query_heads = config.query_heads;
  view.dtype = config.dtype;
  view.query_dtype = config.query_dtype;
  view.sinks = config.sinks;
  view.ring = config.residual + kBlockTokens;
  view.most_blocks = static_cast<uint32_t>(config.tokens / kBlockTokens);
  uint64_t units = 0;
  for (const TileShape& shape : shapes) units = std::max(units, largest_block_units(shape));
  units = units * view.most_blocks + kStreamStart;
  if (units >= kSizeOnly) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot create the kv cache as the packed tokens of a sequence must stay below 32 GiB a layer: "
        "current value of tokens is %llu",
        static_cast<unsigned_long>(config.tokens));
  }
  view.most_pages = static_cast<uint32_t>(divide_up(units, kPageUnits));
  return view;
}

uint64_t index_words(const CacheView& view) {
  return static_cast<uint64_t>(view.most_blocks) * view.heads + 1;
}

// Into how many pieces attention over so many runs and packed blocks of a sequence is cut; all take as long. It does not
// depend on the rest of the batch. A sequence of more than kLongWork is likely one of few, or longer than others of its batch:
// it is cut into smaller pieces, that keep all processors busy to the end. Lengths a little above a power of two, of batches
// that fill the processors evenly, give no piece more. `splits`, if they are more, say that there are few sequences in any
// case; a piece of kLeastPieceWork takes about as long as a thread block's begin and end.
constexpr uint64_t kLongWork = 576, kLongPieceWork = 63, kLeastPieceWork = 16;

uint64_t piece_count(uint64_t work, uint64_t splits) {
  const uint64_t least = work > kLongWork ? (work + kLongPieceWork / 2) / kLongPieceWork
                                          : std::max<uint64_t>(divide_up(work, kMostPieceWork), 1);
  return std::max(least, std::min(splits, work / kLeastPieceWork));
}

// What a step can hold at most: every sequence takes part, and each new block lies in some sequence's new tokens.
uint64_t most_step_blocks(const ph_kv_cache_config& config) {
  return config.step_tokens / kBlockTokens + std::min<uint64_t>(config.sequences, config.step_tokens);
}
uint64_t most_step_pieces(const ph_kv_cache_config& config, const CacheView& view) {
  const uint64_t runs = divide_up(static_cast<uint64_t>(view.sinks) + view.ring, kRunTokens);
  return config.sequences * piece_count(runs + view.most_blocks, config.splits);
}

struct PlanLayout {
  uint64_t sequences, blocks, pieces, bytes;
};

PlanLayout plan_layout(uint64_t sequences, uint64_t blocks, uint64_t pieces) {
  const auto aligned = [](uint64_t bytes) { return divide_up(bytes, 256) * 256; };
  PlanLayout layout{};
  layout.blocks = aligned(sequences * sizeof(StepSequence));
  layout.pieces = layout.blocks + aligned(blocks * sizeof(StepBlock));
  layout.bytes = layout.pieces + aligned(pieces * sizeof(StepPiece));
  return layout;
}

// A stream that ends with its page writes to the next one.
bool writes_last_page(const Stream& stream) {
  return !stream.pages.empty() && stream.bound % kPageUnits != 0;
}

// Of words of the page tables that are sent at a time: each time costs a copy and a kernel, and a step of many tokens takes
// thousands of pages.
constexpr uint64_t kLeastWordBytes = 64 * 1024;

// The one place where it is decided how much a cache allocates.
CacheSizes make_sizes(const ph_kv_cache_config& config, const CacheView& view) {
  const uint64_t blocks = most_step_blocks(config), pieces = most_step_pieces(config, view);
  product({pieces, kMostQueries, config.query_heads, config.head_dim + 2ull,
           sizeof(float)});  // attention's scratch
  CacheSizes sizes{};
  sizes.pool = config.pool_bytes / kPageBytes * kPageBytes;
  sizes.recent = product({recent_part_bytes(view), kParts, config.layers, config.sequences});
  sizes.index = product({index_words(view), config.layers, config.sequences, sizeof(uint32_t)});
  sizes.page_tables = product({view.most_pages, config.layers, config.sequences, sizeof(uint32_t)});
  sizes.plan = plan_layout(config.sequences, blocks, pieces).bytes;
  sizes.workspace = append_workspace_bytes(view, blocks);
  sizes.attention =
      std::max(attention::decode_workspace_bytes(view, pieces), attention::products_workspace_bytes(view));
  sizes.words = std::max(product({config.layers, config.sequences, sizeof(WordAt)}), kLeastWordBytes);
  sizes.non_finite = sizeof(uint64_t);
  return sizes;
}

// Statistics of a cache of these sizes without sequences.
ph_kv_cache_statistics empty_statistics(const CacheSizes& sizes) {
  ph_kv_cache_statistics found{};
  found.pool_bytes = sizes.pool;
  found.recent_bytes = sizes.recent;
  found.index_bytes = sizes.index;
  found.page_table_bytes = sizes.page_tables;
  found.step_bytes = sizes.plan + sizes.words + sizes.non_finite;
  found.workspace_bytes = sizes.workspace + sizes.attention;
  found.free_bytes = sizes.pool;
  return found;
}

// Gives back a stream's pages from page `end` of the stream on.
void drop_after(PagePool& pool, Stream& stream, uint64_t end) {
  while (!stream.pages.empty() && stream.end_page() > end) {
    pool.drop(stream.pages.back());
    stream.pages.pop_back();
  }
}

void require_scale(float scale) {
  if (scale > 0.0f && std::isfinite(scale)) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT,
              "The scale of attention must be positive and finite: current value is %g",
              static_cast<double>(scale));
}

uint32_t blocks_due(const ph_kv_cache_config& config, uint64_t tokens) {
  const uint64_t kept = static_cast<uint64_t>(config.sinks) + config.residual;
  return tokens <= kept ? 0 : static_cast<uint32_t>((tokens - kept) / kBlockTokens);
}

}  // namespace

ph_kv_cache_statistics plan_cache(const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs,
                                  uint64_t* block_bytes) {
  const std::vector<TileShape> shapes = make_shapes(checked_config(config), codecs);
  for (size_t layer = 0; layer < shapes.size(); ++layer) {
    TileShape least = shapes[layer];
    for (TilePart& part : least.parts) {
      if (part.width == 0) part.code_limit = 0;  // every group of width 0
    }
    block_bytes[2 * layer] = largest_block_units(least) * kUnitBytes;
    block_bytes[2 * layer + 1] = largest_block_units(shapes[layer]) * kUnitBytes;
  }
  return empty_statistics(make_sizes(config, make_view(config, shapes)));
}

}  // namespace ph::kv

using namespace ph;
using namespace ph::kv;

ph_kv_cache::ph_kv_cache(ph_device& device, const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs)
    : device_(device),
      config_(checked_config(config)),
      shapes_(make_shapes(config, codecs)),
      windows_(make_windows(config, codecs)),
      view_(make_view(config, shapes_)),
      sizes_(make_sizes(config, view_)),
      pool_(device, sizes_.pool),
      recent_(device, sizes_.recent),
      index_(device, sizes_.index),
      page_tables_(device, sizes_.page_tables),
      plan_(device, sizes_.plan),
      workspace_(device, sizes_.workspace),
      attention_(device, sizes_.attention),
      words_(device, sizes_.words),
      non_finite_(device, sizes_.non_finite),
      pages_(static_cast<uint32_t>(config.pool_bytes / kPageBytes)),
      sequences_(config.sequences),
      appended_(config.layers, true) {
  view_.pool = pool_.data();
  view_.recent = recent_.data();
  view_.index = reinterpret_cast<uint32_t*>(index_.data());
  view_.page_tables = reinterpret_cast<uint32_t*>(page_tables_.data());
  fill(device, non_finite_.data(), 0xff, sizeof(uint64_t));
  fill(device, workspace_.data(), 0, workspace_.bytes());
  fill(device, attention_.data(), 0, attention_.bytes());
}

const Sequence& ph_kv_cache::alive(uint32_t sequence) const {
  if (sequence >= config_.sequences || !sequences_[sequence].alive) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache has no sequence %u", sequence);
  }
  return sequences_[sequence];
}

Sequence& ph_kv_cache::alive(uint32_t sequence) {
  return const_cast<Sequence&>(static_cast<const ph_kv_cache*>(this)->alive(sequence));
}

void ph_kv_cache::require_layer(uint32_t layer) const {
  if (layer >= config_.layers)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache has no layer %u: it has %u", layer, config_.layers);
}

void ph_kv_cache::require_idle(const char* what) const {
  const auto missing = std::find(appended_.begin(), appended_.end(), false);
  if (missing == appended_.end()) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT,
              "Cannot %s: layer %u still lacks the tokens of the step that has begun", what,
              static_cast<uint32_t>(missing - appended_.begin()));
}

// That a layer has no tokens of the step yet.
void ph_kv_cache::require_missing(uint32_t layer) const {
  require_layer(layer);
  if (appended_[layer])
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Layer %u has the tokens of this step already: begin the next one",
                layer);
}

uint32_t ph_kv_cache::free_slot() const {
  for (uint32_t slot = 0; slot < config_.sequences; ++slot) {
    if (!sequences_[slot].alive && sequences_[slot].awaited.empty()) return slot;
  }
  throw Error(PH_ERROR_OUT_OF_MEMORY, "The kv cache is full: it holds %u sequences", config_.sequences);
}

uint64_t ph_kv_cache::page_table_position(uint32_t layer, uint32_t sequence, uint64_t page) const {
  return stream_of(view_, layer, sequence) * view_.most_pages + page;
}

void ph_kv_cache::grant(uint32_t layer, uint32_t sequence, uint32_t page) {
  Stream& stream = sequences_[sequence].streams[layer];
  grants_.push_back({page_table_position(layer, sequence, stream.end_page()), page, 0});
  stream.pages.push_back(page);
}

void ph_kv_cache::send_grants() {
  const size_t most = words_.bytes() / sizeof(WordAt);
  for (size_t sent = 0; sent < grants_.size(); sent += most) {
    const size_t count = std::min(most, grants_.size() - sent);
    enqueue_upload(device_, words_.data(), grants_.data() + sent, count * sizeof(WordAt));
    scatter_words(device_, view_.page_tables, reinterpret_cast<const WordAt*>(words_.data()),
                  static_cast<uint32_t>(count));
  }
  grants_.clear();
}

uint32_t ph_kv_cache::add() {
  const uint32_t slot = free_slot();
  std::vector<Stream> streams(config_.layers);
  grants_.clear();
  // The first entry of each index is where the stream starts.
  std::vector<WordAt> starts(config_.layers);
  for (uint32_t layer = 0; layer < config_.layers; ++layer)
    starts[layer] = {stream_of(view_, layer, slot) * index_words(view_), kStreamStart, 0};
  enqueue_upload(device_, words_.data(), starts.data(), starts.size() * sizeof(WordAt));
  scatter_words(device_, view_.index, reinterpret_cast<const WordAt*>(words_.data()), config_.layers);
  sequences_[slot] = Sequence{true, 0, 0, 0, std::move(streams)};
  return slot;
}

void ph_kv_cache::remove(uint32_t sequence) {
  // No step knows of one that is still being imported.
  const bool known = sequence >= config_.sequences || sequences_[sequence].awaited.empty();
  if (known) require_idle("remove a sequence");
  Sequence& removed = known ? alive(sequence) : sequences_[sequence];
  for (const Stream& stream : removed.streams) {
    for (const uint32_t page : stream.pages) pages_.drop(page);
  }
  removed = Sequence{};
  if (known) planned_ = false;
}

std::vector<uint32_t> ph_kv_cache::alive_sequences() const {
  std::vector<uint32_t> sequences;
  for (uint32_t sequence = 0; sequence < config_.sequences; ++sequence)
    if (sequences_[sequence].alive) sequences.push_back(sequence);
  return sequences;
}

template <typename Block>
std::vector<uint32_t> ph_kv_cache::block_begins(const std::vector<uint32_t>& sequences, Block block) {
  std::vector<WordAt> words;
  for (const uint32_t sequence : sequences) {
    for (uint32_t layer = 0; layer < config_.layers; ++layer) {
      words.push_back({stream_of(view_, layer, sequence) * index_words(view_) +
                           static_cast<uint64_t>(block(layer, sequence)) * view_.heads,
                       0, 0});
    }
  }
  enqueue_upload(device_, words_.data(), words.data(), words.size() * sizeof(WordAt));
  gather_words(device_, view_.index, reinterpret_cast<WordAt*>(words_.data()),
               static_cast<uint32_t>(words.size()));
  download(device_, words.data(), words_.data(), words.size() * sizeof(WordAt));
  std::vector<uint32_t> begins;
  for (const WordAt& word : words) begins.push_back(word.value);
  return begins;
}

std::vector<uint32_t> ph_kv_cache::stream_ends(const std::vector<uint32_t>& sequences) {
  return block_begins(sequences, [&](uint32_t, uint32_t sequence) { return sequences_[sequence].packed; });
}

void ph_kv_cache::tighten() {
  const std::vector<uint32_t> sequences = alive_sequences(), ends = stream_ends(sequences);
  auto end = ends.begin();
  for (const uint32_t sequence : sequences) {
    for (Stream& stream : sequences_[sequence].streams) {
      stream.bound = *end++;
      drop_after(pages_, stream, sequences_[sequence].packed == 0 ? 0 : divide_up(stream.bound, kPageUnits));
    }
  }
}

uint32_t ph_kv_cache::copied(uint32_t page) {
  const uint32_t own = pages_.take();
  copy(device_, view_.pool + own * kPageBytes, view_.pool + page * kPageBytes, kPageBytes);
  return own;
}

// The first token, sinks aside, that a stream still has.
uint64_t ph_kv_cache::first_held(const Stream& stream) const {
  return config_.sinks + static_cast<uint64_t>(stream.first_block) * kBlockTokens;
}

void ph_kv_cache::give_back(uint64_t needed) {
  // The first block that the next token of a sequence sees, or one later.
  const auto first_seen = [&](uint32_t layer, uint32_t sequence) {
    const uint64_t next = sequences_[sequence].tokens;
    const uint64_t seen = windows_[layer] == 0 || next < windows_[layer] ? 0 : next + 1 - windows_[layer];
    const uint64_t blocks = seen > config_.sinks ? (seen - config_.sinks) / kBlockTokens : 0;
    return static_cast<uint32_t>(std::min<uint64_t>(blocks, sequences_[sequence].packed));
  };
  if (std::all_of(windows_.begin(), windows_.end(), [](uint32_t window) { return window == 0; })) return;
  const std::vector<uint32_t> sequences = alive_sequences(), begins = block_begins(sequences, first_seen);
  const auto for_each_stale = [&](auto use) {
    auto next = begins.begin();
    for (const uint32_t sequence : sequences) {
      for (uint32_t layer = 0; layer < config_.layers; ++layer) {
        Stream& stream = sequences_[sequence].streams[layer];
        const uint32_t begin = *next++;
        const uint64_t page = begin / kPageUnits;
        if (page > stream.first_page())
          use(stream, page - stream.first_page(), begin, first_seen(layer, sequence));
      }
    }
  };
  // A page that sequences share is free when none of them needs it.
  std::vector<uint32_t> drops(config_.pool_bytes / kPageBytes, 0);
  uint64_t freed = 0;
  for_each_stale([&](const Stream& stream, uint64_t count, uint32_t, uint32_t) {
    for (uint64_t i = 0; i < count; ++i) freed += ++drops[stream.pages[i]] == pages_.holders(stream.pages[i]);
  });
  if (pages_.available() + freed < needed) return;
  for_each_stale([&](Stream& stream, uint64_t count, uint32_t begin, uint32_t first_block) {
    for (uint64_t i = 0; i < count; ++i) pages_.drop(stream.pages[i]);
    stream.pages.erase(stream.pages.begin(), stream.pages.begin() + static_cast<ptrdiff_t>(count));
    stream.begin = begin;
    stream.first_block = first_block;
  });
}

void ph_kv_cache::own_last_page(uint32_t layer, uint32_t sequence) {
  Stream& stream = sequences_[sequence].streams[layer];
  if (!writes_last_page(stream) || !pages_.shared(stream.pages.back())) return;
  const uint32_t shared = stream.pages.back(), own = copied(shared);
  pages_.drop(shared);
  stream.pages.pop_back();
  grant(layer, sequence, own);
}

uint32_t ph_kv_cache::fork(uint32_t sequence) {
  require_idle("fork a sequence");
  alive(sequence);
  const uint32_t slot = free_slot();
  tighten();
  const Sequence& parent = sequences_[sequence];
  uint32_t copies = 0;
  for (const Stream& stream : parent.streams) copies += writes_last_page(stream);
  if (copies > pages_.available()) {
    throw Error(PH_ERROR_OUT_OF_MEMORY,
                "Cannot fork sequence %u: that takes %u pages of the pool, and %u are free", sequence, copies,
                pages_.available());
  }
  Sequence child{true, parent.tokens, parent.packed, 0, std::vector<Stream>(config_.layers)};
  sequences_[slot] = std::move(child);
  const uint64_t used = (static_cast<uint64_t>(parent.packed) * view_.heads + 1) * sizeof(uint32_t);
  for (uint32_t layer = 0; layer < config_.layers; ++layer) {
    const Stream& from = sequences_[sequence].streams[layer];
    Stream& to = sequences_[slot].streams[layer];
    to = {{}, from.bound, from.begin, from.first_block};
    // Each page is granted once: grants that are sent together are in no order.
    const size_t shared = from.pages.size() - writes_last_page(from);
    for (size_t i = 0; i < shared; ++i) {
      pages_.share(from.pages[i]);
      grant(layer, slot, from.pages[i]);
    }
    if (shared < from.pages.size()) grant(layer, slot, copied(from.pages.back()));
    const uint64_t recent = recent_part_bytes(view_) * kParts;
    copy(device_, reinterpret_cast<uint8_t*>(index_of(view_, layer, slot)),
         reinterpret_cast<const uint8_t*>(index_of(view_, layer, sequence)), used);
    copy(device_, view_.recent + stream_of(view_, layer, slot) * recent,
         view_.recent + stream_of(view_, layer, sequence) * recent, recent);
  }
  send_grants();
  return slot;
}

void ph_kv_cache::truncate(uint32_t sequence, uint64_t tokens) {
  require_idle("truncate a sequence");
  Sequence& cut = alive(sequence);
  if (tokens > cut.tokens) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot truncate sequence %u to %llu tokens: it has %llu",
                sequence, static_cast<unsigned_long>(tokens), static_cast<unsigned_long>(cut.tokens));
  }
  for (uint32_t layer = 0; layer < config_.layers && tokens > config_.sinks; ++layer) {
    const Stream& stream = cut.streams[layer];
    if (stream.first_block == 0 || tokens + 1 >= first_held(stream) + windows_[layer]) continue;
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot truncate sequence %u to %llu tokens: of layer %u it holds those from %llu on, the rest "
        "was given back, and with a window of %u the next token needs %llu tokens or more",
        sequence, static_cast<unsigned_long>(tokens), layer, static_cast<unsigned_long>(first_held(stream)),
        windows_[layer], static_cast<unsigned_long>(first_held(stream) + windows_[layer] - 1));
  }
  const uint64_t after_sinks = tokens > config_.sinks ? tokens - config_.sinks : 0;
  const uint32_t packed = static_cast<uint32_t>(std::min<uint64_t>(cut.packed, after_sinks / kBlockTokens));
  if (packed < cut.packed) {
    const uint32_t before = cut.packed;
    cut.packed = packed;
    const std::vector<uint32_t> ends = stream_ends({sequence});
    uint32_t copies = 0;
    for (uint32_t layer = 0; layer < config_.layers; ++layer) {
      const uint32_t end = ends[layer];
      const Stream& stream = cut.streams[layer];
      copies += packed > 0 && end % kPageUnits != 0 &&
                pages_.shared(stream.pages[end / kPageUnits - stream.first_page()]);
    }
    if (copies > pages_.available()) {
      cut.packed = before;
      throw Error(PH_ERROR_OUT_OF_MEMORY,
                  "Cannot truncate sequence %u, which shares its pages: that takes %u pages of the pool, and "
                  "%u are free",
                  sequence, copies, pages_.available());
    }
    const uint32_t rest = static_cast<uint32_t>(after_sinks % kBlockTokens);
    for (uint32_t layer = 0; layer < config_.layers && rest > 0; ++layer)
      restore_tokens(device_, view_, shapes_[layer], layer, sequence, packed, rest);
    for (uint32_t layer = 0; layer < config_.layers; ++layer) {
      Stream& stream = cut.streams[layer];
      stream.bound = ends[layer];
      drop_after(pages_, stream, packed == 0 ? 0 : divide_up(stream.bound, kPageUnits));
      if (packed == 0) stream.begin = kStreamStart, stream.first_block = 0;
      own_last_page(layer, sequence);
    }
    send_grants();
  }
  cut.tokens = tokens;
  cut.settled = 0;
  planned_ = false;
}

void ph_kv_cache::begin(const uint32_t* sequences, const uint32_t* tokens, uint32_t count) {
  require_idle("begin a step");
  std::vector<StepSequence> entries(count);
  std::vector<StepBlock> blocks;
  std::vector<bool> named(config_.sequences, false);
  uint64_t total = 0;
  uint32_t most_queries = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const Sequence& sequence = alive(sequences[i]);
    if (named[sequences[i]])
      throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot begin a step that names sequence %u twice",
                  sequences[i]);
    named[sequences[i]] = true;
    if (tokens[i] == 0)
      throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot begin a step with 0 tokens for sequence %u",
                  sequences[i]);
    if (sequence.tokens + tokens[i] > config_.tokens) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot append %u tokens to sequence %u: it has %llu, and the cache was created for %llu",
                  tokens[i], sequences[i], static_cast<unsigned_long>(sequence.tokens),
                  static_cast<unsigned_long>(config_.tokens));
    }
    const uint32_t packed = std::max(sequence.packed, blocks_due(config_, sequence.tokens + tokens[i]));
    entries[i] = {sequences[i],    tokens[i],
                  sequence.tokens, static_cast<uint32_t>(total),
                  sequence.packed, packed - sequence.packed,
                  packed};
    for (uint32_t block = sequence.packed; block < packed; ++block) blocks.push_back({i, block});
    most_queries = std::max(most_queries, tokens[i]);
    total += tokens[i];
    if (total > config_.step_tokens) {
      throw Error(PH_ERROR_INVALID_ARGUMENT,
                  "Cannot begin a step of more than %llu tokens, which the cache was created for",
                  static_cast<unsigned_long>(config_.step_tokens));
    }
  }

  const auto pages_needed = [&] {
    uint64_t needed = 0;
    for (const StepSequence& entry : entries) {
      for (uint32_t layer = 0; layer < config_.layers && entry.blocks > 0; ++layer) {
        const Stream& stream = sequences_[entry.sequence].streams[layer];
        const uint64_t bound = stream.bound + entry.blocks * largest_block_units(shapes_[layer]);
        needed += divide_up(bound, kPageUnits) -
                  std::min<uint64_t>(divide_up(bound, kPageUnits), stream.end_page());
      }
    }
    return needed;
  };
  uint64_t needed = pages_needed();
  if (needed > pages_.available()) {
    tighten();
    needed = pages_needed();
    if (needed > pages_.available()) give_back(needed);
    if (needed > pages_.available()) {
      throw Error(
          PH_ERROR_OUT_OF_MEMORY,
          "The kv cache's pool is full: the step may take %llu pages of 65536 bytes, and %u of %llu are free",
          static_cast<unsigned_long>(needed), pages_.available(),
          static_cast<unsigned_long>(config_.pool_bytes / kPageBytes));
    }
  }

  struct Cuts {
    uint32_t entry;
    uint64_t runs, pieces, piece_work;
  };
  std::vector<Cuts> cuts;
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t packed_tokens = static_cast<uint64_t>(entries[i].packed) * kBlockTokens,
                   runs = divide_up(entries[i].before + entries[i].tokens - packed_tokens, kRunTokens),
                   work = runs + entries[i].packed, of_sequence = piece_count(work, config_.splits);
    cuts.push_back({i, runs, of_sequence, work / of_sequence});
  }
  // The largest first, so that small ones fill the gaps at the end.
  std::stable_sort(cuts.begin(), cuts.end(),
                   [](const Cuts& a, const Cuts& b) { return a.piece_work > b.piece_work; });
  std::vector<StepPiece> pieces;
  uint32_t most_pieces = 0;
  for (const Cuts& cut : cuts) {
    const StepSequence& entry = entries[cut.entry];
    uint64_t run = 0, block = 0;
    for (uint64_t place = 0; place < cut.pieces; ++place) {
      const uint64_t run_end = cut.runs * (place + 1) / cut.pieces,
                     block_end = share_end<uint64_t>(entry.packed, cut.runs, block, run_end, place,
                                                     cut.pieces, kMostPieceWork);
      pieces.push_back({entry, cut.entry, static_cast<uint32_t>(run), static_cast<uint32_t>(run_end - run),
                        static_cast<uint32_t>(block), static_cast<uint32_t>(block_end - block),
                        static_cast<uint32_t>(place), static_cast<uint32_t>(cut.pieces)});
      run = run_end, block = block_end;
    }
    most_pieces = std::max(most_pieces, static_cast<uint32_t>(cut.pieces));
  }

  for (const StepSequence& entry : entries) {
    Sequence& sequence = sequences_[entry.sequence];
    for (uint32_t layer = 0; layer < config_.layers && entry.blocks > 0; ++layer) {
      Stream& stream = sequence.streams[layer];
      stream.bound += entry.blocks * largest_block_units(shapes_[layer]);
      while (stream.end_page() < divide_up(stream.bound, kPageUnits))
        grant(layer, entry.sequence, pages_.take());
    }
    sequence.tokens += entry.tokens;
    sequence.packed = entry.packed;
    sequence.settled = entry.first_block;
    sequence.step = steps_ + 1;
  }
  ++steps_;
  send_grants();

  const PlanLayout layout = plan_layout(count, blocks.size(), pieces.size());
  std::vector<uint8_t> plan(layout.bytes);
  const auto put = [&](uint64_t position, const auto& list) {
    if (!list.empty()) memcpy(plan.data() + position, list.data(), list.size() * sizeof list[0]);
  };
  put(layout.sequences, entries);
  put(layout.blocks, blocks);
  put(layout.pieces, pieces);
  enqueue_upload(device_, plan_.data(), plan.data(), plan.size());
  step_ = {reinterpret_cast<const StepSequence*>(plan_.data() + layout.sequences),
           reinterpret_cast<const StepBlock*>(plan_.data() + layout.blocks),
           reinterpret_cast<const StepPiece*>(plan_.data() + layout.pieces),
           count,
           static_cast<uint32_t>(blocks.size()),
           static_cast<uint32_t>(pieces.size()),
           static_cast<uint32_t>(total),
           most_queries,
           most_pieces};
  std::fill(appended_.begin(), appended_.end(), count == 0);
  planned_ = true;
}

void ph_kv_cache::append(uint32_t layer, StepTensors tensors) {
  require_missing(layer);
  kv::append(device_, view_, shapes_[layer], layer, step_, tensors, workspace_.data(),
             reinterpret_cast<uint64_t*>(non_finite_.data()));
  appended_[layer] = true;
}

void ph_kv_cache::attend(uint32_t layer, const uint8_t* queries, uint8_t* out, float scale) {
  require_layer(layer);
  if (!appended_[layer])
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Layer %u lacks the tokens of this step: append them first",
                layer);
  require_step("attend");
  if (step_.most_queries > kMostQueries) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot attend with %u tokens of a sequence in a step: the most is %u; use prefill instead of "
        "append for more",
        step_.most_queries, kMostQueries);
  }
  require_scale(scale);
  if (capture_) capture_->attended[layer] = true;
  if (step_.sequence_count == 0) return;
  attention::decode(device_, view_, shapes_[layer], layer, step_, queries, out, scale, attention_.data(),
                    windows_[layer]);
}

void ph_kv_cache::prefill(uint32_t layer, StepTensors tensors, const uint8_t* queries, uint8_t* out,
                          float scale) {
  require_missing(layer);
  require_scale(scale);
  attention::prefill(device_, view_, shapes_[layer], layer, step_, tensors, queries, out, scale,
                     windows_[layer]);
  append(layer, tensors);
}

void ph_kv_cache::read(uint32_t layer, uint32_t sequence, uint64_t first, uint64_t count, uint8_t* keys,
                       uint8_t* values) {
  require_layer(layer);
  const Sequence& from = alive(sequence);
  if (!appended_[layer])
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Layer %u lacks the tokens of this step: append them first",
                layer);
  if (first > from.tokens || count > from.tokens - first) {
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot read tokens %llu to %llu of sequence %u: it has %llu",
                static_cast<unsigned_long>(first), static_cast<unsigned_long>(first + count), sequence,
                static_cast<unsigned_long>(from.tokens));
  }
  if (count == 0) return;
  const Stream& stream = from.streams[layer];
  const uint64_t held = first_held(stream);
  if (stream.first_block > 0 && first < held && first + count > config_.sinks) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot read tokens %llu to %llu of sequence %u: beside the %u sinks, layer %u holds those from "
        "%llu on; its window left the others",
        static_cast<unsigned_long>(first), static_cast<unsigned_long>(first + count), sequence, config_.sinks,
        layer, static_cast<unsigned_long>(held));
  }
  read_tokens(device_, view_, shapes_[layer], layer, sequence, from.packed, first, count, keys, values);
}

attention::SequenceTokens ph_kv_cache::all_tokens(uint32_t layer, uint32_t sequence, const char* what) const {
  require_layer(layer);
  const Sequence& from = alive(sequence);
  if (!appended_[layer])
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Layer %u lacks the tokens of this step: append them first",
                layer);
  if (from.tokens == 0)
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Cannot %s of sequence %u: it has no tokens", what, sequence);
  const TileShape& shape = shapes_[layer];
  if (!is_per_token(shape.parts[PH_KV_KEYS]) || !is_per_token(shape.parts[PH_KV_VALUES])) {
    throw Error(
        PH_ERROR_UNSUPPORTED,
        "Cannot %s of layer %u: its keys and values must be packed by packkv or fixed, not raw16 or kivi",
        what, layer);
  }
  const Stream& stream = from.streams[layer];
  if (stream.first_block > 0) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot %s of sequence %u: beside the %u sinks, layer %u holds those from %llu on; its window "
        "left the others",
        what, sequence, config_.sinks, layer, static_cast<unsigned_long>(first_held(stream)));
  }
  return {layer, sequence, static_cast<uint32_t>(from.tokens), from.packed, from.settled};
}

void ph_kv_cache::score(uint32_t layer, uint32_t sequence, const uint8_t* queries, float* out, float scale) {
  const attention::SequenceTokens tokens = all_tokens(layer, sequence, "score all tokens");
  require_scale(scale);
  attention::score(device_, view_, shapes_[layer], tokens, queries, out, scale);
}

void ph_kv_cache::weigh(uint32_t layer, uint32_t sequence, const float* weights, float* out) {
  const attention::SequenceTokens tokens = all_tokens(layer, sequence, "weigh all tokens");
  attention::weigh(device_, view_, shapes_[layer], tokens, weights, out, attention_.data());
}

void ph_kv_cache::check() {
  uint64_t found = 0;
  download(device_, &found, non_finite_.data(), sizeof found);
  if (found == UINT64_MAX) return;
  fill(device_, non_finite_.data(), 0xff, sizeof found);
  throw Error(PH_ERROR_NON_FINITE,
              "Token %llu of sequence %u was packed with a value that is not finite; it counts as 0",
              static_cast<unsigned_long>(found & ((1ull << 40) - 1)), static_cast<uint32_t>(found >> 40));
}

ph_kv_cache_statistics ph_kv_cache::statistics() {
  require_idle("count the bytes");
  tighten();
  // What was allocated, not what was planned.
  ph_kv_cache_statistics found =
      empty_statistics({pool_.bytes(), recent_.bytes(), index_.bytes(), page_tables_.bytes(), plan_.bytes(),
                        workspace_.bytes(), attention_.bytes(), words_.bytes(), non_finite_.bytes()});
  found.free_bytes = pages_.available() * kPageBytes;
  for (const Sequence& sequence : sequences_) {
    if (!sequence.alive) continue;
    ++found.sequences;
    found.tokens += sequence.tokens;
    found.packed_tokens += static_cast<uint64_t>(sequence.packed) * kBlockTokens;
    for (const Stream& stream : sequence.streams)
      found.packed_bytes += (stream.bound - stream.begin) * kUnitBytes;
  }
  return found;
}
