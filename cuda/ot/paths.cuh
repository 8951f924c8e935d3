// The least cost of transport without entropy by shortest augmenting paths, as in paths_cpu.h: rows send what they have, one
// after another, along the cheapest paths to columns with room, over pairs that carry mass already and would give it back.
//
// A thread block of kWarps warps has a problem; thread t has the columns t, t + threads, ..., with their potentials and
// distances in registers. Pairs that carry mass ("arcs", with their mass) are a forest of rows and columns in lists in shared
// memory. A search goes from tree to tree: all of a tree is reached with its first column, as its arcs cost nothing, by one
// thread, which walks it and stops at a column with room; then all threads relax their columns from the tree's rows, and the
// nearest column that was not reached yet is next (of equals one with room, then the lowest: the same every time). As a path
// enters no tree twice, arcs stay a forest, however many costs are equal: at most rows + columns - 1, a basic solution. No
// forest carries the same masses twice, so that searches end; kMostPaths bounds them in spite of rounding.
//
// A search step reads the costs of the rows that it reaches, coalesced; takes two barriers (none but the warp's own where
// kWarps is 1) and a walk of about a hundred cycles. Shared memory: 92 bytes a row or column there is room for.
#pragma once

#include "ot/small.cuh"

namespace ph::ot {

// Of up to kMost rows and columns; kBlocks: thread blocks a multiprocessor that registers must suffice for.
template <uint32_t kMost_, int kWarps_, int kBlocks_>
struct PathsLayout {
  static constexpr uint32_t kMost = kMost_, kThreads = kWarps_ * kWarp, kBlocks = kBlocks_;
  static constexpr int kWarps = kWarps_, kColumns = (kMost + kThreads - 1) / kThreads;
};

constexpr uint16_t kNoArc = 0xffff, kNoColumn = 0xffff;
constexpr uint32_t kMostPaths = 64;  // for every row and column

template <typename L>
struct alignas(16) PathsMemory {
  unsigned long long scratch[L::kWarps], nearest[L::kWarps];
  uint32_t nearest_place[L::kWarps];
  // Of rows and columns: potentials, masses that are left to send or to get, and a row's distance.
  double f[L::kMost], g[L::kMost], supply[L::kMost], demand[L::kMost], at[L::kMost];
  double flow[2 * L::kMost];  // of arcs
  uint16_t arc_row[2 * L::kMost], arc_column[2 * L::kMost];
  uint16_t next_of_row[2 * L::kMost], next_of_column[2 * L::kMost];  // lists, which end with kNoArc
  uint16_t row_arcs[L::kMost], column_arcs[L::kMost];                // and begin here
  uint32_t row_seen[L::kMost], column_seen[L::kMost];                // the last search that reached them
  uint16_t row_by[L::kMost];                                         // the arc along which a row was reached
  uint16_t through[L::kMost], column_by[L::kMost];  // a column's row before it, and their arc if there is one
  uint16_t queue[L::kMost];                         // rows that were reached, by distance
  uint32_t queued, end;                             // how many; the column with room, kSearching or kNowhere
};

// The same order as that of doubles, NaN aside, and -0 below 0.
__device__ __forceinline__ unsigned long long order_of(double value) {
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(value));
  return bits ^ (bits >> 63 != 0 ? ~0ull : 1ull << 63);
}
__device__ __forceinline__ double value_of(unsigned long long order) {
  const unsigned long long bits = order ^ (order >> 63 != 0 ? 1ull << 63 : ~0ull);
  return __longlong_as_double(static_cast<long long>(bits));
}

// The least of the lanes' keys, and of the places that have it the least, for all lanes.
__device__ __forceinline__ void least_of_warp(unsigned long long& key, uint32_t& place) {
  const uint32_t high = static_cast<uint32_t>(key >> 32), low = static_cast<uint32_t>(key);
  const uint32_t least_high = __reduce_min_sync(kAllLanes, high);
  const uint32_t least_low = __reduce_min_sync(kAllLanes, high == least_high ? low : ~0u);
  place = __reduce_min_sync(kAllLanes, high == least_high && low == least_low ? place : ~0u);
  key = (0ull + least_high) << 32 | least_low;
}

// Costs [rows, columns], beside which there is a row and a column more of cost 0, but infinite where they meet.
template <typename T>
struct PathCosts {
  const T* entries;
  uint32_t rows, columns;

  __device__ __forceinline__ double operator()(uint32_t row, uint32_t column) const {
    if (row < rows && column < columns) return entries[row * columns + column];
    return row < rows || column < columns ? 0.0 : static_cast<double>(INFINITY);
  }
};

enum class PathsEnd { kAll, kStuck, kLimit };

template <typename L, typename Costs>
struct Paths {
  static constexpr uint32_t kSearching = ~0u, kNowhere = ~0u - 1;

  const Threads<L::kWarps>& threads;
  PathsMemory<L>& memory;
  const Costs costs;
  const uint32_t rows, columns;
  double g[L::kColumns], distance[L::kColumns];
  uint32_t open, crowded;  // own columns that were not reached, and those without room: a bit each
  double total, nothing;
  uint32_t round = 0, augmentations = 0, stuck = 0;
  // Of thread 0.
  uint32_t queued = 0, walked = 0;
  uint16_t arcs = 0, free = kNoArc;

  // memory.supply and memory.demand hold masses of equal totals, which all threads can see.
  __device__ __forceinline__ Paths(const Threads<L::kWarps>& threads_, PathsMemory<L>& memory_,
                                   const Costs& costs_, uint32_t rows_, uint32_t columns_)
      : threads(threads_), memory(memory_), costs(costs_), rows(rows_), columns(columns_) {
    double sum = 0.0;
    for (uint32_t i = threads.thread; i < rows; i += L::kThreads) sum += memory.supply[i];
    total = threads.sum(sum);
    nothing = 1e-15 * total;
  }

  __device__ __forceinline__ PathsEnd solve() {
    begin();
    const uint32_t most = kMostPaths * (rows + columns);
#pragma unroll 1
    for (uint32_t row = 0; row < rows; ++row) {
#pragma unroll 1
      while (memory.supply[row] > nothing) {
        if (augmentations == most) return PathsEnd::kLimit;
        const uint32_t end = search(row);
        if (end == kNowhere) {
          // All the room that there is is rounding.
          if (room() <= 1e-12 * total) break;
          stuck = row;
          return PathsEnd::kStuck;
        }
        if (threads.thread == 0) augment(row, end);
        ++augmentations;
        threads.sync();
      }
    }
    return PathsEnd::kAll;
  }

  // Moves the potentials to memory, those without mass as large as the others let them be.
  __device__ __forceinline__ void finish_potentials() {
    bool idle = false;
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k) idle |= own(k) < columns && memory.column_arcs[own(k)] == kNoArc;
    if (threads.combine(idle ? 1u : 0u, Or{}) != 0) {
      double least[L::kColumns];
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k) least[k] = INFINITY;
      for (uint32_t row = 0; row < rows; ++row) {
        if (memory.row_arcs[row] == kNoArc) continue;
#pragma unroll
        for (int k = 0; k < L::kColumns; ++k)
          if (own(k) < columns) least[k] = smaller(least[k], costs(row, own(k)) - memory.f[row]);
      }
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k) {
        if (own(k) < columns && memory.column_arcs[own(k)] == kNoArc)
          g[k] = least[k] == static_cast<double>(INFINITY) ? 0.0 : least[k];
      }
    }
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k)
      if (own(k) < columns) memory.g[own(k)] = g[k];
    threads.sync();
    reduce_rows([&](uint32_t row) { return memory.row_arcs[row] == kNoArc; },
                [&](uint32_t row, double least, uint32_t) { memory.f[row] = least; });
    threads.sync();
  }

 private:
  struct Or {
    __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
  };
  static __device__ __forceinline__ double smaller(double a, double b) { return b < a ? b : a; }
  __device__ __forceinline__ uint32_t own(int k) const { return threads.thread + k * L::kThreads; }

  __device__ __forceinline__ double room() const {
    double sum = 0.0;
    for (uint32_t j = threads.thread; j < columns; j += L::kThreads) sum += memory.demand[j];
    return threads.sum(sum);
  }

  // Calls use(row, least cost - g, first column that has it) in a lane for the rows that `wanted` says, 0 and kNoColumn where
  // all costs are infinite. memory.g holds the potentials.
  template <typename Wanted, typename Use>
  __device__ __forceinline__ void reduce_rows(Wanted wanted, Use use) const {
    for (uint32_t row = threads.warp; row < rows; row += L::kWarps) {
      if (!wanted(row)) continue;
      unsigned long long key = ~0ull;
      uint32_t place = ~0u;
#pragma unroll 4
      for (uint32_t column = threads.lane; column < columns; column += kWarp) {
        const unsigned long long own_key = order_of(costs(row, column) - memory.g[column]);
        if (own_key < key) {
          key = own_key;
          place = column;
        }
      }
      least_of_warp(key, place);
      const double least = value_of(key);
      const bool any = least < static_cast<double>(INFINITY);
      if (threads.lane == 0) use(row, any ? least : 0.0, any ? place : uint32_t{kNoColumn});
    }
  }

  // Potentials that no pair costs less than; every row sends what it can along the first pair that costs just that.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k) g[k] = INFINITY;
#pragma unroll 4
    for (uint32_t row = 0; row < rows; ++row) {
      if (!(memory.supply[row] > 0.0)) continue;
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k)
        if (own(k) < columns) g[k] = smaller(g[k], costs(row, own(k)));
    }
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k) {
      if (g[k] == static_cast<double>(INFINITY)) g[k] = 0.0;
      if (own(k) >= columns) continue;
      memory.g[own(k)] = g[k];
      memory.column_arcs[own(k)] = kNoArc;
      memory.column_seen[own(k)] = 0;
    }
    for (uint32_t row = threads.thread; row < rows; row += L::kThreads) {
      memory.row_arcs[row] = kNoArc;
      memory.row_seen[row] = 0;
    }
    threads.sync();
    reduce_rows([](uint32_t) { return true; },
                [&](uint32_t row, double least, uint32_t column) {
                  memory.f[row] = least;
                  memory.queue[row] = static_cast<uint16_t>(column);
                });
    threads.sync();
    if (threads.thread == 0) {
      for (uint32_t row = 0; row < rows; ++row) {
        const uint16_t column = memory.queue[row];
        if (column == kNoColumn || !(memory.supply[row] > nothing) || !(memory.demand[column] > nothing))
          continue;
        const double amount = smaller(memory.supply[row], memory.demand[column]);
        send(row, column, kNoArc, amount);
        memory.supply[row] -= amount;
        memory.demand[column] -= amount;
      }
    }
    threads.sync();
  }

  // Distances from row `start` to columns until one with room is reached, which is returned; potentials are raised by them.
  __device__ __forceinline__ uint32_t search(uint32_t start) {
    ++round;
    open = crowded = 0;
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k) {
      distance[k] = INFINITY;
      if (own(k) >= columns) continue;
      open |= 1u << k;
      if (!(memory.demand[own(k)] > nothing)) crowded |= 1u << k;
    }
    if (threads.thread == 0) {
      queued = walked = 0;
      reach_row(start, kNoArc, 0.0);
    }
    uint32_t column = kNoColumn, relaxed = 0;
    double at = 0.0;
#pragma unroll 1
    while (true) {
      if (threads.thread == 0) {
        memory.end = column != kNoColumn && reach_column(column, kNoArc, at) ? column : walk(at);
        memory.queued = queued;
      }
      threads.sync();
      if (memory.end != kSearching) break;
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k) {
        if ((open >> k & 1) == 0 || memory.column_seen[own(k)] != round) continue;
        open &= ~(1u << k);
        distance[k] = at;
      }
      const uint32_t reached = memory.queued;
#pragma unroll 1
      for (; relaxed + 4 <= reached; relaxed += 4) relax<4>(relaxed, at);
#pragma unroll 1
      for (; relaxed < reached; ++relaxed) relax<1>(relaxed, at);
      unsigned long long key = ~0ull;
      uint32_t place = ~0u;
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k) {
        if ((open >> k & 1) == 0) continue;
        // Distances are not negative: their bits have their order.
        const unsigned long long own_key = static_cast<unsigned long long>(__double_as_longlong(distance[k]));
        const uint32_t own_place = (crowded >> k & 1) << 16 | own(k);
        if (own_key < key || (own_key == key && own_place < place)) {
          key = own_key;
          place = own_place;
        }
      }
      nearest(key, place);
      at = __longlong_as_double(static_cast<long long>(key));
      if (!(at < static_cast<double>(INFINITY))) return kNowhere;
      column = place & 0xffff;
    }
    // What was reached last, with the column with room, is at that distance itself.
    for (uint32_t i = threads.thread; i < memory.queued; i += L::kThreads) {
      const uint32_t row = memory.queue[i];
      memory.f[row] += at - memory.at[row];
    }
#pragma unroll
    for (int k = 0; k < L::kColumns; ++k)
      if (own(k) < columns && (open >> k & 1) == 0) g[k] -= at - distance[k];
    return memory.end;
  }

  // Distances by way of kRows rows of the queue, whose costs are read at once.
  template <int kRows>
  __device__ __forceinline__ void relax(uint32_t first, double at) {
    uint32_t row[kRows];
    double cost[kRows][L::kColumns];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row[i] = memory.queue[first + i];
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k)
        cost[i][k] = (open >> k & 1) != 0 ? costs(row[i], own(k)) : static_cast<double>(INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const double base = at - memory.f[row[i]];
#pragma unroll
      for (int k = 0; k < L::kColumns; ++k) {
        double next = base + cost[i][k] - g[k];
        next = next > at ? next : at;  // rounding may make it less; never -0
        if (next < distance[k]) {      // not where it is not open
          distance[k] = next;
          memory.through[own(k)] = static_cast<uint16_t>(row[i]);
        }
      }
    }
  }

  // The nearest of the threads' columns, for all of them. Also a barrier: thread 0 may write then what the others have read.
  __device__ __forceinline__ void nearest(unsigned long long& key, uint32_t& place) const {
    least_of_warp(key, place);
    if constexpr (L::kWarps == 1) {
      __syncwarp();
    } else {
      if (threads.lane == 0) {
        memory.nearest[threads.warp] = key;
        memory.nearest_place[threads.warp] = place;
      }
      __syncthreads();
#pragma unroll
      for (int w = 0; w < L::kWarps; ++w) {
        const unsigned long long other = memory.nearest[w];
        const uint32_t other_place = memory.nearest_place[w];
        if (other < key || (other == key && other_place < place)) {
          key = other;
          place = other_place;
        }
      }
    }
  }

  // What follows is thread 0's.

  __device__ __forceinline__ void reach_row(uint32_t row, uint16_t arc, double at) {
    memory.row_seen[row] = round;
    memory.row_by[row] = arc;
    memory.at[row] = at;
    memory.queue[queued++] = static_cast<uint16_t>(row);
  }
  // And the rows that send to the column; or true, if it has room.
  __device__ __forceinline__ bool reach_column(uint32_t column, uint16_t arc_to, double at) {
    memory.column_seen[column] = round;
    memory.column_by[column] = arc_to;
    if (memory.demand[column] > nothing) return true;
    for (uint16_t arc = memory.column_arcs[column]; arc != kNoArc; arc = memory.next_of_column[arc]) {
      const uint32_t row = memory.arc_row[arc];
      if (memory.row_seen[row] != round) reach_row(row, arc, at);
    }
    return false;
  }
  // All of the trees that the rows of the queue are in, or up to a column with room, which is returned.
  __device__ __forceinline__ uint32_t walk(double at) {
    while (walked < queued) {
      const uint32_t row = memory.queue[walked++];
      for (uint16_t arc = memory.row_arcs[row]; arc != kNoArc; arc = memory.next_of_row[arc]) {
        const uint32_t column = memory.arc_column[arc];
        if (memory.column_seen[column] == round) continue;
        memory.through[column] = static_cast<uint16_t>(row);
        if (reach_column(column, arc, at)) return column;
      }
    }
    return kSearching;
  }

  __device__ __forceinline__ void augment(uint32_t start, uint32_t end) {
    double amount = smaller(memory.supply[start], memory.demand[end]);
    for (uint32_t row = memory.through[end]; row != start;) {
      const uint16_t arc = memory.row_by[row];
      amount = smaller(amount, memory.flow[arc]);
      row = memory.through[memory.arc_column[arc]];
    }
    for (uint32_t column = end;;) {
      const uint32_t row = memory.through[column];
      send(row, column, memory.column_by[column], amount);
      if (row == start) break;
      const uint16_t arc = memory.row_by[row];
      column = memory.arc_column[arc];
      memory.flow[arc] -= amount;
      if (memory.flow[arc] <= 1e-3 * nothing) remove(arc);
    }
    memory.supply[start] -= amount;
    memory.demand[end] -= amount;
  }

  // More along an arc, or along a new one.
  __device__ __forceinline__ void send(uint32_t row, uint32_t column, uint16_t arc, double amount) {
    if (arc != kNoArc) {
      memory.flow[arc] += amount;
      return;
    }
    if (free != kNoArc) {
      arc = free;
      free = memory.next_of_row[arc];
    } else {
      arc = arcs++;
    }
    memory.flow[arc] = amount;
    memory.arc_row[arc] = static_cast<uint16_t>(row);
    memory.arc_column[arc] = static_cast<uint16_t>(column);
    memory.next_of_row[arc] = memory.row_arcs[row];
    memory.next_of_column[arc] = memory.column_arcs[column];
    memory.row_arcs[row] = memory.column_arcs[column] = arc;
  }

  __device__ __forceinline__ void remove(uint16_t arc) {
    unlink(memory.row_arcs[memory.arc_row[arc]], memory.next_of_row, arc);
    unlink(memory.column_arcs[memory.arc_column[arc]], memory.next_of_column, arc);
    memory.next_of_row[arc] = free;
    free = arc;
  }
  static __device__ __forceinline__ void unlink(uint16_t& first, uint16_t* next, uint16_t arc) {
    uint16_t* link = &first;
    while (*link != arc) link = &next[*link];
    *link = next[arc];
  }
};

}  // namespace ph::ot
