// A step of decoding on a CPU at the speed of memory: products with packed weights, the attention
// of a cache, and both halves of a block as one call each. native.py compiles this where there is
// a compiler, and says what each call computes; without it XLA does the same.
//
// R rows, K fan-in, N fan-out; B batch, T tokens, D model, F hidden, H heads, G kv heads, S slots,
// C head width.

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if !defined(__AVX512BF16__) || !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "this processor has no AVX-512 products of bfloat16 and int8"
#endif

namespace ffi = xla::ffi;

namespace {

// ---------------------------------------------------------------------------- threads

// A product of a small model takes 40 microseconds, and waking a thread nearly as long. So the
// helpers watch for the next call for a while before they sleep.
class Pool {
 public:
  static Pool& Get() {
    static Pool* pool = new Pool;  // its threads run until the process ends
    return *pool;
  }

  // Calls f(0) ... f(tasks - 1), here and in the helpers. Where two calls meet, the second is
  // done by its caller alone.
  //
  // `next(i)` is where thread i will probably begin to read in the call after this one: whoever
  // has no task left asks memory for it.
  template <class F>
  void Run(int64_t tasks, const F& f) {
    Run(tasks, f, [](int64_t) -> const char* { return nullptr; });
  }

  template <class F, class Next>
  void Run(int64_t tasks, const F& f, const Next& next) {
    if (tasks < 2 || tasks > kMask || helpers_ == 0) return Alone(tasks, f);
    std::unique_lock<std::mutex> alone(mutex_, std::try_to_lock);
    if (!alone) return Alone(tasks, f);
    call_ = [](const void* of, int64_t i) { (*static_cast<const F*>(of))(i); };
    of_ = &f;
    done_.store(0, std::memory_order_relaxed);
    for (int64_t i = 0; i <= helpers_; ++i) {
      uint64_t first = First(tasks, i), end = First(tasks, i + 1);
      ranges_[i].next.store(next(i), std::memory_order_relaxed);
      ranges_[i].ticket.store(end << kBits | first, std::memory_order_release);
    }
    news_.fetch_add(1, std::memory_order_acq_rel);
    news_.notify_all();
    Take(0);
    if (const char* at = ranges_[0].next.load(std::memory_order_relaxed)) {
      for (const char* end = at + kFirst; at < end; at += 64) _mm_prefetch(at, _MM_HINT_T1);
    }
    while (done_.load(std::memory_order_acquire) < tasks) _mm_pause();
  }

  // The first task of thread i.
  int64_t First(int64_t tasks, int64_t i) const { return tasks * i / (helpers_ + 1); }

 private:
  static constexpr int kBits = 24;
  static constexpr int64_t kMask = (1 << kBits) - 1;
  static constexpr int kSpins = 20000;
  static constexpr int64_t kFirst = 8192;  // bytes that the caller asks for, who has more to do
  static constexpr int64_t kMost = 524288;  // a helper: a quarter of its second cache

  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
    std::atomic<const char*> next{nullptr};
  };

  Pool() {
    cpu_set_t set;
    helpers_ = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) - 1 : 0;
    ranges_ = std::vector<Range>(helpers_ + 1);
    for (int i = 1; i <= helpers_; ++i) std::thread([this, i] { Help(i); }).detach();
  }

  template <class F>
  static void Alone(int64_t tasks, const F& f) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
  }

  // Each thread has a range of tasks, so that it reads one long stretch of memory; then it helps
  // with the others' ranges. One number holds a range's next task and its end, so that whoever
  // comes late takes none, or one of the call that is now running: that call cannot end before
  // it is done.
  void Take(int64_t me) {
    for (int64_t i = 0; i <= helpers_; ++i) {
      std::atomic<uint64_t>& next = ranges_[(me + i) % (helpers_ + 1)].ticket;
      for (;;) {
        uint64_t ticket = next.fetch_add(1, std::memory_order_acq_rel);
        int64_t task = ticket & kMask, end = ticket >> kBits;
        if (task >= end) break;
        call_(of_, task);
        done_.fetch_add(1, std::memory_order_acq_rel);
      }
    }
  }

  void Help(int64_t me) {
    const char *at = nullptr, *end = nullptr;
    for (uint32_t seen = 0;;) {
      for (int spins = 0; news_.load(std::memory_order_acquire) == seen;) {
        if (at < end) {
          _mm_prefetch(at, _MM_HINT_T1);
          at += 64;
        } else if (++spins < kSpins) {
          _mm_pause();
        } else {
          news_.wait(seen);
        }
      }
      seen = news_.load(std::memory_order_acquire);
      Take(me);
      if ((at = ranges_[me].next.load(std::memory_order_relaxed))) end = at + kMost;
    }
  }

  std::mutex mutex_;
  int64_t helpers_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* of_ = nullptr;
  std::vector<Range> ranges_;
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> news_{0};
};

// ---------------------------------------------------------------------------- products

// Weights come as (N / 48, K / e, 48, e), e entries in four bytes: a register holds e entries of
// each of 16 outputs, memory is read from one end to the other, and no sum crosses a register.
// x goes by e entries to all lanes: in bfloat16 as two of float32, since the instruction that
// multiplies bfloat16 can be four times as slow (2.2 cycles measured) as two of float32's.

constexpr int kTiles = 3;  // by 8 rows: 24 sums, as many as there are registers for
constexpr int64_t kAhead = 8192;  // bytes that are asked of memory before they are needed
constexpr int64_t kNear = 1536;   // the same of a cache, for what was just read
constexpr int64_t kTaskBytes = 65536;  // of weights: long enough a stretch of memory

// The first `count` of 16 lanes.
__mmask16 Mask(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

// Numbers as they are kept, bfloat16 by its bits, to float32 and back.
__m512 Load(const float* from) { return _mm512_loadu_ps(from); }

__m512 Load(const uint16_t* from) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

__m512 Load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

__m512 Load(const uint16_t* from, __mmask16 mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

void Store(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }

void Store(uint16_t* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// x as it comes back from where an X is kept.
template <class X>
__m512 Rounded(__m512 x) {
  if constexpr (sizeof(X) == 4) {
    return x;
  } else {
    __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
}

template <class X>
void Widen(const X* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_mask_storeu_ps(to + i, Mask(count - i), Load(from + i, Mask(count - i)));
  }
}

// kTimes: words of x for each word of w.
struct Float32 {
  using Sum = __m512;
  static constexpr int kTimes = 1;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static __m512i Entry(__m512i w, int) { return w; }
  static Sum Add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(x)), _mm512_castsi512_ps(w), sum);
  }
};

struct Bfloat16 : Float32 {
  static constexpr int kTimes = 2;
  static __m512i Entry(__m512i w, int i) {
    return i == 0 ? _mm512_slli_epi32(w, 16) : _mm512_and_si512(w, _mm512_set1_epi32(0xffff0000));
  }
};

struct Int8 {  // the instruction takes unsigned by signed: weights come with 128 added
  using Sum = __m512i;
  static constexpr int kTimes = 1;
  static Sum Zero() { return _mm512_setzero_si512(); }
  static __m512i Entry(__m512i w, int) { return w; }
  static Sum Add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
};

// R rows by 48 outputs, k words each. `kAgain`: other rows have just read these weights.
template <class Type, int R, bool kAgain = false, class Out>
inline void Block(const uint32_t* x, const __m512i* w, int64_t k, const Out& out) {
  typename Type::Sum sum[R][kTiles];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) sum[r][t] = Type::Zero();
  }
  for (int64_t i = 0; i < k; ++i, w += kTiles) {
    for (int t = 0; t < kTiles; ++t) {
      const char* here = reinterpret_cast<const char*>(w + t);
      if constexpr (kAgain) {
        _mm_prefetch(here + kNear, _MM_HINT_T0);
      } else {
        _mm_prefetch(here + kAhead, _MM_HINT_T1);
      }
    }
#pragma GCC unroll 2
    for (int e = 0; e < Type::kTimes; ++e) {
      __m512i tile[kTiles];
      for (int t = 0; t < kTiles; ++t) tile[t] = Type::Entry(_mm512_loadu_si512(w + t), e);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        uint32_t of = x[(r * k + i) * Type::kTimes + e];
#pragma GCC unroll 8
        for (int t = 0; t < kTiles; ++t) sum[r][t] = Type::Add(sum[r][t], of, tile[t]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) out(r, t, sum[r][t]);
  }
}

template <class Type, class Out>
void Rows(const uint32_t* x, const __m512i* w, int64_t k, int64_t rows, const Out& out) {
  int64_t first = 0;
  auto some = [&](int r, int t, typename Type::Sum sum) { out(first + r, t, sum); };
  const int64_t apart = k * Type::kTimes;
  if (rows >= 8) {
    Block<Type, 8>(x, w, k, some);
    first = 8;
  }
  for (; first + 8 <= rows; first += 8) Block<Type, 8, true>(x + first * apart, w, k, some);
  x += first * apart;
  switch (rows - first) {
    case 7: return Block<Type, 7>(x, w, k, some);
    case 6: return Block<Type, 6>(x, w, k, some);
    case 5: return Block<Type, 5>(x, w, k, some);
    case 4: return Block<Type, 4>(x, w, k, some);
    case 3: return Block<Type, 3>(x, w, k, some);
    case 2: return Block<Type, 2>(x, w, k, some);
    case 1: return Block<Type, 1>(x, w, k, some);
  }
}

// A packed weight (N, K); with it a factor for each output in int8, and perhaps a bias.
struct Weight {
  const void* w;
  int64_t groups, words, n;
  const float* factor = nullptr;
  const float* bias = nullptr;

  const __m512i* group(int64_t i) const {
    return static_cast<const __m512i*>(w) + i * kTiles * words;
  }
  int64_t of_task() const { return std::max<int64_t>(1, kTaskBytes / (kTiles * 64 * words)); }
  int64_t tasks() const { return (groups + of_task() - 1) / of_task(); }
};

// The weight that was read after this one the last time: in decoding it is again. A guess that is
// wrong costs a little of memory's time, and an address that is gone is not read.
const Weight* ReadAfter(const Weight& weight) {
  static thread_local std::unordered_map<const void*, Weight> after;
  static thread_local const void* last = nullptr;
  if (after.size() > 10000) after.clear();
  after[last] = weight;
  last = weight.w;
  auto found = after.find(weight.w);
  return found == after.end() ? nullptr : &found->second;
}

// out(row, tile, sum) gets every sum of 16 outputs.
template <class Type, class Out>
void Sums(const void* x, const Weight& weight, int64_t rows, const Out& out) {
  int64_t each = weight.of_task(), k = weight.words;
  Pool& pool = Pool::Get();
  const Weight* after = ReadAfter(weight);
  auto next = [&](int64_t i) -> const char* {
    if (after == nullptr) return nullptr;
    return reinterpret_cast<const char*>(after->group(pool.First(after->tasks(), i) * after->of_task()));
  };
  auto task = [&](int64_t task) {
    for (int64_t g = task * each; g < std::min(weight.groups, (task + 1) * each); ++g) {
      auto some = [&](int64_t r, int t, typename Type::Sum sum) { out(r, g * kTiles + t, sum); };
      Rows<Type>(static_cast<const uint32_t*>(x), weight.group(g), k, rows, some);
    }
  };
  pool.Run(weight.tasks(), task, next);
}

// What is used again by the next call: no memory is asked for at each token.
template <class T>
T* Scratch(std::vector<T>& of, int64_t count) {
  if (int64_t(of.size()) < count) of.resize(count);
  return of.data();
}

// Rows in int8: each by its largest entry, as decoding.quantise does it.
struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> of_row;
  std::vector<int32_t> shift;

  template <class X>
  void Set(const X* x, int64_t rows, int64_t k) {
    q.resize(rows * k);
    of_row.resize(rows);
    shift.resize(rows);
    Pool::Get().Run(rows, [&](int64_t r) {
      const X* from = x + r * k;
      __m512 most = _mm512_setzero_ps();
      for (int64_t i = 0; i < k; i += 16) {
        most = _mm512_max_ps(most, _mm512_abs_ps(Load(from + i, Mask(k - i))));
      }
      float largest = _mm512_reduce_max_ps(most);
      of_row[r] = (largest > 0 ? largest : 1.0f) / 127.0f;
      __m512 by = _mm512_set1_ps(of_row[r]);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < k; i += 16) {
        __mmask16 mask = Mask(k - i);
        __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(Load(from + i, mask), by));
        sum = _mm512_add_epi32(sum, whole);
        _mm512_mask_cvtepi32_storeu_epi8(q.data() + r * k + i, mask, whole);
      }
      shift[r] = 128 * _mm512_reduce_add_epi32(sum);
    });
  }
};

// out(row, tile, mask, y) gets every 16 outputs of x w + bias, in float32, rounded as an X.
template <class Type, class X, class Out>
void Product(const X* x, const Weight& weight, int64_t rows, const Out& out) {
  auto finish = [&](int64_t r, int64_t tile, __m512 y) {
    __mmask16 mask = Mask(weight.n - tile * 16);
    if (weight.bias != nullptr) {
      y = _mm512_add_ps(Rounded<X>(y), Rounded<X>(Load(weight.bias + tile * 16, mask)));
    }
    out(r, tile, mask, Rounded<X>(y));
  };
  if constexpr (std::is_same_v<Type, Int8>) {
    static thread_local Quantised made;
    Quantised& of = made;  // this thread's: the helpers have their own
    of.Set(x, rows, weight.words * 4);
    auto scale = [&](int64_t r, int64_t tile, __m512i sum) {
      __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(of.shift[r])));
      __m512 scaled = _mm512_mul_ps(whole, _mm512_set1_ps(of.of_row[r]));
      __m512 columns = Load(weight.factor + tile * 16, Mask(weight.n - tile * 16));
      finish(r, tile, _mm512_mul_ps(scaled, columns));
    };
    Sums<Int8>(of.q.data(), weight, rows, scale);
  } else if constexpr (std::is_same_v<Type, Bfloat16>) {
    static thread_local std::vector<float> made;
    int64_t k = weight.words * 2;
    float* wide = Scratch(made, rows * k);
    Pool::Get().Run(rows, [&](int64_t r) { Widen(x + r * k, k, wide + r * k); });
    Sums<Type>(wide, weight, rows, finish);
  } else {
    Sums<Type>(x, weight, rows, finish);
  }
}

template <class Type, class X>
void ProductInto(const X* x, const Weight& weight, int64_t rows, X* y) {
  Product<Type>(x, weight, rows, [&](int64_t r, int64_t tile, __mmask16 mask, __m512 sum) {
    Store(y + r * weight.n + tile * 16, mask, sum);
  });
}

// y = residual + x w
template <class Type, class X>
void ProductOnto(const X* residual, const X* x, const Weight& weight, int64_t rows, X* y) {
  Product<Type>(x, weight, rows, [&](int64_t r, int64_t tile, __mmask16 mask, __m512 sum) {
    int64_t at = r * weight.n + tile * 16;
    Store(y + at, mask, _mm512_add_ps(Load(residual + at, mask), sum));
  });
}

// A buffer of no entries says that there is none.
const float* Optional(const ffi::AnyBuffer& of) {
  return of.element_count() == 0 ? nullptr : static_cast<const float*>(of.untyped_data());
}

Weight Packed(const ffi::AnyBuffer& w, int64_t n, const float* factor = nullptr,
              const float* bias = nullptr) {
  return {w.untyped_data(), w.dimensions()[0], w.dimensions()[1], n, factor, bias};
}

// call(Type, X) for weights and a row of these types.
template <class Call>
void ByTypes(const ffi::AnyBuffer& w, const ffi::AnyBuffer& x, const Call& call) {
  bool narrow = x.element_type() == ffi::BF16;
  if (w.element_type() == ffi::F32) return call(Float32(), float());
  if (w.element_type() == ffi::BF16) return call(Bfloat16(), uint16_t());
  if (narrow) return call(Int8(), uint16_t());
  call(Int8(), float());
}

ffi::Error ProductOfRows(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer factor,
                         ffi::Result<ffi::AnyBuffer> y) {
  Weight weight = Packed(w, y->dimensions()[1], Optional(factor));
  ByTypes(w, x, [&]<class Type, class X>(Type, X) {
    ProductInto<Type>(static_cast<const X*>(x.untyped_data()), weight, x.dimensions()[0],
                      static_cast<X*>(y->untyped_data()));
  });
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------- attention

// e^x, to two units in the last place: 2^n times a polynomial of what is left.
__m512 Exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  x = _mm512_min_ps(x, _mm512_set1_ps(104.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f, 1.0f, 1.0f}) {
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(y, n);
}

// The sums across each of 16 registers, in one: lane i has that of sum[i].
[[gnu::always_inline]] inline __m512 Across(const __m512* sum) {
  __m512 two[8], four[4], of[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(sum[2 * i], sum[2 * i + 1]),
                           _mm512_unpackhi_ps(sum[2 * i], sum[2 * i + 1]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    of[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                          _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(of[0], of[1], 0x88),
                       _mm512_shuffle_f32x4(of[0], of[1], 0xdd));
}

constexpr int64_t kSlots = 64;  // of a task: its keys, then its values, from end to end

struct Shape {
  int64_t batch, tokens, heads, slots, kv_heads, width, window;
  float scale;
  int64_t stride() const { return kv_heads * width; }
};

template <class Kept>
void Prefetch(const Kept* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(Kept)) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
  }
}

// One query with 16 slots that lie `stride` apart: those behind `last` count as it does.
template <class X, class Last>
__m512 Scores(const X* query, const float* key, int64_t width, int64_t stride, Last last) {
  const float* row[16];
  __m512 sum[16];
#pragma GCC unroll 16
  for (int64_t s = 0; s < 16; ++s) {
    row[s] = key + std::min<int64_t>(s, last) * stride;
    sum[s] = _mm512_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 16 <= width; c += 16) {
    __m512 q = Load(query + c);
#pragma GCC unroll 16
    for (int64_t s = 0; s < 16; ++s) sum[s] = _mm512_fmadd_ps(q, Load(row[s] + c), sum[s]);
  }
  if (c < width) {
    __mmask16 mask = Mask(width - c);
    __m512 q = Load(query + c, mask);
#pragma GCC unroll 16
    for (int64_t s = 0; s < 16; ++s) sum[s] = _mm512_fmadd_ps(q, Load(row[s] + c, mask), sum[s]);
  }
  return Across(sum);
}

template <class X>
__m512 Scores(const X* query, const float* key, int64_t width, int64_t stride, int64_t last) {
  if (last < 15) return Scores<X, int64_t>(query, key, width, stride, last);
  std::integral_constant<int64_t, 15> whole;
  return Scores<X, decltype(whole)>(query, key, width, stride, whole);
}

// The values' sum by the weights of R heads: `to` has a row of `lanes` for each. What lies at `next`
// as the values do is asked for meanwhile.
template <int R, class Kept>
void Sum(const float* weights, const Kept* value, const Kept* next, int64_t count, int64_t width, int64_t stride,
         int64_t lanes, float* to) {
  int64_t c = 0;
  for (; c + 64 <= width; c += 64) {
    __m512 of[R][4] = {};
    for (int64_t s = 0; s < count; ++s) {
      __m512 v[4];
      for (int i = 0; i < 4; ++i) v[i] = Load(value + s * stride + c + 16 * i);
      if (next != nullptr) Prefetch(next + s * stride + c, 64);
      for (int r = 0; r < R; ++r) {
        __m512 weight = _mm512_set1_ps(weights[r * kSlots + s]);
        for (int i = 0; i < 4; ++i) of[r][i] = _mm512_fmadd_ps(weight, v[i], of[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) _mm512_storeu_ps(to + r * lanes + c + 16 * i, of[r][i]);
    }
  }
  for (; c < width; c += 16) {
    __mmask16 mask = Mask(width - c);
    __m512 of[R] = {};
    for (int64_t s = 0; s < count; ++s) {
      __m512 v = Load(value + s * stride + c, mask);
      for (int r = 0; r < R; ++r) {
        of[r] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * kSlots + s]), v, of[r]);
      }
    }
    for (int r = 0; r < R; ++r) _mm512_storeu_ps(to + r * lanes + c, of[r]);
  }
}

template <class X, class Kept>
void Append(const X* x, Kept* to, int64_t features) {
  for (int64_t i = 0; i < features; i += 16) {
    Store(to + i, Mask(features - i), Load(x + i, Mask(features - i)));
  }
}

// One token a row. Query h of row b sees the slots of kv head h / (H / G), `window` of them at
// most, its own last; k and v of its own are put there first. q, k and v of a token lie `apart`
// from those of the next.
//
// Each task makes a part of the sum over its slots for all heads, by the largest score among
// them, as in flash attention (arXiv:2205.14135); the parts are added in the order of the slots.
template <class X, class Kept>
void AttendOne(const Shape& of, const X* q, const X* k, const X* v, int64_t q_apart,
               int64_t kv_apart, Kept* keys, Kept* values, const int32_t* lengths, X* y) {
  const int64_t heads = of.heads, width = of.width, stride = of.stride();
  const int64_t lanes = (width + 15) / 16 * 16, group = heads / of.kv_heads;
  int64_t longest = 0;
  for (int64_t b = 0; b < of.batch; ++b) longest = std::max<int64_t>(longest, lengths[b] + 1);
  const int64_t parts = (std::min({longest, of.slots, of.window}) + kSlots - 1) / kSlots;
  const int64_t filled = (parts + 15) / 16 * 16;
  static thread_local std::vector<float> of_sums, of_largest, of_totals;
  float* sums = Scratch(of_sums, of.batch * parts * heads * lanes);
  float* largest = Scratch(of_largest, of.batch * heads * filled);
  float* totals = Scratch(of_totals, of.batch * heads * filled);
  auto seen = [&](int64_t b) {
    int64_t end = std::min<int64_t>(lengths[b] + 1, of.slots);
    return std::pair(std::max<int64_t>(0, end - of.window), end);
  };
  Pool::Get().Run(of.batch * parts, [&](int64_t task) {
    int64_t b = task / parts, part = task % parts;
    auto [first, end] = seen(b);
    first += part * kSlots;
    int64_t count = std::min(kSlots, end - first);
    if (count <= 0) return;
    if (first + count == end) {
      Append(k + b * kv_apart, keys + (b * of.slots + end - 1) * stride, stride);
      Append(v + b * kv_apart, values + (b * of.slots + end - 1) * stride, stride);
    }
    const Kept* key = keys + (b * of.slots + first) * stride;
    const Kept* value = values + (b * of.slots + first) * stride;
    static thread_local std::vector<float> of_scores, of_wide;
    float* scores = Scratch(of_scores, heads * kSlots);
    // bfloat16 is widened once for all the queries of a kv head.
    constexpr bool narrow = sizeof(Kept) == 2;
    float* wide = narrow ? Scratch(of_wide, 16 * width) : nullptr;
    for (int64_t s = 0; s < count; s += 16) {
      int64_t last = std::min<int64_t>(count - s, 16) - 1;
      for (int64_t g = 0; g < of.kv_heads; ++g) {
        int64_t piece = (last + 1) * stride / heads;  // of what is asked for meanwhile
        const Kept* of_head = key + s * stride + g * width;
        if (narrow) {
          for (int64_t i = 0; i <= last; ++i) Widen(of_head + i * stride, width, wide + i * width);
        }
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          const X* query = q + b * q_apart + h * width;
          Prefetch(value + s * stride + h * piece, piece);
          Prefetch(key + (s + 32) * stride + h * piece, piece);
          __m512 score;
          if constexpr (narrow) {
            score = Scores(query, wide, width, width, last);
          } else {
            score = Scores(query, of_head, width, stride, last);
          }
          score = _mm512_mul_ps(score, _mm512_set1_ps(of.scale));
          _mm512_storeu_ps(scores + h * kSlots + s, score);
        }
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      float* score = scores + h * kSlots;
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int64_t s = 0; s < count; s += 16) {
        most = _mm512_mask_max_ps(most, Mask(count - s), most, Load(score + s));
      }
      float top = _mm512_reduce_max_ps(most);
      for (int64_t s = 0; s < count; s += 16) {
        __m512 e = Exp(_mm512_sub_ps(Load(score + s), _mm512_set1_ps(top)));
        e = _mm512_maskz_mov_ps(Mask(count - s), e);
        _mm512_storeu_ps(score + s, e);
        total = _mm512_add_ps(total, e);
      }
      largest[(b * heads + h) * filled + part] = top;
      totals[(b * heads + h) * filled + part] = _mm512_reduce_add_ps(total);
    }
    for (int64_t g = 0; g < of.kv_heads; ++g) {
      for (int64_t h = g * group; h < (g + 1) * group;) {
        float* to = sums + (task * heads + h) * lanes;
        auto some = [&]<int R>(std::integral_constant<int, R>) {
          const Kept* next = h == g * group ? key + kSlots * stride + g * width : nullptr;
          Sum<R>(scores + h * kSlots, value + g * width, next, count, width, stride, lanes, to);
          h += R;
        };
        switch (std::min<int64_t>((g + 1) * group - h, 4)) {
          case 4: some(std::integral_constant<int, 4>()); break;
          case 3: some(std::integral_constant<int, 3>()); break;
          case 2: some(std::integral_constant<int, 2>()); break;
          default: some(std::integral_constant<int, 1>());
        }
      }
    }
  });
  Pool::Get().Run(of.batch, [&](int64_t b) {
    auto [first, end] = seen(b);
    int64_t count = (end - first + kSlots - 1) / kSlots;
    for (int64_t h = 0; h < heads; ++h) {
      int64_t row = b * heads + h;
      float *top = largest + row * filled, *weights = totals + row * filled;
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int64_t p = 0; p < count; p += 16) {
        most = _mm512_mask_max_ps(most, Mask(count - p), most, Load(top + p));
      }
      most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
      for (int64_t p = 0; p < count; p += 16) {
        __mmask16 mask = Mask(count - p);
        __m512 weight = Exp(_mm512_sub_ps(Load(top + p, mask), most));
        total = _mm512_fmadd_ps(weight, Load(weights + p, mask), total);
        _mm512_mask_storeu_ps(weights + p, mask, weight);
      }
      __m512 by = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
      for (int64_t c = 0; c < width; c += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t p = 0; p < count; ++p) {
          __m512 part = Load(sums + ((b * parts + p) * heads + h) * lanes + c);
          sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[p]), part, sum);
        }
        Store(y + row * width + c, Mask(width - c), _mm512_mul_ps(sum, by));
      }
    }
  });
}

// R rows of a with 64 columns of b, which is k deep; rows lie `apart`.
template <int R>
inline void Tile(const float* a, int64_t a_apart, const float* b, int64_t b_apart, int64_t k,
                 float* c, int64_t c_apart) {
  __m512 sum[R][4] = {};
  for (int64_t i = 0; i < k; ++i, b += b_apart) {
    __m512 of[4];
    for (int t = 0; t < 4; ++t) of[t] = Load(b + 16 * t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512 x = _mm512_set1_ps(a[r * a_apart + i]);
      for (int t = 0; t < 4; ++t) sum[r][t] = _mm512_fmadd_ps(x, of[t], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < 4; ++t) _mm512_storeu_ps(c + r * c_apart + 16 * t, sum[r][t]);
  }
}

void Tiles(int64_t rows, const float* a, int64_t a_apart, const float* b, int64_t b_apart,
           int64_t k, float* c, int64_t c_apart) {
  for (; rows >= 6; rows -= 6, a += 6 * a_apart, c += 6 * c_apart) {
    Tile<6>(a, a_apart, b, b_apart, k, c, c_apart);
  }
  switch (rows) {
    case 5: return Tile<5>(a, a_apart, b, b_apart, k, c, c_apart);
    case 4: return Tile<4>(a, a_apart, b, b_apart, k, c, c_apart);
    case 3: return Tile<3>(a, a_apart, b, b_apart, k, c, c_apart);
    case 2: return Tile<2>(a, a_apart, b, b_apart, k, c, c_apart);
    case 1: return Tile<1>(a, a_apart, b, b_apart, k, c, c_apart);
  }
}

constexpr int64_t kQueries = 24;  // of a task: four tiles
constexpr int64_t kWide = 64;

// Any number of tokens a row, each of which sees as `AttendOne`'s do. The queries that share a kv
// head are the rows of one product with its keys, and of another with its values.
template <class X, class Kept>
void AttendMany(const Shape& of, const X* q, const X* k, const X* v, int64_t q_apart,
                int64_t kv_apart, Kept* keys, Kept* values, const int32_t* lengths, X* y) {
  const int64_t heads = of.heads, width = of.width, stride = of.stride(), tokens = of.tokens;
  const int64_t group = heads / of.kv_heads, lanes = (width + kWide - 1) / kWide * kWide;
  auto first = [&](int64_t b) { return std::max<int64_t>(0, lengths[b] + 1 - of.window); };
  auto end = [&](int64_t b) { return std::min<int64_t>(lengths[b] + tokens, of.slots); };
  int64_t blocks = 1;  // of 64 slots, of all that is seen of a row
  for (int64_t b = 0; b < of.batch; ++b) {
    blocks = std::max(blocks, (end(b) - first(b) + kWide - 1) / kWide);
  }
  Pool::Get().Run(of.batch * tokens, [&](int64_t row) {
    int64_t b = row / tokens, slot = lengths[b] + row % tokens;
    if (slot >= of.slots) return;
    Append(k + row * kv_apart, keys + (b * of.slots + slot) * stride, stride);
    Append(v + row * kv_apart, values + (b * of.slots + slot) * stride, stride);
  });
  // Keys as (blocks, C, 64), values as (slots, lanes), of each row and kv head, in float32.
  static thread_local std::vector<float> of_keys, of_values;
  float* turned = Scratch(of_keys, of.batch * of.kv_heads * blocks * kWide * width);
  float* wide = Scratch(of_values, of.batch * of.kv_heads * blocks * kWide * lanes);
  Pool::Get().Run(of.batch * of.kv_heads * blocks, [&](int64_t task) {
    int64_t block = task % blocks, g = task / blocks % of.kv_heads, b = task / blocks / of.kv_heads;
    int64_t from = first(b) + block * kWide, count = std::min(kWide, end(b) - from);
    float *key = turned + task * kWide * width, *value = wide + task * kWide * lanes;
    if (count < kWide) std::fill(key, key + kWide * width, 0.0f);
    __m512i column = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(kWide));
    for (int64_t s = 0; s < count; ++s) {
      int64_t at = (b * of.slots + from + s) * stride + g * width;
      for (int64_t c = 0; c < width; c += 16) {
        __mmask16 mask = Mask(width - c);
        _mm512_mask_i32scatter_ps(key + c * kWide + s, mask, column, Load(keys + at + c, mask), 4);
      }
      for (int64_t c = 0; c < lanes; c += 16) {
        __mmask16 mask = Mask(width - c);
        _mm512_storeu_ps(value + s * lanes + c, Load(values + at + c, mask));
      }
    }
  });
  const int64_t rows = tokens * group, chunks = (rows + kQueries - 1) / kQueries;
  const int64_t apart = blocks * kWide + 16;  // no power of two: rows of it share no cache line
  Pool::Get().Run(of.batch * of.kv_heads * chunks, [&](int64_t task) {
    int64_t chunk = task % chunks, of_head = task / chunks, b = of_head / of.kv_heads;
    int64_t head = of_head % of.kv_heads * group, row = chunk * kQueries;
    int64_t count = std::min(kQueries, rows - row);
    static thread_local std::vector<float> of_queries, of_scores, of_sums;
    float *queries = Scratch(of_queries, kQueries * width), *sums = Scratch(of_sums, kQueries * kWide);
    float* scores = Scratch(of_scores, kQueries * apart);
    auto token = [&](int64_t i) { return b * tokens + (row + i) / group; };
    auto query = [&](int64_t i) { return head + (row + i) % group; };
    // The slots that row i sees, counted from the first that is packed.
    auto last = [&](int64_t i) {
      return std::min(lengths[b] + (row + i) / group + 1, of.slots) - first(b);
    };
    auto begin = [&](int64_t i) { return std::max<int64_t>(0, last(i) - of.window); };
    for (int64_t i = 0; i < count; ++i) {
      Widen(q + token(i) * q_apart + query(i) * width, width, queries + i * width);
    }
    int64_t from = begin(0) / kWide * kWide, to = last(count - 1);
    const float* key = turned + of_head * blocks * kWide * width;
    const float* value = wide + of_head * blocks * kWide * lanes;
    for (int64_t s = from; s < to; s += kWide) {
      Tiles(count, queries, width, key + s * width, kWide, width, scores + s, apart);
    }
    float totals[kQueries];
    for (int64_t i = 0; i < count; ++i) {
      float* score = scores + i * apart;
      int64_t low = begin(i), high = last(i);
      auto mask = [&](int64_t s) -> __mmask16 { return Mask(high - s) & ~Mask(low - s); };
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      __m512 scale = _mm512_set1_ps(of.scale);
      for (int64_t s = from; s < to; s += 16) {
        most = _mm512_mask_max_ps(most, mask(s), most, _mm512_mul_ps(Load(score + s), scale));
      }
      most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
      for (int64_t s = from; s < to; s += 16) {
        __m512 e = Exp(_mm512_sub_ps(_mm512_mul_ps(Load(score + s), scale), most));
        e = _mm512_maskz_mov_ps(mask(s), e);
        _mm512_storeu_ps(score + s, e);
        total = _mm512_add_ps(total, e);
      }
      totals[i] = _mm512_reduce_add_ps(total);
    }
    for (int64_t c = 0; c < width; c += kWide) {
      Tiles(count, scores + from, apart, value + from * lanes + c, lanes, to - from, sums, kWide);
      for (int64_t i = 0; i < count; ++i) {
        __m512 by = _mm512_set1_ps(1.0f / totals[i]);
        X* out = y + (token(i) * heads + query(i)) * width;
        for (int64_t j = c; j < std::min(c + kWide, width); j += 16) {
          __m512 sum = _mm512_mul_ps(Load(sums + i * kWide + j - c), by);
          Store(out + j, Mask(width - j), sum);
        }
      }
    }
  });
}

template <class T>
T* Data(const ffi::AnyBuffer& of) {
  return static_cast<T*>(of.untyped_data());
}

template <class X>
void Attend(const Shape& of, const X* q, const X* k, const X* v, int64_t q_apart, int64_t kv_apart,
            const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values, const int32_t* lengths,
            X* y) {
  auto call = [&]<class Kept>(Kept) {
    auto attend = of.tokens == 1 ? AttendOne<X, Kept> : AttendMany<X, Kept>;
    attend(of, q, k, v, q_apart, kv_apart, Data<Kept>(keys), Data<Kept>(values), lengths, y);
  };
  if (keys.element_type() == ffi::BF16) {
    call(uint16_t());
  } else {
    call(float());
  }
}

Shape ShapeOf(const ffi::AnyBuffer& keys, int64_t tokens, int64_t heads, int64_t window,
              float scale) {
  auto kept = keys.dimensions();
  return {kept[0], tokens, heads, kept[1], kept[2], kept[3], window, scale};
}

// The caches that come out are those that go in: the same memory.
ffi::Error AttendToCache(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer,
                         ffi::AnyBuffer, ffi::BufferR1<ffi::S32> lengths,
                         ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> keys,
                         ffi::Result<ffi::AnyBuffer> values, int64_t window, float scale) {
  Shape of = ShapeOf(*keys, q.dimensions()[1], q.dimensions()[2], window, scale);
  auto call = [&]<class X>(X) {
    Attend(of, Data<const X>(q), Data<const X>(k), Data<const X>(v), of.heads * of.width,
           of.stride(), *keys, *values, lengths.typed_data(), Data<X>(*y));
  };
  if (q.element_type() == ffi::BF16) {
    call(uint16_t());
  } else {
    call(float());
  }
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------- a block's halves

// LayerNorm (`centred`) or RMSNorm, in float32.
struct Norm {
  const float *scale, *bias;
  float epsilon;
  bool centred;

  template <class X>
  void Row(const X* x, int64_t d, X* y) const {
    float mean = 0;
    if (centred) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < d; i += 16) sum = _mm512_add_ps(sum, Load(x + i, Mask(d - i)));
      mean = _mm512_reduce_add_ps(sum) / d;
    }
    __m512 squares = _mm512_setzero_ps(), from = _mm512_set1_ps(mean);
    for (int64_t i = 0; i < d; i += 16) {
      __mmask16 mask = Mask(d - i);
      __m512 of = _mm512_maskz_sub_ps(mask, Load(x + i, mask), from);
      squares = _mm512_fmadd_ps(of, of, squares);
    }
    __m512 rate = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / d + epsilon));
    for (int64_t i = 0; i < d; i += 16) {
      __mmask16 mask = Mask(d - i);
      __m512 of = _mm512_mul_ps(_mm512_sub_ps(Load(x + i, mask), from), rate);
      if (scale != nullptr) of = _mm512_mul_ps(of, Load(scale + i, mask));
      if (bias != nullptr) of = _mm512_add_ps(of, Load(bias + i, mask));
      Store(y + i, mask, of);
    }
  }

  template <class X>
  void Rows(const X* x, int64_t rows, int64_t d, X* y) const {
    Pool::Get().Run(rows, [&](int64_t r) { Row(x + r * d, d, y + r * d); });
  }
};

// Turns (first half, second half) of a head by the angles of its position.
template <class X>
void Rotate(X* x, const float* cos, const float* sin, int64_t width) {
  int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    __mmask16 mask = Mask(half - i);
    __m512 a = Load(x + i, mask), b = Load(x + half + i, mask);
    __m512 c = Load(cos + i, mask), s = Load(sin + i, mask);
    Store(x + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    Store(x + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
  }
}

ffi::Error AttentionHalf(ffi::AnyBuffer x, ffi::AnyBuffer norm_scale, ffi::AnyBuffer norm_bias,
                         ffi::AnyBuffer qkv, ffi::AnyBuffer qkv_factor, ffi::AnyBuffer qkv_bias,
                         ffi::AnyBuffer out, ffi::AnyBuffer out_factor, ffi::AnyBuffer out_bias,
                         ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer, ffi::AnyBuffer,
                         ffi::BufferR1<ffi::S32> lengths, ffi::Result<ffi::AnyBuffer> y,
                         ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values,
                         float epsilon, bool centred, int64_t heads, int64_t window, float scale) {
  int64_t tokens = x.dimensions()[1], d = x.dimensions()[2];
  Shape of = ShapeOf(*keys, tokens, heads, window, scale);
  int64_t rows = of.batch * tokens;
  int64_t wide = heads * of.width, all = wide + 2 * of.stride();
  Norm norm{Optional(norm_scale), Optional(norm_bias), epsilon, centred};
  Weight into = Packed(qkv, all, Optional(qkv_factor), Optional(qkv_bias));
  Weight back = Packed(out, d, Optional(out_factor), Optional(out_bias));
  const float *cosines = Optional(cos), *sines = Optional(sin);
  ByTypes(qkv, x, [&]<class Type, class X>(Type, X) {
    static thread_local std::vector<X> of_normed, of_made, of_attended;
    X *normed = Scratch(of_normed, rows * d), *made = Scratch(of_made, rows * all);
    X* attended = Scratch(of_attended, rows * wide);
    norm.Rows(Data<X>(x), rows, d, normed);
    ProductInto<Type>(normed, into, rows, made);
    if (cosines != nullptr) {
      Pool::Get().Run(rows, [&](int64_t r) {
        int64_t at = r * (of.width / 2);
        for (int64_t h = 0; h < heads + of.kv_heads; ++h) {
          Rotate(made + r * all + h * of.width, cosines + at, sines + at, of.width);
        }
      });
    }
    Attend<X>(of, made, made + wide, made + wide + of.stride(), all, all, *keys, *values,
              lengths.typed_data(), attended);
    ProductOnto<Type>(Data<const X>(x), attended, back, rows, Data<X>(*y));
  });
  return ffi::Error::Success();
}

enum Activation : int64_t { kSilu, kGeluTanh, kRelu, kReluSquared };

__m512 Activate(__m512 x, int64_t activation) {
  if (activation == kRelu) return _mm512_max_ps(x, _mm512_setzero_ps());
  if (activation == kReluSquared) {
    x = _mm512_max_ps(x, _mm512_setzero_ps());
    return _mm512_mul_ps(x, x);
  }
  __m512 u = x;  // x sigmoid(u), as GELU with a tangent is too
  if (activation == kGeluTanh) {
    __m512 cubic = _mm512_mul_ps(_mm512_set1_ps(0.044715f), _mm512_mul_ps(x, x));
    u = _mm512_mul_ps(_mm512_fmadd_ps(cubic, x, x), _mm512_set1_ps(1.5957691216f));
  }
  __m512 below = Exp(_mm512_sub_ps(_mm512_setzero_ps(), u));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), below));
}

ffi::Error MlpHalf(ffi::AnyBuffer x, ffi::AnyBuffer norm_scale, ffi::AnyBuffer norm_bias,
                   ffi::AnyBuffer up, ffi::AnyBuffer up_factor, ffi::AnyBuffer up_bias,
                   ffi::AnyBuffer down, ffi::AnyBuffer down_factor, ffi::AnyBuffer down_bias,
                   ffi::Result<ffi::AnyBuffer> y, float epsilon, bool centred, bool gated,
                   int64_t activation) {
  int64_t rows = x.dimensions()[0], d = x.dimensions()[1];
  int64_t hidden = down.dimensions()[1] * down.dimensions()[3];
  int64_t all = gated ? 2 * hidden : hidden;
  Norm norm{Optional(norm_scale), Optional(norm_bias), epsilon, centred};
  Weight into = Packed(up, all, Optional(up_factor), Optional(up_bias));
  Weight back = Packed(down, d, Optional(down_factor), Optional(down_bias));
  ByTypes(up, x, [&]<class Type, class X>(Type, X) {
    static thread_local std::vector<X> of_normed, of_made, of_activated;
    X *normed = Scratch(of_normed, rows * d), *made = Scratch(of_made, rows * all);
    X* activated = Scratch(of_activated, rows * hidden);
    norm.Rows(Data<X>(x), rows, d, normed);
    ProductInto<Type>(normed, into, rows, made);
    Pool::Get().Run(rows, [&](int64_t r) {
      const X *gate = made + r * all, *beside = gate + hidden;
      for (int64_t i = 0; i < hidden; i += 16) {
        __mmask16 mask = Mask(hidden - i);
        __m512 of = Rounded<X>(Activate(Load(gate + i, mask), activation));
        if (gated) of = _mm512_mul_ps(of, Load(beside + i, mask));
        Store(activated + r * hidden + i, mask, of);
      }
    });
    ProductOnto<Type>(Data<const X>(x), activated, back, rows, Data<X>(*y));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(product, ProductOfRows,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend, AttendToCache,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_half, AttentionHalf,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("centred")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mlp_half, MlpHalf,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("centred")
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("activation"));
