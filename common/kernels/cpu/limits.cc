// How fast can memory be read? Each kernel here reads a whole buffer once, with several threads, and nothing else. None is best
// on every machine, so the caller runs them all and keeps the best (McCalpin 1995, STREAM, for the idea of a machine's limit).

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
typedef uint64_t Vector __attribute__((vector_size(64)));  // the compiler splits it where registers are smaller

constexpr size_t kLine = 64;                     // bytes of a cache line, and of a Vector
constexpr size_t kAccumulators = 8;              // independent additions, more than their latency in cycles
constexpr size_t kStep = kAccumulators * kLine;  // bytes of one turn of the loop

// The sum of all words of `bytes` bytes, a multiple of kStep, read as kStreams sequences side by side. With kAhead, the lines
// that many bytes ahead are asked for before they are needed.
template <size_t kStreams, size_t kAhead>
uint64_t Sum(const char* data, size_t bytes) {
  constexpr size_t kLines = kAccumulators / kStreams;  // of each stream in a turn
  const size_t stride = bytes / kStep * kLines * kLine;
  Vector sums[kAccumulators] = {};
  for (size_t at = 0; at < stride; at += kLines * kLine) {
    for (size_t stream = 0; stream < kStreams; ++stream) {
      const char* here = data + stream * stride + at;
      for (size_t line = 0; line < kLines; ++line) {
        if (kAhead > 0) __builtin_prefetch(here + kAhead + line * kLine, 0, 0);  // past the end it does no harm
        sums[stream * kLines + line] += *reinterpret_cast<const Vector*>(here + line * kLine);
      }
    }
  }
  uint64_t sum = 0;
  for (const Vector& part : sums) {
    for (size_t i = 0; i < kLine / sizeof(uint64_t); ++i) sum += part[i];
  }
  return sum;
}

// Call work(begin, size, thread) on a part of `bytes` in each thread. Returns the seconds from the first's begin to the last's
// end; all begin when all are there.
template <typename Work>
double Share(size_t bytes, int threads, const Work& work) {
  const size_t steps = bytes / kStep;
  std::atomic<int> ready{0};
  std::vector<Clock::time_point> begun(threads), ended(threads);
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread) {
    team.emplace_back([&, thread] {
      const size_t begin = steps * thread / threads * kStep, end = steps * (thread + 1) / threads * kStep;
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      begun[thread] = Clock::now();
      work(begin, end - begin, thread);
      ended[thread] = Clock::now();
    });
  }
  for (std::thread& member : team) member.join();
  const auto first = *std::min_element(begun.begin(), begun.end()), last = *std::max_element(ended.begin(), ended.end());
  return std::chrono::duration<double>(last - first).count();
}

template <size_t kStreams, size_t kAhead>
double Read(const char* data, size_t bytes, int threads, uint64_t* sum) {
  std::vector<uint64_t> sums(threads);
  const double seconds = Share(bytes, threads, [&](size_t begin, size_t size, int thread) {
    sums[thread] = Sum<kStreams, kAhead>(data + begin, size);
  });
  *sum = 0;
  for (uint64_t part : sums) *sum += part;
  return seconds;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// data[bytes], aligned to 64, bytes a multiple of 512; `*sum` becomes the sum of its 64-bit words. Returns seconds.
EXPORT double read_plain(const char* data, size_t bytes, int threads, uint64_t* sum) {
  return Read<1, 0>(data, bytes, threads, sum);
}
EXPORT double read_prefetch(const char* data, size_t bytes, int threads, uint64_t* sum) {
  return Read<1, 4096>(data, bytes, threads, sum);
}
EXPORT double read_streams(const char* data, size_t bytes, int threads, uint64_t* sum) {
  return Read<4, 0>(data, bytes, threads, sum);
}
EXPORT double read_streams_prefetch(const char* data, size_t bytes, int threads, uint64_t* sum) {
  return Read<4, 2048>(data, bytes, threads, sum);
}

// Writes every word, each by the thread that will read it: on a machine of several memories, a page lies where it is written
// first. Words count up, so that no page is all zeros, which a system may keep only once.
EXPORT void fill(char* data, size_t bytes, int threads) {
  Share(bytes, threads, [&](size_t begin, size_t size, int) {
    uint64_t* words = reinterpret_cast<uint64_t*>(data + begin);
    for (size_t i = 0; i < size / sizeof(uint64_t); ++i) words[i] = begin + i;
  });
}
