// The magnitude-preserving step in one pass over weights, gradients, moments and averages (trainer/optimizer.py has the equations).
//
// A row is read from memory once: its two sums, the projected gradient, Adam, the averages and the renormalisation all happen while it
// is in the cache. Work comes as segments (fragment, begin, length, kind, length of the row): a whole row (kind -1), a piece of a row
// that another rank shares (its slot), whose sums come from outside and which is renormalised outside, or elements without rows (-2).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

namespace {

using at::Tensor;

constexpr int LANES = 16;
constexpr int64_t NEAR = 64;  // elements: how far ahead moments and averages are asked for
constexpr int STREAMS = 4;  // in a read alone, which one stream leaves waiting for memory a quarter of the time
constexpr float EPS = 1e-4f;  // models/magnitude.py
constexpr int64_t PLAIN = -2, ROW = -1;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline float total(Lanes v) {
  float sum = 0;
  for (int l = 0; l < LANES; ++l) sum += v[l];
  return sum;
}

struct Sums {
  float aa, ab;
};

inline Sums dot(const float* a, const float* b, int64_t n) {
  Lanes aa[2] = {}, ab[2] = {};  // two chains each: an addition takes longer than a load
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    for (int half = 0; half < 2; ++half) {
      const Lanes x = load(a + i + half * LANES), y = load(b + i + half * LANES);
      aa[half] += x * x;
      ab[half] += x * y;
    }
  Sums sums{total(aa[0] + aa[1]), total(ab[0] + ab[1])};
  for (; i < n; ++i) sums.aa += a[i] * a[i], sums.ab += a[i] * b[i];
  return sums;
}

struct Numbers {
  // with root = sqrt(1 - beta2^step): eps root and lr root / (1 - beta1^step), which leaves one division of two
  float beta1, beta2, eps, step_size;
};

inline Lanes square_root(Lanes v) {
#ifdef __AVX512F__
  return (Lanes)_mm512_sqrt_ps((__m512)v);
#else
  for (int l = 0; l < LANES; ++l) v[l] = std::sqrt(v[l]);
  return v;
#endif
}

struct Pointers {  // to one segment's piece of each tensor
  float *w, *g, *m, *v;
  const std::vector<float*>& averages;
  int64_t fragment, fragments, begin;
  float* average(size_t a) const { return averages[a * fragments + fragment] + begin; }
};

// Adam with (g - along w) scale, and every average towards the weights as Adam left them; return <w, w>. Loads and stores see
// `count` <= 16 elements at i; what comes after the segment is asked for meanwhile, because rows are short and follow each other.
template <bool whole, int AVERAGES>
inline Lanes step(const Pointers& p, int64_t i, int64_t count, int64_t ahead, float along, float scale, const Numbers& k,
                  const float* weights, float* const* averages) {
  const size_t bytes = whole ? sizeof(Lanes) : count * sizeof(float);
  auto get = [&](const float* from) {
    Lanes v = {};
    std::memcpy(&v, from + i, bytes);
    return v;
  };
  auto put = [&](float* to, const Lanes& v) { std::memcpy(to + i, &v, bytes); };
  if (whole) {
    __builtin_prefetch(p.w + i + ahead), __builtin_prefetch(p.g + i + ahead);
    __builtin_prefetch(p.m + i + NEAR, 1), __builtin_prefetch(p.v + i + NEAR, 1);
    for (int a = 0; a < AVERAGES; ++a) __builtin_prefetch(averages[a] + i + NEAR, 1);
  }
  const Lanes old = get(p.w), g = (get(p.g) - along * old) * scale;
  Lanes m = get(p.m), v = get(p.v);
  m += (1 - k.beta1) * (g - m);
  v = k.beta2 * v + (1 - k.beta2) * g * g;
  const Lanes w = old - k.step_size * m / (square_root(v) + k.eps);
  put(p.m, m), put(p.v, v), put(p.w, w);
  for (int a = 0; a < AVERAGES; ++a) {  // as torch.lerp: exact at both ends
    const Lanes e = get(averages[a]);
    put(averages[a], weights[a] < 0.5f ? e + weights[a] * (w - e) : w - (w - e) * (1 - weights[a]));
  }
  return w * w;
}

template <int AVERAGES>
float step_segment(const Pointers& p, int64_t n, float along, float scale, const Numbers& k, const float* weights) {
  float* averages[AVERAGES + 1];
  for (int a = 0; a < AVERAGES; ++a) averages[a] = p.average(a);
  Lanes squares = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares += step<true, AVERAGES>(p, i, LANES, n, along, scale, k, weights, averages);
  if (i < n) squares += step<false, AVERAGES>(p, i, n - i, n, along, scale, k, weights, averages);
  return total(squares);
}

using StepSegment = float (*)(const Pointers&, int64_t, float, float, const Numbers&, const float*);
constexpr StepSegment STEP[] = {step_segment<0>, step_segment<1>, step_segment<2>, step_segment<3>, step_segment<4>};

// as torch.lerp: exact at both ends
inline void move(float* __restrict average, const float* __restrict w, int64_t n, float weight) {
  if (weight < 0.5f)
    for (int64_t i = 0; i < n; ++i) average[i] += weight * (w[i] - average[i]);
  else
    for (int64_t i = 0; i < n; ++i) average[i] = w[i] - (w[i] - average[i]) * (1 - weight);
}

void one_pass(at::TensorList masters, at::TensorList grads, at::TensorList first, at::TensorList second, at::TensorList averages,
              const Tensor& segments, const Tensor& cut, const Tensor& corrections, const Tensor& masked, double gradient_scale,
              double lr, double beta1, double beta2, double eps, at::ArrayRef<double> weights) {
  const size_t fragments = masters.size();
  std::vector<float*> w, g, m, v, e;
  for (const Tensor& t : masters) w.push_back(t.mutable_data_ptr<float>());
  for (const Tensor& t : grads) g.push_back(t.mutable_data_ptr<float>());
  for (const Tensor& t : first) m.push_back(t.mutable_data_ptr<float>());
  for (const Tensor& t : second) v.push_back(t.mutable_data_ptr<float>());
  for (const Tensor& t : averages) e.push_back(t.mutable_data_ptr<float>());
  const double* one_minus = corrections.const_data_ptr<double>();  // 1 - beta^step of both moments
  const bool still = *masked.const_data_ptr<float>() > 0;
  const double root = std::sqrt(one_minus[1]);
  const Numbers k{float(beta1), float(beta2), float(eps * root), float(lr * root / one_minus[0])};
  const float* shared = cut.const_data_ptr<float>();  // <w, w> and <w, g> of every cut row
  const int64_t slots = cut.size(1);
  const std::vector<float> pull(weights.begin(), weights.end());
  const size_t fused = std::min(pull.size(), std::size(STEP) - 1);
  const auto table = segments.const_data_ptr<int64_t>();
  at::parallel_for(0, segments.size(0), 64, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s) {
      const int64_t f = table[5 * s], begin = table[5 * s + 1], n = table[5 * s + 2], kind = table[5 * s + 3];
      const Pointers p{w[f] + begin, g[f] + begin, m[f] + begin, v[f] + begin, e, f, int64_t(fragments), begin};
      if (still) {
        for (size_t a = 0; a < pull.size(); ++a) move(p.average(a), p.w, n, pull[a]);
        continue;
      }
      float along = 0, scale = float(gradient_scale);
      if (kind != PLAIN) {
        const Sums sums = kind == ROW ? dot(p.w, p.g, n) : Sums{shared[kind], shared[slots + kind]};
        const float length = float(table[5 * s + 4]);  // of the whole row
        const float r = std::sqrt(sums.aa / length), below = length * r * (r + EPS);
        along = sums.ab / (below > 1e-30f ? below : 1e-30f);
        scale /= r + EPS;
      }
      const float square = STEP[fused](p, n, along, scale, k, pull.data());
      for (size_t a = fused; a < pull.size(); ++a) move(p.average(a), p.w, n, pull[a]);
      if (kind == ROW) {
        const float factor = 1 / (std::sqrt(square / float(n)) + EPS);
        for (int64_t i = 0; i < n; ++i) p.w[i] *= factor;
      }
    }
  });
}

// sqrt(<t, t>) of every tensor: infinite or NaN where an entry is
Tensor norms(at::TensorList tensors) {
  Tensor out = at::empty({int64_t(tensors.size())}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  for (const Tensor& t : tensors) {
    const float* from = t.const_data_ptr<float>();
    const int64_t part = t.numel() / (2 * STREAMS * LANES) * 2 * LANES;  // of a stream
    Lanes sums[STREAMS][2] = {};
    for (int64_t i = 0; i < part; i += 2 * LANES)
      for (int s = 0; s < STREAMS; ++s)
        for (int half = 0; half < 2; ++half) {
          const float* at = from + s * part + i + half * LANES;
          __builtin_prefetch(at + 512, 0, 2);
          const Lanes x = load(at);
          sums[s][half] += x * x;
        }
    float sum = 0;
    for (int s = 0; s < STREAMS; ++s) sum += total(sums[s][0] + sums[s][1]);
    for (int64_t i = STREAMS * part; i < t.numel(); ++i) sum += from[i] * from[i];
    *to++ = std::sqrt(sum);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(evenkeel, m) {
  m.def(
      "one_pass(Tensor(a!)[] masters, Tensor(b!)[] grads, Tensor(c!)[] first, Tensor(d!)[] second, Tensor(e!)[] averages, "
      "Tensor segments, Tensor cut, Tensor corrections, Tensor masked, float gradient_scale, float lr, float beta1, float beta2, "
      "float eps, float[] weights) -> ()");
  m.def("norms(Tensor[] tensors) -> Tensor");
}

TORCH_LIBRARY_IMPL(evenkeel, CPU, m) {
  m.impl("one_pass", one_pass);
  m.impl("norms", norms);
}
