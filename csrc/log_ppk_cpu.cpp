// log-PPK and proxy-NCA on the CPU. Rows (the samples, image by image) meet proxies in tiles: a
// panel of proxies is prepared once, in double, and packed; blocks of rows are multiplied with it
// by the kernel below, and the scores of a tile are used where they lie in cache. What a task
// computes depends on the shapes alone and every sum has one order, so the bits do not depend on
// the number of threads. (torch's matmul would bring its own threads and its own order.)
//
//   z = num / sqrt(1 + delta) - D/2 log1p(delta) + bias,   num = x . linear,   delta = (x o x) .
//   spread
//
// The logits of an image are one softmax over its samples and all proxies, so that the backward
// needs two numbers per image. Each image's maximum over each panel is kept: the backward leaves
// out every (image, panel) whose softmax mass is certainly below rounding, and only the rows that
// remain are gathered and multiplied. In these the scores below the same bound have no weight, and
// where most have none, the products pass over what is zero.
#include "log_ppk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "parallel.h"

#include "vmf_math.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__gnu_linux__)
#define NIVMF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define NIVMF_CLONES
#endif
#define NIVMF_INLINE inline __attribute__((always_inline))  // into the clones
// A loop over lanes: unrolled, GCC would not see that it is one vector.
#define NIVMF_LANES(T, l) _Pragma("GCC unroll 1") for (int l = 0; l < kLanes<T>; ++l)

namespace nivmf {
namespace {

constexpr int64_t kPanel = 128;  // proxies
constexpr int64_t kStride =
    kPanel + 16;  // of gradient tiles, read by columns: a power of two would fill a few sets of L1
constexpr int64_t kBlock = 96;  // rows
constexpr int64_t kDepth =
    128;  // of a product at a time: short sums are exact sums, short strips stay in L1
constexpr int64_t kTileRows = 6;    // x kLanes sums: 6 or 12 vector registers of 16 or 32
constexpr int64_t kRowGroup = 256;  // rows worth a gradient of the proxies of their own
constexpr int64_t kTasks = 16;      // enough; each has its own memory
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);
constexpr double kLog2E = 1.44269504088896340736;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Zeros that start on a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0) : lines_(ceil_div(size, kLanes<T>)) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  struct alignas(64) Line {
    T lane[kLanes<T>] = {};
  };
  std::vector<Line> lines_;
};

// ---- elementary functions that vectorise
// ----------------------------------------------------------------------------

// 2^x, 0 below the range; NaN stays NaN.
template <typename T>
NIVMF_INLINE T exp2_of(T x) {
  using Bits = detail::Bits<T>;
  using Int = typename Bits::Int;
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T kLeast = kFloat ? -126 : -1022, kShift = T(3) * (Int(1) << (Bits::kMantissa - 1));
  const T bounded = x < kLeast ? kLeast : x;
  const T shifted = bounded + kShift, whole = shifted - kShift;  // to the nearest integer
  const T f = (bounded - whole) * T(0.693147180559945309417);
  T series = 1;
  NIVMF_UNROLL
  for (int i = kFloat ? 6 : 12; i > 0; --i) series = 1 + series * f * T(1.0 / i);
  Int bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  bits = (bits + (kFloat ? 127 : 1023)) << Bits::kMantissa;
  T power;
  std::memcpy(&power, &bits, sizeof(T));
  return x < kLeast ? T(0) : series * power;
}

// log(1 + x) with relative accuracy near 0; NaN from -1 down.
template <typename T>
NIVMF_INLINE T log1p_of(T x) {
  using Bits = detail::Bits<T>;
  using Int = typename Bits::Int;
  const T u = 1 + x;
  Int bits;
  std::memcpy(&bits, &u, sizeof(T));
  const Int e = (bits - Bits::kRootHalf) >> Bits::kMantissa;
  bits = (Int(sizeof(T) == 4 ? 127 : 1023) - e) << Bits::kMantissa;
  T scale;  // 2^-e
  std::memcpy(&scale, &bits, sizeof(T));
  const T f = x * scale + (scale - 1);  // (1 + x) 2^-e - 1, without the rounding of 1 + x
  const T s = f / (2 + f), z = s * s;
  T series = 0;
  NIVMF_UNROLL
  for (int i = Bits::kLogTerms - 1; i > 0; --i) series = (series + T(1) / T(2 * i + 1)) * z;
  const T value = T(e) * T(0.693147180559945309417) + (2 * s + 2 * s * series);
  return u > 0 ? value : std::numeric_limits<T>::quiet_NaN();
}

template <typename T>
NIVMF_INLINE T sum_of(T* lanes) {
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// ---- products
// -----------------------------------------------------------------------------------------------------------

// Sums of kTileRows rows and kLanes columns, in registers.
template <typename T>
struct Tile {
  T sum[kTileRows][kLanes<T>];

  NIVMF_INLINE void clear() {
    for (int64_t t = 0; t < kTileRows; ++t) {
      NIVMF_LANES(T, l) sum[t][l] = 0;
    }
  }

  // The products of one number of each row of a, row_stride apart, and kLanes of b.
  NIVMF_INLINE void step(const T* a, int64_t row_stride, const T* b) {
    NIVMF_UNROLL
    for (int64_t t = 0; t < kTileRows; ++t) {
      const T x = a[t * row_stride];
      NIVMF_LANES(T, l) sum[t][l] += x * b[l];
    }
  }

  NIVMF_INLINE void store(bool add, T* __restrict__ c, int64_t c_stride) const {
    for (int64_t t = 0; t < kTileRows; ++t) {
      if (add) {
        NIVMF_LANES(T, l) c[t * c_stride + l] += sum[t][l];
      } else {
        NIVMF_LANES(T, l) c[t * c_stride + l] = sum[t][l];
      }
    }
  }
};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]: b in strips of kLanes columns, a by
// its two strides. Writes whole tiles: rows up to a multiple of kTileRows, columns of kLanes.
template <typename T>
NIVMF_CLONES void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a,
                           int64_t row_stride, int64_t stride, const T* __restrict__ b, bool add,
                           T* __restrict__ c, int64_t c_stride) {
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t end = std::min(begin + kDepth, depth);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const T* const strip = b + j * depth;
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const T* const from = a + i * row_stride;
        Tile<T> tile;
        tile.clear();
        for (int64_t k = begin; k < end; ++k) {
          tile.step(from + k * stride, row_stride, strip + k * kLanes<T>);
        }
        tile.store(add || begin > 0, c + i * c_stride + j, c_stride);
      }
    }
  }
}

// The same product with an a of which each tile of rows is zero but at the steps listed for it.
// Leaving out what adds zero changes no bit.
struct Steps {
  std::vector<int32_t> step, end;  // end: of each tile's steps

  // True where the list is worth its indirection.
  template <typename T>
  bool list(int64_t rows, int64_t depth, const T* a, int64_t row_stride, int64_t stride);
};

template <typename T>
NIVMF_CLONES int64_t list_steps(int64_t depth, const T* __restrict__ a, int64_t row_stride,
                                int64_t stride, int32_t* __restrict__ out) {
  int64_t count = 0;
  for (int64_t k = 0; k < depth; ++k) {
    bool used = false;
    NIVMF_UNROLL
    for (int64_t t = 0; t < kTileRows; ++t) used |= a[t * row_stride + k * stride] != 0;
    out[count] = int32_t(k);
    count += used;
  }
  return count;
}

template <typename T>
bool Steps::list(int64_t rows, int64_t depth, const T* a, int64_t row_stride, int64_t stride) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  step.resize(tiles * depth + 1);
  end.resize(tiles);
  int64_t count = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    count +=
        list_steps(depth, a + i * kTileRows * row_stride, row_stride, stride, step.data() + count);
    end[i] = int32_t(count);
  }
  return 2 * count < tiles * depth;
}

template <typename T>
NIVMF_CLONES void multiply(const Steps& steps, int64_t rows, int64_t columns, int64_t depth,
                           const T* a, int64_t row_stride, int64_t stride, const T* __restrict__ b,
                           bool add, T* __restrict__ c, int64_t c_stride) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const T* const strip = b + j * depth;
    const int32_t* k = steps.step.data();
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const T* const from = a + i * row_stride;
      const int32_t* const end = steps.step.data() + steps.end[i / kTileRows];
      Tile<T> tile;
      tile.clear();
      for (; k < end; ++k) tile.step(from + *k * stride, row_stride, strip + *k * kLanes<T>);
      tile.store(add, c + i * c_stride + j, c_stride);
    }
  }
}

template <typename T>
NIVMF_CLONES void add(T* __restrict__ sum, const T* __restrict__ term, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += term[i];
}

// ---- proxies
// ------------------------------------------------------------------------------------------------------------

template <typename T>
struct Task {  // the op and what all its parts share
  const T *samples, *loc, *concentration;
  int64_t n, batch, proxies, dim;
  double temperature;
  bool exact, projection;
  int64_t workspace;
  LogNormalizerPlan<double> plan;
  double common;  // taken off all biases, so that the scores are small numbers; any number is right
  int64_t padded;  // dim, to whole lanes
  bool squares;    // delta is needed
  T scale;         // log2 e / T

  Task(const LogPpkSizes& sizes, const LogPpkInputs<T>& in)
      : samples(in.samples),
        loc(in.loc),
        concentration(in.concentration),
        n(sizes.samples),
        batch(sizes.images),
        proxies(sizes.proxies),
        dim(sizes.dim),
        temperature(double(*in.temperature)),
        exact(sizes.options.exact),
        projection(sizes.options.projection),
        workspace(sizes.options.workspace),
        plan(make_log_normalizer_plan<double>(dim)),
        common(0),
        padded(round_up(dim, kLanes<T>)),
        squares(projection || exact) {
    if (!(temperature > 0)) temperature = NAN;
    scale = T(kLog2E / temperature);
  }
};

struct Proxy {
  double inverse_kbar;  // kbar: the geometric mean of kappa
  double bias;          // of the score, in full
  double pull;          // -d bias / d|K mu| / |K mu|
};

// One proxy in double, filled up to whole groups so that the sums have no remainder.
constexpr int64_t kGroup = 64;
struct ProxyRow {
  Buffer<double> kappa, mu;
  double log_sum, square_sum;  // of kappa; of kappa mu

  explicit ProxyRow(int64_t dim) : kappa(round_up(dim, kGroup)), mu(round_up(dim, kGroup)) {}
};

template <typename T>
NIVMF_CLONES void load_proxy(const T* kappa_row, const T* mu_row, int64_t dim, ProxyRow& row) {
  constexpr int kWays = 16;
  double *const kappa = row.kappa.data(), *const mu = row.mu.data();
  for (int64_t d = 0; d < dim; ++d) kappa[d] = double(kappa_row[d]);
  for (int64_t d = 0; d < dim; ++d) mu[d] = double(mu_row[d]);
  std::fill(kappa + dim, kappa + round_up(dim, kGroup), 1.0);
  double logs[kWays] = {}, squares[kWays] = {}, bad[kWays] = {};
  for (int64_t begin = 0; begin < dim; begin += kGroup) {
    double product[kWays];
    std::fill_n(product, kWays, 1.0);
    for (int64_t d = begin; d < begin + kGroup; d += kWays) {  // one logarithm for four numbers
      _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) {
        const double along = kappa[d + l] * mu[d + l];
        product[l] *= kappa[d + l];
        squares[l] += along * along;
        bad[l] += kappa[d + l] > 0 && kappa[d + l] < INFINITY ? 0.0 : 1.0;
      }
    }
    _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) logs[l] += detail::fast_log(product[l]);
  }
  for (int l = 1; l < kWays; ++l) {
    logs[0] += logs[l];
    squares[0] += squares[l];
    bad[0] += bad[l];
  }
  row.log_sum = logs[0];
  row.square_sum = bad[0] > 0 ? NAN : squares[0];
}

template <typename T>
Proxy describe(const Task<T>& op, int64_t j, ProxyRow& row) {
  load_proxy(op.concentration + j * op.dim, op.loc + j * op.dim, op.dim, row);
  const double length = std::sqrt(row.square_sum), dim = double(op.dim);
  const LogNormalizer<double> normalizer = log_normalizer(length, op.plan);
  Proxy out = {std::exp(-row.log_sum / dim), normalizer.g,
               length > 0 ? normalizer.a / length : 1 / dim};
  if (!op.exact) {
    out.bias += row.log_sum - std::log(length);
    out.pull += 1 / row.square_sum;
  }
  return out;
}

// Prepared in double and rounded once: the logits are these times thousands.
template <typename T>
NIVMF_CLONES void round_proxy(const Task<T>& op, const ProxyRow& row, double inverse_kbar,
                              T* __restrict__ linear, T* __restrict__ spread) {
  const double *const kappa = row.kappa.data(), *const mu = row.mu.data();
  if (op.projection) {
    for (int64_t d = 0; d < op.dim; ++d) linear[d] = T(kappa[d] * inverse_kbar * kappa[d] * mu[d]);
  } else {
    for (int64_t d = 0; d < op.dim; ++d) linear[d] = T(kappa[d] * mu[d]);
  }
  for (int64_t d = 0; d < op.dim; ++d) {
    const double ratio = kappa[d] * inverse_kbar;
    spread[d] = T(ratio * ratio - 1);
  }
}

// The proxies of one panel as operands.
template <typename T>
struct Panel {
  int64_t first, width, lanes;  // lanes: width up to whole lanes
  std::vector<Proxy> proxy;
  Buffer<T> bias;
  Buffer<T> linear, spread;            // strips of proxies, for the scores
  Buffer<T> linear_rows, spread_rows;  // strips of dimensions, for the samples' gradient

  Panel(const Task<T>& op, int64_t width, bool scores, bool gradients)
      : proxy(width),
        bias(round_up(width, kLanes<T>)),
        linear(scores ? op.padded * round_up(width, kLanes<T>) : 0),
        spread(scores && op.squares ? op.padded * round_up(width, kLanes<T>) : 0),
        linear_rows(gradients ? op.padded * width : 0),
        spread_rows(gradients && op.squares ? op.padded * width : 0) {}
};

template <typename T>
NIVMF_CLONES void place(const T* __restrict__ row, int64_t j, int64_t dim, int64_t width,
                        T* __restrict__ strips, T* __restrict__ row_strips) {
  if (strips != nullptr) {
    T* const to = strips + j / kLanes<T> * kLanes<T> * dim + j % kLanes<T>;
    for (int64_t d = 0; d < dim; ++d) to[d * kLanes<T>] = row[d];
  }
  if (row_strips != nullptr) {
    for (int64_t d = 0; d < dim; d += kLanes<T>) {
      T* const to = row_strips + d * width + j * kLanes<T>;
      NIVMF_LANES(T, l) to[l] = row[d + l];
    }
  }
}

// On all threads, unless a task on one of them asks.
template <typename T>
void prepare(const Task<T>& op, int64_t first, int64_t width, Panel<T>& panel) {
  panel.first = first;
  panel.width = std::min(width, op.proxies - first);
  panel.lanes = round_up(panel.width, kLanes<T>);
  parallel_for(0, panel.width, 16, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.dim);
    Buffer<T> linear(op.padded), spread(op.padded);
    for (int64_t j = begin; j < end; ++j) {
      const Proxy proxy = panel.proxy[j] = describe(op, first + j, row);
      panel.bias[j] = T(proxy.bias - op.common);
      round_proxy(op, row, proxy.inverse_kbar, linear.data(), spread.data());
      place(linear.data(), j, op.dim, panel.width, panel.linear.data(), panel.linear_rows.data());
      if (op.squares) {
        place(spread.data(), j, op.dim, panel.width, panel.spread.data(), panel.spread_rows.data());
      }
    }
  });
  for (int64_t j = panel.width; j < panel.lanes; ++j) panel.bias[j] = -INFINITY;
}

// Mean bias of the first proxies.
template <typename T>
double mean_bias(const Task<T>& op, int64_t count) {
  std::vector<double> bias(std::min(op.proxies, count));
  parallel_for(0, int64_t(bias.size()), 32, [&](int64_t begin, int64_t end) {
    ProxyRow row(op.dim);
    for (int64_t j = begin; j < end; ++j) bias[j] = describe(op, j, row).bias;
  });
  double sum = 0;
  for (const double value : bias) sum += value;
  return sum / double(bias.size());
}

// ---- scores
// -------------------------------------------------------------------------------------------------------------

// A block of rows and its tile against a panel.
template <typename T>
struct Block {
  Buffer<T> x, xx;       // [kBlock, padded]: the rows, and squared
  Buffer<T> num, delta;  // [kBlock, kPanel]
  Buffer<T> z;           // of one row

  explicit Block(const Task<T>& op)
      : x(kBlock * op.padded),
        xx(op.squares ? kBlock * op.padded : 0),
        num(kBlock * kPanel),
        delta(kBlock * kPanel),
        z(kPanel) {}
};

// Row q is sample q % n of image q / n, and lies here in samples and their gradient.
template <typename T>
int64_t row_offset(const Task<T>& op, int64_t q) {
  return nivmf::row_offset(q % op.n, q / op.n, op.batch, op.dim);
}

template <typename T>
NIVMF_CLONES void load_row(const T* __restrict__ from, int64_t dim, T* __restrict__ x,
                           T* __restrict__ xx) {
  for (int64_t d = 0; d < dim; ++d) x[d] = from[d];
  if (xx == nullptr) return;
  for (int64_t d = 0; d < dim; ++d) xx[d] = from[d] * from[d];
}

// Row i of `count`, as it is and squared, into strips of kLanes columns.
template <typename T>
NIVMF_CLONES void pack_row(const T* __restrict__ from, int64_t i, int64_t count, int64_t dim,
                           T* __restrict__ x, T* __restrict__ xx) {
  for (int64_t begin = 0; begin < dim; begin += kLanes<T>) {
    T* const to = x + begin * count + i * kLanes<T>;
    T* const squared = xx == nullptr ? nullptr : xx + begin * count + i * kLanes<T>;
    if (begin + kLanes<T> <= dim) {
      NIVMF_LANES(T, l) to[l] = from[begin + l];
      if (squared == nullptr) continue;
      NIVMF_LANES(T, l) squared[l] = from[begin + l] * from[begin + l];
    } else {
      for (int64_t l = 0; l < dim - begin; ++l) to[l] = from[begin + l];
      for (int64_t l = 0; squared != nullptr && l < dim - begin; ++l) squared[l] = to[l] * to[l];
    }
  }
}

template <typename T>
void load(const Task<T>& op, const int64_t* rows, int64_t count, Block<T>& block) {
  for (int64_t r = 0; r < count; ++r) {
    load_row(op.samples + row_offset(op, rows[r]), op.dim, block.x.data() + r * op.padded,
             op.squares ? block.xx.data() + r * op.padded : nullptr);
  }
}

template <typename T>
void score(const Task<T>& op, const Panel<T>& panel, int64_t count, Block<T>& block) {
  multiply(count, panel.lanes, op.dim, block.x.data(), op.padded, 1, panel.linear.data(), false,
           block.num.data(), kPanel);
  if (!op.squares) return;
  multiply(count, panel.lanes, op.dim, block.xx.data(), op.padded, 1, panel.spread.data(), false,
           block.delta.data(), kPanel);
}

// The two products of a row and a proxy in double, rounded once.
template <typename T>
NIVMF_CLONES void exact_products(const Task<T>& op, const T* __restrict__ x,
                                 const T* __restrict__ kappa, const T* __restrict__ mu,
                                 double inverse_kbar, T* __restrict__ num, T* __restrict__ delta) {
  constexpr int kWays = 16;
  double nums[kWays] = {}, deltas[kWays] = {};
  const auto add = [&](int64_t d, int l) __attribute__((always_inline)) {
    const double k = double(kappa[d + l]), at = double(x[d + l]), ratio = k * inverse_kbar;
    nums[l] += (op.projection ? ratio : 1.0) * k * double(mu[d + l]) * at;
    deltas[l] += (ratio * ratio - 1) * at * at;
  };
  const int64_t whole = op.dim / kWays * kWays;
  for (int64_t d = 0; d < whole; d += kWays) {
    _Pragma("GCC unroll 1") for (int l = 0; l < kWays; ++l) add(d, l);
  }
  for (int64_t l = 0; l < op.dim - whole; ++l) add(whole, int(l));
  for (int l = 1; l < kWays; ++l) {
    nums[0] += nums[l];
    deltas[0] += deltas[l];
  }
  *num = T(nums[0]);
  *delta = T(deltas[0]);
}

// An image's own proxy weighs in its loss twice, so its scores are worth more than float products:
// at T = 0.003, D = 512 this took the worst loss error from 6.3e-4 to 3.2e-4 at a spread of kappa
// of 5% (gradients: 3.9e-4 to 2.9e-4) and from 3.0e-3 to 1.9e-3 (1.0e-3 to 5.3e-4) at 30%.
template <typename T, typename Label>
void sharpen_own(const Task<T>& op, const Panel<T>& panel, const int64_t* rows, int64_t count,
                 const Label& label_of, Block<T>& block) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t j = label_of(rows[r] / op.n) - panel.first;
    if (j < 0 || j >= panel.width) continue;
    const int64_t proxy = (panel.first + j) * op.dim, at = r * kPanel + j;
    exact_products(op, op.samples + row_offset(op, rows[r]), op.concentration + proxy,
                   op.loc + proxy, panel.proxy[j].inverse_kbar, block.num.data() + at,
                   block.delta.data() + at);
  }
}

template <typename T>
NIVMF_CLONES void row_scores(const Task<T>& op, const T* __restrict__ num,
                             const T* __restrict__ delta, const T* __restrict__ bias, int64_t size,
                             T* __restrict__ z) {
  const T half = T(op.dim) / 2;
  if (op.projection && op.exact) {
    for (int64_t j = 0; j < size; ++j) {
      z[j] = num[j] / std::sqrt(1 + delta[j]) - half * log1p_of(delta[j]) + bias[j];
    }
  } else if (op.projection) {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] / std::sqrt(1 + delta[j]) + bias[j];
  } else if (op.exact) {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] - half * log1p_of(delta[j]) + bias[j];
  } else {
    for (int64_t j = 0; j < size; ++j) z[j] = num[j] + bias[j];
  }
}

// A maximum in raw units and the sum of exp((z - maximum) / T). (z / T is too large for its own
// rounding.)
struct LogSum {
  double top = -INFINITY, sum = 0;

  void add(const LogSum& other, double temperature) {
    if (other.top > top) {
      sum = sum * std::exp((top - other.top) / temperature) + other.sum;
      top = other.top;
    } else {
      sum += other.sum * (other.top == top ? 1 : std::exp((other.top - top) / temperature));
    }
  }
};

template <typename T>
NIVMF_CLONES LogSum row_log_sum(const T* z, int64_t size, T scale) {
  T lanes[kLanes<T>];
  NIVMF_LANES(T, l) lanes[l] = -INFINITY;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] = z[j + l] > lanes[l] ? z[j + l] : lanes[l];
  }
  const T top = *std::max_element(lanes, lanes + kLanes<T>);
  NIVMF_LANES(T, l) lanes[l] = 0;
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] += exp2_of((z[j + l] - top) * scale);
  }
  return {double(top), double(sum_of(lanes))};
}

// `saved` of the proxy-NCA ops is [panels, columns]: per panel of `width` proxies each image's
// largest score and, if `scores`, of every row (image, sample) the two products that make its
// scores, [2, batch * n, width].
struct SavedLayout {
  int64_t width, panels, columns;
  bool scores;
};

SavedLayout without_scores(int64_t proxies) {
  const int64_t width = std::min(kPanel, round_up(proxies, 16));
  return {width, ceil_div(proxies, width), 0, false};
}

template <typename T>
SavedLayout saved_layout(const LogPpkSizes& sizes) {
  SavedLayout out = without_scores(sizes.proxies);
  const int64_t scores = 2 * sizes.samples * sizes.images * out.width;
  const int64_t workspace = sizes.options.workspace;
  out.scores =
      sizes.options.keep && out.panels * scores * int64_t(sizeof(T)) <= workspace - workspace / 8;
  out.columns = sizes.images + (out.scores ? scores : 0);
  return out;
}

// ---- proxy-NCA, forward
// -------------------------------------------------------------------------------------------------

template <typename T>
struct NcaForward {
  const int64_t* labels;
  SavedLayout layout;
  T* saved;
  std::vector<T> own;            // [batch, n], scores against the own proxy
  std::vector<LogSum> by_panel;  // [panels, batch]
};

template <typename T>
void forward_panel(const Task<T>& op, NcaForward<T>& out, int64_t p,
                   const std::vector<int64_t>& rows, const Panel<T>& panel, Block<T>& block) {
  const int64_t width = out.layout.width, total = op.batch * op.n, count = rows.size();
  T* const tops = out.saved + p * out.layout.columns;
  T* const kept = tops + op.batch;
  LogSum* const images = out.by_panel.data() + p * op.batch;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(op, rows.data() + start, size, block);
    score(op, panel, size, block);
    sharpen_own(
        op, panel, rows.data() + start, size, [&](int64_t i) { return out.labels[i]; }, block);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], image = q / op.n;
      const T *const num = block.num.data() + r * kPanel, *const delta =
                                                              block.delta.data() + r * kPanel;
      if (out.layout.scores) {
        std::copy_n(num, panel.lanes, kept + q * width);
        std::copy_n(delta, panel.lanes, kept + (total + q) * width);
      }
      T* const z = block.z.data();
      row_scores(op, num, delta, panel.bias.data(), panel.lanes, z);
      images[image].add(row_log_sum(z, panel.lanes, op.scale), op.temperature);
      tops[image] = T(images[image].top);
      const int64_t label = out.labels[image] - panel.first;
      if (label >= 0 && label < panel.width) out.own[q] = z[label];
    }
  }
}

// ---- log-PPK, forward
// ---------------------------------------------------------------------------------------------------

template <typename T>
struct PpkForward {
  int64_t width;
  T* values;  // [batch, proxies]
  T* tops;    // [batch, proxies]
  T* rests;   // [batch, proxies]
};

// One more sample into the log sums of an image.
template <typename T>
NIVMF_CLONES void add_sample(const T* __restrict__ z, int64_t size, T scale, T* __restrict__ top,
                             T* __restrict__ sum) {
  for (int64_t j = 0; j < size; ++j) {
    const T greater = z[j] > top[j] ? z[j] : top[j];
    sum[j] = sum[j] * exp2_of((top[j] - greater) * scale) + exp2_of((z[j] - greater) * scale);
    top[j] = greater;
  }
}

template <typename T>
void ppk_panel(const Task<T>& op, const PpkForward<T>& out, int64_t p,
               const std::vector<int64_t>& rows, const Panel<T>& panel, Block<T>& block) {
  const int64_t count = rows.size();
  Buffer<T> top(kPanel), sum(kPanel);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    load(op, rows.data() + start, size, block);
    score(op, panel, size, block);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], sample = q % op.n;
      if (sample == 0) {
        std::fill_n(top.data(), kPanel, T(-INFINITY));
        std::fill_n(sum.data(), kPanel, T(0));
      }
      row_scores(op, block.num.data() + r * kPanel, block.delta.data() + r * kPanel,
                 panel.bias.data(), panel.lanes, block.z.data());
      add_sample(block.z.data(), panel.lanes, op.scale, top.data(), sum.data());
      if (sample < op.n - 1) continue;
      for (int64_t j = 0; j < panel.width; ++j) {
        const int64_t at = q / op.n * op.proxies + panel.first + j;
        const double rest = std::log(double(sum[j]));
        out.tops[at] = top[j];
        out.rests[at] = T(rest);
        out.values[at] = T(double(top[j]) / op.temperature + rest - std::log(double(op.n)));
      }
    }
  }
}

// ---- backward
// -----------------------------------------------------------------------------------------------------------

// The softmax of an image: weight(z) = grad exp2((z - top) scale - rest); own: over the samples of
// the own proxy alone.
template <typename T>
struct Softmax {
  T grad, top, rest, own_top, own_rest;
  int64_t label;
  double least;  // where all scores of a panel are below, their weights are zero to rounding
};

template <typename T>
struct BackwardJob {
  SavedLayout layout;
  const Softmax<T>* images;  // of proxy-NCA, with what its forward saved
  const T* saved;
  const T* grad;  // of log-PPK, [batch, proxies], with what its forward saved
  const T* tops;
};

template <typename T>
struct GradientScratch {
  Buffer<T> weight;              // dL/dl of one row
  Buffer<T> g1, g2;              // dL/dnum, dL/ddelta: [kBlock, kStride]
  Buffer<T> x, xx;               // the block in strips
  Buffer<T> dx, dx2;             // [kBlock, padded]
  Buffer<T> d_linear, d_spread;  // of a panel, whole tiles, where no other row group adds to it
  Buffer<double> d_bias;
  Steps of_rows, of_proxies;
  double d_temperature = 0;

  GradientScratch(const Task<T>& op, int64_t slab)
      : weight(kPanel),
        g1((kBlock + 1) * kStride),  // whole tiles of proxies are read too
        g2((kBlock + 1) * kStride),
        x(kBlock * op.padded),
        xx(kBlock * op.padded),
        dx(kBlock * op.padded),
        dx2(kBlock * op.padded),
        d_linear(slab),
        d_spread(slab),
        d_bias(kPanel) {}
};

// sum_j weight_j (z_j - top) / -T^2 is the temperature's gradient; this is the sum, where 0 times
// infinity is 0.
template <typename T>
NIVMF_INLINE double moment(const T* weight, const T* z, T top, int64_t size) {
  T lanes[kLanes<T>] = {};
  for (int64_t j = 0; j < size; j += kLanes<T>) {
    NIVMF_LANES(T, l) lanes[l] += weight[j + l] == 0 ? T(0) : weight[j + l] * (z[j + l] - top);
  }
  return double(sum_of(lanes));
}

// Softmax over samples and proxies less that over samples of the own proxy, which is at `label` of
// this panel or not in it. The weights of an image sum to zero: taking its maximum off every score
// changes no gradient. What is certainly below rounding becomes zero, and is not multiplied.
template <typename T>
NIVMF_CLONES double nca_weights(const Softmax<T>& image, const T* __restrict__ z, int64_t width,
                                int64_t size, int64_t label, T scale, T least,
                                T* __restrict__ weight) {
  for (int64_t j = 0; j < size; ++j) {
    const T w = image.grad * exp2_of((z[j] - image.top) * scale - image.rest);
    weight[j] = z[j] < least ? T(0) : w;
  }
  if (label >= 0 && label < width) {
    weight[label] -= image.grad * exp2_of((z[label] - image.own_top) * scale - image.own_rest);
  }
  for (int64_t j = width; j < size; ++j) weight[j] = 0;
  return moment(weight, z, image.top, size);
}

template <typename T>
NIVMF_CLONES double ppk_weights(const T* __restrict__ grad, const T* __restrict__ top,
                                const T* __restrict__ rest, const T* __restrict__ z, int64_t width,
                                int64_t size, T scale, T* __restrict__ weight) {
  for (int64_t j = 0; j < width; ++j) {
    weight[j] = grad[j] * exp2_of((z[j] - top[j]) * scale - rest[j] * T(kLog2E));
  }
  for (int64_t j = width; j < size; ++j) weight[j] = 0;
  return moment(weight, z, T(0), size);
}

template <typename T>
NIVMF_CLONES void row_gradients(const Task<T>& op, const T* __restrict__ num,
                                const T* __restrict__ delta, const T* __restrict__ weight,
                                int64_t size, T* __restrict__ g1, T* __restrict__ g2,
                                double* __restrict__ d_bias) {
  const T inverse = T(1 / op.temperature), dim = op.exact ? T(op.dim) : T(0);
  for (int64_t j = 0; j < size; ++j) {
    g1[j] = weight[j] * inverse;
    d_bias[j] += double(g1[j]);
  }
  if (op.projection) {
    for (int64_t j = 0; j < size; ++j) {
      const T root = 1 / std::sqrt(1 + delta[j]);
      g2[j] = T(-0.5) * g1[j] * (num[j] * root + dim) * (root * root);
      g1[j] *= root;
    }
  } else if (op.exact) {
    for (int64_t j = 0; j < size; ++j) g2[j] = T(-0.5) * g1[j] * dim / (1 + delta[j]);
  }
}

template <typename T>
NIVMF_CLONES void row_gradient(const T* __restrict__ x, const T* __restrict__ dx,
                               const T* __restrict__ dx2, int64_t dim, bool add,
                               T* __restrict__ out) {
  if (dx2 == nullptr) {
    for (int64_t d = 0; d < dim; ++d) out[d] = (add ? out[d] : T(0)) + dx[d];
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d] = (add ? out[d] : T(0)) + (dx[d] + 2 * x[d] * dx2[d]);
  }
}

// One panel against the rows that are alive in it; adds to the gradient of every row q, or starts
// it where reached[q] is not set yet.
template <typename T>
void backward_panel(const Task<T>& op, const BackwardJob<T>& job, int64_t p,
                    const std::vector<int64_t>& rows, char* reached, T* d_samples,
                    const Panel<T>& panel, Block<T>& block, GradientScratch<T>& out, T* d_linear,
                    T* d_spread) {
  const int64_t width = job.layout.width, total = op.batch * op.n, count = rows.size();
  const int64_t pairs = op.batch * op.proxies;
  std::fill_n(out.d_bias.data(), kPanel, 0.0);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = std::min(kBlock, count - start);
    if (!job.layout.scores) {
      load(op, rows.data() + start, size, block);
      score(op, panel, size, block);
      if (job.images != nullptr) {
        const auto label = [&](int64_t i) { return job.images[i].label; };
        sharpen_own(op, panel, rows.data() + start, size, label, block);
      }
    }
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], image = q / op.n;
      const T* num = block.num.data() + r * kPanel;
      const T* delta = block.delta.data() + r * kPanel;
      if (job.layout.scores) {
        num = job.saved + p * job.layout.columns + op.batch + q * width;
        delta = num + total * width;
      }
      T *const z = block.z.data(), *const weight = out.weight.data();
      row_scores(op, num, delta, panel.bias.data(), panel.lanes, z);
      if (job.images != nullptr) {
        const Softmax<T>& softmax = job.images[image];
        const bool all = job.saved[p * job.layout.columns + image] == T(INFINITY);  // as in `alive`
        const T least = all ? T(-INFINITY) : std::nextafter(T(softmax.least), T(-INFINITY));
        out.d_temperature += nca_weights(softmax, z, panel.width, panel.lanes,
                                         softmax.label - panel.first, op.scale, least, weight);
      } else {
        const int64_t at = image * op.proxies + panel.first;
        out.d_temperature += ppk_weights(job.grad + at, job.tops + at, job.tops + pairs + at, z,
                                         panel.width, panel.lanes, op.scale, weight);
      }
      row_gradients(op, num, delta, weight, panel.lanes, out.g1.data() + r * kStride,
                    out.g2.data() + r * kStride, out.d_bias.data());
    }
    for (int64_t r = 0; r < size; ++r) {
      pack_row(op.samples + row_offset(op, rows[start + r]), r, size, op.dim, out.x.data(),
               op.squares ? out.xx.data() : nullptr);
    }
    for (int64_t r = size; r % kTileRows != 0; ++r) {  // to a whole tile
      std::fill_n(out.g1.data() + r * kStride, panel.lanes, T(0));
      std::fill_n(out.g2.data() + r * kStride, panel.lanes, T(0));
    }
    // g2 is zero where g1 is
    const bool few = out.of_rows.list(size, panel.width, out.g1.data(), kStride, 1) &&
                     out.of_proxies.list(panel.width, size, out.g1.data(), 1, kStride);
    const auto gradients = [&](const Buffer<T>& g, const Buffer<T>& proxies, const Buffer<T>& x,
                               Buffer<T>& dx, T* d_proxies) {
      const auto product = [&](const Steps& steps, int64_t rows, int64_t depth, int64_t row_stride,
                               int64_t stride, const T* b, bool add, T* c) {
        if (few) {
          multiply(steps, rows, op.padded, depth, g.data(), row_stride, stride, b, add, c,
                   op.padded);
        } else {
          multiply(rows, op.padded, depth, g.data(), row_stride, stride, b, add, c, op.padded);
        }
      };
      product(out.of_rows, size, panel.width, kStride, 1, proxies.data(), false, dx.data());
      product(out.of_proxies, panel.width, size, 1, kStride, x.data(), start > 0, d_proxies);
    };
    gradients(out.g1, panel.linear_rows, out.x, out.dx, d_linear);
    if (op.squares) gradients(out.g2, panel.spread_rows, out.xx, out.dx2, d_spread);
    for (int64_t r = 0; r < size; ++r) {
      const int64_t q = rows[start + r], at = row_offset(op, q);
      row_gradient(op.samples + at, out.dx.data() + r * op.padded,
                   op.squares ? out.dx2.data() + r * op.padded : nullptr, op.dim, reached[q] != 0,
                   d_samples + at);
      reached[q] = 1;
    }
  }
}

// The gradients of a proxy from those of its linear, spread and bias.
template <typename T>
NIVMF_CLONES void finish_proxy(const Task<T>& op, const Proxy& proxy, int64_t j,
                               const T* __restrict__ d_linear, const T* __restrict__ d_spread,
                               double d_bias, const LogPpkGradients<T>& out) {
  const T *const kappa = op.concentration + j * op.dim, *const mu = op.loc + j * op.dim;
  T* __restrict__ const d_mu = out.loc + j * op.dim;
  T* __restrict__ const d_kappa = out.concentration + j * op.dim;
  const double inverse = proxy.inverse_kbar, pull = d_bias * proxy.pull;
  const double power = op.projection ? 2 : 1;  // of kappa in linear
  for (int64_t d = 0; d < op.dim; ++d) {
    const double k = double(kappa[d]), m = double(mu[d]), linear = double(d_linear[d]);
    const double slope = op.projection ? linear * k * inverse : linear;
    d_mu[d] = T(k * (slope - pull * k * m));
    const double spread = d_spread == nullptr ? 0 : 2 * inverse * inverse * double(d_spread[d]);
    d_kappa[d] = T(power * m * slope + spread * k + d_bias / k - pull * k * m * m);
  }
}

// ---- cutting the work, by the shapes alone
// -----------------------------------------------------------------------------

// Groups of panels each need a gradient of the samples of their own, groups of images one of the
// proxies: as many as are useful and fit an eighth of the workspace.
struct Cut {
  int64_t panel_groups = 1, row_groups = 1;

  int64_t tasks() const { return panel_groups * row_groups; }
};

template <typename T>
Cut cut(const Task<T>& op, int64_t panels) {
  const int64_t rows = op.n * op.batch, budget = op.workspace / 8 / int64_t(sizeof(T));
  Cut out;
  while (2 * out.tasks() <= kTasks && 2 * out.panel_groups <= panels &&
         2 * out.panel_groups * rows * op.dim <= budget) {
    out.panel_groups *= 2;
  }
  while (2 * out.tasks() <= kTasks && 2 * out.row_groups * kRowGroup <= rows &&
         2 * out.row_groups <= op.batch && 4 * out.row_groups * op.proxies * op.dim <= budget) {
    out.row_groups *= 2;
  }
  return out;
}

// The rows of one group of images.
template <typename T>
std::vector<int64_t> rows_of(const Task<T>& op, int64_t group, int64_t groups) {
  const int64_t begin = op.batch * group / groups, end = op.batch * (group + 1) / groups;
  std::vector<int64_t> rows((end - begin) * op.n);
  std::iota(rows.begin(), rows.end(), begin * op.n);
  return rows;
}

// Panels for the tasks of one pass. Where several groups of rows meet each panel, all are prepared
// before, once (they fit: see `cut`); else each task prepares the panel it has come to.
template <typename T>
class Panels {
 public:
  Panels(const Task<T>& op, const SavedLayout& layout, int64_t row_groups, bool scores,
         bool gradients)
      : op_(op), layout_(layout), scores_(scores), gradients_(gradients) {
    for (int64_t p = 0; row_groups > 1 && p < layout.panels; ++p) {
      shared_.emplace_back(op, layout.width, scores, gradients);
      prepare(op, p * layout.width, layout.width, shared_.back());
    }
  }

  // Space for one panel of a task's own, if it will need it.
  Panel<T> space() const {
    return shared_.empty() ? Panel<T>(op_, layout_.width, scores_, gradients_)
                           : Panel<T>(op_, 0, false, false);
  }

  const Panel<T>& shared(int64_t p) const { return shared_[p]; }

  const Panel<T>& get(int64_t p, Panel<T>& own) const {
    if (!shared_.empty()) return shared_[p];
    prepare(op_, p * layout_.width, layout_.width, own);
    return own;
  }

 private:
  const Task<T>& op_;
  const SavedLayout& layout_;
  bool scores_, gradients_;
  std::vector<Panel<T>> shared_;
};

// Calls visit(panel index, rows, panel, block) for every panel and group of rows, group by group.
template <typename T, typename Visit>
void for_each_panel(const Task<T>& op, const SavedLayout& layout, const Visit& visit) {
  const int64_t row_groups = cut(op, layout.panels).row_groups;
  const Panels<T> panels(op, layout, row_groups, true, false);
  parallel_for(0, layout.panels * row_groups, 1, [&](int64_t begin, int64_t end) {
    Panel<T> own = panels.space();
    Block<T> block(op);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % layout.panels;
      visit(p, rows_of(op, task / layout.panels, row_groups), panels.get(p, own), block);
    }
  });
}

template <typename T>
bool alive(const Task<T>& op, const BackwardJob<T>& job, int64_t p, int64_t image) {
  if (job.images == nullptr) return true;
  const Softmax<T>& softmax = job.images[image];
  const int64_t label = softmax.label - p * job.layout.width;
  if (label >= 0 && label < job.layout.width) return true;
  // so is NaN; a maximum that a test sets to infinity is never below
  return !(double(job.saved[p * job.layout.columns + image]) < softmax.least);
}

// Numbers in the gradient of one panel's linear or spread, written in whole tiles.
template <typename T>
int64_t slab_size(const Task<T>& op, const SavedLayout& layout) {
  return round_up(layout.width, kTileRows) * op.padded;
}

// The tasks' parts of the gradients, to be added in their order.
template <typename T>
struct Parts {
  std::vector<T*> d_samples;  // [panel_groups] x [n, batch, dim]
  // For more than one row group: [row_groups, panels, a panel's whole tiles]
  std::unique_ptr<T[]> d_linear, d_spread;
  std::vector<double> d_bias;         // [row_groups, proxies]
  std::vector<double> d_temperature;  // [row_groups, panel_groups]
};

template <typename T>
void backward_task(const Task<T>& op, const BackwardJob<T>& job, const Cut& cuts, int64_t task,
                   Parts<T>& parts, const LogPpkGradients<T>& out, const Panels<T>& panels,
                   Panel<T>& own, Block<T>& block, GradientScratch<T>& scratch) {
  const int64_t row_group = task / cuts.panel_groups, group = task % cuts.panel_groups;
  const std::vector<int64_t> rows = rows_of(op, row_group, cuts.row_groups);
  const int64_t slab = slab_size(op, job.layout);
  T* const d_samples = parts.d_samples[group];
  std::vector<int64_t> live;
  std::vector<char> reached(rows.size());  // by a gradient: until then d_samples holds nothing
  scratch.d_temperature = 0;
  const int64_t begin = job.layout.panels * group / cuts.panel_groups;
  const int64_t end = job.layout.panels * (group + 1) / cuts.panel_groups;
  for (int64_t p = begin; p < end; ++p) {
    live.clear();
    std::copy_if(rows.begin(), rows.end(), std::back_inserter(live),
                 [&](int64_t q) { return alive(op, job, p, q / op.n); });
    const int64_t first = p * job.layout.width;
    const int64_t last = std::min(op.proxies, first + job.layout.width);
    const bool alone = cuts.row_groups == 1;
    const int64_t at = alone ? 0 : (row_group * job.layout.panels + p) * slab;
    T* const d_linear = (alone ? scratch.d_linear.data() : parts.d_linear.get()) + at;
    T* const d_spread =
        !op.squares ? nullptr : (alone ? scratch.d_spread.data() : parts.d_spread.get()) + at;
    if (live.empty()) {
      if (alone) {
        std::fill_n(out.loc + first * op.dim, (last - first) * op.dim, T(0));
        std::fill_n(out.concentration + first * op.dim, (last - first) * op.dim, T(0));
      } else {
        std::fill_n(d_linear, slab, T(0));
        if (op.squares) std::fill_n(d_spread, slab, T(0));
      }
      continue;
    }
    const Panel<T>& panel = panels.get(p, own);
    backward_panel(op, job, p, live, reached.data() - rows[0], d_samples, panel, block, scratch,
                   d_linear, d_spread);
    if (alone) {
      for (int64_t j = first; j < last; ++j) {
        const int64_t row = (j - first) * op.padded;
        finish_proxy(op, panel.proxy[j - first], j, d_linear + row,
                     op.squares ? d_spread + row : nullptr, scratch.d_bias[j - first], out);
      }
    } else {
      std::copy_n(scratch.d_bias.data(), last - first,
                  parts.d_bias.data() + row_group * op.proxies + first);
    }
  }
  for (const int64_t q : rows) {
    if (!reached[q - rows[0]]) std::fill_n(d_samples + row_offset(op, q), op.dim, T(0));
  }
  parts.d_temperature[task] = scratch.d_temperature;
}

template <typename T>
void backward(const Task<T>& op, const BackwardJob<T>& job, const LogPpkGradients<T>& out) {
  const Cut cuts = cut(op, job.layout.panels);
  const int64_t size = op.n * op.batch * op.dim, slab = slab_size(op, job.layout);
  const int64_t plane = job.layout.panels * slab;
  const bool alone = cuts.row_groups == 1;
  const auto uninitialised = [](int64_t count) { return std::unique_ptr<T[]>(new T[count]); };
  const auto slabs = uninitialised((cuts.panel_groups - 1) * size);
  Parts<T> parts = {{out.samples},
                    uninitialised(alone ? 0 : cuts.row_groups * plane),
                    uninitialised(alone || !op.squares ? 0 : cuts.row_groups * plane),
                    std::vector<double>(alone ? 0 : cuts.row_groups * op.proxies),
                    std::vector<double>(cuts.tasks())};
  for (int64_t g = 1; g < cuts.panel_groups; ++g) {
    parts.d_samples.push_back(slabs.get() + (g - 1) * size);
  }
  const Panels<T> panels(op, job.layout, cuts.row_groups, !job.layout.scores, true);
  parallel_for(0, cuts.tasks(), 1, [&](int64_t begin, int64_t end) {
    Panel<T> own = panels.space();
    Block<T> block(op);
    GradientScratch<T> scratch(op, alone ? slab : 0);
    for (int64_t task = begin; task < end; ++task) {
      backward_task(op, job, cuts, task, parts, out, panels, own, block, scratch);
    }
  });
  if (!alone) {
    parallel_for(0, op.proxies, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t p = j / job.layout.width, in_panel = j % job.layout.width;
        T* const d_linear = parts.d_linear.get() + p * slab + in_panel * op.padded;
        T* const d_spread =
            op.squares ? parts.d_spread.get() + p * slab + in_panel * op.padded : nullptr;
        for (int64_t g = 1; g < cuts.row_groups; ++g) {
          add(d_linear, d_linear + g * plane, op.dim);
          if (op.squares) add(d_spread, d_spread + g * plane, op.dim);
          parts.d_bias[j] += parts.d_bias[g * op.proxies + j];
        }
        finish_proxy(op, panels.shared(p).proxy[in_panel], j, d_linear, d_spread, parts.d_bias[j],
                     out);
      }
    });
  }
  parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t g = 1; g < cuts.panel_groups; ++g) {
      add(out.samples + begin, parts.d_samples[g] + begin, end - begin);
    }
  });
  const double sum = std::accumulate(parts.d_temperature.begin(), parts.d_temperature.end(), 0.0);
  *out.temperature = T(-sum / (op.temperature * op.temperature));
}

}  // namespace

template <typename T>
SavedShape proxy_nca_saved_cpu(const LogPpkSizes& sizes) {
  const SavedLayout layout = saved_layout<T>(sizes);
  return {layout.panels, layout.columns};
}

template <typename T>
int64_t log_ppk_forward_scratch_bytes_cpu(const LogPpkSizes&) {
  return 0;
}

template <typename T>
int64_t log_ppk_backward_scratch_bytes_cpu(const LogPpkSizes&) {
  return 0;
}

template <typename T>
int proxy_nca_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* losses, double* partial,
                  void* saved, void*, void*) {
  Task<T> op(sizes, in);
  op.common = mean_bias(op, kPanel);
  const int64_t B = op.batch, N = op.n;
  const int64_t* const labels = in.labels;
  const SavedLayout layout = saved_layout<T>(sizes);
  NcaForward<T> out = {labels, layout, static_cast<T*>(saved), std::vector<T>(B * N),
                       std::vector<LogSum>(layout.panels * B)};
  for_each_panel(op, layout,
                 [&](int64_t p, const std::vector<int64_t>& rows, const Panel<T>& panel,
                     Block<T>& block) { forward_panel(op, out, p, rows, panel, block); });
  for (int64_t i = 0; i < B; ++i) {
    LogSum all, mine;
    for (int64_t p = 0; p < layout.panels; ++p) all.add(out.by_panel[p * B + i], op.temperature);
    const bool known = labels[i] >= 0 && labels[i] < op.proxies;
    for (int64_t s = 0; known && s < N; ++s) {
      mine.add({double(out.own[i * N + s]), 1}, op.temperature);
    }
    const double log_z = std::log(all.sum), own_log_z = known ? std::log(mine.sum) : 0;
    partial[i] = all.top + op.common;
    partial[B + i] = log_z;
    partial[2 * B + i] = known ? mine.top + op.common : -INFINITY;
    partial[3 * B + i] = own_log_z;
    losses[i] = known ? T((all.top - mine.top) / op.temperature + (log_z - own_log_z)) : T(NAN);
  }
  return 0;
}

template <typename T>
int proxy_nca_backward_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                           const double* partial, const void* saved, void*,
                           const LogPpkGradients<T>& out, void*) {
  Task<T> op(sizes, in);
  op.common = mean_bias(op, kPanel);
  const int64_t B = op.batch;
  // Certified: all N P weights of an image below this share of its sum are together below its
  // rounding.
  const double least =
      std::log(double(std::numeric_limits<T>::epsilon()) / 2 / (double(op.n) * double(op.proxies)));
  std::vector<Softmax<T>> images(B);
  for (int64_t i = 0; i < B; ++i) {
    const double top = partial[i] - op.common, own_top = partial[2 * B + i] - op.common;
    const bool known = own_top > -INFINITY;
    Softmax<T>& s = images[i];
    s = {known ? grad[i] : T(NAN), T(top), T(0), T(own_top), T(0), in.labels[i], NAN};
    s.rest = T(kLog2E * (partial[B + i] + (top - double(s.top)) / op.temperature));
    s.own_rest = T(kLog2E * (partial[3 * B + i] + (own_top - double(s.own_top)) / op.temperature));
    if (known) s.least = top + op.temperature * (partial[B + i] + least);
  }
  const SavedLayout layout = saved_layout<T>(sizes);
  backward(op, {layout, images.data(), static_cast<const T*>(saved), nullptr, nullptr}, out);
  return 0;
}

template <typename T>
int log_ppk_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, T* values, T* saved,
                double* common, void*, void*) {
  Task<T> op(sizes, in);
  *common = op.common = mean_bias(op, op.proxies);
  const SavedLayout layout = without_scores(op.proxies);
  const PpkForward<T> out = {layout.width, values, saved, saved + op.batch * op.proxies};
  for_each_panel(op, layout,
                 [&](int64_t p, const std::vector<int64_t>& rows, const Panel<T>& panel,
                     Block<T>& block) { ppk_panel(op, out, p, rows, panel, block); });
  return 0;
}

template <typename T>
int log_ppk_backward_cpu(const LogPpkSizes& sizes, const LogPpkInputs<T>& in, const T* grad,
                         const T* saved, void*, const LogPpkGradients<T>& out, void*) {
  Task<T> op(sizes, in);
  op.common = mean_bias(op, op.proxies);
  backward(op, {without_scores(op.proxies), nullptr, nullptr, grad, saved}, out);
  return 0;
}

#define NIVMF_INSTANTIATE(T)                                                                   \
  template SavedShape proxy_nca_saved_cpu<T>(const LogPpkSizes&);                              \
  template int64_t log_ppk_forward_scratch_bytes_cpu<T>(const LogPpkSizes&);                   \
  template int64_t log_ppk_backward_scratch_bytes_cpu<T>(const LogPpkSizes&);                  \
  template int proxy_nca_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, T*, double*, void*,   \
                             void*, void*);                                                    \
  template int proxy_nca_backward_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,    \
                                      const double*, const void*, void*,                       \
                                      const LogPpkGradients<T>&, void*);                       \
  template int log_ppk_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, T*, T*, double*, void*, \
                           void*);                                                             \
  template int log_ppk_backward_cpu(const LogPpkSizes&, const LogPpkInputs<T>&, const T*,      \
                                    const T*, void*, const LogPpkGradients<T>&, void*);
NIVMF_INSTANTIATE(float)
NIVMF_INSTANTIATE(double)
#undef NIVMF_INSTANTIATE

}  // namespace nivmf
