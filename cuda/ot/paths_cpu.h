// The least cost of transport without entropy, by shortest augmenting paths: rows send what they have, one after another, along
// the cheapest paths to columns with room, over pairs that carry mass already and would give it back. Distances are reduced by
// potentials, as Jonker and Volgenant's for assignments, so that they are not negative and a search ends at the first
// column with room. A problem has at most one path at a time; problems are spread over cores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace ph::ot {

class Paths {
 public:
  // Costs [n, stride]; masses have equal totals.
  Paths(uint32_t n, uint32_t m, uint64_t stride, const double* cost, const double* a, const double* b,
        double* flow, double* f, double* g)
      : n_(n),
        m_(m),
        stride_(stride),
        cost_(cost),
        flow_(flow),
        f_(f),
        g_(g),
        supply_(a, a + n),
        demand_(b, b + m),
        senders_(m),
        distance_(m),
        through_(m),
        visited_(m),
        entered_(n),
        came_by_(n) {
    for (double mass : supply_) total_ += mass;
    nothing_ = 1e-15 * total_;
  }

  uint32_t augmentations = 0;

  // False if some mass cannot go anywhere: of row `stuck`.
  bool solve() {
    begin();
    for (uint32_t i = 0; i < n_; ++i) {
      while (supply_[i] > nothing_) {
        const int64_t end = search(i);
        if (end == kNowhere) {
          // All the room that there is is rounding.
          if (room() <= 1e-12 * total_) break;
          stuck = i;
          return false;
        }
        augment(i, static_cast<uint32_t>(end));
      }
    }
    finish_potentials();
    return true;
  }

  uint32_t stuck = 0;

 private:
  static constexpr int64_t kNowhere = -1;

  const double* row(uint32_t i) const { return cost_ + i * stride_; }

  double room() const {
    double total = 0.0;
    for (double mass : demand_) total += mass;
    return total;
  }

  // Potentials that no pair costs less than, and as much as goes along pairs that cost just that.
  void begin() {
    std::fill(flow_, flow_ + n_ * stride_, 0.0);
    std::fill(g_, g_ + m_, INFINITY);
    for (uint32_t i = 0; i < n_; ++i)
      if (supply_[i] > 0.0)
        for (uint32_t j = 0; j < m_; ++j) g_[j] = std::min(g_[j], row(i)[j]);
    for (uint32_t j = 0; j < m_; ++j)
      if (g_[j] == INFINITY) g_[j] = 0.0;
    for (uint32_t i = 0; i < n_; ++i) {
      f_[i] = INFINITY;
      for (uint32_t j = 0; j < m_; ++j) f_[i] = std::min(f_[i], row(i)[j] - g_[j]);
      if (f_[i] == INFINITY) f_[i] = 0.0;
      for (uint32_t j = 0; j < m_ && supply_[i] > nothing_; ++j) {
        if (demand_[j] <= nothing_ || row(i)[j] - g_[j] != f_[i]) continue;
        const double amount = std::min(supply_[i], demand_[j]);
        send(i, j, amount);
        supply_[i] -= amount;
        demand_[j] -= amount;
      }
    }
  }

  void send(uint32_t i, uint32_t j, double amount) {
    double& flow = flow_[i * stride_ + j];
    if (flow == 0.0) senders_[j].push_back(i);
    flow += amount;
  }

  // Distances from row `start` to columns until one with room is reached; potentials are raised by them. kNowhere if none is.
  int64_t search(uint32_t start) {
    std::fill(distance_.begin(), distance_.end(), INFINITY);
    std::fill(visited_.begin(), visited_.end(), 0);
    reached_.clear();
    std::fill(entered_.begin(), entered_.end(), 0);
    rows_at_.clear();
    enter(start, 0.0);
    while (true) {
      int64_t nearest = kNowhere;
      double least = INFINITY;
      for (uint32_t j = 0; j < m_; ++j) {
        if (visited_[j] == 0 && distance_[j] < least) {
          least = distance_[j];
          nearest = j;
        }
      }
      if (nearest == kNowhere) return kNowhere;
      const uint32_t column = static_cast<uint32_t>(nearest);
      visited_[column] = 1;
      if (demand_[column] > nothing_) {
        for (const auto& [i, at] : rows_at_) f_[i] += least - at;
        for (uint32_t j : reached_) g_[j] -= least - distance_[j];
        return nearest;
      }
      reached_.push_back(column);
      for (uint32_t i : senders_[column]) {
        if (entered_[i] != 0) continue;
        came_by_[i] = column;
        enter(i, least);
      }
    }
  }

  void enter(uint32_t i, double at) {
    entered_[i] = 1;
    rows_at_.push_back({i, at});
    const double* cost = row(i);
    const double base = at - f_[i];
    for (uint32_t j = 0; j < m_; ++j) {
      const double distance = std::max(base + cost[j] - g_[j], at);  // rounding may make it less
      if (visited_[j] == 0 && distance < distance_[j]) {
        distance_[j] = distance;
        through_[j] = i;
      }
    }
  }

  void augment(uint32_t start, uint32_t end) {
    double amount = std::min(supply_[start], demand_[end]);
    for (uint32_t j = end, i = through_[j]; i != start; i = through_[j]) {
      j = came_by_[i];
      amount = std::min(amount, flow_[i * stride_ + j]);
    }
    for (uint32_t j = end;;) {
      const uint32_t i = through_[j];
      send(i, j, amount);
      if (i == start) break;
      j = came_by_[i];
      double& flow = flow_[i * stride_ + j];
      flow -= amount;
      if (flow <= 1e-3 * nothing_) {
        flow = 0.0;
        auto& senders = senders_[j];
        senders.erase(std::find(senders.begin(), senders.end(), i));
      }
    }
    supply_[start] -= amount;
    demand_[end] -= amount;
    ++augmentations;
  }

  // Of those without mass: as large as the others let them be.
  void finish_potentials() {
    std::vector<char> sends(n_, 0);
    for (uint32_t j = 0; j < m_; ++j)
      for (uint32_t i : senders_[j]) sends[i] = 1;
    for (uint32_t j = 0; j < m_; ++j) {
      if (!senders_[j].empty()) continue;
      double least = INFINITY;
      for (uint32_t i = 0; i < n_; ++i)
        if (sends[i] != 0) least = std::min(least, row(i)[j] - f_[i]);
      g_[j] = least == INFINITY ? 0.0 : least;
    }
    for (uint32_t i = 0; i < n_; ++i) {
      if (sends[i] != 0) continue;
      double least = INFINITY;
      for (uint32_t j = 0; j < m_; ++j) least = std::min(least, row(i)[j] - g_[j]);
      f_[i] = least == INFINITY ? 0.0 : least;
    }
  }

  const uint32_t n_, m_;
  const uint64_t stride_;
  const double* cost_;
  double *flow_, *f_, *g_;
  std::vector<double> supply_, demand_;
  std::vector<std::vector<uint32_t>> senders_;  // rows that send to a column
  std::vector<double> distance_;
  std::vector<uint32_t> through_;  // the row before a column on its path
  std::vector<char> visited_, entered_;
  std::vector<uint32_t> came_by_;                     // the column before a row
  std::vector<uint32_t> reached_;                     // columns
  std::vector<std::pair<uint32_t, double>> rows_at_;  // rows that were entered, and their distances
  double total_ = 0.0, nothing_ = 0.0;
};

}  // namespace ph::ot
