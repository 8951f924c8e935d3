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
  bool shared(uint32_t page) const { return holders_[page] > 1; }
  void drop(uint32_t page);

 private:
  std::vector<uint32_t> holders_, free_;
};

// A sequence's records in one layer.
struct Stream {
  std::vector<uint32_t> pages;
  uint64_t bound = kStreamStart;  // units: the stream ends here at the latest
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

  // The true ends of all streams, in units: waits for the device.
  std::vector<uint32_t> stream_ends();
  // Lowers every bound to the true end, and gives back the pages behind it.
  void tighten();
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
