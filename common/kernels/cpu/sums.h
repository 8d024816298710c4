// What the ranks of one machine tell each other inside a step, through memory that all of them have mapped: the sum of what they
// have, or every rank's beside each other.
//
// Each puts its part where all can read it, waits until all have, and reads them in the order of ranks: the sums are the same bits
// on every rank. It has two places, which it takes in turn: once all have put part n + 1, all have read part n. So one wait is
// enough. What is larger than a place goes in pieces.
//
// Of R ranks each reads the R - 1 parts of the others. To add up 1 / R of x each and read the sums would be 2 (R - 1) / R parts and
// a second wait: no less for two ranks, half for four.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>

#include "pool.h"

namespace tandem {

// At the begin of that memory, which is zeros when the ranks meet.
struct Meeting {
  static constexpr int MOST = 64;  // MAX_RANKS
  static constexpr size_t PLACE = size_t(2) << 20;

  struct alignas(64) Rank {
    std::atomic<uint32_t> parts;  // how many it has put
    uint64_t left[2];             // of each of the last two, what the call had yet to tell, and its kind
    uint64_t bytes, nanoseconds;  // that it has told, and how long that took, waiting included
  };

  // 0: for so many there is no room.
  static size_t size(int ranks) { return ranks < 1 || ranks > MOST ? 0 : sizeof(Meeting) + size_t(ranks) * 2 * PLACE; }

  std::atomic<uint32_t> over;  // a rank has left in the middle of a step: nobody waits for it
  Rank ranks[MOST];
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "other processes know nothing of a lock");

enum class Told { ALL, OVER, DIFFERENT };

// One rank's end of it. One call at a time.
class Exchange {
 public:
  // A rank alone needs no memory.
  Exchange(void* memory, int rank, int ranks) : meeting_((Meeting*)memory), rank_(rank), ranks_(ranks) {}

  // Where the next part will be put: what is there already need not be copied. Null if it has no room for so many bytes.
  void* room(size_t bytes) const {
    return ranks_ > 1 && bytes <= Meeting::PLACE ? place(rank_, (own().parts.load(std::memory_order_relaxed) + 1) % 2) : nullptr;
  }

  // use(i, n, sum) of each sixteen of every rank's x[size] added in float32, of which the first n are there. Who waits fetches
  // up to `ahead` bytes of `next`: what it will read then.
  template <class E, class Use>
  Told sum(const typename E::T* x, size_t size, Use&& use, const void* next = nullptr, size_t ahead = 0) const {
    using T = typename E::T;
    if (ranks_ == 1) {
      for (size_t i = 0; i < size; i += LANES) use(i, count(size - i), get<E>(x + i, count(size - i)));
      return Told::ALL;
    }
    return each(x, size * sizeof(T), 0, next, ahead, [&](size_t at, size_t bytes, int turn) {
      const size_t first = at / sizeof(T), n = bytes / sizeof(T);
      for (size_t i = 0; i < n; i += LANES) {
        V sum = E::get((const T*)place(0, turn) + i);  // a place ends with whole sixteens
        for (int r = 1; r < ranks_; ++r) sum = sum + E::get((const T*)place(r, turn) + i);
        use(first + i, count(n - i), sum);
      }
    });
  }

  // x[size] becomes the sum, rounded once.
  template <class E>
  Told add(typename E::T* x, size_t size) const {
    return sum<E>(x, size, [&](size_t i, int n, V sum) { put<E>(x + i, sum, n); });
  }

  // Every rank's x[size] one behind the other.
  Told gather(const void* x, size_t size, void* every) const {
    return each(x, size, 1, nullptr, 0, [&](size_t at, size_t bytes, int turn) {
      for (int r = 0; r < ranks_; ++r) std::memcpy((char*)every + size_t(r) * size + at, place(r, turn), bytes);
    });
  }

  // From any thread.
  void leave() const { meeting_->over.store(1, std::memory_order_release); }

 private:
  // Some 20 µs, then about 2 ms in which another may have the core, then naps: a rank may compile, or wait for a core itself.
  static constexpr int SPINS = 1 << 8, YIELDS = 1 << 11;
  static constexpr timespec NAP{0, 50'000};

  static int count(size_t left) { return int(std::min<size_t>(left, LANES)); }

  static uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return uint64_t(t.tv_sec) * 1'000'000'000 + uint64_t(t.tv_nsec);
  }

  Meeting::Rank& own() const { return meeting_->ranks[rank_]; }

  bool over() const { return meeting_->over.load(std::memory_order_acquire); }

  char* place(int rank, int turn) const {
    return (char*)meeting_ + sizeof(Meeting) + (size_t(rank) * 2 + size_t(turn)) * Meeting::PLACE;
  }

  // read(at, bytes, turn) of each piece of x[size], once it is with all.
  template <class Read>
  Told each(const void* x, size_t size, uint64_t kind, const void* next, size_t ahead, Read&& read) const {
    const uint64_t begin = now();
    for (size_t at = 0; at < size; at += Meeting::PLACE) {
      if (over()) return Told::OVER;
      const size_t bytes = std::min(size - at, Meeting::PLACE);
      const uint32_t parts = own().parts.load(std::memory_order_relaxed) + 1;
      const int turn = int(parts % 2);
      const uint64_t left = (size - at) * 2 + kind;
      const char* from = (const char*)x + at;
      if (from != place(rank_, turn)) std::memcpy(place(rank_, turn), from, bytes);
      own().left[turn] = left;
      own().parts.store(parts, std::memory_order_release);
      for (int r = 0; r < ranks_; ++r) {
        const Meeting::Rank& other = meeting_->ranks[r];
        const auto there = [&] { return int32_t(other.parts.load(std::memory_order_acquire) - parts) >= 0; };
        if (!await(there, (const char*)next, ahead)) return Told::OVER;
        if (other.left[turn] == left) continue;
        leave();
        return Told::DIFFERENT;
      }
      read(at, bytes, turn);
    }
    own().bytes += size;
    own().nanoseconds += now() - begin;
    return Told::ALL;
  }

  // Whether `there` before somebody leaves.
  template <class There>
  bool await(There&& there, const char* next, size_t ahead) const {
    const char* end = next + std::min(ahead, Pool::FETCH);
    for (int turns = 0; !there(); ++turns) {
      if (over()) return false;
      for (int i = 0; i < 4 && next < end; ++i, next += 64) prefetch(next);
      if (turns < SPINS) relax();
      else if (turns < SPINS + YIELDS) sched_yield();
      else nanosleep(&NAP, nullptr);
    }
    return true;
  }

  Meeting* meeting_;
  int rank_, ranks_;
};

}  // namespace tandem
