// A step of decoding on a CPU at the speed of memory: products with packed weights, and the
// attention of one query a row. native.py compiles this where there is a compiler, and says
// what each call computes; without it XLA does the same.
//
// R rows, K fan-in, N fan-out; B batch, H heads, G kv heads, S slots, C head width.

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
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
  template <class F>
  void Run(int64_t tasks, const F& f) {
    std::unique_lock<std::mutex> alone(mutex_, std::try_to_lock);
    if (tasks < 2 || tasks > kMask || helpers_ == 0 || !alone) {
      for (int64_t i = 0; i < tasks; ++i) f(i);
      return;
    }
    call_ = [](const void* of, int64_t i) { (*static_cast<const F*>(of))(i); };
    of_ = &f;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(uint64_t(tasks) << kBits, std::memory_order_release);
    news_.fetch_add(1, std::memory_order_acq_rel);
    news_.notify_all();
    Take();
    while (done_.load(std::memory_order_acquire) < tasks) _mm_pause();
  }

 private:
  static constexpr int kBits = 24;
  static constexpr int64_t kMask = (1 << kBits) - 1;
  static constexpr int kSpins = 20000;

  Pool() {
    cpu_set_t set;
    helpers_ = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) - 1 : 0;
    for (int i = 0; i < helpers_; ++i) std::thread([this] { Help(); }).detach();
  }

  // One number holds the next task and how many there are, so that whoever comes late takes
  // none, or one of the call that is now running: that call cannot end before it is done.
  void Take() {
    for (;;) {
      uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
      int64_t task = ticket & kMask, tasks = ticket >> kBits;
      if (task >= tasks) return;
      call_(of_, task);
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  void Help() {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; news_.load(std::memory_order_acquire) == seen;) {
        if (++spins < kSpins) {
          _mm_pause();
        } else {
          news_.wait(seen);
        }
      }
      seen = news_.load(std::memory_order_acquire);
      Take();
    }
  }

  std::mutex mutex_;
  int helpers_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* of_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> news_{0};
};

// ---------------------------------------------------------------------------- products

// Weights come as (N / 48, K / e, 48, e), e entries in four bytes: a register holds e entries of
// each of 16 outputs, memory is read from one end to the other, and no sum crosses a register.
// x goes by e entries to all lanes.

constexpr int kTiles = 3;  // by 8 rows: 24 sums, as many as there are registers for
constexpr int64_t kAhead = 4096;  // bytes that are asked of memory before they are needed
constexpr int64_t kTaskBytes = 131072;  // of weights: long enough a stretch of memory

struct Float32 {
  using Sum = __m512;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Sum Add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(x)), _mm512_castsi512_ps(w), sum);
  }
};

struct Bfloat16 {
  using Sum = __m512;
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Sum Add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
  }
};

struct Int8 {  // the instruction takes unsigned by signed: weights come with 128 added
  using Sum = __m512i;
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Sum Add(Sum sum, uint32_t x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
  }
};

// R rows by 48 outputs, k words each.
template <class Type, int R, class Out>
inline void Block(const uint32_t* x, const __m512i* w, int64_t k, const Out& out) {
  typename Type::Sum sum[R][kTiles];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) sum[r][t] = Type::Zero();
  }
  for (int64_t i = 0; i < k; ++i, w += kTiles) {
    __m512i tile[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      tile[t] = _mm512_loadu_si512(w + t);
      _mm_prefetch(reinterpret_cast<const char*>(w + t) + kAhead, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < kTiles; ++t) sum[r][t] = Type::Add(sum[r][t], x[r * k + i], tile[t]);
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
  for (; first + 8 <= rows; first += 8) Block<Type, 8>(x + first * k, w, k, some);
  x += first * k;
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

// out(row, tile, sum) gets every sum of 16 outputs.
template <class Type, class Out>
void Product(const void* x, const void* w, int64_t k, int64_t rows, int64_t groups,
             const Out& out) {
  int64_t each = std::max<int64_t>(1, kTaskBytes / (kTiles * 64 * k));
  Pool::Get().Run((groups + each - 1) / each, [&](int64_t task) {
    for (int64_t g = task * each; g < std::min(groups, (task + 1) * each); ++g) {
      auto some = [&](int64_t r, int t, typename Type::Sum sum) { out(r, g * kTiles + t, sum); };
      Rows<Type>(static_cast<const uint32_t*>(x),
                 static_cast<const __m512i*>(w) + g * kTiles * k, k, rows, some);
    }
  });
}

// The first `count` of 16 lanes.
__mmask16 Mask(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

ffi::Error ProductFloat32(ffi::BufferR2<ffi::F32> x, ffi::BufferR4<ffi::F32> w,
                          ffi::ResultBufferR2<ffi::F32> y) {
  int64_t n = y->dimensions()[1];
  float* to = y->typed_data();
  auto out = [=](int64_t r, int64_t tile, __m512 sum) {
    _mm512_mask_storeu_ps(to + r * n + tile * 16, Mask(n - tile * 16), sum);
  };
  Product<Float32>(x.typed_data(), w.typed_data(), w.dimensions()[1], x.dimensions()[0],
                   w.dimensions()[0], out);
  return ffi::Error::Success();
}

ffi::Error ProductBfloat16(ffi::BufferR2<ffi::BF16> x, ffi::BufferR4<ffi::BF16> w,
                           ffi::ResultBufferR2<ffi::BF16> y) {
  int64_t n = y->dimensions()[1];
  auto* to = reinterpret_cast<uint16_t*>(y->typed_data());
  auto out = [=](int64_t r, int64_t tile, __m512 sum) {
    _mm256_mask_storeu_epi16(to + r * n + tile * 16, Mask(n - tile * 16),
                             (__m256i)_mm512_cvtneps_pbh(sum));
  };
  Product<Bfloat16>(x.typed_data(), w.typed_data(), w.dimensions()[1], x.dimensions()[0],
                    w.dimensions()[0], out);
  return ffi::Error::Success();
}

// Each row of x is quantised by its largest entry, as decoding.quantise does it.
ffi::Error ProductInt8(ffi::BufferR2<ffi::F32> x, ffi::BufferR4<ffi::U8> w,
                       ffi::BufferR1<ffi::F32> factor, ffi::ResultBufferR2<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  std::vector<int8_t> q(rows * k);
  std::vector<float> of_row(rows);
  std::vector<int32_t> shift(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x.typed_data() + r * k;
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += 16) {
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(Mask(k - i), from + i)));
    }
    float largest = _mm512_reduce_max_ps(most);
    of_row[r] = (largest > 0 ? largest : 1.0f) / 127.0f;
    __m512 by = _mm512_set1_ps(of_row[r]);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
      __mmask16 mask = Mask(k - i);
      __m512i whole =
          _mm512_cvtps_epi32(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, from + i), by));
      sum = _mm512_add_epi32(sum, whole);
      _mm512_mask_cvtepi32_storeu_epi8(q.data() + r * k + i, mask, whole);
    }
    shift[r] = 128 * _mm512_reduce_add_epi32(sum);
  }
  float* to = y->typed_data();
  const float* of_output = factor.typed_data();
  auto out = [&](int64_t r, int64_t tile, __m512i sum) {
    __mmask16 mask = Mask(n - tile * 16);
    __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(shift[r])));
    __m512 scaled = _mm512_mul_ps(whole, _mm512_set1_ps(of_row[r]));
    __m512 columns = _mm512_maskz_loadu_ps(mask, of_output + tile * 16);
    _mm512_mask_storeu_ps(to + r * n + tile * 16, mask, _mm512_mul_ps(scaled, columns));
  };
  Product<Int8>(q.data(), w.typed_data(), w.dimensions()[1], rows, w.dimensions()[0], out);
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------- attention

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

// exp of x <= 0, to two units in the last place: 2^n times a polynomial of what is left.
__m512 Exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
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

constexpr int64_t kSlots = 32;  // of a task: its keys, then its values, from end to end

// Query h of row b sees the slots of kv head h / (H / G), `window` of them at most, its own last.
//
// Each task makes a part of the sum over its slots for all heads, by the largest score among
// them, as in flash attention (arXiv:2205.14135); the parts are added in the order of the slots.
template <class X, class Kept>
void Attend(const X* q, const Kept* keys, const Kept* values, const int32_t* lengths, X* y,
            int64_t batch, int64_t heads, int64_t slots, int64_t kv_heads, int64_t width,
            int64_t window, float scale) {
  int64_t lanes = (width + 15) / 16 * 16, stride = kv_heads * width, longest = 0;
  for (int64_t b = 0; b < batch; ++b) longest = std::max<int64_t>(longest, lengths[b] + 1);
  int64_t parts = (std::min({longest, slots, window}) + kSlots - 1) / kSlots;
  int64_t each = heads * (lanes + 2);  // of a part: for each head its sum, largest and total
  std::vector<float> made(batch * parts * each);
  std::vector<char> begins(heads);  // whether a head is the first of the next kv head
  for (int64_t h = 0; h < heads; h += heads / kv_heads) begins[h] = 1;
  auto seen = [&](int64_t b) {
    int64_t end = std::min<int64_t>(lengths[b] + 1, slots);
    return std::pair(std::max<int64_t>(0, end - window), end);
  };
  Pool::Get().Run(batch * parts, [&](int64_t task) {
    int64_t b = task / parts, part = task % parts;
    auto [first, end] = seen(b);
    first += part * kSlots;
    int64_t count = std::min(kSlots, end - first);
    if (count <= 0) return;
    const Kept* key = keys + (b * slots + first) * stride;
    const Kept* value = values + (b * slots + first) * stride;
    static thread_local std::vector<float> scores;
    scores.resize(heads * kSlots);
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t i = 0; i < stride; i += 64 / sizeof(Kept)) {
        _mm_prefetch(reinterpret_cast<const char*>(value + s * stride + i), _MM_HINT_T0);
      }
      const Kept* of_head = key + s * stride;
      const X* query = q + b * heads * width;
      for (int64_t h = 0; h < heads; ++h, query += width) {
        if (h > 0 && begins[h]) of_head += width;
        __m512 sum = _mm512_setzero_ps();
        int64_t c = 0;
        for (; c + 16 <= width; c += 16) {
          sum = _mm512_fmadd_ps(Load(query + c), Load(of_head + c), sum);
        }
        if (c < width) {
          __mmask16 mask = Mask(width - c);
          sum = _mm512_fmadd_ps(Load(query + c, mask), Load(of_head + c, mask), sum);
        }
        scores[h * kSlots + s] = _mm512_reduce_add_ps(sum) * scale;
      }
    }
    float* sums = made.data() + task * each;
    for (int64_t h = 0; h < heads; ++h) {
      float *score = &scores[h * kSlots], *sum = sums + h * lanes;
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int64_t s = 0; s < count; s += 16) {
        __mmask16 mask = Mask(count - s);
        most = _mm512_mask_max_ps(most, mask, most, Load(score + s));
      }
      float largest = _mm512_reduce_max_ps(most);
      for (int64_t s = 0; s < count; s += 16) {
        __m512 e = Exp(_mm512_sub_ps(Load(score + s), _mm512_set1_ps(largest)));
        e = _mm512_maskz_mov_ps(Mask(count - s), e);
        _mm512_storeu_ps(score + s, e);
        total = _mm512_add_ps(total, e);
      }
      sums[heads * lanes + h] = largest;
      sums[heads * (lanes + 1) + h] = _mm512_reduce_add_ps(total);
      const Kept* of_head = value + h / (heads / kv_heads) * width;
      int64_t c = 0;
      for (; c + 64 <= width; c += 64) {
        __m512 of[4] = {};
        for (int64_t s = 0; s < count; ++s) {
          __m512 weight = _mm512_set1_ps(score[s]);
          for (int i = 0; i < 4; ++i) {
            of[i] = _mm512_fmadd_ps(weight, Load(of_head + s * stride + c + 16 * i), of[i]);
          }
        }
        for (int i = 0; i < 4; ++i) _mm512_storeu_ps(sum + c + 16 * i, of[i]);
      }
      for (; c < width; c += 16) {
        __mmask16 mask = Mask(width - c);
        __m512 of = _mm512_setzero_ps();
        for (int64_t s = 0; s < count; ++s) {
          of = _mm512_fmadd_ps(_mm512_set1_ps(score[s]), Load(of_head + s * stride + c, mask), of);
        }
        _mm512_storeu_ps(sum + c, of);
      }
    }
  });
  std::vector<float> weights(parts);
  for (int64_t row = 0; row < batch * heads; ++row) {
    int64_t b = row / heads, h = row % heads;
    auto [first, end] = seen(b);
    int64_t count = (end - first + kSlots - 1) / kSlots;
    const float* sums = made.data() + b * parts * each;
    const float *largest = sums + heads * lanes + h, *totals = sums + heads * (lanes + 1) + h;
    float most = -INFINITY, total = 0;
    for (int64_t p = 0; p < count; ++p) most = std::max(most, largest[p * each]);
    for (int64_t p = 0; p < count; ++p) {
      weights[p] = std::exp(largest[p * each] - most);
      total += weights[p] * totals[p * each];
    }
    for (int64_t c = 0; c < width; c += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t p = 0; p < count; ++p) {
        __m512 part = Load(sums + p * each + h * lanes + c);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[p]), part, sum);
      }
      sum = _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / total));
      Store(y + row * width + c, Mask(width - c), sum);
    }
  }
}

template <class X, class Kept>
void Append(const X* x, Kept* kept, const int32_t* lengths, int64_t batch, int64_t slots,
            int64_t features) {
  for (int64_t b = 0; b < batch; ++b) {
    Kept* to = kept + (b * slots + std::min<int64_t>(lengths[b], slots - 1)) * features;
    for (int64_t i = 0; i < features; i += 16) {
      Store(to + i, Mask(features - i), Load(x + b * features + i, Mask(features - i)));
    }
  }
}

template <class X, class Kept>
void AppendAndAttend(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                     const int32_t* lengths, ffi::AnyBuffer& y, ffi::AnyBuffer& keys,
                     ffi::AnyBuffer& values, int64_t window, float scale) {
  auto of = q.dimensions(), kept = keys.dimensions();
  int64_t batch = of[0], heads = of[1], width = of[2], slots = kept[1], kv_heads = kept[2];
  auto* to_keys = static_cast<Kept*>(keys.untyped_data());
  auto* to_values = static_cast<Kept*>(values.untyped_data());
  int64_t features = kv_heads * width;
  Append(static_cast<const X*>(k.untyped_data()), to_keys, lengths, batch, slots, features);
  Append(static_cast<const X*>(v.untyped_data()), to_values, lengths, batch, slots, features);
  Attend(static_cast<const X*>(q.untyped_data()), to_keys, to_values, lengths,
         static_cast<X*>(y.untyped_data()), batch, heads, slots, kv_heads, width, window, scale);
}

// The caches that come out are those that go in: the same memory.
ffi::Error AttendOneQuery(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer,
                          ffi::AnyBuffer, ffi::BufferR1<ffi::S32> lengths,
                          ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> keys,
                          ffi::Result<ffi::AnyBuffer> values, int64_t window, float scale) {
  bool narrow = q.element_type() == ffi::BF16, kept = keys->element_type() == ffi::BF16;
  auto call = narrow ? kept ? AppendAndAttend<uint16_t, uint16_t> : AppendAndAttend<uint16_t, float>
                     : kept ? AppendAndAttend<float, uint16_t> : AppendAndAttend<float, float>;
  call(q, k, v, lengths.typed_data(), *y, *keys, *values, window, scale);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_float32, ProductFloat32,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_bfloat16, ProductBfloat16,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR4<ffi::BF16>>()
                                  .Ret<ffi::BufferR2<ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_int8, ProductInt8,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_one_query, AttendOneQuery,
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
