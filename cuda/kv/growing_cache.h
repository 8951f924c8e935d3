// The growing kv cache of packhorse.h: who owns which page of the pool, and what each step has to do. Host side, the same
// for both backends.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "attention/products.h"
#include "kv/cache_operations.h"
#include "kv/step_graph.h"

namespace ph::kv {

// Pages of the pool, with the number of sequences that share each.
class PagePool {
 public:
  explicit PagePool(uint32_t pages);

  uint32_t available() const { return static_cast<uint32_t>(free_.size()); }
  uint32_t take();
  void share(uint32_t page) { ++holders_[page]; }
  uint32_t holders(uint32_t page) const { return holders_[page]; }
  bool shared(uint32_t page) const { return holders_[page] > 1; }
  void drop(uint32_t page);

 private:
  std::vector<uint32_t> holders_, free_;
};

// A sequence's records in one layer. Those of blocks before `first_block` may have been given back, as the layer's window
// no longer shows them.
struct Stream {
  std::vector<uint32_t> pages;    // from first_page() on
  uint64_t bound = kStreamStart;  // units: the stream ends here at the latest
  uint32_t begin = kStreamStart;  // units: where first_block begins
  uint32_t first_block = 0;

  uint64_t first_page() const { return begin / kPageUnits; }
  uint64_t end_page() const { return first_page() + pages.size(); }
};

struct Sequence {
  bool alive = false;
  uint64_t tokens = 0;
  uint32_t packed = 0;   // blocks
  uint32_t settled = 0;  // of those, how many the last step found, if nothing was changed since
  std::vector<Stream> streams;
  // While it is imported it is not alive yet, but takes its slot and its pages: the layers that are still to come.
  std::vector<bool> awaited = {};
  uint64_t step = 0;  // the last one that named it
};

// One layer of a sequence in host memory.
template <typename Byte, typename Offset>
struct HostLayer {
  Byte* records;  // of its blocks, one after another
  uint64_t record_bytes;
  Offset* offsets;  // [blocks + 1]: where they begin and end
  Byte* recent;     // tokens in 16 bits: keys [heads, tokens - 64 * blocks, head_dim], then values
  uint64_t recent_bytes;
};
using SequenceLayer = HostLayer<uint8_t, uint64_t>;
using ConstSequenceLayer = HostLayer<const uint8_t, const uint64_t>;

// Bytes of device memory that a cache allocates.
struct CacheSizes {
  uint64_t pool, recent, index, page_tables, plan, workspace, attention, words, non_finite;
};

// What a cache of this configuration would count before its first sequence, without a device. block_bytes, [layers][2]:
// the least and the most that a packed block of a layer takes, over all kv heads.
ph_kv_cache_statistics plan_cache(const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs,
                                  uint64_t* block_bytes);

// Device memory that lives as long as its owner.
class DeviceMemory {
 public:
  DeviceMemory(ph_device& device, uint64_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  ph_device& device_;
  uint8_t* data_;
  uint64_t bytes_;
};

}  // namespace ph::kv

struct ph_kv_cache {
 public:
  ph_kv_cache(ph_device& device, const ph_kv_cache_config& config, const ph_kv_cache_codec* codecs);

  uint32_t add();
  uint32_t fork(uint32_t sequence);
  void truncate(uint32_t sequence, uint64_t tokens);
  void remove(uint32_t sequence);
  uint64_t length(uint32_t sequence) const { return alive(sequence).tokens; }

  void begin(const uint32_t* sequences, const uint32_t* tokens, uint32_t count);
  void append(uint32_t layer, ph::kv::StepTensors tensors);
  void attend(uint32_t layer, const uint8_t* queries, uint8_t* out, float scale);
  // Attention of the tokens, then append.
  void prefill(uint32_t layer, ph::kv::StepTensors tensors, const uint8_t* queries, uint8_t* out,
               float scale);
  void read(uint32_t layer, uint32_t sequence, uint64_t first, uint64_t count, uint8_t* keys,
            uint8_t* values);
  // Products of queries and keys, and of weights and values, of all tokens of a sequence.
  void score(uint32_t layer, uint32_t sequence, const uint8_t* queries, float* out, float scale);
  void weigh(uint32_t layer, uint32_t sequence, const float* weights, float* out);
  void check();
  ph_kv_cache_statistics statistics();

  // Capture and replay, in step_graph.cpp.
  ~ph_kv_cache();
  std::array<uint32_t, PH_KV_CACHE_SHAPE_WORDS> step_shape() const;
  void begin_capture();
  ph_kv_cache_graph* end_capture();
  void replay(ph_kv_cache_graph& graph);
  bool capturing() const { return capture_.has_value(); }
  // Sequences to and from host memory, of untrusted origin (sequence_copy.cpp); see packhorse.h.
  uint32_t measure(uint32_t sequence, uint64_t* record_bytes);
  void export_layer(uint32_t sequence, uint32_t layer, ph::kv::SequenceLayer target);
  uint32_t begin_import(uint64_t tokens, uint32_t blocks, const uint64_t* record_bytes);
  // Throws PH_ERROR_CORRUPT and sets `malformed` for a block that no encoder writes.
  void import_layer(uint32_t sequence, uint32_t layer, ph::kv::ConstSequenceLayer source,
                    uint64_t& malformed);

  const ph_kv_cache_config& config() const { return config_; }
  uint64_t step_tokens() const { return step_.tokens; }

 private:
  const ph::kv::Sequence& alive(uint32_t sequence) const;
  ph::kv::Sequence& alive(uint32_t sequence);
  void require_layer(uint32_t layer) const;
  void require_idle(const char* what) const;
  void require_step(const char* what) const;
  // Throws if a layer still lacks tokens of the sequence.
  void require_settled(uint32_t sequence, const char* what) const;
  void require_missing(uint32_t layer) const;
  // The tokens of a sequence, all of which a layer must have, and still hold.
  ph::attention::SequenceTokens all_tokens(uint32_t layer, uint32_t sequence, const char* what) const;
  uint32_t free_slot() const;
  // Throws for a stream that has given blocks back.
  void require_whole(const ph::kv::Stream& stream, uint32_t sequence) const;
  // The slot of a sequence that is being imported.
  ph::kv::Sequence& importing(uint32_t sequence);
  // Calls visit(part, token, count, memory) for stretches of tokens in 16 bits, in their order; memory is the device's,
  // [count][heads][head_dim].
  template <typename Visit>
  void for_each_recent(uint32_t layer, uint32_t sequence, const ph::kv::Sequence& held, Visit visit) const;

  std::vector<uint32_t> alive_sequences() const;
  // Where blocks begin, in units: of every layer of the sequences, in their order, the one that `block(layer, sequence)`
  // names; a stream ends where its block after the last begins. Waits for the device.
  template <typename Block>
  std::vector<uint32_t> block_begins(const std::vector<uint32_t>& sequences, Block block);
  std::vector<uint32_t> stream_ends(const std::vector<uint32_t>& sequences);
  // Lowers every bound to the true end, and gives back the pages behind it.
  void tighten();
  // Gives back the pages before what windows show to tokens to come, if `needed` pages are free then; else changes
  // nothing. Bounds must be tight.
  void give_back(uint64_t needed);
  uint64_t first_held(const ph::kv::Stream& stream) const;
  uint64_t page_table_position(uint32_t layer, uint32_t sequence, uint64_t page) const;
  void grant(uint32_t layer, uint32_t sequence, uint32_t page);
  void send_grants();
  // A page of one's own with what is in another.
  uint32_t copied(uint32_t page);
  // Replaces the page in which a stream ends by a copy of its own.
  void own_last_page(uint32_t layer, uint32_t sequence);

  ph_device& device_;
  ph_kv_cache_config config_;
  std::vector<ph::kv::TileShape> shapes_;
  std::vector<uint32_t> windows_;  // of layers; 0: none
  ph::kv::CacheView view_;
  ph::kv::CacheSizes sizes_;
  ph::kv::DeviceMemory pool_, recent_, index_, page_tables_, plan_, workspace_, attention_, words_,
      non_finite_;
  ph::kv::PagePool pages_;
  std::vector<ph::kv::Sequence> sequences_;

  ph::kv::StepView step_{};
  uint64_t steps_ = 0;          // begun so far
  std::vector<bool> appended_;  // layers, in this step
  bool planned_ = false;        // attention of this step
  std::vector<ph::kv::WordAt> grants_;
  const uint64_t serial_ = next_serial();  // of all caches of the process
  std::optional<ph::kv::Capture> capture_;

  static uint64_t next_serial();
};
