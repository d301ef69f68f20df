// Training's two heavy parts on a CPU, products with weights and attention, by a BLAS: SciPy's,
// whose sgemm is given as a pointer. blas.py compiles this where there is a compiler, and says
// what each call computes; without it XLA does the same.
//
// All matrices are row-major, M rows, K summed, N columns. B batch, T queries, S keys, H heads,
// G kv heads, C head width.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*,
                       const int*);
Sgemm sgemm = nullptr;

struct Matrix {
  const float* data;
  int stride;  // entries from one row, as it lies in memory, to the next
  bool turned = false;
};

// c = factor a b + keep c, of (M, K) and (K, N). BLAS counts columns first: it is given b^T a^T.
void Multiply(int m, int n, int k, Matrix a, Matrix b, float* c, int stride, float factor = 1,
              float keep = 0) {
  const char ta = a.turned ? 'T' : 'N', tb = b.turned ? 'T' : 'N';
  sgemm(&tb, &ta, &n, &m, &k, &factor, b.data, &b.stride, a.data, &a.stride, &keep, c, &stride);
}

// ---------------------------------------------------------------------------- threads

// How many can run at once: XLA has a thread for each simulated device, whatever the processor.
int64_t Threads(ffi::ThreadPool& pool) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(pool.num_threads(), 1, cores);
}

// Calls f(0) ... f(tasks - 1), here and in XLA's own threads where they are free. Whoever comes
// when all tasks are taken does nothing, so nobody waits for a thread that is at other work.
template <class F>
void Run(ffi::ThreadPool& pool, int64_t tasks, const F& f) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto take = [state, tasks, &f] {  // f is gone when the last task is done, and not read then
    for (int64_t i; (i = state->next.fetch_add(1)) < tasks; state->done.fetch_add(1)) f(i);
  };
  const int64_t helpers = std::min(tasks, Threads(pool)) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(take)(take));
  take();
  while (state->done.load(std::memory_order_acquire) < tasks) std::this_thread::yield();
}

// ---------------------------------------------------------------------------- entries

struct Float32 {
  using Entry = float;
  static float Read(float x) { return x; }
  static float Write(float x) { return x; }
};

struct Bfloat16 {
  using Entry = uint16_t;
  static float Read(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }
  static uint16_t Write(float x) {  // to the nearest, ties to even; NaN stays NaN
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint16_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
  }
};

// A thread's own memory, kept from call to call.
float* Scratch(int place, int64_t size) {
  thread_local std::vector<float> kept[8];
  if (int64_t(kept[place].size()) < size) kept[place].resize(size);
  return kept[place].data();
}

template <class D>
const typename D::Entry* In(const ffi::AnyBuffer& x) {
  return static_cast<const typename D::Entry*>(x.untyped_data());
}

template <class D>
typename D::Entry* Out(ffi::Result<ffi::AnyBuffer>& x) {
  return static_cast<typename D::Entry*>(x->untyped_data());
}

// Rows of a matrix as float32: where they lie, or a copy.
template <class D>
Matrix Rows(const typename D::Entry* x, int64_t stride, int64_t rows, int64_t columns, int place) {
  if constexpr (std::is_same_v<D, Float32>) return {x, int(stride)};
  float* __restrict copy = Scratch(place, rows * columns);
  for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) copy[i * columns + j] = D::Read(x[i * stride + j]);
  return {copy, int(columns)};
}

// ---------------------------------------------------------------------------- products

constexpr double kAlone = 1e6;  // multiplications: fewer take less time than another thread to come
constexpr int64_t kPiece = 1 << 20;  // entries of a copied result: they stay in the cache

// op(a) op(b) for each of the leading axes of both, summed in float32.
template <class D>
ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b,
                  ffi::Result<ffi::AnyBuffer> c, bool ta, bool tb) {
  auto da = a.dimensions(), dc = c->dimensions();
  const int64_t r = dc.size(), m = dc[r - 2], n = dc[r - 1], k = da[r - (ta ? 2 : 1)];
  int64_t batch = 1;
  for (int64_t i = 0; i + 2 < r; ++i) batch *= dc[i];
  auto *pa = In<D>(a), *pb = In<D>(b);
  auto* pc = Out<D>(c);
  // The longer side of c is cut, at whole registers; the other factor is read by every task.
  const bool rows = m >= n;
  const int64_t side = rows ? m : n, threads = Threads(pool);
  int64_t cuts = double(m) * n * k < kAlone ? 1 : threads;
  if (!std::is_same_v<D, Float32>) cuts *= (m * n + kPiece * cuts - 1) / (kPiece * cuts);
  const int64_t cut = (side + cuts * 16 - 1) / (cuts * 16) * 16;
  Run(pool, batch * cuts, [=](int64_t task) {
    const int64_t i = task / cuts, from = std::min(side, task % cuts * cut);
    const int64_t many = std::min(side, from + cut) - from;
    if (many == 0) return;
    const int64_t mm = rows ? many : m, nn = rows ? n : many;
    auto *x = pa + i * m * k + (rows ? ta ? from : from * k : 0);
    auto *w = pb + i * k * n + (rows ? 0 : tb ? from * k : from);
    auto* y = pc + i * m * n + (rows ? from * n : from);
    Matrix fx = ta ? Rows<D>(x, m, k, mm, 0) : Rows<D>(x, k, mm, k, 0);
    Matrix fw = tb ? Rows<D>(w, k, nn, k, 1) : Rows<D>(w, n, k, nn, 1);
    fx.turned = ta, fw.turned = tb;
    if constexpr (std::is_same_v<D, Float32>) {
      Multiply(mm, nn, k, fx, fw, y, n);
    } else {
      float* sums = Scratch(2, mm * nn);
      Multiply(mm, nn, k, fx, fw, sums, nn);
      for (int64_t j = 0; j < mm; ++j)
#pragma omp simd
        for (int64_t l = 0; l < nn; ++l) y[j * n + l] = D::Write(sums[j * nn + l]);
    }
  });
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------- attention

constexpr int kQueries = 128;  // at a time: their scores stay in the cache

// exp(x) to 2 units in the last place; 0 below -87, NaN of NaN.
inline float Exp(float x) {
  const float y = x < -87.f ? -87.f : x;
  const float n = (y * 1.44269504f + 12582912.f) - 12582912.f;  // rounded
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const float two_to_n = std::bit_cast<float>((int32_t(n) + 127) << 23);
  return x < -87.f ? 0.f : p * two_to_n;
}

struct Shape {
  int64_t batch, t, s, heads, kv_heads, c, bias_batch, bias_rows;
  bool causal;
  int64_t window;
  float scale;

  int64_t Group() const { return heads / kv_heads; }
  // The keys that queries `from` to `to` may see.
  int64_t First(int64_t from) const { return causal ? std::max<int64_t>(0, from - window + 1) : 0; }
  int64_t Last(int64_t to) const { return causal ? std::min(s, to) : s; }
};

// One head of a row.
template <class D>
Matrix Head(const typename D::Entry* x, int64_t heads, int64_t c, int64_t rows, int place) {
  return Rows<D>(x, heads * c, rows, c, place);
}

// scale q k^T + bias of queries `from` to `to`, over the keys `first` to `last`.
void Scores(const Shape& d, Matrix q, Matrix k, const float* bias, int64_t b, int64_t from,
            int64_t to, int64_t first, int64_t last, float* scores) {
  const int64_t n = last - first;
  Multiply(to - from, n, d.c, {q.data + from * q.stride, q.stride},
           {k.data + first * k.stride, k.stride, true}, scores, n, d.scale);
  for (int64_t i = 0; i < to - from; ++i) {
    const int64_t row = d.bias_rows == 1 ? 0 : from + i;
    const float* add = bias + (b * d.bias_batch / d.batch * d.bias_rows + row) * d.s + first;
    float* x = scores + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] += add[j];
  }
}

template <class D>
void Forward(const Shape& d, const typename D::Entry* pq, const typename D::Entry* pk,
             const typename D::Entry* pv, const float* bias, typename D::Entry* py, float* kept,
             int64_t b, int64_t g) {
  const int64_t wide = d.heads * d.c;
  const Matrix k = Head<D>(pk + (b * d.s * d.kv_heads + g) * d.c, d.kv_heads, d.c, d.s, 0);
  const Matrix v = Head<D>(pv + (b * d.s * d.kv_heads + g) * d.c, d.kv_heads, d.c, d.s, 1);
  for (int64_t h = g * d.Group(); h < (g + 1) * d.Group(); ++h) {
    const Matrix q = Head<D>(pq + b * d.t * wide + h * d.c, d.heads, d.c, d.t, 2);
    auto* y = py + b * d.t * wide + h * d.c;
    float* statistics = kept + (b * d.heads + h) * d.t * 2;
    for (int64_t from = 0; from < d.t; from += kQueries) {
      const int64_t to = std::min(d.t, from + kQueries), rows = to - from;
      const int64_t first = d.First(from), last = d.Last(to), n = last - first;
      float* scores = Scratch(3, rows * n);
      Scores(d, q, k, bias, b, from, to, first, last, scores);
      for (int64_t i = 0; i < rows; ++i) {
        float* x = scores + i * n;
        float most = x[0], sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < n; ++j) most = most > x[j] ? most : x[j];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; ++j) sum += x[j] = Exp(x[j] - most);
        statistics[(from + i) * 2] = most;
        statistics[(from + i) * 2 + 1] = 1 / sum;
      }
      float* sums = Scratch(4, rows * d.c);
      Multiply(rows, d.c, n, {scores, int(n)}, {v.data + first * v.stride, v.stride}, sums, d.c);
      for (int64_t i = 0; i < rows; ++i) {
        const float share = statistics[(from + i) * 2 + 1];
#pragma omp simd
        for (int64_t j = 0; j < d.c; ++j)
          y[(from + i) * wide + j] = D::Write(sums[i * d.c + j] * share);
      }
    }
  }
}

template <class D>
void Backward(const Shape& d, const typename D::Entry* pq, const typename D::Entry* pk,
              const typename D::Entry* pv, const float* bias, const typename D::Entry* py,
              const float* kept, const typename D::Entry* pg, typename D::Entry* pdq,
              typename D::Entry* pdk, typename D::Entry* pdv, int64_t b, int64_t g) {
  const int64_t wide = d.heads * d.c, narrow = d.kv_heads * d.c;
  const int64_t kv = (b * d.s * d.kv_heads + g) * d.c;
  const Matrix k = Head<D>(pk + kv, d.kv_heads, d.c, d.s, 0);
  const Matrix v = Head<D>(pv + kv, d.kv_heads, d.c, d.s, 1);
  float* dk = Scratch(5, 2 * d.s * d.c);
  float* dv = dk + d.s * d.c;
  std::fill(dk, dk + 2 * d.s * d.c, 0.f);
  for (int64_t h = g * d.Group(); h < (g + 1) * d.Group(); ++h) {
    const int64_t head = b * d.t * wide + h * d.c;
    const Matrix q = Head<D>(pq + head, d.heads, d.c, d.t, 2);
    const Matrix dy = Head<D>(pg + head, d.heads, d.c, d.t, 6);
    const float* statistics = kept + (b * d.heads + h) * d.t * 2;
    for (int64_t from = 0; from < d.t; from += kQueries) {
      const int64_t to = std::min(d.t, from + kQueries), rows = to - from;
      const int64_t first = d.First(from), last = d.Last(to), n = last - first;
      float* weights = Scratch(3, 2 * rows * n);
      float* d_scores = weights + rows * n;
      Scores(d, q, k, bias, b, from, to, first, last, weights);
      Multiply(rows, n, d.c, {dy.data + from * dy.stride, dy.stride},
               {v.data + first * v.stride, v.stride, true}, d_scores, n);
      for (int64_t i = 0; i < rows; ++i) {
        const float most = statistics[(from + i) * 2], share = statistics[(from + i) * 2 + 1];
        const auto* y = py + head + (from + i) * wide;
        const float* gradient = dy.data + (from + i) * dy.stride;
        float row = 0;
#pragma omp simd reduction(+ : row)
        for (int64_t j = 0; j < d.c; ++j) row += D::Read(y[j]) * gradient[j];
        float *__restrict w = weights + i * n, *__restrict ds = d_scores + i * n;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          w[j] = Exp(w[j] - most) * share;
          ds[j] = w[j] * (ds[j] - row);
        }
      }
      const Matrix w{weights, int(n)}, ds{d_scores, int(n)};
      Multiply(n, d.c, rows, {weights, int(n), true}, {dy.data + from * dy.stride, dy.stride},
               dv + first * d.c, d.c, 1, 1);
      Multiply(n, d.c, rows, {d_scores, int(n), true}, {q.data + from * q.stride, q.stride},
               dk + first * d.c, d.c, d.scale, 1);
      float* dq = Scratch(4, rows * d.c);
      Multiply(rows, d.c, n, ds, {k.data + first * k.stride, k.stride}, dq, d.c, d.scale);
      for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < d.c; ++j)
          pdq[head + (from + i) * wide + j] = D::Write(dq[i * d.c + j]);
    }
  }
  for (int64_t i = 0; i < d.s; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d.c; ++j) {
      pdk[kv + i * narrow + j] = D::Write(dk[i * d.c + j]);
      pdv[kv + i * narrow + j] = D::Write(dv[i * d.c + j]);
    }
  }
}

// Axes before the last three are the batch; the bias is (B or fewer, 1, T or 1, S).
Shape ShapeOf(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& bias,
              bool causal, int64_t window, float scale) {
  auto dq = q.dimensions(), dk = k.dimensions(), db = bias.dimensions();
  const int64_t r = dq.size();
  Shape d{1, dq[r - 3], dk[r - 3], dq[r - 2], dk[r - 2], dq[r - 1], 1, db[r - 2], causal, window,
          scale};
  for (int64_t i = 0; i + 3 < r; ++i) {
    d.batch *= dq[i];
    d.bias_batch *= db[i];
  }
  return d;
}

template <class D>
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                  ffi::Result<ffi::AnyBuffer> kept, bool causal, int64_t window, float scale) {
  const Shape d = ShapeOf(q, k, bias, causal, window, scale);
  Run(pool, d.batch * d.kv_heads, [&](int64_t i) {
    Forward<D>(d, In<D>(q), In<D>(k), In<D>(v), In<Float32>(bias), Out<D>(y), Out<Float32>(kept),
               i / d.kv_heads, i % d.kv_heads);
  });
  return ffi::Error::Success();
}

template <class D>
ffi::Error AttendBackward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                          ffi::AnyBuffer v, ffi::AnyBuffer bias, ffi::AnyBuffer y,
                          ffi::AnyBuffer kept, ffi::AnyBuffer g, ffi::Result<ffi::AnyBuffer> dq,
                          ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                          bool causal, int64_t window, float scale) {
  const Shape d = ShapeOf(q, k, bias, causal, window, scale);
  Run(pool, d.batch * d.kv_heads, [&](int64_t i) {
    Backward<D>(d, In<D>(q), In<D>(k), In<D>(v), In<Float32>(bias), In<D>(y), In<Float32>(kept),
                In<D>(g), Out<D>(dq), Out<D>(dk), Out<D>(dv), i / d.kv_heads, i % d.kv_heads);
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" void set_sgemm(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }

#define CALLS(NAME, DTYPE)                                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(matmul_##NAME, Matmul<DTYPE>,  \
                                ffi::Ffi::Bind()               \
                                    .Ctx<ffi::ThreadPool>()    \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Attr<bool>("ta")          \
                                    .Attr<bool>("tb"));        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_##NAME, Attend<DTYPE>,  \
                                ffi::Ffi::Bind()               \
                                    .Ctx<ffi::ThreadPool>()    \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Attr<bool>("causal")      \
                                    .Attr<int64_t>("window")   \
                                    .Attr<float>("scale"));    \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(attend_backward_##NAME, AttendBackward<DTYPE>, \
                                ffi::Ffi::Bind()               \
                                    .Ctx<ffi::ThreadPool>()    \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Arg<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Ret<ffi::AnyBuffer>()     \
                                    .Attr<bool>("causal")      \
                                    .Attr<int64_t>("window")   \
                                    .Attr<float>("scale"))

CALLS(float32, Float32);
CALLS(bfloat16, Bfloat16);
