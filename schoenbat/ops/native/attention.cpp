// Attention through features that are products of projections, forward and backward, in float32 on a CPU.
//
// What is computed, and its names, are those of ops/linear.py, ops/_bounds.py and features/plan.py. Tokens go through
// in blocks whose features stay in the cache; the backward pass makes them anew. Blocks are stored with a coordinate or
// feature as a row and a token as a column ("lanes"), so that a feature is a product of rows, whatever the plan.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

constexpr int BLOCK = 12 * WIDTH;  // tokens that are handled at a time,
constexpr int LD = BLOCK + WIDTH;   // by an odd number of vectors, so that rows do not meet in the cache
constexpr int CHUNK = 48;          // and their features, which stay in the fastest cache

// ---- limits of outputs, with their derivatives by three moments

struct Dual {
  Vec x, by_square, by_isotropic, by_number;
};
inline Dual constant(Vec x) { return {x, Vec{}, Vec{}, Vec{}}; }
inline Dual chain(const Dual& p, Vec value, Vec slope) {
  return {value, slope * p.by_square, slope * p.by_isotropic, slope * p.by_number};
}
inline Dual operator+(const Dual& p, const Dual& q) {
  return {p.x + q.x, p.by_square + q.by_square, p.by_isotropic + q.by_isotropic, p.by_number + q.by_number};
}
inline Dual operator*(const Dual& p, const Dual& q) { return chain(p, p.x * q.x, q.x) + chain(q, Vec{}, p.x); }
inline Dual operator-(const Dual& p, const Dual& q) { return p + chain(q, -q.x, all(-1)); }
inline Dual operator*(float c, const Dual& p) { return chain(p, c * p.x, all(c)); }
inline Dual operator+(float c, const Dual& p) { return chain(p, c + p.x, all(1)); }
inline Dual operator/(const Dual& p, const Dual& q) {
  const Vec inverse = 1.0f / q.x;
  return p * chain(q, inverse, -inverse * inverse);
}
inline Dual at_least(const Dual& p, float least) {
  return chain(p, p.x < all(least) ? all(least) : p.x, p.x < all(least) ? Vec{} : all(1));
}
inline Dual at_most(const Dual& p, float most) {
  return chain(p, p.x > all(most) ? all(most) : p.x, p.x > all(most) ? Vec{} : all(1));
}
inline Dual exponential(const Dual& p) {
  const Vec e = exponential(p.x);
  return chain(p, e, e);
}
constexpr float TINY = 1.17549435e-38f;
inline Dual root(const Dual& p) {
  const Dual inside = at_least(p, TINY);
  const Vec value = square_root(inside.x);
  return chain(inside, value, 0.5f / value);
}

// `length` products of as many coordinates as `degree` says; the constant has the degree 0.
struct Run {
  int degree, first, length;  // the first of all features that it is, and how many
  float square;               // of the weight
  std::vector<int> offsets;
};

struct Plan {
  bool centres, self_attention, bounded;
  float constant, scale, smallest, unexplained, reach, largest;
  int width, sketched, num_features = 0;
  std::vector<float> shares;  // by degree, without gaps
  std::vector<Run> runs;      // none longer than a chunk

  Plan(const int* whole, const float* numbers) {
    centres = *whole++, self_attention = *whole++, bounded = *whole++;
    width = *whole++, sketched = *whole++;
    shares.resize(*whole++);
    const int num_runs = *whole++;
    constant = *numbers++, scale = *numbers++, smallest = *numbers++, unexplained = *numbers++;
    reach = *numbers++, largest = *numbers++;
    for (float& share : shares) share = *numbers++;
    if (constant != 0) add(0, 1, 1, nullptr);
    for (int i = 0; i < num_runs; i++, numbers++) {
      add(whole[0], whole[1], *numbers * *numbers, whole + 2);
      whole += 2 + whole[0];
    }
  }

  void add(int degree, int length, float square, const int* offsets) {
    for (int start = 0; start < length; start += CHUNK) {
      Run run{degree, num_features, std::min(CHUNK, length - start), square, {}};
      for (int i = 0; i < degree; i++) run.offsets.push_back(offsets[i] + start);
      num_features += run.length;
      runs.push_back(run);
    }
  }

  // Calls function(first run, run behind the last, first feature, number of features) for as many as a chunk holds.
  template <class Function>
  void each_chunk(Function function) const {
    for (size_t start = 0, end; start < runs.size(); start = end) {
      int count = 0;
      for (end = start; end < runs.size() && count + runs[end].length <= CHUNK; end++) count += runs[end].length;
      function(&runs[start], &runs[start] + (end - start), runs[start].first, count);
    }
  }

  bool has_sketch() const { return sketched != INT_MAX; }
};

constexpr float STANDARD_ERRORS = 3, FEW_KEYS = 4;
constexpr float LARGEST_VARIANCE = 40;  // beyond it an output is the mean value in float32
constexpr float SHORTEST = 1e-18f;      // whose square is still a number

struct Limits {
  Dual factor, cooler, excess, least;
};

Dual described(const Plan& plan, const Dual& variance) {
  const int top = plan.shares.size() - 1;
  double factorial = std::tgamma(top + 1.0);
  Dual total = constant(all(plan.shares[top] / factorial));
  for (int degree = top - 1; degree >= 0; degree--) {
    factorial /= degree + 1;
    total = (float)(plan.shares[degree] / factorial) + total * variance;
  }
  return total;
}

Limits limits_of(const Plan& plan, Vec mean_square, Vec isotropic_square, float count) {
  const Dual square = {mean_square, all(1), Vec{}, Vec{}}, isotropic = {isotropic_square, Vec{}, all(1), Vec{}};
  const Dual number = {all(count), Vec{}, Vec{}, all(1)};
  const float limit = std::max(1.0f, plan.reach);
  Limits out;
  const Dual cooled = constant(all(limit)) / at_least(square, limit);
  out.factor = root(cooled);
  const Dual variance = at_most(isotropic * cooled, LARGEST_VARIANCE);
  const Dual grown = exponential(variance);
  const Dual noise = at_least(grown - described(plan, variance), 0) * grown;
  out.least = at_least(STANDARD_ERRORS * root(noise / number), 1);
  // What an even highest degree adds.
  out.excess = constant(Vec{});
  const int top = plan.shares.size() - 1, half = top / 2;
  if (top && top % 2 == 0) {
    out.excess = constant(all(plan.shares[top] / std::ldexp(std::tgamma(half + 1.0), half)));
    for (int i = 0; i < half; i++) out.excess = out.excess * at_most(square, limit);
  }
  out.cooler = constant(all(1));
  if (plan.has_sketch()) {
    const float share = plan.shares[plan.sketched];
    const Dual ratio = at_most(square / at_least(isotropic, SHORTEST), 1);
    out.cooler = ratio / ((1 - share) + share * ratio);
  }
  return out;
}

// ---- a chunk of the features of a block: z [P, lanes] to phi [D, lanes] and back

// `cooler_z` stands for z in features of the degree `plan.sketched` and above.
void expand(const Plan& plan, const Run* run, const Run* end, const float* z, const float* cooler_z, float* phi,
            int lanes, int ld) {
  for (; run < end; run++)
    for (int i = 0; i < run->length; i++, phi += ld) {
      const float* from = (run->degree >= plan.sketched ? cooler_z : z) + (size_t)i * ld;
      const auto factor = [&](int j) { return from + (size_t)run->offsets[j] * ld; };
      if (run->degree == 0) {
        std::fill(phi, phi + lanes, plan.constant);
      } else if (run->degree == 1) {
        std::memcpy(phi, factor(0), lanes * sizeof(float));
      } else {
        const float *x = factor(0), *y = factor(1);
        for (int n = 0; n < lanes; n += WIDTH) vec(phi + n) = vec(x + n) * vec(y + n);
        for (int j = 2; j < run->degree; j++)
          for (int n = 0; n < lanes; n += WIDTH) vec(phi + n) *= vec(factor(j) + n);
      }
    }
}

// Add to the gradients of z and cooler_z what comes from that of phi.
void pull_back(const Plan& plan, const Run* run, const Run* end, const float* z, const float* cooler_z,
               const float* grad, float* grad_z, float* grad_cooler_z, int lanes, int ld) {
  for (; run < end; run++) {
    const bool cooler = run->degree >= plan.sketched;
    for (int i = 0; i < run->length; i++, grad += ld) {
      const float* from = (cooler ? cooler_z : z) + (size_t)i * ld;
      float* to = (cooler ? grad_cooler_z : grad_z) + (size_t)i * ld;
      if (run->degree == 2) {
        const size_t a = (size_t)run->offsets[0] * ld, b = (size_t)run->offsets[1] * ld;
        for (int n = 0; n < lanes; n += WIDTH) {
          const Vec own = vec(grad + n), x = vec(from + a + n), y = vec(from + b + n);
          vec(to + a + n) += own * y;
          vec(to + b + n) += own * x;
        }
        continue;
      }
      for (int j = 0; j < run->degree; j++)
        for (int n = 0; n < lanes; n += WIDTH) {
          Vec own = vec(grad + n);
          for (int other = 0; other < run->degree; other++)
            if (other != j) own *= vec(from + (size_t)run->offsets[other] * ld + n);
          vec(to + (size_t)run->offsets[j] * ld + n) += own;
        }
    }
  }
}

// ---- the tensors of a call

// A tensor [B, H, N, n] whose rows are contiguous; `groups` consecutive heads are further tokens of one head.
struct Rows {
  float* at;
  int64_t batch, head, token;
  int groups, tokens, width;

  float* row(int b, int h, int i) const {
    return at + b * batch + (h * groups + i / tokens) * head + (i % tokens) * token;
  }
};

struct Call {
  Plan plan;
  int batch, heads, num_queries, num_keys, d, v, threads;
  bool centres, self_attention, bounded;
  Rows query, key, value;
  const uint8_t* mask;           // [B, M] or null
  std::vector<float> projection, projection_t;  // P [d, P] and its transpose, times the root of the scale
  mutable std::atomic<bool> beyond{false};  // whether a coordinate is larger than features and moments can be
  int parts, dp, vp, features, columns;  // columns = v + 1
  size_t head_size;

  Call(const int64_t* sizes, const int* whole, const float* numbers, const float* matrix, float* q, float* k, float* x,
       const uint8_t* key_mask)
      : plan(whole, numbers), mask(key_mask) {
    batch = sizes[0], heads = sizes[1], d = sizes[5], v = sizes[6], threads = sizes[7];
    centres = plan.centres, self_attention = plan.self_attention, bounded = plan.bounded;
    const int groups = sizes[2], n = sizes[3], m = sizes[4];
    query = {q, sizes[8], sizes[9], sizes[10], groups, n, d};
    key = {k, sizes[11], sizes[12], sizes[13], 1, m, d};
    value = {x, sizes[14], sizes[15], sizes[16], 1, m, v};
    num_queries = groups * n, num_keys = m;
    features = plan.num_features, columns = v + 1, dp = padded(d), vp = padded(v);
    const int tasks = batch * heads, longest = std::max(num_queries, num_keys);
    parts = threads <= 1 ? 1 : std::max(1, std::min(longest / (2 * BLOCK), (2 * threads + tasks - 1) / tasks));
    if (tasks >= 2 * threads) parts = 1;
    head_size = 2 + 2 * d + v + (size_t)d * dp + (size_t)features * columns;
    const float factor = std::sqrt(plan.scale);
    projection.resize((size_t)d * plan.width), projection_t.resize((size_t)d * plan.width);
    for (int i = 0; i < d; i++)
      for (int j = 0; j < plan.width; j++)
        projection_t[(size_t)j * d + i] = projection[(size_t)i * plan.width + j] = factor * matrix[(size_t)i * plan.width + j];
  }

  // What is kept of the queries for the backward pass: deviations over denominators, and sums; null for none.
  Rows results(float* at) const {
    return {at, (int64_t)heads * num_queries * columns, (int64_t)num_queries * columns, columns, 1, num_queries, columns};
  }
  int first(int part, int tokens) const { return (int64_t)tokens * part / parts; }
  bool is_softmax() const { return self_attention; }
  bool there(int b, int token) const { return !mask || mask[(size_t)b * num_keys + token]; }
  // The first mask of queries is that of the keys, as they are the same tokens.
  bool query_there(int b, int i) const { return there(b, i % query.tokens); }
  float count_keys(int b) const {
    float count = 0;
    for (int i = 0; i < num_keys; i++) count += there(b, i);
    return count;
  }
  // Over all items (a head and a part of its tokens), on all threads.
  template <class Function>
  void each_part(Function function) const {
    each(batch * heads * parts, threads, [&](int item) {
      const int g = item / parts;
      function(g, g / heads, g % heads, item % parts, item);
    });
  }
};

// What is kept of a head of keys for the backward pass.
struct Head {
  float *number = nullptr, *mass = nullptr, *mean = nullptr, *centre = nullptr, *average = nullptr, *second = nullptr;
  float* sums = nullptr;
  Head() {}
  Head(const Call& c, float* at) {
    number = at, mass = at + 1, mean = at + 2, centre = mean + c.d, average = centre + c.d, second = average + c.v;
    sums = second + (size_t)c.d * c.dp;
  }
};

void add_row(double* total, const float* row, int n, float factor = 1) {
  for (int i = 0; i < n; i++) total[i] += factor * row[i];
}

enum Slot { ROWS, Y, VALUES, E, E_T, Z, COOL_Z, PHI, GRAD_PHI, GRAD_Z, GRAD_COOL_Z, T, U, O, GRAD_O, LANES, SUMS, SUMS_T,
            GRAD_SUMS, GRAD_SUMS_T, SECOND, LIMITS };

// Load rows [n, width] less `centre`, padded with zeros to whole vectors; rows that are not `kept` are 0. Return whether
// no number is beyond `largest`.
template <class Kept>
bool load(const Rows& x, int b, int h, int start, int n, const float* centre, float* rows, Kept kept, float largest) {
  const int wide = padded(x.width), lanes = padded(n);
  Vec most = {};
  for (int i = 0; i < lanes; i++) {
    float* to = rows + (size_t)i * wide;
    int j = 0;
    if (i < n && kept(i)) {
      const float* from = x.row(b, h, start + i);
      if (centre)
        for (; j < x.width; j++) to[j] = from[j] - centre[j];
      else
        for (; j < x.width; j++) to[j] = from[j];
    }
    for (; j < wide; j++) to[j] = 0;
    for (j = 0; j < wide; j += WIDTH) {
      const Vec own = vec(to + j), size = own < Vec{} ? -own : own;
      most = size <= most ? most : size;
    }
  }
  for (int j = 0; j < WIDTH; j++)
    if (!(most[j] <= largest)) return false;
  return true;
}

void store(const Rows& x, int b, int h, int start, int n, const float* rows) {
  const int wide = padded(x.width);
  for (int i = 0; i < n; i++) std::memcpy(x.row(b, h, start + i), rows + (size_t)i * wide, x.width * sizeof(float));
}

// Sum over [D, lanes] rows times weights of lanes, added to total [D].
void add_weighted(int rows, int lanes, const float* x, int ld, const float* weight, float* total) {
  for (int i = 0; i < rows; i++) total[i] += dot(x + (size_t)i * ld, weight, lanes);
}

// The sums over keys [D, vp] and [D] of `parts`, times the squares of the weights, as [D, v + 1] and transposed.
void gather_sums(const Call& c, const float* partial, size_t size, float* sums, float* sums_t) {
  for (const Run& run : c.plan.runs)
    for (int f = run.first; f < run.first + run.length; f++)
      for (int j = 0; j <= c.v; j++) {
        float total = 0;
        for (int part = 0; part < c.parts; part++) {
          const float* from = partial + part * size;
          total += j < c.v ? from[(size_t)f * c.vp + j] : from[(size_t)c.features * c.vp + f];
        }
        sums[(size_t)f * c.columns + j] = sums_t[(size_t)j * c.features + f] = total * run.square;
      }
}

// ---- a block of queries, as both passes need it

struct QueryBlock {
  float *rows, *y, *t, *z, *cool_z;
  float *factor, *cooler, *total;  // by lane; total is the denominator that is divided by,
  float *is_sum, *is_limit;        // and 1 in these says whether it is a sum over keys, or its limit
  Limits* limits;
  int n, lanes;

  QueryBlock(const Call& c, int lane_arrays) {
    const int wide = std::max(c.plan.width, 1);
    rows = scratch<ROWS>((size_t)BLOCK * c.dp), y = scratch<Y>((size_t)c.dp * LD);
    t = scratch<T>((size_t)c.dp * LD), z = scratch<Z>((size_t)wide * LD), cool_z = z;
    if (c.bounded && c.plan.has_sketch()) cool_z = scratch<COOL_Z>((size_t)wide * LD);
    factor = scratch<LANES>((size_t)(5 + lane_arrays) * LD), cooler = factor + LD, total = cooler + LD;
    is_sum = total + LD, is_limit = is_sum + LD;
    limits = reinterpret_cast<Limits*>(scratch<LIMITS>(BLOCK / WIDTH * sizeof(Limits) / sizeof(float)));
  }

  template <class Kept>
  void compute(const Call& c, int b, int h, const Head& head, int start, int count, Kept kept) {
    n = count, lanes = padded(n);
    if (!load(c.query, b, h, start, n, c.self_attention ? head.mean : nullptr, rows, kept, c.plan.largest / 2)) c.beyond = true;
    transpose(lanes, c.dp, rows, c.dp, y, LD);
    multiply(c.plan.width, lanes, c.d, c.projection_t.data(), c.d, y, LD, z, LD);
    if (c.bounded) {
      multiply(c.d, lanes, c.d, head.second, c.dp, y, LD, t, LD);
      float size = 0;
      for (int i = 0; i < c.d; i++) size += head.second[(size_t)i * c.dp + i] / c.d;
      for (int i = 0; i < lanes; i += WIDTH) {
        Vec square = {}, length = {};
        for (int j = 0; j < c.d; j++) {
          const Vec x = vec(y + (size_t)j * LD + i);
          square += x * vec(t + (size_t)j * LD + i), length += x * x;
        }
        Limits& own = limits[i / WIDTH] =
            limits_of(c.plan, square < Vec{} ? Vec{} : square, length * size, *head.number);
        vec(factor + i) = own.factor.x, vec(cooler + i) = own.cooler.x;
      }
      for (int j = 0; j < c.plan.width; j++)
        for (int i = 0; i < lanes; i += WIDTH) vec(z + (size_t)j * LD + i) *= vec(factor + i);
    }
    if (cool_z != z)
      for (int j = 0; j < c.plan.width; j++)
        for (int i = 0; i < lanes; i += WIDTH)
          vec(cool_z + (size_t)j * LD + i) = vec(z + (size_t)j * LD + i) * vec(cooler + i);
  }

  // Find the denominators, from the sums over keys.
  void settle(const Call& c, const Head& head, const float* sum) {
    const float mass = *head.mass, smallest = c.plan.smallest;
    for (int i = 0; i < lanes; i++) {
      if (!c.bounded) {
        is_sum[i] = std::fabs(sum[i]) >= smallest;
        total[i] = is_sum[i] || std::isnan(sum[i]) ? sum[i] : std::copysign(smallest, sum[i]);
        continue;
      }
      const float x = sum[i] - mass * limits[i / WIDTH].excess.x[i % WIDTH];
      const float least = limits[i / WIDTH].least.x[i % WIDTH];
      const float found = x > mass * least ? x : mass * least;
      // Where no key is there, all is 0.
      total[i] = found > 0 ? found : 1;
      is_sum[i] = found > 0 && x > mass * least, is_limit[i] = found > 0 && !is_sum[i];
    }
  }
};

float trust(const Call& c, float number) { return c.bounded ? number / (number + FEW_KEYS * c.plan.unexplained) : 1; }

// ---- a block of keys, as both passes need it

struct KeyBlock {
  float *rows, *y, *values, *e, *weight, *z;
  int n, lanes;

  explicit KeyBlock(const Call& c) {
    const int wide = std::max(c.plan.width, 1);
    rows = scratch<ROWS>((size_t)BLOCK * c.dp), y = scratch<Y>((size_t)c.dp * LD);
    values = scratch<VALUES>((size_t)BLOCK * c.vp), e = scratch<E>((size_t)BLOCK * c.vp);
    z = scratch<Z>((size_t)wide * LD);
    weight = scratch<LANES>(8 * LD);
  }

  // Keys less their centre, values less their average, and features; `weights` [M] of softmax, else null.
  void compute(const Call& c, int b, int h, const Head& head, const float* weights, int start, int count) {
    n = count, lanes = padded(n);
    // A key of weight 0 stands at the centre: its features could be infinite, and so nothing times 0.
    const auto kept = [&](int i) { return c.there(b, start + i) && !(weights && weights[start + i] == 0); };
    if (!load(c.key, b, h, start, n, c.centres ? head.centre : nullptr, rows, kept, c.plan.largest / 2)) c.beyond = true;
    load(c.value, b, h, start, n, c.bounded ? head.average : nullptr, values, kept, INFINITY);
    for (int i = 0; i < lanes; i++) {
      weight[i] = i < n ? (weights ? weights[start + i] : (float)kept(i)) : 0;
      for (int j = 0; j < c.vp; j++) e[(size_t)i * c.vp + j] = weight[i] * values[(size_t)i * c.vp + j];
    }
    transpose(lanes, c.dp, rows, c.dp, y, LD);
    multiply(c.plan.width, lanes, c.d, c.projection_t.data(), c.d, y, LD, z, LD);
  }
};

// ---- the forward pass

void forward(const Call& c, Rows out, Rows found, float* weights, float* saved) {
  const int tasks = c.batch * c.heads, items = tasks * c.parts, d = c.d, v = c.v;
  const auto weights_of = [&](int g) { return c.is_softmax() ? weights + (size_t)g * c.num_keys : nullptr; };
  const auto head_of = [&](int g) { return Head(c, saved + g * c.head_size); };
  const size_t row = 2 + d + v;
  std::vector<double> query_sums, moments;
  std::vector<float> tops(items, -INFINITY);
  if (c.self_attention) {
    query_sums.resize(items * (size_t)(d + 1));
    c.each_part([&](int, int b, int h, int part, int item) {
      double* total = &query_sums[item * (size_t)(d + 1)];
      for (int i = c.first(part, c.num_queries); i < c.first(part + 1, c.num_queries); i++)
        if (c.query_there(b, i)) add_row(total, c.query.row(b, h, i), d), total[d]++;
    });
    c.each_part([&](int g, int b, int h, int part, int item) {
      std::vector<float> mean(d);
      double count = 0;
      for (int p = 0; p < c.parts; p++) count += query_sums[(g * c.parts + p) * (size_t)(d + 1) + d];
      for (int p = 0; p < c.parts; p++)
        for (int j = 0; j < d; j++)
          mean[j] += query_sums[(g * c.parts + p) * (size_t)(d + 1) + j] / std::max(count, 1.0);
      if (part == 0) std::copy(mean.begin(), mean.end(), head_of(g).mean);
      float top = -INFINITY;
      for (int i = c.first(part, c.num_keys); i < c.first(part + 1, c.num_keys); i++) {
        float& x = weights_of(g)[i];
        x = c.there(b, i) ? c.plan.scale * dot(mean.data(), c.key.row(b, h, i), d) : -INFINITY;
        top = std::max(top, x);
      }
      tops[item] = top;
    });
  }
  // Sums of w, w^2, w k and w v, of which the weights are not yet divided by their sum.
  if (c.centres || c.bounded) {
    moments.resize(items * row);
    c.each_part([&](int g, int b, int h, int part, int item) {
      double* total = &moments[item * row];
      const float top = *std::max_element(&tops[g * c.parts], &tops[g * c.parts] + c.parts);
      for (int i = c.first(part, c.num_keys); i < c.first(part + 1, c.num_keys); i++) {
        float w = c.there(b, i);
        if (c.is_softmax()) w = weights_of(g)[i] = w ? std::exp(weights_of(g)[i] - top) : 0;
        if (w == 0) continue;
        total[0] += w, total[1] += (double)w * w;
        add_row(total + 2, c.key.row(b, h, i), d, w);
        add_row(total + 2 + d, c.value.row(b, h, i), v, w);
      }
    });
  }
  const size_t sums_size = (size_t)c.features * (c.vp + 1) + (size_t)d * c.dp;
  std::vector<float> partial(items * sums_size);
  c.each_part([&](int g, int b, int h, int part, int item) {
    std::vector<float> own(c.head_size);
    Head head(c, own.data());
    *head.mass = *head.number = std::max(1, c.num_keys);
    double sum = 1;
    if (!moments.empty()) {
      std::vector<double> total(row);
      for (int p = 0; p < c.parts; p++)
        for (size_t j = 0; j < row; j++) total[j] += moments[(g * c.parts + p) * row + j];
      sum = total[0] > 0 ? total[0] : 1;
      if (c.centres) for (int j = 0; j < d; j++) head.centre[j] = total[2 + j] / sum;
      if (c.bounded) for (int j = 0; j < v; j++) head.average[j] = total[2 + d + j] / sum;
      *head.mass = c.is_softmax() ? total[0] > 0 : total[0];
      *head.number = total[1] > 0 ? sum * sum / total[1] : sum * sum / TINY;
      if (!c.is_softmax() && !c.mask) *head.mass = *head.number = std::max(1, c.num_keys);
    }
    const int start = c.first(part, c.num_keys), end = c.first(part + 1, c.num_keys);
    if (c.is_softmax()) for (int i = start; i < end; i++) weights_of(g)[i] /= sum;
    if (part == 0) {
      float* kept = saved + g * c.head_size;
      // The mean query is there already.
      kept[0] = own[0], kept[1] = own[1];
      std::copy(head.centre, head.second, Head(c, kept).centre);
    }
    float *sums = &partial[item * sums_size], *sum_of_weights = sums + (size_t)c.features * c.vp;
    float* second = sum_of_weights + c.features;
    KeyBlock block(c);
    float *phi = scratch<PHI>(CHUNK * LD), *u = scratch<U>((size_t)c.dp * LD);
    for (int i = start; i < end; i += BLOCK) {
      block.compute(c, b, h, head, weights_of(g), i, std::min(BLOCK, end - i));
      c.plan.each_chunk([&](const Run* run, const Run* end, int first, int count) {
        expand(c.plan, run, end, block.z, block.z, phi, block.lanes, LD);
        multiply(count, c.vp, block.lanes, phi, LD, block.e, c.vp, sums + (size_t)first * c.vp, c.vp, true);
        add_weighted(count, block.lanes, phi, LD, block.weight, sum_of_weights + first);
      });
      if (c.bounded) {
        const float factor = c.plan.scale * c.plan.scale / (c.is_softmax() ? 1 : sum);
        for (int j = 0; j < d; j++)
          for (int k = 0; k < block.lanes; k += WIDTH)
            vec(u + (size_t)j * LD + k) = factor * vec(block.weight + k) * vec(block.y + (size_t)j * LD + k);
        multiply(d, c.dp, block.lanes, u, LD, block.rows, c.dp, second, c.dp, true);
      }
    }
  });
  c.each_part([&](int g, int b, int h, int part, int) {
    Head head = head_of(g);
    float *sums = scratch<SUMS>((size_t)c.features * c.columns), *sums_t = scratch<SUMS_T>((size_t)c.features * c.columns);
    gather_sums(c, &partial[g * c.parts * sums_size], sums_size, sums, sums_t);
    float* second = scratch<SECOND>((size_t)d * c.dp);
    std::fill(second, second + (size_t)d * c.dp, 0.0f);
    for (int p = 0; p < c.parts; p++) {
      const float* from = &partial[(g * c.parts + p) * sums_size] + (size_t)c.features * (c.vp + 1);
      for (int j = 0; j < d * c.dp; j++) second[j] += from[j];
    }
    if (part == 0) {
      std::copy_n(sums, (size_t)c.features * c.columns, head.sums);
      std::copy_n(second, (size_t)d * c.dp, head.second);
    }
    head.second = second;
    QueryBlock block(c, 0);
    float *phi = scratch<PHI>(CHUNK * LD), *o = scratch<O>((size_t)padded(c.columns) * LD);
    float *sum = o + (size_t)v * LD, *rows = scratch<VALUES>(BLOCK * (size_t)padded(c.columns));
    const float trusted = trust(c, *head.number);
    const int end = c.first(part + 1, c.num_queries);
    for (int i = c.first(part, c.num_queries); i < end; i += BLOCK) {
      block.compute(c, b, h, head, i, std::min(BLOCK, end - i), [](int) { return true; });
      const int lanes = block.lanes;
      c.plan.each_chunk([&](const Run* run, const Run* end, int first, int count) {
        expand(c.plan, run, end, block.z, block.cool_z, phi, lanes, LD);
        multiply(c.columns, lanes, count, sums_t + first, c.features, phi, LD, o, LD, first > 0);
      });
      block.settle(c, head, sum);
      for (int j = 0; j < v; j++)
        for (int k = 0; k < lanes; k += WIDTH) vec(o + (size_t)j * LD + k) /= vec(block.total + k);
      if (found.at) {
        transpose(padded(c.columns), lanes, o, LD, rows, padded(c.columns));
        store(found, b, h, i, block.n, rows);
      }
      for (int j = 0; j < v; j++) {
        const Vec average = all(c.bounded ? head.average[j] : 0);
        for (int k = 0; k < lanes; k += WIDTH) {
          Vec& x = vec(o + (size_t)j * LD + k);
          x = average + trusted * x;
        }
      }
      transpose(c.vp, lanes, o, LD, rows, c.vp);
      store(out, b, h, i, block.n, rows);
    }
  });
}

// ---- the backward pass

void backward(const Call& c, Rows grad_out, Rows found, const float* weights, float* saved, Rows grad_query, Rows grad_key,
              Rows grad_value) {
  const int items = c.batch * c.heads * c.parts, d = c.d, v = c.v, wide = std::max(c.plan.width, 1);
  const auto weights_of = [&](int g) { return c.is_softmax() ? weights + (size_t)g * c.num_keys : nullptr; };
  const auto head_of = [&](int g) { return Head(c, saved + g * c.head_size); };
  const float squared_scale = c.plan.scale * c.plan.scale;
  // Queries: gradients of the sums, of the second moments, and of what concerns the whole head.
  const size_t sums_size = (size_t)c.features * (c.vp + 1) + (size_t)d * c.dp, whole = 3 + v + 2 * d;
  std::vector<float> partial(items * sums_size);
  std::vector<double> heads(items * whole);  // number, size, total; average; mean, centre
  std::vector<float> grad_weights(c.is_softmax() ? (size_t)c.batch * c.heads * c.num_keys : 0);
  c.each_part([&](int g, int b, int h, int part, int item) {
    const Head head = head_of(g);
    float *sums = &partial[item * sums_size], *sum_of_weights = sums + (size_t)c.features * c.vp;
    float* second = sum_of_weights + c.features;
    double *total = &heads[item * whole], *average = total + 3, *mean = average + v;
    QueryBlock block(c, 4);
    float *by_square = block.factor + 4 * LD, *by_isotropic = by_square + LD;
    float *pulled_factor = by_isotropic + LD, *pulled_cooler = pulled_factor + LD;
    float *grads = scratch<VALUES>((size_t)BLOCK * c.vp), *grad_o = scratch<GRAD_O>((size_t)padded(c.columns) * LD);
    float *results = scratch<E>((size_t)BLOCK * padded(c.columns)), *o = scratch<O>((size_t)padded(c.columns) * LD);
    float *phi = scratch<PHI>(CHUNK * LD), *grad_phi = scratch<GRAD_PHI>(CHUNK * LD);
    float* grad_z = scratch<GRAD_Z>((size_t)wide * LD);
    float* grad_cool_z = block.cool_z == block.z ? grad_z : scratch<GRAD_COOL_Z>((size_t)wide * LD);
    float* u = scratch<U>((size_t)c.dp * LD);
    std::vector<uint8_t> counts(BLOCK);
    const float number = *head.number, mass = *head.mass, trusted = trust(c, number);
    float size = 0;
    for (int i = 0; i < d; i++) size += head.second[(size_t)i * c.dp + i] / d;
    const int end = c.first(part + 1, c.num_queries);
    for (int start = c.first(part, c.num_queries); start < end; start += BLOCK) {
      const int n = std::min(BLOCK, end - start);
      // What stands where no gradient comes from may be NaN.
      for (int i = 0; i < n; i++) {
        const float* row = grad_out.row(b, h, start + i);
        counts[i] = std::any_of(row, row + v, [](float x) { return x != 0; });
      }
      const auto kept = [&](int i) { return counts[i] != 0; };
      block.compute(c, b, h, head, start, n, kept);
      load(grad_out, b, h, start, n, nullptr, grads, kept, INFINITY);
      load(found, b, h, start, n, nullptr, results, kept, INFINITY);
      const int lanes = block.lanes;
      transpose(lanes, c.vp, grads, c.vp, grad_o, LD);
      transpose(lanes, padded(c.columns), results, padded(c.columns), o, LD);
      block.settle(c, head, o + (size_t)v * LD);
      // Of average + trust * deviation / total.
      double of_trust = 0, of_number = 0;
      float* grad_sum = grad_o + (size_t)v * LD;
      float* factor = pulled_factor;
      for (int i = 0; i < lanes; i += WIDTH) {
        Vec product = {};
        for (int j = 0; j < v; j++) product += vec(grad_o + (size_t)j * LD + i) * vec(o + (size_t)j * LD + i);
        const Vec own = vec(factor + i) = trusted / vec(block.total + i);
        for (int j = 0; j < v; j++) vec(grad_o + (size_t)j * LD + i) *= own;
        of_trust += sum_of(product);
        vec(grad_sum + i) = -own * product;
      }
      for (int i = 0; i < n; i++) {
        add_row(average, grads + (size_t)i * c.vp, v);
        for (int j = 0; j < c.vp; j++) grads[(size_t)i * c.vp + j] *= factor[i];
      }
      // A denominator that is a limit has no gradient; the limit has.
      for (int i = 0; i < lanes; i++) {
        const float grad_total = grad_sum[i];
        grad_sum[i] *= block.is_sum[i];
        if (c.bounded) {
          const Limits& limits = block.limits[i / WIDTH];
          const float of_excess = -mass * grad_sum[i], of_least = mass * grad_total * block.is_limit[i];
          const int lane = i % WIDTH;
          by_square[i] = of_excess * limits.excess.by_square[lane] + of_least * limits.least.by_square[lane];
          by_isotropic[i] = of_least * limits.least.by_isotropic[lane];
          of_number += of_least * limits.least.by_number[lane];
        }
      }
      for (int j = 0; j < c.plan.width; j++) {
        std::fill_n(grad_z + (size_t)j * LD, lanes, 0.0f);
        std::fill_n(grad_cool_z + (size_t)j * LD, lanes, 0.0f);
      }
      c.plan.each_chunk([&](const Run* run, const Run* end, int first, int count) {
        expand(c.plan, run, end, block.z, block.cool_z, phi, lanes, LD);
        multiply(count, c.vp, lanes, phi, LD, grads, c.vp, sums + (size_t)first * c.vp, c.vp, true);
        add_weighted(count, lanes, phi, LD, grad_sum, sum_of_weights + first);
        const float* of_chunk = head.sums + (size_t)first * c.columns;
        multiply(count, lanes, c.columns, of_chunk, c.columns, grad_o, LD, grad_phi, LD);
        pull_back(c.plan, run, end, block.z, block.cool_z, grad_phi, grad_z, grad_cool_z, lanes, LD);
      });
      // z is factor * projected, cool_z is cooler * z.
      for (int i = 0; i < lanes; i += WIDTH) {
        Vec of_factor = {}, of_cooler = {};
        const Vec scaling = c.bounded ? vec(block.factor + i) : all(1);
        for (int j = 0; j < c.plan.width; j++) {
          Vec& own = vec(grad_z + (size_t)j * LD + i);
          const Vec z = vec(block.z + (size_t)j * LD + i);
          if (grad_cool_z != grad_z) {
            const Vec cool = vec(grad_cool_z + (size_t)j * LD + i);
            of_cooler += z * cool;
            own += vec(block.cooler + i) * cool;
          }
          of_factor += z * own;
          own *= scaling;
        }
        vec(pulled_factor + i) = of_factor / scaling;
        vec(pulled_cooler + i) = of_cooler;
      }
      multiply(d, lanes, c.plan.width, c.projection.data(), c.plan.width, grad_z, LD, u, LD);
      if (c.bounded) {
        for (int i = 0; i < lanes; i += WIDTH) {
          const Limits& own = block.limits[i / WIDTH];
          const Vec of_factor = vec(pulled_factor + i), of_cooler = vec(pulled_cooler + i);
          Vec square = vec(by_square + i) + of_factor * own.factor.by_square + of_cooler * own.cooler.by_square;
          Vec isotropic = vec(by_isotropic + i) + of_factor * own.factor.by_isotropic + of_cooler * own.cooler.by_isotropic;
          of_number += sum_of(of_factor * own.factor.by_number + of_cooler * own.cooler.by_number);
          Vec length = {};
          for (int j = 0; j < d; j++) {
            const Vec y = vec(block.y + (size_t)j * LD + i);
            Vec& t = vec(block.t + (size_t)j * LD + i);
            length += y * y;
            vec(u + (size_t)j * LD + i) += 2.0f * (square * t + size * isotropic * y);
            t = square * y;
          }
          total[1] += sum_of(isotropic * length);
        }
        multiply(d, c.dp, lanes, block.t, LD, block.rows, c.dp, second, c.dp, true);
      }
      const double few = FEW_KEYS * c.plan.unexplained;
      if (c.bounded) total[0] += of_number + of_trust * few / ((number + few) * (number + few));
      transpose(c.dp, lanes, u, LD, block.rows, c.dp);
      store(grad_query, b, h, start, n, block.rows);
      for (int i = 0; i < n; i++) add_row(mean, block.rows + (size_t)i * c.dp, d, -1);
    }
  });
  // Keys and values, but for what comes through the centre, the average and the weights of all keys.
  c.each_part([&](int g, int b, int h, int part, int item) {
    const Head head = head_of(g);
    const size_t first = (size_t)g * c.parts;
    float *grad_sums = scratch<GRAD_SUMS>((size_t)c.features * c.columns);
    float *grad_sums_t = scratch<GRAD_SUMS_T>((size_t)c.features * c.columns);
    gather_sums(c, &partial[first * sums_size], sums_size, grad_sums, grad_sums_t);
    double of_number = 0, of_size = 0;
    float* second = scratch<SECOND>((size_t)d * c.dp);
    std::fill(second, second + (size_t)d * c.dp, 0.0f);
    for (int p = 0; p < c.parts; p++) {
      of_number += heads[(first + p) * whole], of_size += heads[(first + p) * whole + 1];
      const float* from = &partial[(first + p) * sums_size] + (size_t)c.features * (c.vp + 1);
      for (int j = 0; j < d * c.dp; j++) second[j] += from[j];
    }
    for (int j = 0; j < d; j++) second[(size_t)j * c.dp + j] += of_size / d;
    const float divisor = *head.mass > 0 ? *head.mass : 1, of_second = squared_scale / divisor;
    double *total = &heads[item * whole], *average = total + 3, *centre = average + v + d;
    KeyBlock block(c);
    float *e_t = scratch<E_T>((size_t)padded(c.columns) * LD), *grad_e = scratch<GRAD_O>((size_t)padded(c.columns) * LD);
    float *phi = scratch<PHI>(CHUNK * LD), *grad_phi = scratch<GRAD_PHI>(CHUNK * LD);
    float* grad_z = scratch<GRAD_Z>((size_t)wide * LD);
    float *u = scratch<U>((size_t)c.dp * LD), *t = scratch<T>((size_t)c.dp * LD), *of_weight = block.weight + LD;
    const int end = c.first(part + 1, c.num_keys);
    for (int start = c.first(part, c.num_keys); start < end; start += BLOCK) {
      block.compute(c, b, h, head, weights_of(g), start, std::min(BLOCK, end - start));
      const int n = block.n, lanes = block.lanes;
      transpose(lanes, c.vp, block.e, c.vp, e_t, LD);
      std::copy_n(block.weight, lanes, e_t + (size_t)v * LD);
      for (int j = 0; j < c.plan.width; j++) std::fill_n(grad_z + (size_t)j * LD, lanes, 0.0f);
      c.plan.each_chunk([&](const Run* run, const Run* end, int first, int count) {
        expand(c.plan, run, end, block.z, block.z, phi, lanes, LD);
        multiply(c.columns, lanes, count, grad_sums_t + first, c.features, phi, LD, grad_e, LD, first > 0);
        const float* of_chunk = grad_sums + (size_t)first * c.columns;
        multiply(count, lanes, c.columns, of_chunk, c.columns, e_t, LD, grad_phi, LD);
        pull_back(c.plan, run, end, block.z, block.z, grad_phi, grad_z, grad_z, lanes, LD);
      });
      transpose(lanes, c.vp, block.values, c.vp, e_t, LD);
      for (int i = 0; i < lanes; i += WIDTH) {
        const Vec w = vec(block.weight + i);
        Vec sum = vec(grad_e + (size_t)v * LD + i) - (float)(2 * of_number) * *head.number * *head.number * w;
        for (int j = 0; j < v; j++) {
          Vec& grad = vec(grad_e + (size_t)j * LD + i);
          sum += vec(e_t + (size_t)j * LD + i) * grad;
          grad *= w;
        }
        vec(of_weight + i) = sum;
      }
      multiply(d, lanes, c.plan.width, c.projection.data(), c.plan.width, grad_z, LD, u, LD);
      if (c.bounded) {
        multiply(d, lanes, d, second, c.dp, block.y, LD, t, LD);
        for (int i = 0; i < lanes; i += WIDTH) {
          Vec square = {};
          for (int j = 0; j < d; j++) {
            const Vec own = of_second * vec(t + (size_t)j * LD + i);
            square += own * vec(block.y + (size_t)j * LD + i);
            vec(u + (size_t)j * LD + i) += 2.0f * vec(block.weight + i) * own;
          }
          vec(of_weight + i) += square;
        }
      }
      transpose(c.dp, lanes, u, LD, block.rows, c.dp);
      store(grad_key, b, h, start, n, block.rows);
      transpose(c.vp, lanes, grad_e, LD, block.values, c.vp);
      store(grad_value, b, h, start, n, block.values);
      for (int i = 0; i < n; i++) {
        add_row(centre, block.rows + (size_t)i * c.dp, d, -1);
        add_row(average, block.values + (size_t)i * c.vp, v, -1);
        if (c.is_softmax()) {
          grad_weights[(size_t)g * c.num_keys + start + i] = of_weight[i];
          total[2] += (double)of_weight[i] * block.weight[i];
        }
      }
    }
  });
  if (!c.centres && !c.bounded) return;
  // The centre and the average are means of keys and values under the weights, and those follow from the mean query.
  std::vector<double> means(c.self_attention ? items * (size_t)d : 0);
  c.each_part([&](int g, int b, int h, int part, int item) {
    const Head head = head_of(g);
    std::vector<float> average(v), centre(d);
    double sum = 0;
    for (int p = 0; p < c.parts; p++) {
      const double* total = &heads[((size_t)g * c.parts + p) * whole];
      sum += total[2];
      for (int j = 0; j < v; j++) average[j] += c.bounded ? total[3 + j] : 0;
      for (int j = 0; j < d; j++) centre[j] += c.centres ? total[3 + v + d + j] : 0;
    }
    // Without softmax all keys that are there have the same weight in a mean.
    const float share = 1 / std::max(1.0f, c.is_softmax() ? 1.0f : c.count_keys(b));
    for (int i = c.first(part, c.num_keys); i < c.first(part + 1, c.num_keys); i++) {
      if (!c.there(b, i)) continue;
      const float w = c.is_softmax() ? weights_of(g)[i] : share;
      float *key = grad_key.row(b, h, i), *value = grad_value.row(b, h, i);
      for (int j = 0; j < d; j++) key[j] += w * centre[j];
      for (int j = 0; j < v; j++) value[j] += w * average[j];
      if (!c.is_softmax()) continue;
      const float *k = c.key.row(b, h, i), *x = c.value.row(b, h, i);
      float own = grad_weights[(size_t)g * c.num_keys + i] - sum;
      own += dot(centre.data(), k, d) - dot(centre.data(), head.centre, d);
      if (c.bounded) own += dot(average.data(), x, v) - dot(average.data(), head.average, v);
      own *= w * c.plan.scale;
      for (int j = 0; j < d; j++) key[j] += own * head.mean[j];
      for (int j = 0; j < d; j++) means[item * (size_t)d + j] += own * (k[j] - head.centre[j]);
    }
  });
  if (!c.self_attention) return;
  c.each_part([&](int g, int b, int h, int part, int) {
    std::vector<double> mean(d);
    double count = 0;
    for (int i = 0; i < c.num_queries; i++) count += c.query_there(b, i);
    for (int p = 0; p < c.parts; p++)
      for (int j = 0; j < d; j++)
        mean[j] += means[((size_t)g * c.parts + p) * d + j] + heads[((size_t)g * c.parts + p) * whole + 3 + v + j];
    std::vector<float> share(d);
    for (int j = 0; j < d; j++) share[j] = mean[j] / std::max(count, 1.0);
    for (int i = c.first(part, c.num_queries); i < c.first(part + 1, c.num_queries); i++)
      if (c.query_there(b, i)) {
        float* row = grad_query.row(b, h, i);
        for (int j = 0; j < d; j++) row[j] += share[j];
      }
  });
}

// ---- the two halves alone, of tensors as they come: sums over keys [D, v], and what queries find in them

// Add up what the parts of each head have, times `factor` of its run, as [D, v].
template <class Factor>
void add_parts(const Call& c, const std::vector<float>& partial, float* sums, Factor factor) {
  const size_t size = (size_t)c.features * c.vp;
  each(c.batch * c.heads, c.threads, [&](int g) {
    for (const Run& run : c.plan.runs)
      for (int f = run.first; f < run.first + run.length; f++)
        for (int j = 0; j < c.v; j++) {
          float total = 0;
          for (int part = 0; part < c.parts; part++) total += partial[(g * c.parts + part) * size + (size_t)f * c.vp + j];
          sums[((size_t)g * c.features + f) * c.v + j] = factor(run) * total;
        }
  });
}

// The sums of head g times `factor`, transposed.
template <class Factor>
void spread_sums(const Call& c, const float* from, int g, Factor factor, float* sums, float* sums_t) {
  from += (size_t)g * c.features * c.v;
  for (const Run& run : c.plan.runs)
    for (int f = run.first; f < run.first + run.length; f++)
      for (int j = 0; j < c.v; j++)
        sums[(size_t)f * c.v + j] = sums_t[(size_t)j * c.features + f] = factor(run) * from[(size_t)f * c.v + j];
}

float one(const Run&) { return 1; }
float square_of(const Run& run) { return run.square; }

void sum_keys(const Call& c, float* sums) {
  const Head none;
  const size_t size = (size_t)c.features * c.vp;
  std::vector<float> partial(c.batch * c.heads * c.parts * size);
  c.each_part([&](int, int b, int h, int part, int item) {
    KeyBlock block(c);
    float* phi = scratch<PHI>(CHUNK * LD);
    const int end = c.first(part + 1, c.num_keys);
    for (int i = c.first(part, c.num_keys); i < end; i += BLOCK) {
      block.compute(c, b, h, none, nullptr, i, std::min(BLOCK, end - i));
      c.plan.each_chunk([&](const Run* run, const Run* last, int first, int count) {
        expand(c.plan, run, last, block.z, block.z, phi, block.lanes, LD);
        float* to = &partial[item * size] + (size_t)first * c.vp;
        multiply(count, c.vp, block.lanes, phi, LD, block.e, c.vp, to, c.vp, true);
      });
    }
  });
  add_parts(c, partial, sums, square_of);
}

void sum_keys_backward(const Call& c, const float* grad, Rows grad_key, Rows grad_value) {
  const Head none;
  const int d = c.d, v = c.v, wide = std::max(c.plan.width, 1);
  c.each_part([&](int g, int b, int h, int part, int) {
    float *sums = scratch<GRAD_SUMS>((size_t)c.features * v), *sums_t = scratch<GRAD_SUMS_T>((size_t)c.features * v);
    spread_sums(c, grad, g, square_of, sums, sums_t);
    KeyBlock block(c);
    float *e_t = scratch<E_T>((size_t)c.vp * LD), *grad_e = scratch<GRAD_O>((size_t)c.vp * LD);
    float *phi = scratch<PHI>(CHUNK * LD), *grad_phi = scratch<GRAD_PHI>(CHUNK * LD);
    float *grad_z = scratch<GRAD_Z>((size_t)wide * LD), *u = scratch<U>((size_t)c.dp * LD);
    const int end = c.first(part + 1, c.num_keys);
    for (int i = c.first(part, c.num_keys); i < end; i += BLOCK) {
      block.compute(c, b, h, none, nullptr, i, std::min(BLOCK, end - i));
      const int lanes = block.lanes;
      transpose(lanes, c.vp, block.e, c.vp, e_t, LD);
      std::fill_n(grad_z, (size_t)c.plan.width * LD, 0.0f);
      c.plan.each_chunk([&](const Run* run, const Run* last, int first, int count) {
        expand(c.plan, run, last, block.z, block.z, phi, lanes, LD);
        multiply(v, lanes, count, sums_t + first, c.features, phi, LD, grad_e, LD, first > 0);
        multiply(count, lanes, v, sums + (size_t)first * v, v, e_t, LD, grad_phi, LD);
        pull_back(c.plan, run, last, block.z, block.z, grad_phi, grad_z, grad_z, lanes, LD);
      });
      multiply(d, lanes, c.plan.width, c.projection.data(), c.plan.width, grad_z, LD, u, LD);
      transpose(c.dp, lanes, u, LD, block.rows, c.dp);
      store(grad_key, b, h, i, block.n, block.rows);
      transpose(c.vp, lanes, grad_e, LD, block.values, c.vp);
      store(grad_value, b, h, i, block.n, block.values);
    }
  });
}

void look_up(const Call& c, const float* given, Rows out) {
  const Head none;
  c.each_part([&](int g, int b, int h, int part, int) {
    float *sums = scratch<SUMS>((size_t)c.features * c.v), *sums_t = scratch<SUMS_T>((size_t)c.features * c.v);
    spread_sums(c, given, g, one, sums, sums_t);
    QueryBlock block(c, 0);
    float *phi = scratch<PHI>(CHUNK * LD), *o = scratch<O>((size_t)c.vp * LD);
    float* rows = scratch<VALUES>((size_t)BLOCK * c.vp);
    const int end = c.first(part + 1, c.num_queries);
    for (int i = c.first(part, c.num_queries); i < end; i += BLOCK) {
      block.compute(c, b, h, none, i, std::min(BLOCK, end - i), [](int) { return true; });
      c.plan.each_chunk([&](const Run* run, const Run* last, int first, int count) {
        expand(c.plan, run, last, block.z, block.z, phi, block.lanes, LD);
        multiply(c.v, block.lanes, count, sums_t + first, c.features, phi, LD, o, LD, first > 0);
      });
      transpose(c.vp, block.lanes, o, LD, rows, c.vp);
      store(out, b, h, i, block.n, rows);
    }
  });
}

void look_up_backward(const Call& c, const float* given, Rows grad_out, Rows grad_query, float* grad_sums) {
  const Head none;
  const int d = c.d, v = c.v, wide = std::max(c.plan.width, 1);
  const size_t size = (size_t)c.features * c.vp;
  std::vector<float> partial(c.batch * c.heads * c.parts * size);
  c.each_part([&](int g, int b, int h, int part, int item) {
    QueryBlock block(c, 0);
    const float* sums = given + (size_t)g * c.features * v;
    float *grads = scratch<VALUES>((size_t)BLOCK * c.vp), *grad_o = scratch<GRAD_O>((size_t)c.vp * LD);
    float *phi = scratch<PHI>(CHUNK * LD), *grad_phi = scratch<GRAD_PHI>(CHUNK * LD);
    float *grad_z = scratch<GRAD_Z>((size_t)wide * LD), *u = scratch<U>((size_t)c.dp * LD);
    const auto kept = [](int) { return true; };
    const int end = c.first(part + 1, c.num_queries);
    for (int i = c.first(part, c.num_queries); i < end; i += BLOCK) {
      block.compute(c, b, h, none, i, std::min(BLOCK, end - i), kept);
      const int lanes = block.lanes;
      load(grad_out, b, h, i, block.n, nullptr, grads, kept, INFINITY);
      transpose(lanes, c.vp, grads, c.vp, grad_o, LD);
      std::fill_n(grad_z, (size_t)c.plan.width * LD, 0.0f);
      c.plan.each_chunk([&](const Run* run, const Run* last, int first, int count) {
        expand(c.plan, run, last, block.z, block.z, phi, lanes, LD);
        multiply(count, c.vp, lanes, phi, LD, grads, c.vp, &partial[item * size] + (size_t)first * c.vp, c.vp, true);
        multiply(count, lanes, v, sums + (size_t)first * v, v, grad_o, LD, grad_phi, LD);
        pull_back(c.plan, run, last, block.z, block.z, grad_phi, grad_z, grad_z, lanes, LD);
      });
      multiply(d, lanes, c.plan.width, c.projection.data(), c.plan.width, grad_z, LD, u, LD);
      transpose(c.dp, lanes, u, LD, block.rows, c.dp);
      store(grad_query, b, h, i, block.n, block.rows);
    }
  });
  add_parts(c, partial, grad_sums, one);
}

}  // namespace

// `sizes` are batch, heads of keys, heads of queries for each of them, queries, keys, their width, that of values and the
// number of threads; then come three strides of each tensor [B, H, N, n], in the order of the arguments. What comes back is
// whether all coordinates were small enough; else what was computed is void.
extern "C" int schoenbat_forward(const int64_t* sizes, const int* plan, const float* numbers, const float* projection,
                                  float* query, float* key, float* value, const uint8_t* mask, float* out,
                                  float* results, float* weights, float* heads) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  const int64_t* s = sizes + 17;
  forward(c, {out, s[0], s[1], s[2], c.query.groups, c.query.tokens, c.v}, c.results(results), weights, heads);
  return !c.beyond;
}

extern "C" int schoenbat_sum_keys(const int64_t* sizes, const int* plan, const float* numbers, const float* projection,
                                  float* query, float* key, float* value, const uint8_t* mask, float* sums) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  sum_keys(c, sums);
  return 1;
}

extern "C" int schoenbat_sum_keys_backward(const int64_t* sizes, const int* plan, const float* numbers,
                                           const float* projection, float* query, float* key, float* value,
                                           const uint8_t* mask, float* grad_key, float* grad_value, const float* grad) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  const int64_t* s = sizes + 17;
  sum_keys_backward(c, grad, {grad_key, s[0], s[1], s[2], 1, c.key.tokens, c.d},
                    {grad_value, s[3], s[4], s[5], 1, c.key.tokens, c.v});
  return 1;
}

extern "C" int schoenbat_look_up(const int64_t* sizes, const int* plan, const float* numbers, const float* projection,
                                 float* query, float* key, float* value, const uint8_t* mask, float* out,
                                 const float* sums) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  const int64_t* s = sizes + 17;
  look_up(c, sums, {out, s[0], s[1], s[2], 1, c.query.tokens, c.v});
  return 1;
}

extern "C" int schoenbat_look_up_backward(const int64_t* sizes, const int* plan, const float* numbers,
                                          const float* projection, float* query, float* key, float* value,
                                          const uint8_t* mask, float* grad_out, float* grad_query, const float* sums,
                                          float* grad_sums) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  const int64_t* s = sizes + 17;
  look_up_backward(c, sums, {grad_out, s[0], s[1], s[2], 1, c.query.tokens, c.v},
                   {grad_query, s[3], s[4], s[5], 1, c.query.tokens, c.d}, grad_sums);
  return 1;
}

extern "C" int schoenbat_backward(const int64_t* sizes, const int* plan, const float* numbers, const float* projection,
                                   float* query, float* key, float* value, const uint8_t* mask, float* grad_out,
                                   float* grad_query, float* grad_key, float* grad_value, float* results,
                                   const float* weights, float* heads) {
  const Call c(sizes, plan, numbers, projection, query, key, value, mask);
  const int64_t* s = sizes + 17;
  const auto rows = [&](float* at, const int64_t* strides, const Rows& like, int width) {
    return Rows{at, strides[0], strides[1], strides[2], like.groups, like.tokens, width};
  };
  backward(c, rows(grad_out, s, c.query, c.v), c.results(results), weights, heads, rows(grad_query, s + 3, c.query, c.d),
           rows(grad_key, s + 6, c.key, c.d), rows(grad_value, s + 9, c.value, c.v));
  return !c.beyond;
}
