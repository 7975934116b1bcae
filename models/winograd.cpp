// 3x3 convolutions on CPUs by Winograd's F(4x4, 3x3): 36 multiplications where the definition has 144.
//
// Lavin & Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308, Section 4.3), for every 4x4 tile of the output:
//
//     Y = A^T [ (G g G^T) * (B^T d B) ] A          d: 6x6 window of the input, g: 3x3 filter, * elementwise
//
// Summed over channels, the elementwise products are 36 matrix products, one for each place p of the 6x6 grid. Everything between
// the transforms is stored as [row, 36, channels], rows being tiles or output channels, so that a transform writes one contiguous
// piece of memory. The backward is the transpose of each of the three linear maps. Tensors are fp32, activations channels_last.

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::Tensor;

constexpr int LANES = 16;  // channels handled at once: one AVX-512 register, two of AVX2
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

inline Lanes load(const float* from) {
  Lanes v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

// The matrices of F(4, 3) for the points 0, +-1, +-2 and infinity, and their transposes, as products with a vector of 16 channels at
// each place; `s` is the distance between consecutive entries.

inline void bt(const Lanes* d, int s, Lanes* out, int t) {  // B^T: 6 -> 6
  const Lanes a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s], c = d[4 * s] - d[2 * s], e = 2 * (d[3 * s] - d[s]);
  out[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s];
  out[t] = a + b;
  out[2 * t] = a - b;
  out[3 * t] = c + e;
  out[4 * t] = c - e;
  out[5 * t] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
}

inline void b(const Lanes* v, int s, Lanes* out, int t) {  // B: 6 -> 6
  const Lanes p = v[s] + v[2 * s], m = v[s] - v[2 * s], q = v[3 * s] + v[4 * s], n = 2 * (v[3 * s] - v[4 * s]);
  out[0] = 4 * v[0];
  out[t] = 4 * v[5 * s] - 4 * m - n;
  out[2 * t] = -5 * v[0] - 4 * p - q;
  out[3 * t] = m + n - 5 * v[5 * s];
  out[4 * t] = v[0] + p + q;
  out[5 * t] = v[5 * s];
}

inline void at_(const Lanes* m, int s, Lanes* out, int t) {  // A^T: 6 -> 4
  const Lanes p = m[s] + m[2 * s], d = m[s] - m[2 * s], q = m[3 * s] + m[4 * s], e = m[3 * s] - m[4 * s];
  out[0] = m[0] + p + q;
  out[t] = d + 2 * e;
  out[2 * t] = p + 4 * q;
  out[3 * t] = d + 8 * e + m[5 * s];
}

inline void a(const Lanes* y, int s, Lanes* out, int t) {  // A: 4 -> 6
  const Lanes even = y[0] + y[2 * s], odd = y[s] + y[3 * s];
  const Lanes even4 = y[0] + 4 * y[2 * s], odd4 = 2 * y[s] + 8 * y[3 * s];
  out[0] = y[0];
  out[t] = even + odd;
  out[2 * t] = even - odd;
  out[3 * t] = even4 + odd4;
  out[4 * t] = even4 - odd4;
  out[5 * t] = y[3 * s];
}

inline void g(const Lanes* w, int s, Lanes* out, int t) {  // G: 3 -> 6
  const Lanes even = w[0] + w[2 * s], even4 = (w[0] + 4 * w[2 * s]) * (1.f / 24), odd4 = w[s] * (1.f / 12);
  out[0] = w[0] * (1.f / 4);
  out[t] = (even + w[s]) * (-1.f / 6);
  out[2 * t] = (even - w[s]) * (-1.f / 6);
  out[3 * t] = even4 + odd4;
  out[4 * t] = even4 - odd4;
  out[5 * t] = w[2 * s];
}

inline void gt(const Lanes* u, int s, Lanes* out, int t) {  // G^T: 6 -> 3
  const Lanes p = (u[s] + u[2 * s]) * (1.f / 6), q = u[3 * s] + u[4 * s];
  out[0] = u[0] * (1.f / 4) - p + q * (1.f / 24);
  out[t] = (u[2 * s] - u[s]) * (1.f / 6) + (u[3 * s] - u[4 * s]) * (1.f / 12);
  out[2 * t] = q * (1.f / 6) - p + u[5 * s];
}

typedef void Map(const Lanes*, int, Lanes*, int);

// out [M, M] = map in [N, N] map^T
template <Map map, int N, int M>
inline void both_sides(const Lanes* in, Lanes* out) {
  Lanes half[M * N];
  for (int j = 0; j < N; ++j) map(in + j, N, half + j, N);
  for (int i = 0; i < M; ++i) map(half + i * N, 1, out + i * M, 1);
}

struct Tiles {  // the 4x4 tiles of a channels_last image [n, channels, height, width]
  int64_t height, width, channels, down, across, number;
  explicit Tiles(const Tensor& x)
      : height(x.size(2)), width(x.size(3)), channels(x.size(1)), down(height / 4), across(width / 4), number(x.size(0) * down * across) {}

  // Call f(tile, first pixel of its image, first row, first column) for the tiles of images [begin, end).
  template <typename F>
  void each(const Tensor& x, F f) const {
    at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin * down * across; tile < end * down * across; ++tile) {
        const int64_t image = tile / (down * across), place = tile % (down * across);
        f(tile, image * height * width, place / across * 4, place % across * 4);
      }
    });
  }
};

// V [tiles, 36, channels] = B^T d B, d being the 6x6 window around each tile with zeros outside of the image
Tensor windows(const Tensor& x) {
  const Tiles t(x);
  Tensor v = at::empty({t.number, 36, t.channels}, x.options().memory_format(at::MemoryFormat::Contiguous));
  const float* from = x.const_data_ptr<float>();
  float* to = v.mutable_data_ptr<float>();
  t.each(x, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    for (int64_t c = 0; c < t.channels; c += LANES) {
      Lanes d[36], out[36];
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j) {
          const int64_t h = row + i - 1, w = column + j - 1;
          const bool inside = h >= 0 && h < t.height && w >= 0 && w < t.width;
          d[6 * i + j] = inside ? load(from + (image + h * t.width + w) * t.channels + c) : Lanes{};
        }
      both_sides<bt, 6, 6>(d, out);
      for (int p = 0; p < 36; ++p) store(to + (tile * 36 + p) * t.channels + c, out[p]);
    }
  });
  return v;
}

// The transpose of `windows`: windows overlap, so their gradients add up. x gives the shape.
Tensor windows_transposed(const Tensor& dv, const Tensor& x) {
  const Tiles t(x);
  Tensor dx = at::zeros_like(x);
  const float* from = dv.const_data_ptr<float>();
  float* to = dx.mutable_data_ptr<float>();
  t.each(x, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    for (int64_t c = 0; c < t.channels; c += LANES) {
      Lanes d[36], out[36];
      for (int p = 0; p < 36; ++p) d[p] = load(from + (tile * 36 + p) * t.channels + c);
      both_sides<b, 6, 6>(d, out);
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j) {
          const int64_t h = row + i - 1, w = column + j - 1;
          if (h < 0 || h >= t.height || w < 0 || w >= t.width) continue;
          float* pixel = to + (image + h * t.width + w) * t.channels + c;
          store(pixel, load(pixel) + out[6 * i + j]);
        }
    }
  });
  return dx;
}

// y [n, channels, height, width] = A^T M A from M [tiles, 36, channels]
void tiles(const Tensor& m, Tensor& y) {
  const Tiles t(y);
  const float* from = m.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  t.each(y, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    for (int64_t c = 0; c < t.channels; c += LANES) {
      Lanes d[36], out[16];
      for (int p = 0; p < 36; ++p) d[p] = load(from + (tile * 36 + p) * t.channels + c);
      both_sides<at_, 6, 4>(d, out);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          store(to + (image + (row + i) * t.width + column + j) * t.channels + c, out[4 * i + j]);
    }
  });
}

// The transpose of `tiles`: dM [tiles, 36, channels] = A dY A^T
Tensor tiles_transposed(const Tensor& dy) {
  const Tiles t(dy);
  Tensor dm = at::empty({t.number, 36, t.channels}, dy.options().memory_format(at::MemoryFormat::Contiguous));
  const float* from = dy.const_data_ptr<float>();
  float* to = dm.mutable_data_ptr<float>();
  t.each(dy, [&](int64_t tile, int64_t image, int64_t row, int64_t column) {
    for (int64_t c = 0; c < t.channels; c += LANES) {
      Lanes d[16], out[36];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
          d[4 * i + j] = load(from + (image + (row + i) * t.width + column + j) * t.channels + c);
      both_sides<a, 4, 6>(d, out);
      for (int p = 0; p < 36; ++p) store(to + (tile * 36 + p) * t.channels + c, out[p]);
    }
  });
  return dm;
}

// U [out, 36, in] = scale G g G^T from filters [out, in, 3, 3]
Tensor filters(const Tensor& w, float scale) {
  const int64_t in = w.size(1);
  Tensor u = at::empty({w.size(0), 36, in}, w.options());
  const float* from = w.const_data_ptr<float>();
  float* to = u.mutable_data_ptr<float>();
  at::parallel_for(0, w.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < in; c += LANES) {
        Lanes d[9], out[36];
        for (int k = 0; k < 9; ++k)
          for (int l = 0; l < LANES; ++l) d[k][l] = scale * from[(o * in + c + l) * 9 + k];
        both_sides<g, 3, 6>(d, out);
        for (int p = 0; p < 36; ++p) store(to + (o * 36 + p) * in + c, out[p]);
      }
  });
  return u;
}

// The transpose of `filters`: dw [out, in, 3, 3] = scale G^T dU G
Tensor filters_transposed(const Tensor& du, const Tensor& w, float scale) {
  const int64_t in = w.size(1);
  Tensor dw = at::empty_like(w);
  const float* from = du.const_data_ptr<float>();
  float* to = dw.mutable_data_ptr<float>();
  at::parallel_for(0, w.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < in; c += LANES) {
        Lanes d[36], out[9];
        for (int p = 0; p < 36; ++p) d[p] = load(from + (o * 36 + p) * in + c);
        both_sides<gt, 6, 3>(d, out);
        for (int k = 0; k < 9; ++k)
          for (int l = 0; l < LANES; ++l) to[(o * in + c + l) * 9 + k] = scale * out[k][l];
      }
  });
  return dw;
}

// [rows, 36, columns] = the 36 products of a [36, rows, k] and b [36, k, columns]
Tensor products(const Tensor& a, const Tensor& b) {
  Tensor out = at::empty({a.size(1), 36, b.size(2)}, a.options());
  Tensor by_place = out.transpose(0, 1);
  at::bmm_out(by_place, a, b);
  return out;
}

Tensor conv3x3(const Tensor& x_, const Tensor& w_, double scale) {
  const Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), w = w_.contiguous();
  Tensor y = at::empty({x.size(0), w.size(0), x.size(2), x.size(3)}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  tiles(products(windows(x).transpose(0, 1), filters(w, scale).permute({1, 2, 0})), y);
  return y;
}

std::tuple<Tensor, Tensor> conv3x3_backward(const Tensor& dy, const Tensor& x_, const Tensor& w_, double scale) {
  const Tensor x = x_.contiguous(at::MemoryFormat::ChannelsLast), w = w_.contiguous();
  const Tensor dm = tiles_transposed(dy.contiguous(at::MemoryFormat::ChannelsLast));
  const Tensor dv = products(dm.transpose(0, 1), filters(w, scale).transpose(0, 1));
  const Tensor du = products(dm.permute({1, 2, 0}), windows(x).transpose(0, 1));
  return {windows_transposed(dv, x), filters_transposed(du, w, scale)};
}

}  // namespace

TORCH_LIBRARY(evenkeel, m) {
  m.def("conv3x3(Tensor x, Tensor weight, float scale) -> Tensor");
  m.def("conv3x3_backward(Tensor grad, Tensor x, Tensor weight, float scale) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(evenkeel, CPU, m) {
  m.impl("conv3x3", conv3x3);
  m.impl("conv3x3_backward", conv3x3_backward);
}
