// Training's heavy parts on a CPU: products with weights and attention by a BLAS, MKL as it is
// linked or SciPy's as a pointer; norms and activations, each in one pass over memory. blas.py
// compiles this where there is a compiler, and says what each call computes; without it XLA does
// the same.
//
// All matrices are row-major, M rows, K summed, N columns. B batch, T queries, S keys, H heads,
// G kv heads, C head width.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*,
                       const int*);
#ifdef MKL
extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                       const float*, const int*, const float*, const int*, const float*, float*,
                       const int*);
Sgemm sgemm = sgemm_;
#else
Sgemm sgemm = nullptr;  // given by blas.py, through set_sgemm
#endif

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

// ---------------------------------------------------------------------------- calls' arrays

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

// A thread's own memory, kept from call to call. It begins where a cache line does: a BLAS may
// sum in another order elsewhere, and a run must give the same bits again.
float* Scratch(int place, int64_t size) {
  struct Freed {
    void operator()(float* x) const { std::free(x); }
  };
  thread_local std::unique_ptr<float, Freed> kept[8];
  thread_local int64_t sizes[8];
  if (sizes[place] < size) {
    sizes[place] = (size + 15) / 16 * 16;
    kept[place].reset(static_cast<float*>(std::aligned_alloc(64, sizes[place] * sizeof(float))));
  }
  return kept[place].get();
}

// One call, as blas.py made it: arrays in and out, and how.
struct Call {
  ffi::ThreadPool& pool;
  std::vector<ffi::AnyBuffer> in, out;
  const ffi::Dictionary& how;

  template <class T>
  T Of(const char* name) const {
    return how.get<T>(name).value();
  }
  template <class D>
  const typename D::Entry* In(int i) const {
    return static_cast<const typename D::Entry*>(in[i].untyped_data());
  }
  template <class D>
  typename D::Entry* Out(int i) const {
    return static_cast<typename D::Entry*>(out[i].untyped_data());
  }
};

using Dimensions = ffi::Span<const int64_t>;

// The product of all axes but the last `own`.
int64_t Before(Dimensions axes, int own) {
  int64_t many = 1;
  for (size_t i = 0; i + own < axes.size(); ++i) many *= axes[i];
  return many;
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

// y = a b, of (M, K) and (K, N).
template <class D>
void Written(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, typename D::Entry* y,
             int64_t stride) {
  if constexpr (std::is_same_v<D, Float32>) return Multiply(m, n, k, a, b, y, stride);
  float* sums = Scratch(2, m * n);
  Multiply(m, n, k, a, b, sums, n);
  for (int64_t i = 0; i < m; ++i)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) y[i * stride + j] = D::Write(sums[i * n + j]);
}

// op(a) op(b) for each of the leading axes of both, summed in float32.
template <class D>
void Matmul(const Call& call) {
  const bool ta = call.Of<bool>("ta"), tb = call.Of<bool>("tb");
  auto da = call.in[0].dimensions(), dc = call.out[0].dimensions();
  const int64_t r = dc.size(), m = dc[r - 2], n = dc[r - 1], k = da[r - (ta ? 2 : 1)];
  const int64_t batch = Before(dc, 2);
  if (m * n == 0) return;
  auto *pa = call.In<D>(0), *pb = call.In<D>(1);
  auto* pc = call.Out<D>(0);
  // The longer side of c is cut, at whole registers; the other factor is read by every task.
  const bool rows = m >= n;
  const int64_t side = rows ? m : n, threads = Threads(call.pool);
  int64_t cuts = double(m) * n * k < kAlone ? 1 : threads;
  if (!std::is_same_v<D, Float32>) cuts *= (m * n + kPiece * cuts - 1) / (kPiece * cuts);
  const int64_t cut = (side + cuts * 16 - 1) / (cuts * 16) * 16;
  Run(call.pool, batch * cuts, [=](int64_t task) {
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
    Written<D>(mm, nn, k, fx, fw, y, n);
  });
}

// Rows of one group after the other, each group with a matrix of its own. So many at a time.
constexpr int64_t kGroupRows = 512;

// y = x w[its group], w turned if `turned`; rows behind the last group are 0.
template <class D>
void Grouped(const Call& call) {
  const bool turned = call.Of<bool>("turned");
  auto dy = call.out[0].dimensions();
  const int64_t rows = dy[dy.size() - 2], n = dy.back(), k = call.in[0].dimensions().back();
  const int64_t groups = call.in[2].dimensions().back();
  struct Piece {
    int64_t row, many;
    const typename D::Entry* w;
  };
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < Before(dy, 2); ++b) {
    int64_t row = b * rows;
    auto cut = [&](int64_t end, const typename D::Entry* w) {
      for (; row < end; row += kGroupRows) pieces.push_back({row, std::min(kGroupRows, end - row), w});
      row = end;
    };
    for (int64_t i = b * groups; i < (b + 1) * groups; ++i)
      cut(row + static_cast<const int32_t*>(call.in[2].untyped_data())[i],
          call.In<D>(1) + i * n * k);
    cut((b + 1) * rows, nullptr);
  }
  Run(call.pool, pieces.size(), [&](int64_t i) {
    const auto [row, many, w] = pieces[i];
    auto* y = call.Out<D>(0) + row * n;
    if (!w) return void(std::fill(y, y + many * n, typename D::Entry(0)));
    const Matrix fx = Rows<D>(call.In<D>(0) + row * k, k, many, k, 0);
    Matrix fw = turned ? Rows<D>(w, k, n, k, 1) : Rows<D>(w, n, k, n, 1);
    fw.turned = turned;
    Written<D>(many, n, k, fx, fw, y, n);
  });
}

// The gradient of w: x^T g of each group's rows.
template <class D>
void GroupedGradient(const Call& call) {
  auto dx = call.in[0].dimensions(), dw = call.out[0].dimensions();
  const int64_t rows = dx[dx.size() - 2], k = dx.back(), n = dw.back();
  const int64_t groups = call.in[2].dimensions().back(), all = Before(dw, 2);
  auto* sizes = static_cast<const int32_t*>(call.in[2].untyped_data());
  const int64_t cuts = Threads(call.pool), cut = (k + cuts * 16 - 1) / (cuts * 16) * 16;
  Run(call.pool, all * cuts, [&](int64_t task) {
    const int64_t i = task / cuts, from = std::min(k, task % cuts * cut);
    const int64_t many = std::min(k, from + cut) - from;
    int64_t row = i / groups * rows;
    for (int64_t j = i / groups * groups; j < i; ++j) row += sizes[j];
    auto* y = call.Out<D>(0) + (i * k + from) * n;
    if (many == 0 || sizes[i] == 0) return void(std::fill(y, y + many * n, typename D::Entry(0)));
    Matrix fx = Rows<D>(call.In<D>(0) + row * k + from, k, sizes[i], many, 0);
    fx.turned = true;
    const Matrix fg = Rows<D>(call.In<D>(1) + row * n, n, sizes[i], n, 1);
    Written<D>(many, n, sizes[i], fx, fg, y, n);
  });
}

// ---------------------------------------------------------------------------- rows and entries

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

inline float Sigmoid(float x) {
  const float e = Exp(x < 0.f ? x : -x);
  return (x < 0.f ? e : 1.f) / (1.f + e);
}

// Eigen's and XLA's rational form, to 3 units in the last place.
inline float Erf(float x) {
  x = x < -4.f ? -4.f : x > 4.f ? 4.f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f, q = -1.45660718464996e-05f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

// Activations of a row of float32, and their derivatives.
template <class F>
inline void Each(int64_t n, const F& f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) f(i);
}

enum Activation { kGelu, kGeluTanh, kSilu };  // as in blas.py

void Values(int64_t kind, int64_t n, const float* __restrict x, float* __restrict y) {
  if (kind == kGelu)  // arXiv:1606.08415
    Each(n, [=](int64_t i) { y[i] = x[i] * (.5f + .5f * Erf(x[i] * .70710678118f)); });
  if (kind == kGeluTanh)  // its approximation: (1 + tanh u) / 2 is the sigmoid of 2 u
    Each(n, [=](int64_t i) {
      y[i] = x[i] * Sigmoid(1.5957691216f * (x[i] + .044715f * x[i] * x[i] * x[i]));
    });
  if (kind == kSilu) Each(n, [=](int64_t i) { y[i] = x[i] * Sigmoid(x[i]); });
}

void ValuesAndSlopes(int64_t kind, int64_t n, const float* __restrict x, float* __restrict y,
                     float* __restrict dy) {
  if (kind == kGelu)
    Each(n, [=](int64_t i) {
      const float below = .5f + .5f * Erf(x[i] * .70710678118f);
      y[i] = x[i] * below;
      dy[i] = below + x[i] * .3989422804f * Exp(-.5f * x[i] * x[i]);
    });
  if (kind == kGeluTanh)
    Each(n, [=](int64_t i) {
      const float s = Sigmoid(1.5957691216f * (x[i] + .044715f * x[i] * x[i] * x[i]));
      y[i] = x[i] * s;
      dy[i] = s + y[i] * (1.f - s) * 1.5957691216f * (1.f + .134145f * x[i] * x[i]);
    });
  if (kind == kSilu)
    Each(n, [=](int64_t i) {
      const float s = Sigmoid(x[i]);
      y[i] = x[i] * s;
      dy[i] = s + y[i] * (1.f - s);
    });
}

constexpr int64_t kFew = 1 << 14;  // entries: fewer take less time than another thread to come

// Calls f(row) for each row, in parts that threads take.
template <class F>
void EachRow(const Call& call, int64_t rows, int64_t width, const F& f) {
  const int64_t parts = rows * width < kFew ? 1 : std::min(rows, 4 * Threads(call.pool));
  Run(call.pool, parts, [&](int64_t part) {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) f(i);
  });
}

// Where the rows of an activation lie: `up`, if any, multiplies act(x); it is the second array,
// or, where that has no entries, the right half of x's rows.
struct Gated {
  int64_t rows, width, x_row, up_row, kind;
  bool gated, apart;

  Gated(const Call& call, Dimensions y)
      : rows(Before(y, 1)), width(y.back()), x_row(call.in[0].dimensions().back()),
        kind(call.Of<int64_t>("activation")), gated(call.Of<bool>("gated")),
        apart(call.in[1].element_count()) {
    up_row = apart ? width : x_row;
  }
};

constexpr int64_t kPart = 1024;  // of a row at a time: it stays in the first cache

// y = act(x), or act(x) up.
template <class D>
void Activate(const Call& call) {
  const Gated d(call, call.out[0].dimensions());
  EachRow(call, d.rows, d.width, [&](int64_t i) {
    float z[kPart], a[kPart];
    for (int64_t from = 0; from < d.width; from += kPart) {
      const int64_t n = std::min(kPart, d.width - from);
      auto* __restrict x = call.In<D>(0) + i * d.x_row + from;
      auto* __restrict up = d.apart ? call.In<D>(1) + i * d.up_row + from : x + d.width;
      auto* __restrict y = call.Out<D>(0) + i * d.width + from;
      Each(n, [&](int64_t j) { z[j] = D::Read(x[j]); });
      Values(d.kind, n, z, a);
      if (d.gated) Each(n, [&](int64_t j) { y[j] = D::Write(a[j] * D::Read(up[j])); });
      else Each(n, [&](int64_t j) { y[j] = D::Write(a[j]); });
    }
  });
}

template <class D>
void ActivateBackward(const Call& call) {
  const Gated d(call, call.in[2].dimensions());
  EachRow(call, d.rows, d.width, [&](int64_t i) {
    float z[kPart], a[kPart], da[kPart];
    for (int64_t from = 0; from < d.width; from += kPart) {
      const int64_t n = std::min(kPart, d.width - from);
      auto* __restrict x = call.In<D>(0) + i * d.x_row + from;
      auto* __restrict dx = call.Out<D>(0) + i * d.x_row + from;
      auto* __restrict g = call.In<D>(2) + i * d.width + from;
      auto* __restrict up = d.apart ? call.In<D>(1) + i * d.up_row + from : x + d.width;
      auto* __restrict d_up = d.apart ? call.Out<D>(1) + i * d.up_row + from : dx + d.width;
      Each(n, [&](int64_t j) { z[j] = D::Read(x[j]); });
      ValuesAndSlopes(d.kind, n, z, a, da);
      if (d.gated)
        Each(n, [&](int64_t j) {
          const float by_y = D::Read(g[j]);
          dx[j] = D::Write(by_y * D::Read(up[j]) * da[j]);
          d_up[j] = D::Write(by_y * a[j]);
        });
      else Each(n, [&](int64_t j) { dx[j] = D::Write(D::Read(g[j]) * da[j]); });
    }
  });
}

// A norm's scale or bias: `otherwise` where it has no entries; else a vector, or with more axes
// before its own, one for each equal share of the rows.
struct Vector {
  std::vector<float> none;
  const float* data;
  int64_t rows, stride;  // of rows that each vector serves; from one vector to the next

  Vector(const ffi::AnyBuffer& x, int64_t rows, int64_t width, float otherwise) {
    const bool there = x.element_count();
    if (!there) none.assign(width, otherwise);
    data = there ? static_cast<const float*>(x.untyped_data()) : none.data();
    this->rows = rows / Before(x.dimensions(), 1);
    stride = there ? width : 0;
  }
  const float* operator()(int64_t row) const { return data + row / rows * stride; }
};

// LayerNorm (`centred`) or RMSNorm of each row; kept: its mean, 1 / its deviation.
template <class D>
void Norm(const Call& call) {
  const int64_t width = call.in[0].dimensions().back(), rows = Before(call.in[0].dimensions(), 1);
  const Vector scale(call.in[1], rows, width, 1), bias(call.in[2], rows, width, 0);
  const bool centred = call.Of<bool>("centred");
  const float epsilon = call.Of<float>("epsilon");
  EachRow(call, rows, width, [&](int64_t i) {
    auto* __restrict x = call.In<D>(0) + i * width;
    auto* __restrict y = call.Out<D>(0) + i * width;
    const float *__restrict times = scale(i), *__restrict plus = bias(i);
    float mean = 0, square = 0;
    if (centred) {
#pragma omp simd reduction(+ : mean)
      for (int64_t j = 0; j < width; ++j) mean += D::Read(x[j]);
      mean /= width;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t j = 0; j < width; ++j) {
      const float z = D::Read(x[j]) - mean;
      square += z * z;
    }
    const float rate = 1.f / std::sqrt(square / width + epsilon);
    call.Out<Float32>(1)[2 * i] = mean;
    call.Out<Float32>(1)[2 * i + 1] = rate;
    Each(width, [&](int64_t j) {
      y[j] = D::Write((D::Read(x[j]) - mean) * rate * times[j] + plus[j]);
    });
  });
}

template <class D>
void NormBackward(const Call& call) {
  const int64_t width = call.in[0].dimensions().back(), rows = Before(call.in[0].dimensions(), 1);
  const Vector scale(call.in[1], rows, width, 1);
  const bool centred = call.Of<bool>("centred");
  // Each part of the rows that share a vector has its own sums for the gradients of vectors. As
  // many parts whatever the threads are, so that a run goes on with the same bits on any number.
  const int64_t vectors = Before(call.in[1].dimensions(), 1);
  const int64_t parts = scale.rows * width < kFew ? 1 : std::min<int64_t>(scale.rows, 64);
  std::vector<float> sums(vectors * parts * 2 * width);
  Run(call.pool, vectors * parts, [&](int64_t part) {
    float* __restrict by_scale = sums.data() + part * 2 * width;
    float* __restrict by_bias = by_scale + width;
    const int64_t first = part / parts * scale.rows;
    const int64_t from = first + scale.rows * (part % parts) / parts;
    const int64_t to = first + scale.rows * (part % parts + 1) / parts;
    for (int64_t i = from; i < to; ++i) {
      auto *__restrict x = call.In<D>(0) + i * width, *__restrict g = call.In<D>(3) + i * width;
      auto* __restrict dx = call.Out<D>(0) + i * width;
      const float mean = call.In<Float32>(2)[2 * i], rate = call.In<Float32>(2)[2 * i + 1];
      const float* __restrict times = scale(i);
      float along = 0, shift = 0;
#pragma omp simd reduction(+ : along, shift)
      for (int64_t j = 0; j < width; ++j) {
        const float by_y = D::Read(g[j]), z = (D::Read(x[j]) - mean) * rate;
        by_scale[j] += by_y * z;
        by_bias[j] += by_y;
        along += by_y * times[j] * z;
        shift += by_y * times[j];
      }
      along /= width;
      shift = centred ? shift / width : 0.f;
      Each(width, [&](int64_t j) {
        const float z = (D::Read(x[j]) - mean) * rate;
        dx[j] = D::Write((D::Read(g[j]) * times[j] - shift - z * along) * rate);
      });
    }
  });
  for (int which : {0, 1}) {
    if (call.out[1 + which].element_count() == 0) continue;
    float* result = call.Out<Float32>(1 + which);
    std::fill(result, result + vectors * width, 0.f);
    for (int64_t part = 0; part < vectors * parts; ++part)
      for (int64_t j = 0; j < width; ++j)
        result[part / parts * width + j] += sums[(2 * part + which) * width + j];
  }
}

// log sum exp of each row, in float32.
template <class D>
void LogSumExp(const Call& call) {
  const int64_t width = call.in[0].dimensions().back(), rows = Before(call.in[0].dimensions(), 1);
  EachRow(call, rows, width, [&](int64_t i) {
    auto* __restrict x = call.In<D>(0) + i * width;
    float most = D::Read(x[0]), sum = 0;
    int nan = 0;
#pragma omp simd reduction(max : most) reduction(| : nan)
    for (int64_t j = 0; j < width; ++j) {
      const float z = D::Read(x[j]);
      most = most > z ? most : z;
      nan |= z != z;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) sum += Exp(D::Read(x[j]) - most);
    const float result = std::isfinite(most) ? most + std::log(sum) : most;
    call.Out<Float32>(0)[i] = nan ? NAN : result;
  });
}

// ---------------------------------------------------------------------------- attention

constexpr int kQueries = 128;  // at a time: their scores stay in the cache

struct Shape {
  int64_t batch, t, s, heads, kv_heads, c, bias_batch, bias_rows;
  int64_t q_row, kv_row;  // entries from one token to the next
  bool together, causal;
  int64_t window;
  float scale;

  int64_t Group() const { return heads / kv_heads; }
  // The keys that queries `from` to `to` may see.
  int64_t First(int64_t from) const { return causal ? std::max<int64_t>(0, from - window + 1) : 0; }
  int64_t Last(int64_t to) const { return causal ? std::min(s, to) : s; }
  // Where the bias of a query begins, of a batch of `bias_batch` times `bias_rows` rows.
  int64_t Bias(int64_t b, int64_t query) const {
    return (b * bias_batch / batch * bias_rows + (bias_rows == 1 ? 0 : query)) * s;
  }
};

// scale q k^T of queries `from` to `to`, over the keys `first` to `last`.
void Scores(const Shape& d, Matrix q, Matrix k, int64_t from, int64_t to, int64_t first,
            int64_t last, float* scores) {
  Multiply(to - from, last - first, d.c, {q.data + from * q.stride, q.stride},
           {k.data + first * k.stride, k.stride, true}, scores, last - first, d.scale);
}

template <class D>
void Forward(const Shape& d, const typename D::Entry* pq, const typename D::Entry* pk,
             const typename D::Entry* pv, const float* bias, typename D::Entry* py, float* kept,
             int64_t b, int64_t g) {
  const int64_t wide = d.heads * d.c, kv = b * d.s * d.kv_row + g * d.c;
  const Matrix k = Rows<D>(pk + kv, d.kv_row, d.s, d.c, 0);
  const Matrix v = Rows<D>(pv + kv, d.kv_row, d.s, d.c, 1);
  for (int64_t h = g * d.Group(); h < (g + 1) * d.Group(); ++h) {
    const Matrix q = Rows<D>(pq + b * d.t * d.q_row + h * d.c, d.q_row, d.t, d.c, 2);
    auto* y = py + b * d.t * wide + h * d.c;
    float* statistics = kept + (b * d.heads + h) * d.t * 2;
    for (int64_t from = 0; from < d.t; from += kQueries) {
      const int64_t to = std::min(d.t, from + kQueries), rows = to - from;
      const int64_t first = d.First(from), last = d.Last(to), n = last - first;
      float* scores = Scratch(3, rows * n);
      Scores(d, q, k, from, to, first, last, scores);
      for (int64_t i = 0; i < rows; ++i) {
        float* __restrict x = scores + i * n;
        const float* __restrict add = bias + d.Bias(b, from + i) + first;
        float most = x[0] + add[0], sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < n; ++j) {
          x[j] += add[j];
          most = most > x[j] ? most : x[j];
        }
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
  const int64_t wide = d.heads * d.c, kv = b * d.s * d.kv_row + g * d.c;
  const Matrix k = Rows<D>(pk + kv, d.kv_row, d.s, d.c, 0);
  const Matrix v = Rows<D>(pv + kv, d.kv_row, d.s, d.c, 1);
  float* dk = Scratch(5, 2 * d.s * d.c);
  float* dv = dk + d.s * d.c;
  std::fill(dk, dk + 2 * d.s * d.c, 0.f);
  for (int64_t h = g * d.Group(); h < (g + 1) * d.Group(); ++h) {
    const int64_t head = b * d.t * wide + h * d.c, query = b * d.t * d.q_row + h * d.c;
    const Matrix q = Rows<D>(pq + query, d.q_row, d.t, d.c, 2);
    const Matrix dy = Rows<D>(pg + head, wide, d.t, d.c, 6);
    const float* statistics = kept + (b * d.heads + h) * d.t * 2;
    for (int64_t from = 0; from < d.t; from += kQueries) {
      const int64_t to = std::min(d.t, from + kQueries), rows = to - from;
      const int64_t first = d.First(from), last = d.Last(to), n = last - first;
      float* weights = Scratch(3, 2 * rows * n);
      float* d_scores = weights + rows * n;
      Scores(d, q, k, from, to, first, last, weights);
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
        const float* __restrict add = bias + d.Bias(b, from + i) + first;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          w[j] = Exp(w[j] + add[j] - most) * share;
          ds[j] = w[j] * (ds[j] - row);
        }
      }
      const Matrix ds{d_scores, int(n)};
      Multiply(n, d.c, rows, {weights, int(n), true}, {dy.data + from * dy.stride, dy.stride},
               dv + first * d.c, d.c, 1, 1);
      Multiply(n, d.c, rows, {d_scores, int(n), true}, {q.data + from * q.stride, q.stride},
               dk + first * d.c, d.c, d.scale, 1);
      float* dq = Scratch(4, rows * d.c);
      Multiply(rows, d.c, n, ds, {k.data + first * k.stride, k.stride}, dq, d.c, d.scale);
      for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
        for (int64_t j = 0; j < d.c; ++j)
          pdq[query + (from + i) * d.q_row + j] = D::Write(dq[i * d.c + j]);
    }
  }
  for (int64_t i = 0; i < d.s; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < d.c; ++j) {
      pdk[kv + i * d.kv_row + j] = D::Write(dk[i * d.c + j]);
      pdv[kv + i * d.kv_row + j] = D::Write(dv[i * d.c + j]);
    }
  }
}

// The batch is all axes before the last three; the bias is (B or fewer, 1, T or 1, S). Queries,
// keys and values are three arrays, or `together` in the rows of one.
Shape ShapeOf(const Call& call, Dimensions y) {
  const bool together = call.Of<bool>("together");
  const int64_t r = y.size(), t = y[r - 3], h = y[r - 2], c = y[r - 1];
  auto bias = call.in[together ? 1 : 3].dimensions(), k = call.in[together ? 0 : 1].dimensions();
  const int64_t s = together ? t : k[r - 3];
  const int64_t kv_heads = together ? (k.back() / c - h) / 2 : k[r - 2];
  return {.batch = Before(y, 3), .t = t, .s = s, .heads = h, .kv_heads = kv_heads, .c = c,
          .bias_batch = Before(bias, 3), .bias_rows = bias[r - 2],
          .q_row = together ? k.back() : h * c, .kv_row = together ? k.back() : kv_heads * c,
          .together = together, .causal = call.Of<bool>("causal"),
          .window = call.Of<int64_t>("window"), .scale = call.Of<float>("scale")};
}

// Where keys and values begin, of arrays that begin with the queries'.
template <class D>
struct Heads {
  typename D::Entry *q, *k, *v;

  Heads(const std::vector<ffi::AnyBuffer>& x, const Shape& d) {
    auto at = [&](int i) { return static_cast<typename D::Entry*>(x[i].untyped_data()); };
    q = at(0);
    k = d.together ? q + d.heads * d.c : at(1);
    v = d.together ? k + d.kv_heads * d.c : at(2);
  }
};

template <class D>
void Attend(const Call& call) {
  const Shape d = ShapeOf(call, call.out[0].dimensions());
  const Heads<D> x(call.in, d);
  auto* bias = call.In<Float32>(d.together ? 1 : 3);
  Run(call.pool, d.batch * d.kv_heads, [&](int64_t i) {
    Forward<D>(d, x.q, x.k, x.v, bias, call.Out<D>(0), call.Out<Float32>(1), i / d.kv_heads,
               i % d.kv_heads);
  });
}

template <class D>
void AttendBackward(const Call& call) {
  const int n = call.in.size();  // the last: bias, y, kept, g
  const Shape d = ShapeOf(call, call.in[n - 3].dimensions());
  const Heads<D> x(call.in, d), dx(call.out, d);
  Run(call.pool, d.batch * d.kv_heads, [&](int64_t i) {
    Backward<D>(d, x.q, x.k, x.v, call.In<Float32>(n - 4), call.In<D>(n - 3),
                call.In<Float32>(n - 2), call.In<D>(n - 1), dx.q, dx.k, dx.v, i / d.kv_heads,
                i % d.kv_heads);
  });
}

// ---------------------------------------------------------------------------- the handler

template <class D>
bool Made(const Call& call, std::string_view what) {
  if (what == "matmul") Matmul<D>(call);
  else if (what == "grouped") Grouped<D>(call);
  else if (what == "grouped_gradient") GroupedGradient<D>(call);
  else if (what == "activate") Activate<D>(call);
  else if (what == "activate_backward") ActivateBackward<D>(call);
  else if (what == "norm") Norm<D>(call);
  else if (what == "norm_backward") NormBackward<D>(call);
  else if (what == "logsumexp") LogSumExp<D>(call);
  else if (what == "attend") Attend<D>(call);
  else if (what == "attend_backward") AttendBackward<D>(call);
  else return false;
  return true;
}

// One handler of all calls: XLA's templates take long to compile for each handler.
ffi::Error Make(ffi::ThreadPool pool, ffi::RemainingArgs in, ffi::RemainingRets out,
                ffi::Dictionary how) {
  Call call{pool, {}, {}, how};
  for (size_t i = 0; i < in.size(); ++i) call.in.push_back(in.get<ffi::AnyBuffer>(i).value());
  for (size_t i = 0; i < out.size(); ++i) call.out.push_back(*out.get<ffi::AnyBuffer>(i).value());
  auto what = how.get<std::string_view>("what").value();
  const bool made = call.in[0].element_type() == ffi::DataType::BF16 ? Made<Bfloat16>(call, what)
                                                                     : Made<Float32>(call, what);
  return made ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::string(what));
}

}  // namespace

#ifndef MKL
extern "C" void set_sgemm(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(make, Make,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs());
