// The product of float32 activations with a packed weight on a CPU, as a handler of XLA's FFI.
//
//   y[l, m, n] = sum_k x[l, m, k] * q[l, k, n] * scale[l, g(k), n]
//              + sum_g (sum_{k in g} x[l, m, k]) * bias[l, g, n]
//
// q is the value of a stored code: codes of `bits` bits are packed along k, least significant bit
// first, for every column n (see packing.py), and the columns of a row are neighbours in memory.
//
// A weight is read once, front to back, and decoded a tile at a time: up to TILE_ROWS rows that
// share their scales, by TILE_COLUMNS columns, as floats that stay in the first-level cache. The
// tile is then multiplied with a few rows of x at a time, sums in registers. A scale multiplies the
// sums over its rows. Threads share the columns.
//
// Vectors are those of GCC and Clang, on any processor; the lookup in a table of 16 entries alone
// is written for each: `lookup`.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// ---- vectors -----------------------------------------------------------------------------------

// WIDTH floats make a vector. ROWS * VECTORS sums, and what is added to them, fit the registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 6, VECTORS = 4;  // 32 registers
constexpr char ISA[] = "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8, ROWS = 6, VECTORS = 2;  // 16 registers
constexpr char ISA[] = "AVX2";
#elif defined(__aarch64__) && defined(__ARM_NEON)
constexpr int WIDTH = 4, ROWS = 6, VECTORS = 4;  // 32 registers
constexpr char ISA[] = "NEON";
#else
constexpr int WIDTH = 4, ROWS = 3, VECTORS = 4;
constexpr char ISA[] = "portable";
#endif

using Floats = float __attribute__((vector_size(4 * WIDTH)));
using Ints = int32_t __attribute__((vector_size(4 * WIDTH)));

constexpr int64_t TILE_COLUMNS = 64;  // one cache line of bytes
constexpr int64_t TILE_ROWS = 64;
// Rows of bytes that are read side by side for few tokens, when memory is what takes time.
constexpr int64_t STREAMS = 32, FEW_TOKENS = 16;
// A tile begins and ends with whole units of packed codes, of which there are up to 8.
constexpr int64_t TILE_SIZE = (TILE_ROWS + 2 * 8) * TILE_COLUMNS;
static_assert(TILE_COLUMNS % (WIDTH * VECTORS) == 0);

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Returns WIDTH bytes as integers.
inline Ints widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__) && defined(__FMA__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  Ints out;
  for (int i = 0; i < WIDTH; ++i) out[i] = from[i];
  return out;
#endif
}

// The same for signed bytes.
inline Ints widen_signed(const uint8_t* from) { return (widen(from) ^ 0x80) - 0x80; }

// Returns levels[code], codes below 16.
inline Floats lookup(Ints codes, const float* levels) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(levels));
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256i i = (__m256i)codes;
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), i);
  return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
#elif defined(__aarch64__) && defined(__ARM_NEON)
  // The table is 64 bytes, which one instruction looks up by byte.
  const uint8x16x4_t table = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(levels));
  const Ints bytes = codes * 0x04040404 + 0x03020100;
  return (Floats)vqtbl4q_u8(table, (uint8x16_t)bytes);
#else
  Floats out;
  for (int i = 0; i < WIDTH; ++i) out[i] = levels[codes[i]];
  return out;
#endif
}

// ---- codes -------------------------------------------------------------------------------------

enum Kind {
  kInteger,  // a packed code c stands for c + lowest, a byte for itself
  kSigned,   // a byte is a signed integer
  kTable,    // a code c stands for levels[c]
};

struct Codes {
  const uint8_t* data;  // row 0 of the columns of the tile
  int64_t stride;       // bytes from one row to the next
  int32_t lowest;
  const float* levels;
};

template <int BITS>
struct Unit {  // the fewest codes that fill whole bytes
  static constexpr int CODES = 8 / std::gcd(8, BITS), BYTES = BITS * CODES / 8;
};

// Writes the values of rows [first, last) of TILE_COLUMNS columns. Returns where row `first` lies
// in the tile, which begins with a whole unit.
template <int BITS, Kind KIND>
const float* decode(const Codes& codes, int64_t first, int64_t last, float* tile) {
  constexpr int CODES = Unit<BITS>::CODES, BYTES = Unit<BITS>::BYTES;
  const int64_t begin = first / CODES, end = (last + CODES - 1) / CODES;
  float* out = tile;
  for (int64_t u = begin; u < end; ++u, out += CODES * TILE_COLUMNS) {
    const uint8_t* in = codes.data + u * BYTES * codes.stride;
    for (int j = 0; j < BYTES; ++j) {
      __builtin_prefetch(in + j * codes.stride + TILE_COLUMNS);  // the next tile
    }
#pragma GCC unroll 4
    for (int c = 0; c < TILE_COLUMNS; c += WIDTH) {
      if constexpr (BITS == 8 && KIND == kTable) {
        for (int i = 0; i < WIDTH; ++i) out[c + i] = codes.levels[in[c + i]];
      } else if constexpr (KIND == kSigned) {
        store(out + c, __builtin_convertvector(widen_signed(in + c), Floats));
      } else {
        Ints bytes[BYTES];
#pragma GCC unroll 8
        for (int j = 0; j < BYTES; ++j) {
          bytes[j] = widen(in + j * codes.stride + c);
        }
#pragma GCC unroll 8
        for (int i = 0; i < CODES; ++i) {
          const int j = i * BITS / 8, shift = i * BITS % 8;
          Ints code = bytes[j] >> shift;
          if (shift + BITS > 8) code |= bytes[j + 1] << (8 - shift);  // it straddles two bytes
          if (shift + BITS != 8) code &= (1 << BITS) - 1;
          store(out + i * TILE_COLUMNS + c,
                KIND == kTable ? lookup(code, codes.levels)
                               : __builtin_convertvector(code + codes.lowest, Floats));
        }
      }
    }
  }
  return tile + (first - begin * CODES) * TILE_COLUMNS;
}

using Decode = const float* (*)(const Codes&, int64_t, int64_t, float*);

Decode decoder(int64_t bits, Kind kind) {
  if (kind == kSigned) return bits == 8 ? decode<8, kSigned> : nullptr;
  if (kind == kTable) {
    return bits == 4 ? decode<4, kTable> : bits == 8 ? decode<8, kTable> : nullptr;
  }
  constexpr Decode integer[] = {
      decode<1, kInteger>, decode<2, kInteger>, decode<3, kInteger>, decode<4, kInteger>,
      decode<5, kInteger>, decode<6, kInteger>, decode<7, kInteger>, decode<8, kInteger>,
  };
  return 1 <= bits && bits <= 8 ? integer[bits - 1] : nullptr;
}

// ---- products ----------------------------------------------------------------------------------

// A tile's product with R rows of x, which are interleaved: x[k * R + r].
//
// Adds scale * (x @ tile) + sums * bias to y, or writes it there if `is_first`.
template <int R>
void multiply(const float* x, const float* tile, int64_t n_rows, const float* scale,
              const float* bias, const float* sums, float* y, int64_t stride, bool is_first) {
  for (int part = 0; part < TILE_COLUMNS; part += WIDTH * VECTORS) {
    Floats total[R][VECTORS] = {};
    for (int64_t k = 0; k < n_rows; ++k) {
      const float* w = tile + k * TILE_COLUMNS + part;
      Floats row[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) row[v] = load<Floats>(w + v * WIDTH);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) total[r][v] += x[k * R + r] * row[v];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t c = part + v * WIDTH;
        Floats out = total[r][v] * load<Floats>(scale + c);
        if (bias != nullptr) out += sums[r] * load<Floats>(bias + c);
        float* to = y + r * stride + c;
        if (!is_first) out += load<Floats>(to);
        store(to, out);
      }
    }
  }
}

using Multiply = void (*)(const float*, const float*, int64_t, const float*, const float*,
                          const float*, float*, int64_t, bool);

Multiply multiplier(int64_t rows) {
  constexpr Multiply all[] = {multiply<1>, multiply<2>, multiply<3>,
                              multiply<4>, multiply<5>, multiply<6>};
  static_assert(ROWS <= 6);
  return all[rows - 1];
}

// Rows of one group that are decoded together.
struct Segment {
  int64_t first, last, group;
};

std::vector<Segment> segments(int64_t K, int64_t group_size, int64_t n_rows) {
  std::vector<Segment> out;
  for (int64_t k = 0; k < K;) {
    const int64_t group = k / group_size;
    const int64_t last = std::min({k + n_rows, (group + 1) * group_size, K});
    out.push_back({k, last, group});
    k = last;
  }
  return out;
}

struct Product {
  int64_t L, M, K, N, B, G;  // leading axes in one, tokens, in, out, packed rows, groups
  Decode decode;
  int32_t lowest;
  const float* levels;
  std::vector<Segment> segments;
  const uint8_t* data;  // [L, B, N]
  const float* scale;   // [L, G, N]
  const float* bias;    // [L, G, N] or null
  float* y;             // [L, M, N]

  // x [L, M, K] as blocks of rows, each interleaved, one after the other; and its sums over
  // segments [L, segments, M], if there is a bias.
  std::vector<int64_t> blocks;  // where each begins, and M
  std::unique_ptr<float[]> x, sums;

  // Rows of x are shared out evenly: 8 are 4 and 4, not 6 and 2.
  bool arrange(const float* from) {
    const int64_t n_blocks = (M + ROWS - 1) / ROWS;
    for (int64_t b = 0; b <= n_blocks; ++b) blocks.push_back(b * M / n_blocks);
    x.reset(new (std::nothrow) float[L * M * K]);
    if (x == nullptr) return false;
    for (int64_t l = 0; l < L; ++l) {
      for (int64_t b = 0; b < n_blocks; ++b) {
        const int64_t first = blocks[b], n_rows = blocks[b + 1] - first;
        const float* in = from + (l * M + first) * K;
        float* out = x.get() + (l * M + first) * K;
        for (int64_t k = 0; k < K; ++k) {
          for (int64_t r = 0; r < n_rows; ++r) *out++ = in[r * K + k];
        }
      }
    }
    if (bias == nullptr) return true;
    sums.reset(new (std::nothrow) float[L * M * segments.size()]);
    if (sums == nullptr) return false;
    float* sum = sums.get();
    for (int64_t l = 0; l < L; ++l) {
      for (const Segment& s : segments) {
        for (int64_t m = 0; m < M; ++m, ++sum) {
          const float* row = from + (l * M + m) * K;
          *sum = std::accumulate(row + s.first, row + s.last, 0.0f);
        }
      }
    }
    return true;
  }

  // Computes columns [begin, end) of y[l].
  void run(int64_t l, int64_t begin, int64_t end) const {
    alignas(64) float tile[TILE_SIZE];
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& s = segments[i];
      const float* sum = bias == nullptr ? nullptr : &sums[(l * segments.size() + i) * M];
      for (int64_t n = begin; n < end; n += TILE_COLUMNS) {
        if (end - n >= TILE_COLUMNS) {
          const int64_t at = (l * G + s.group) * N + n;
          const Codes codes{data + l * B * N + n, N, lowest, levels};
          multiply_all(l, s, decode(codes, s.first, s.last, tile), scale + at,
                       bias == nullptr ? nullptr : bias + at, sum, y + l * M * N + n, N, i == 0);
        } else {
          last_columns(l, s, n, sum, tile, i == 0);
        }
      }
    }
  }

  void multiply_all(int64_t l, const Segment& s, const float* w, const float* scale,
                    const float* bias, const float* sum, float* y, int64_t stride,
                    bool is_first) const {
    for (size_t b = 0; b + 1 < blocks.size(); ++b) {
      const int64_t m = blocks[b], n_rows = blocks[b + 1] - m;
      multiplier(n_rows)(x.get() + (l * M + m) * K + s.first * n_rows, w, s.last - s.first, scale,
                         bias, sum == nullptr ? nullptr : sum + m, y + m * stride, stride,
                         is_first);
    }
  }

  // As `run` for fewer columns than a tile has: on copies, since what lies behind is not ours.
  void last_columns(int64_t l, const Segment& s, int64_t n, const float* sum, float* tile,
                    bool is_first) const {
    const int64_t n_columns = N - n;
    const auto copy = [&](const float* from, float* to) {
      std::fill(std::copy_n(from, n_columns, to), to + TILE_COLUMNS, 0.0f);
    };
    // Packed rows of the segment, a unit more at either end: at most a byte a code.
    uint8_t bytes[TILE_SIZE] = {};
    const int64_t unit = K_unit, unit_bytes = B_unit;
    const int64_t from = s.first / unit, to = (s.last + unit - 1) / unit;
    for (int64_t b = from * unit_bytes; b < to * unit_bytes; ++b) {
      std::memcpy(bytes + (b - from * unit_bytes) * TILE_COLUMNS, data + (l * B + b) * N + n,
                  n_columns);
    }
    float scales[TILE_COLUMNS], biases[TILE_COLUMNS], out[ROWS * TILE_COLUMNS];
    const int64_t at = (l * G + s.group) * N + n;
    copy(scale + at, scales);
    if (bias != nullptr) copy(bias + at, biases);
    const Codes codes{bytes, TILE_COLUMNS, lowest, levels};
    const float* w = decode(codes, s.first - from * unit, s.last - from * unit, tile);
    for (size_t b = 0; b + 1 < blocks.size(); ++b) {
      const int64_t m = blocks[b], n_rows = blocks[b + 1] - m;
      multiplier(n_rows)(x.get() + (l * M + m) * K + s.first * n_rows, w, s.last - s.first, scales,
                         bias == nullptr ? nullptr : biases, sum == nullptr ? nullptr : sum + m,
                         out, TILE_COLUMNS, true);
      for (int64_t r = 0; r < n_rows; ++r) {
        float* row = y + (l * M + m + r) * N + n;
        for (int64_t c = 0; c < n_columns; ++c) {
          const float value = out[r * TILE_COLUMNS + c];
          row[c] = is_first ? value : row[c] + value;
        }
      }
    }
  }

  int64_t K_unit, B_unit;  // codes of a unit, bytes of a unit
};

// ---- threads -----------------------------------------------------------------------------------

// Runs run(0), ..., run(n - 1) on this thread and on those of the pool that are free.
//
// This thread waits only for tasks that another one is running, never for one to start: it may be
// one of the pool itself.
template <class Run>
void parallel(ffi::ThreadPool& pool, int64_t n, const Run& run) {
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable is_done;
    int64_t done = 0;
  };
  const auto state = std::make_shared<State>();  // outlives this call: a helper may start late
  const auto work = [state, n, run = &run] {
    int64_t mine = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < n; ++mine) (*run)(i);
    if (mine == 0) return;
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->done += mine;
    if (state->done == n) state->is_done.notify_one();
  };
  const int64_t helpers = std::min(n, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::decay_t<decltype(work)>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->is_done.wait(lock, [&] { return state->done == n; });
}

// Multiplications below which another thread costs more than it brings.
constexpr int64_t WORK = 1 << 18;

ffi::Error packed_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer data,
                         ffi::Buffer<ffi::F32> scale, ffi::RemainingArgs rest,
                         ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group_size,
                         int64_t lowest, ffi::Span<const float> levels) {
  const auto xs = x.dimensions(), ds = data.dimensions(), ss = scale.dimensions();
  if (xs.size() != 3 || ds.size() != 3 || ss.size() != 3) {
    return ffi::Error::InvalidArgument("x, data and scale must have 3 axes");
  }
  const bool is_signed = data.element_type() == ffi::S8;
  const Kind kind = levels.size() ? kTable : is_signed ? kSigned : kInteger;
  Product p;
  p.L = xs[0], p.M = xs[1], p.K = xs[2], p.N = ds[2], p.B = ds[1], p.G = ss[1];
  p.decode = decoder(bits, kind);
  if (p.decode == nullptr || (kind == kTable && levels.size() != size_t{1} << bits)) {
    return ffi::Error::InvalidArgument("no such codes");
  }
  p.lowest = static_cast<int32_t>(lowest);
  p.levels = levels.begin();
  p.segments = segments(p.K, group_size, bits == 8 && p.M <= FEW_TOKENS ? STREAMS : TILE_ROWS);
  p.data = static_cast<const uint8_t*>(data.untyped_data());
  p.scale = scale.typed_data();
  p.bias = nullptr;
  if (rest.size()) {
    const auto bias = rest.get<ffi::Buffer<ffi::F32>>(0);
    if (!bias.has_value()) return bias.error();
    p.bias = bias->typed_data();
  }
  p.y = y->typed_data();
  p.K_unit = 8 / std::gcd(int64_t{8}, bits), p.B_unit = bits * p.K_unit / 8;
  if (!p.arrange(x.typed_data())) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations");
  }
  // Two parts of the columns for every thread, as threads are not equally fast. More would cut the
  // runs of memory that a thread reads.
  const int64_t tiles = (p.N + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t work = p.K * p.N * (p.M + 2);
  const int64_t wanted = std::min(2 * pool.num_threads(), work / WORK);
  const int64_t parts = std::max(int64_t{1}, std::min(tiles, wanted));
  parallel(pool, p.L * parts, [&](int64_t i) {
    const int64_t l = i / parts, part = i % parts;
    const int64_t begin = part * tiles / parts, end = (part + 1) * tiles / parts;
    p.run(l, begin * TILE_COLUMNS, std::min(end * TILE_COLUMNS, p.N));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_packed_matmul, packed_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()  // x [L, M, K]
                                  .Arg<ffi::AnyBuffer>()         // data [L, B, N]
                                  .Arg<ffi::Buffer<ffi::F32>>()  // scale [L, G, N]
                                  .RemainingArgs()               // bias [L, G, N], if any
                                  .Ret<ffi::Buffer<ffi::F32>>()  // y [L, M, N]
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("lowest")
                                  .Attr<ffi::Span<const float>>("levels"));

// The instruction set that it was compiled for.
extern "C" const char* qjax_isa() { return ISA; }
