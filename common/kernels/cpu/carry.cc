// Pages of a pool into memory where they lie side by side, and back; and checksums of what lies there.
//
// A page has a piece in each of many rows. Whole lines are stored past the caches: an ordinary store has what it overwrites read
// first, for a cache in which nobody will look for it. While a piece is copied the next one is fetched, which lies far from it.
//
// A checksum is XXH3 with 64 bits and no seed, of more than 240 bytes (Yann Collet, doc/xxhash_spec.md of github.com/Cyan4973/xxHash).

#include <algorithm>

#include "pool.h"

namespace tandem {

constexpr size_t LINE = 64;        // bytes of a cache line, and of what XXH3 takes at once
constexpr size_t AHEAD = 2048;     // bytes after which what lies side by side is fetched
constexpr size_t ALONE = 1 << 20;  // bytes below which nobody is woken to help
using Words = uint64_t __attribute__((vector_size(LINE)));

TANDEM_INLINE Words words_at(const void* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// Of the sum of all that is added, line by line, and of a last one, which may have bytes of the one before again.
class Sum {
 public:
  // f(i, line) is called with each line. Those at `next` are fetched: they are added next.
  template <class F>
  TANDEM_INLINE void add(const char* from, size_t lines, const char* next, F&& f) {
    for (size_t i = 0; i < lines;) {
      for (; i < lines && at_ < LINES; ++i, ++at_) {
        const Words line = words_at(from + i * LINE);
        prefetch(next + i * LINE);
        f(i, line);
        step(line, SECRET + 8 * at_);
      }
      if (at_ == LINES) scramble();
    }
  }

  // Of so many bytes, the last LINE of which are at `last`.
  uint64_t end(const char* last, size_t bytes) {
    step(words_at(last), SECRET + sizeof SECRET - LINE - 7);
    mix();
    uint64_t sum = bytes * PRIME64_1;
    for (int i = 0; i < 8; i += 2) {
      uint64_t secret[2];
      std::memcpy(secret, SECRET + 11 + 8 * i, sizeof secret);
      const auto product = (unsigned __int128)(sums_[i] ^ secret[0]) * (sums_[i + 1] ^ secret[1]);
      sum += uint64_t(product) ^ uint64_t(product >> 64);
    }
    sum = (sum ^ sum >> 37) * 0x165667919E3779F9;
    return sum ^ sum >> 32;
  }

 private:
  static constexpr size_t LINES = 16;  // of a block
  static constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
  static constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9,
                            PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;
  static constexpr unsigned char SECRET[192] = {
      0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
      0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
      0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
      0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
      0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
      0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
      0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
      0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
      0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
      0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

  TANDEM_INLINE void step(const Words& line, const unsigned char* secret) {
    const Words keyed = line ^ words_at(secret);
    sums_ += (keyed & 0xffffffff) * (keyed >> 32);
    plain_ += line;
  }

  // Each word as it is counts for its neighbour.
  TANDEM_INLINE void mix() {
    const Words& p = plain_;
    sums_ += Words{p[1], p[0], p[3], p[2], p[5], p[4], p[7], p[6]};
    plain_ = Words{};
  }

  TANDEM_INLINE void scramble() {
    mix();
    sums_ = (sums_ ^ sums_ >> 47 ^ words_at(SECRET + sizeof SECRET - LINE)) * PRIME32_1;
    at_ = 0;
  }

  Words sums_ = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1}, plain_ = {};
  size_t at_ = 0;  // in a block
};

// To a whole line, past the caches.
TANDEM_INLINE void stream(char* to, const Words& line) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)line);
#elif defined(__SSE2__)
  for (size_t at = 0; at < LINE; at += 16) {
    __m128i part;
    std::memcpy(&part, (const char*)&line + at, sizeof part);
    _mm_stream_si128((__m128i*)(to + at), part);
  }
#else
  std::memcpy(to, &line, sizeof line);
#endif
}

// What was streamed is there for whoever is told of it afterwards.
TANDEM_INLINE void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

TANDEM_INLINE bool whole_lines(const void* at, size_t bytes) { return ((uintptr_t)at | bytes) % LINE == 0; }

uint64_t sum_of(const char* from, size_t bytes) {
  Sum sum;
  sum.add(from, (bytes - 1) / LINE, from + AHEAD, [](size_t, const Words&) {});
  return sum.end(from + bytes - LINE, bytes);
}

// Keys, or values: pages in rows, and the memory they are copied to or from.
struct Part {
  char* const* rows;  // [num_rows]: page 0 of each; the next page is `bytes` behind it
  size_t num_rows, bytes;
  char* there;     // [pages][num_rows][bytes]
  uint64_t* sums;  // [pages]; none where a page has no more than 240 bytes

  size_t page_bytes() const { return num_rows * bytes; }
  char* piece(size_t row, int64_t page) const { return rows[row] + page * bytes; }
  char* page(size_t i) const { return there + i * page_bytes(); }
};

// A page, whose pieces are whole lines. `next` is the page after it. Returns the checksum.
uint64_t gather_lines(const Part& part, int64_t page, int64_t next, char* there) {
  Sum sum;
  const size_t last = part.num_rows - 1, lines = part.bytes / LINE;
  for (size_t row = 0; row <= last; ++row, there += part.bytes) {
    const char* const ahead = row < last ? part.piece(row + 1, page) : part.piece(0, next);
    const size_t some = row < last ? lines : lines - 1;
    sum.add(part.piece(row, page), some, ahead, [&](size_t i, const Words& line) { stream(there + i * LINE, line); });
  }
  const char* const end = part.piece(last, page) + part.bytes - LINE;
  stream(there - LINE, words_at(end));
  return sum.end(end, part.page_bytes());
}

void copy(char* to, const char* from, size_t bytes) {
  if (!whole_lines(to, bytes)) std::memcpy(to, from, bytes);
  else for (size_t at = 0; at < bytes; at += LINE) stream(to + at, words_at(from + at));
}

// f(i) for each i in [0, n), of `bytes` bytes each; of many by two threads, for one alone waits for memory most of the time.
template <class F>
void share(size_t n, size_t bytes, F&& f) {
  if (n * bytes < ALONE) {
    for (size_t i = 0; i < n; ++i) f(i);
    return settle();
  }
  Pool& pool = Pool::get();
  pool.resize(2);
  pool.run([&](Member& member) {
    member.share(int(n), f);
    settle();
  });
}

}  // namespace tandem

using namespace tandem;

#define TANDEM_EXPORT extern "C" __attribute__((visibility("default")))

// All parts have the same pages, each of them another one.
TANDEM_EXPORT void tandem_gather(const Part* parts, size_t num_parts, const int64_t* pages, size_t num_pages) {
  share(num_parts * num_pages, parts->page_bytes(), [&](size_t at) {
    const Part& part = parts[at / num_pages];
    const size_t i = at % num_pages;
    char* const page = part.page(i);
    if (part.sums && whole_lines(page, part.bytes)) {
      part.sums[i] = gather_lines(part, pages[i], pages[std::min(i + 1, num_pages - 1)], page);
      return;
    }
    for (size_t row = 0; row < part.num_rows; ++row)
      std::memcpy(page + row * part.bytes, part.piece(row, pages[i]), part.bytes);
    if (part.sums) part.sums[i] = sum_of(page, part.page_bytes());
  });
}

// The inverse, without sums.
TANDEM_EXPORT void tandem_scatter(const Part* parts, size_t num_parts, const int64_t* pages, size_t num_pages) {
  share(num_parts * num_pages, parts->page_bytes(), [&](size_t at) {
    const Part& part = parts[at / num_pages];
    const size_t i = at % num_pages;
    for (size_t row = 0; row < part.num_rows; ++row)
      copy(part.piece(row, pages[i]), part.page(i) + row * part.bytes, part.bytes);
  });
}

// Of pieces of more than 240 bytes.
TANDEM_EXPORT void tandem_sums(const char* const* pieces, const int64_t* bytes, size_t count, uint64_t* sums) {
  if (count) share(count, *bytes, [&](size_t i) { sums[i] = sum_of(pieces[i], bytes[i]); });
}
