// Sequences of the growing cache to and from host memory, a layer at a time. Exports are the records as they are, without
// the gaps of pages; imports check every byte (tile_check.h) before it goes to the pool.
#include <algorithm>
#include <cstring>

#include "common/error.h"
#include "kv/growing_cache.h"
#include "kv/tile_check.h"

using namespace ph;
using namespace ph::kv;

namespace {

using unsigned_long = unsigned long long;

uint64_t pages_of(uint64_t units) { return (units + kPageUnits - 1) / kPageUnits; }

// Calls visit(memory, done, count) for each of the stretches into which pages cut a stream's records.
template <typename Visit>
void for_each_stretch(const CacheView& cache, const Stream& stream, uint64_t bytes, Visit visit) {
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t offset = kStreamStart * kUnitBytes + done;
    const uint64_t count = std::min(bytes - done, kPageBytes - offset % kPageBytes);
    visit(cache.pool + stream.pages[offset / kPageBytes] * kPageBytes + offset % kPageBytes, done, count);
    done += count;
  }
}

uint64_t unpacked_tokens(const Sequence& sequence) {
  return sequence.tokens - static_cast<uint64_t>(sequence.packed) * kBlockTokens;
}

uint64_t recent_bytes(const CacheView& cache, const Sequence& sequence) {
  return kParts * unpacked_tokens(sequence) * cache.heads * cache.head_dim * 2;
}

// Calls visit(row, place, bytes) for the heads of `count` tokens: at byte `row` of [count][heads][head_dim], and at byte
// `place` of [heads, tokens, head_dim], whose tokens from `first` on they are.
template <typename Visit>
void for_each_row(const CacheView& cache, uint64_t tokens, uint64_t first, uint64_t count, Visit visit) {
  const uint64_t bytes = cache.head_dim * 2;
  for (uint64_t i = 0; i < count; ++i) {
    for (uint64_t head = 0; head < cache.heads; ++head)
      visit((i * cache.heads + head) * bytes, (head * tokens + first + i) * bytes, bytes);
  }
}

void require_bytes(const char* what, uint64_t given, uint64_t needed) {
  if (given == needed) return;
  throw Error(PH_ERROR_INVALID_ARGUMENT, "The %s of the layer take %llu bytes: current value is %llu", what,
              static_cast<unsigned_long>(needed), static_cast<unsigned_long>(given));
}

}  // namespace

template <typename Visit>
void ph_kv_cache::for_each_recent(uint32_t layer, uint32_t sequence, const Sequence& held,
                                  Visit visit) const {
  const uint64_t packed_end = config_.sinks + static_cast<uint64_t>(held.packed) * kBlockTokens;
  const uint64_t row_bytes = static_cast<uint64_t>(view_.heads) * view_.head_dim * 2;
  for (uint32_t part = 0; part < kParts; ++part) {
    uint8_t* const memory =
        view_.recent + (stream_of(view_, layer, sequence) * kParts + part) * recent_part_bytes(view_);
    uint64_t done = 0;
    const auto visit_from = [&](uint64_t token, uint64_t count) {
      if (count == 0) return;
      visit(part, done, count, memory + recent_slot(view_, token) * row_bytes);
      done += count;
    };
    visit_from(0, std::min<uint64_t>(held.tokens, config_.sinks));
    for (uint64_t token = packed_end; token < held.tokens;) {
      const uint64_t until_wrap = config_.sinks + view_.ring - recent_slot(view_, token);
      const uint64_t count = std::min(held.tokens - token, until_wrap);
      visit_from(token, count);
      token += count;
    }
  }
}

void ph_kv_cache::require_whole(const Stream& stream, uint32_t sequence) const {
  if (stream.first_block == 0) return;
  throw Error(
      PH_ERROR_INVALID_ARGUMENT,
      "Cannot export sequence %u: blocks outside of a layer's window were given back, and it holds tokens "
      "from %llu on",
      sequence, static_cast<unsigned long long>(first_held(stream)));
}

void ph_kv_cache::require_settled(uint32_t sequence, const char* what) const {
  if (alive(sequence).step == steps_) require_idle(what);
}

uint32_t ph_kv_cache::measure(uint32_t sequence, uint64_t* record_bytes) {
  require_settled(sequence, "export a sequence");
  const Sequence& measured = alive(sequence);
  for (const Stream& stream : measured.streams) require_whole(stream, sequence);
  const std::vector<uint32_t> ends = stream_ends({sequence});
  for (uint32_t layer = 0; layer < config_.layers; ++layer)
    record_bytes[layer] = static_cast<uint64_t>(ends[layer] - kStreamStart) * kUnitBytes;
  return measured.packed;
}

void ph_kv_cache::export_layer(uint32_t sequence, uint32_t layer, SequenceLayer target) {
  require_settled(sequence, "export a sequence");
  require_layer(layer);
  const Sequence& from = alive(sequence);
  require_whole(from.streams[layer], sequence);
  std::vector<uint32_t> ends(static_cast<size_t>(from.packed) * view_.heads + 1);
  download(device_, ends.data(), reinterpret_cast<const uint8_t*>(index_of(view_, layer, sequence)),
           ends.size() * sizeof ends[0]);
  require_bytes("records", target.record_bytes,
                static_cast<uint64_t>(ends.back() - kStreamStart) * kUnitBytes);
  require_bytes("tokens in 16 bits", target.recent_bytes, recent_bytes(view_, from));
  for (uint32_t block = 0; block <= from.packed; ++block) {
    const uint32_t end = ends[static_cast<size_t>(block) * view_.heads];
    target.offsets[block] = static_cast<uint64_t>(end - kStreamStart) * kUnitBytes;
  }
  for_each_stretch(view_, from.streams[layer], target.record_bytes,
                   [&](const uint8_t* memory, uint64_t done, uint64_t count) {
                     download(device_, target.records + done, memory, count);
                   });
  const uint64_t tokens = unpacked_tokens(from), part_bytes = target.recent_bytes / kParts;
  std::vector<uint8_t> rows;
  for_each_recent(
      layer, sequence, from, [&](uint32_t part, uint64_t token, uint64_t count, const uint8_t* memory) {
        rows.resize(count * view_.heads * view_.head_dim * 2);
        download(device_, rows.data(), memory, rows.size());
        uint8_t* const tensor = target.recent + part * part_bytes;
        for_each_row(view_, tokens, token, count, [&](uint64_t row, uint64_t place, uint64_t bytes) {
          memcpy(tensor + place, rows.data() + row, bytes);
        });
      });
}

uint32_t ph_kv_cache::begin_import(uint64_t tokens, uint32_t blocks, const uint64_t* record_bytes) {
  if (tokens > config_.tokens) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "Cannot import a sequence of %llu tokens: the cache was created for %llu",
                static_cast<unsigned_long>(tokens), static_cast<unsigned_long>(config_.tokens));
  }
  const uint64_t after_sinks = tokens > config_.sinks ? tokens - config_.sinks : 0;
  const uint64_t packed_tokens = static_cast<uint64_t>(blocks) * kBlockTokens;
  if (packed_tokens > after_sinks) {
    throw Error(PH_ERROR_INVALID_ARGUMENT,
                "Cannot import %u blocks of a sequence of %llu tokens, of which %u are sinks", blocks,
                static_cast<unsigned_long>(tokens), config_.sinks);
  }
  // As append leaves it: a block that is due would be packed.
  const uint64_t kept = after_sinks - packed_tokens;
  if (kept >= view_.ring) {
    throw Error(
        PH_ERROR_INVALID_ARGUMENT,
        "Cannot import a sequence with %llu newest tokens in 16 bits: that takes a cache with a residual of "
        "%llu or more, current value is %u",
        static_cast<unsigned_long>(kept), static_cast<unsigned_long>(kept - kBlockTokens + 1),
        config_.residual);
  }
  uint64_t needed = 0;
  for (uint32_t layer = 0; layer < config_.layers; ++layer) {
    const uint64_t most = blocks * largest_block_units(shapes_[layer]) * kUnitBytes;
    if (record_bytes[layer] > most || record_bytes[layer] % kUnitBytes != 0) {
      throw Error(PH_ERROR_CORRUPT,
                  "The records of layer %u take %llu bytes, but %u blocks a multiple of 16 up to %llu", layer,
                  static_cast<unsigned_long>(record_bytes[layer]), blocks, static_cast<unsigned_long>(most));
    }
    if (blocks > 0) needed += pages_of(kStreamStart + record_bytes[layer] / kUnitBytes);
  }
  const uint32_t slot = free_slot();
  const bool idle = std::find(appended_.begin(), appended_.end(), false) == appended_.end();
  if (needed > pages_.available() && idle) tighten();
  if (needed > pages_.available()) {
    throw Error(
        PH_ERROR_OUT_OF_MEMORY,
        "The kv cache's pool is full: the sequence takes %llu pages of 65536 bytes, and %u of %llu are free",
        static_cast<unsigned_long>(needed), pages_.available(),
        static_cast<unsigned_long>(config_.pool_bytes / kPageBytes));
  }
  sequences_[slot] = Sequence{
      false, tokens, blocks, 0, std::vector<Stream>(config_.layers), std::vector<bool>(config_.layers, true)};
  grants_.clear();
  for (uint32_t layer = 0; layer < config_.layers; ++layer) {
    Stream& stream = sequences_[slot].streams[layer];
    stream.bound = kStreamStart + record_bytes[layer] / kUnitBytes;
    while (blocks > 0 && stream.pages.size() < pages_of(stream.bound)) grant(layer, slot, pages_.take());
  }
  send_grants();
  return slot;
}

Sequence& ph_kv_cache::importing(uint32_t sequence) {
  if (sequence >= config_.sequences || sequences_[sequence].awaited.empty())
    throw Error(PH_ERROR_INVALID_ARGUMENT, "The kv cache is not importing a sequence %u", sequence);
  return sequences_[sequence];
}

void ph_kv_cache::import_layer(uint32_t sequence, uint32_t layer, ConstSequenceLayer source,
                               uint64_t& malformed) {
  require_layer(layer);
  Sequence& to = importing(sequence);
  if (!to.awaited[layer])
    throw Error(PH_ERROR_INVALID_ARGUMENT, "Layer %u of sequence %u has been imported", layer, sequence);
  const Stream& stream = to.streams[layer];
  require_bytes("records", source.record_bytes, (stream.bound - kStreamStart) * kUnitBytes);
  require_bytes("tokens in 16 bits", source.recent_bytes, recent_bytes(view_, to));

  std::vector<uint32_t> ends = {kStreamStart}, record_ends(view_.heads);
  ends.reserve(static_cast<size_t>(to.packed) * view_.heads + 1);
  for (uint32_t block = 0; block < to.packed; ++block) {
    const uint64_t begin = source.offsets[block], end = source.offsets[block + 1];
    const bool ordered = begin <= end && end <= source.record_bytes && (block > 0 || begin == 0) &&
                         (block + 1 < to.packed || end == source.record_bytes);
    const BlockFlaw flaw =
        ordered ? check_block(shapes_[layer], source.records + begin, end - begin, record_ends.data())
                : BlockFlaw{"its place is not between those of its neighbours", kNoHead};
    if (flaw.what != nullptr) {
      malformed = block;
      if (flaw.head == kNoHead) throw Error(PH_ERROR_CORRUPT, "%s", flaw.what);
      throw Error(PH_ERROR_CORRUPT, "head %u: %s", flaw.head, flaw.what);
    }
    const uint32_t start = ends.back();
    for (const uint32_t end_bytes : record_ends) ends.push_back(start + end_bytes / kUnitBytes);
  }

  enqueue_upload(device_, reinterpret_cast<uint8_t*>(index_of(view_, layer, sequence)), ends.data(),
                 ends.size() * sizeof ends[0]);
  for_each_stretch(view_, stream, source.record_bytes, [&](uint8_t* memory, uint64_t done, uint64_t count) {
    enqueue_upload(device_, memory, source.records + done, count);
  });
  const uint64_t tokens = unpacked_tokens(to), part_bytes = source.recent_bytes / kParts;
  std::vector<uint8_t> rows;
  for_each_recent(layer, sequence, to, [&](uint32_t part, uint64_t token, uint64_t count, uint8_t* memory) {
    rows.resize(count * view_.heads * view_.head_dim * 2);
    const uint8_t* const tensor = source.recent + part * part_bytes;
    for_each_row(view_, tokens, token, count, [&](uint64_t row, uint64_t place, uint64_t bytes) {
      memcpy(rows.data() + row, tensor + place, bytes);
    });
    enqueue_upload(device_, memory, rows.data(), rows.size());
  });
  to.awaited[layer] = false;
  if (std::find(to.awaited.begin(), to.awaited.end(), true) != to.awaited.end()) return;
  to.awaited.clear();
  to.alive = true;
}
