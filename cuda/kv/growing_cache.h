// The growing kv cache of packhorse.h: who owns which page of the pool, and what each step has to do. Host side, the same
// for both backends.
#pragma once

#include <vector>

#include "kv/cache_operations.h"

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
  uint32_t packed = 0;  // blocks
  std::vector<Stream> streams;
};

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
  void check();
  ph_kv_cache_statistics statistics();

  const ph_kv_cache_config& config() const { return config_; }
  uint64_t step_tokens() const { return step_.tokens; }

 private:
  const ph::kv::Sequence& alive(uint32_t sequence) const;
  ph::kv::Sequence& alive(uint32_t sequence);
  void require_layer(uint32_t layer) const;
  void require_idle(const char* what) const;
  void require_missing(uint32_t layer) const;
  uint32_t free_slot() const;

  // Where blocks begin, in units, of each stream of an alive sequence the one that `block(layer, sequence)` names; a
  // stream ends where its block after the last begins. Waits for the device.
  template <typename Block>
  std::vector<uint32_t> block_begins(Block block);
  std::vector<uint32_t> stream_ends();
  // Lowers every bound to the true end, and gives back the pages behind it.
  void tighten();
  // Gives back the pages before what windows show to tokens to come, if `needed` pages are free then; else changes
  // nothing. Bounds must be tight.
  void give_back(uint64_t needed);
  uint64_t first_held(const ph::kv::Stream& stream) const;
  // Pieces of attention over so many packed blocks.
  uint32_t packed_pieces(uint32_t packed) const;
  uint64_t page_table_position(uint32_t layer, uint32_t sequence, uint64_t page) const;
  void grant(uint32_t layer, uint32_t sequence, uint32_t page);
  void send_grants();
  // Replaces the page in which a stream ends by a copy of its own.
  void own_last_page(uint32_t layer, uint32_t sequence);

  ph_device& device_;
  ph_kv_cache_config config_;
  std::vector<ph::kv::TileShape> shapes_;
  std::vector<uint32_t> windows_;  // of layers; 0: none
  ph::kv::CacheView view_;
  ph::kv::DeviceMemory pool_, recent_, index_, page_tables_, plan_, workspace_, attention_, words_,
      non_finite_;
  ph::kv::PagePool pages_;
  std::vector<ph::kv::Sequence> sequences_;
  uint32_t resident_pieces_;

  ph::kv::StepView step_{};
  std::vector<bool> appended_;  // layers, in this step
  bool planned_ = false;        // attention of this step
  std::vector<ph::kv::WordAt> grants_;
};
