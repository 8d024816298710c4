// One team of threads for all kernels of a process. Frameworks call in from several threads, one call after another; libgomp
// would keep a team for each of them.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "vec.h"

namespace tandem {

// Round to nearest, subnormals as 0, no traps; the caller's mode comes back at the end. XLA flushes subnormals, PyTorch does
// not: results must not depend on who calls.
class FloatMode {
 public:
#if defined(__x86_64__) || defined(__i386__)
  FloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~FloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

TANDEM_INLINE void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The one T of a process, never destroyed: its threads may outlive main. A forked process gets a new one: what it inherits are locks
// that nobody will open, and the memory of threads that it does not have.
template <class T>
T& shared() {
  static T* object = nullptr;
  static const int once = (object = new T, pthread_atfork(nullptr, nullptr, [] { object = new T; }));
  (void)once;
  return *object;
}

// A call is worked on by the caller and by whichever workers join before its first phase ends. A worker that the system has put
// aside is not waited for: what it would have done, the others do. Work is claimed piece by piece for the same reason.
class Pool {
 public:
  static constexpr int MAX_PHASES = 16, SPINS = 1 << 14, GRACE = 1 << 8;
  static constexpr size_t FETCH = 192 << 10;  // of the second-level cache, while waiting

  // What a thread of the team knows of the call it works on.
  class Member {
   public:
    Member(Pool* pool, int id) : id(id), pool_(pool) {}
    const int id;  // 0 is the caller

    // How many there would be if all came.
    int size() const { return pool_->size_; }

    // Wait for all. Work shared out after it is counted anew. Who waits fetches up to `bytes` of `next` meanwhile: what this
    // thread will read then.
    void barrier(const void* next = nullptr, size_t bytes = 0) {
      const int round = phase_++;
      if (pool_->size_ == 1) return;
      const char* line = (const char*)next;
      const char* end = line + (bytes < FETCH ? bytes : FETCH);
      auto meanwhile = [&] {
        for (int i = 0; i < 4 && line < end; ++i, line += 64) prefetch(line);
      };
      if (id == 0) {
        if (round == 0) pool_->close();
        const int all = (round + 1) * (pool_->joined_ - 1);
        await([&] { return pool_->arrived_.load(std::memory_order_acquire) == all; }, meanwhile);
        pool_->round_.store(phase_, std::memory_order_release);
      } else {
        pool_->arrived_.fetch_add(1, std::memory_order_acq_rel);
        await([&] { return pool_->round_.load(std::memory_order_acquire) == phase_; }, meanwhile);
      }
    }

    // Calls f(i, j) for each i in [0, n) and j in [0, rounds) once in the whole team. Every thread begins with a run of its own,
    // goes through it `rounds` times, and then helps the others: neighbours follow each other, and nobody idles. Nobody waits at
    // the end.
    template <class F>
    TANDEM_INLINE void share(int n, int rounds, F&& f) {
      const int size = pool_->size_;
      for (int k = 0; k < size; ++k) {
        const int owner = (id + k) % size, first = int(int64_t(n) * owner / size);
        const int run = int(int64_t(n) * (owner + 1) / size) - first;
        auto& next = pool_->next_[phase_ * size + owner].value;
        for (int i; run && (i = next.fetch_add(1, std::memory_order_relaxed)) < run * rounds;) f(first + i % run, i / run);
      }
    }

    template <class F>
    TANDEM_INLINE void share(int n, F&& f) {
      share(n, 1, [&](int i, int) { f(i); });
    }

   private:
    Pool* pool_;
    int phase_ = 0;
  };

  static Pool& get() { return shared<Pool>(); }

  void resize(int size) {
    std::lock_guard<std::mutex> lock(calls_);
    wanted_ = size < 1 ? 1 : size;
  }

  int wanted() {
    std::lock_guard<std::mutex> lock(calls_);
    return wanted_;
  }

  // Calls f(member) in the caller and in the workers that join, and waits for them.
  template <class F>
  void run(F&& f) {
    std::lock_guard<std::mutex> lock(calls_);
    FloatMode mode;
    if (size_ != wanted_) start();
    for (int i = 0; i < size_ * MAX_PHASES; ++i) next_[i].value.store(0, std::memory_order_relaxed);
    Member self(this, 0);
    if (size_ == 1) return f(self);
    call_ = [](void* f, Member& member) { (*static_cast<std::remove_reference_t<F>*>(f))(member); };
    argument_ = const_cast<void*>(static_cast<const void*>(&f));
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    joined_ = 0;
    busy_.store(true, std::memory_order_relaxed);
    publish(1);
    f(self);
    if (!joined_) close();
    await([&] { return left_.load(std::memory_order_acquire) == joined_ - 1; }, [] {});
    busy_.store(false, std::memory_order_relaxed);
  }

 private:
  // What workers watch: the call's number in the upper half, then whether it is closed, and how many have joined.
  static constexpr uint64_t CLOSED = uint64_t(1) << 31;
  static constexpr uint64_t call_of(uint64_t state) { return state >> 32; }

  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  template <class Done, class Meanwhile>
  static TANDEM_INLINE void await(Done&& done, Meanwhile&& meanwhile) {
    for (int spins = 0; !done(); meanwhile())
      if (++spins < SPINS) relax();
      else sched_yield();
  }

  // A new call for the workers, or a new generation of them if nobody may join.
  void publish(uint64_t low) {
    state_.store((call_of(state_.load(std::memory_order_relaxed)) + 1) << 32 | low);
    if (!sleeping_.load()) return;
    std::lock_guard<std::mutex> sleep(sleep_);
    wake_.notify_all();
  }

  // From now on nobody joins. Workers that are awake get a moment to do so: a first phase may be very short.
  void close() {
    const unsigned expected = unsigned(size_ - sleeping_.load(std::memory_order_relaxed));
    for (int spins = 0; unsigned(state_.load(std::memory_order_acquire)) < expected && spins < GRACE; ++spins) relax();
    joined_ = int(state_.fetch_or(CLOSED) & (CLOSED - 1));
  }

  // Workers of an older team belong to another generation and end.
  void start() {
    size_ = wanted_;
    next_.reset(new Counter[size_ * MAX_PHASES]);
    const int generation = generation_.fetch_add(1) + 1;
    publish(CLOSED);
    const uint64_t seen = call_of(state_.load());
    for (int id = 1; id < size_; ++id) std::thread([this, generation, seen] { work(generation, seen); }).detach();
  }

  void work(int generation, uint64_t seen) {
    FloatMode mode;
    for (;;) {
      // Who comes too late for a call stays awake for the next.
      for (int spins = 0; call_of(state_.load(std::memory_order_acquire)) == seen && spins < SPINS; ++spins) {
        if (busy_.load(std::memory_order_relaxed)) spins = 0;
        relax();
      }
      if (call_of(state_.load()) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return call_of(state_.load()) != seen; });
        sleeping_.fetch_sub(1);
      }
      // The generation after the call: one that is joined in the state seen here was published to this generation.
      uint64_t state = state_.load();
      if (generation_.load() != generation) return;
      while (!(state & CLOSED) && !state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel))
        if (generation_.load() != generation) return;
      seen = call_of(state);
      if (state & CLOSED) continue;
      Member self(this, int(state & (CLOSED - 1)));
      call_(argument_, self);
      left_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  int size_ = 0, wanted_ = 1, joined_ = 0;
  void (*call_)(void*, Member&) = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
  alignas(64) std::atomic<int> left_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> busy_{false};
  std::atomic<int> generation_{0};
  std::unique_ptr<Counter[]> next_;  // of each phase and thread
};

using Member = Pool::Member;

// Ask for large memory pages under long-lived data, and what follows it in the last of them. KV pages are read in pieces of a few
// kilobytes from all over the pool: with small memory pages each piece would cost a walk of the page table. Where the system
// has none, nothing changes.
inline void huge(void* data, size_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = uintptr_t(2) << 20;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, newer than some headers
  const auto up = [](uintptr_t address) { return (address + PAGE - 1) / PAGE * PAGE; };
  const uintptr_t begin = up((uintptr_t)data), end = up((uintptr_t)data + size);
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);
  madvise((void*)begin, end - begin, COLLAPSE);
#endif
}

}  // namespace tandem
