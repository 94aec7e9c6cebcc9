// Attention that is exact for near and heavy keys and described for the rest: ops/sparse.py, forward, where every query
// sees its own block of tokens and those beside it, in float32 on a CPU. Names are those of that module.
#include <memory>
#include <numeric>
#include <vector>

#include "lanes.h"

namespace {

constexpr float LOWEST = -1e30f, WIDE = 3.5f, FEW_KEYS = 4;

struct Shape {
  int sequences, groups, tokens, head_dim, values, window, heavy;
  float scale;
};

// Features of the second degree: runs of products of two coordinates of projected vectors.
struct Second {
  int num_runs, width, num_features;
  const int* runs;       // [num_runs, 3]: two offsets and a length
  const float* squares;  // of their weights
  float share;           // of the degree that is described
  bool is_complete() const { return share >= 1; }
};

// What the rest of the keys of a sequence is summed up to.
struct Rest {
  float *key, *extended, *heavy_key;  // [tokens, head_dim], [tokens, values + 1], [heavy, head_dim]
  float *values, *heavy_values;       // transposed [v, 1]: [values + 1, tokens padded], [values + 1, heavy padded]
  float *total, *first, *moment,
      *second;      // [values + 1], [values + 1, head_dim], [head_dim, head_dim], [values + 1, D]
  float* features;  // of the second degree of each key, weights squared: [tokens, D]
};

void transpose_any(int rows, int columns, const float* from, int ld_from, float* to, int ld_to) {
  float* whole = scratch<20>((size_t)padded(rows) * padded(columns));
  float* turned = scratch<21>((size_t)padded(rows) * padded(columns));
  std::fill(whole, whole + (size_t)padded(rows) * padded(columns), 0.0f);
  for (int i = 0; i < rows; i++)
    std::memcpy(whole + (size_t)i * padded(columns), from + (size_t)i * ld_from, columns * sizeof(float));
  transpose(padded(rows), padded(columns), whole, padded(columns), turned, padded(rows));
  for (int i = 0; i < columns; i++)
    std::memcpy(to + (size_t)i * ld_to, turned + (size_t)i * padded(rows), rows * sizeof(float));
}

// [D, lanes] from [width, lanes].
void multiply_coordinates(const Second& second, const float* projected, float* features, int lanes, bool squares) {
  for (int r = 0; r < second.num_runs; r++) {
    const int* run = second.runs + 3 * r;
    const Vec weight = all(squares ? second.squares[r] : 1.0f);
    for (int i = 0; i < run[2]; i++, features += lanes)
      for (int n = 0; n < lanes; n += WIDTH)
        vec(features + n) = weight * vec(projected + (size_t)(run[0] + i) * lanes + n) *
                            vec(projected + (size_t)(run[1] + i) * lanes + n);
  }
}

constexpr int QUERIES = 32, LOOKED_AT = QUERIES / WIDTH;

float log_mass(float variance, float count, float curvature) {
  const float beyond = (std::sqrt(std::max(variance, WIDE * WIDE)) - WIDE) * std::sqrt(2 * std::log(count));
  return std::log(count * (1 + curvature * variance / 2)) + beyond;
}

// Choose heavy keys of a sequence, and measure g of each of its heads by the queries that chose.
void choose_heavy(const Shape& s, const float* query, const float* key, const uint8_t* real, int* places,
                  float* missed) {
  const int d = s.head_dim;
  std::vector<int> tokens;
  for (int j = 0; j < s.tokens; j++)
    if (real[j]) tokens.push_back(j);
  const int count = tokens.size();
  int asking[QUERIES];
  for (int i = 0; i < QUERIES; i++) asking[i] = count ? tokens[(int)((i + 0.5) / QUERIES * count)] : 0;
  float* scores = scratch<23>((size_t)s.groups * s.tokens * QUERIES);
  float* worth = scratch<24>(s.tokens);
  std::fill(worth, worth + s.tokens, 0.0f);
  Ints blocks[LOOKED_AT];
  for (int i = 0; i < QUERIES; i++) blocks[i / WIDTH][i % WIDTH] = asking[i] / s.window;
  const auto is_far = [&](int j, int part) {
    const Ints distance = blocks[part] - j / s.window;
    return distance * distance > 1;
  };
  float* turned = scratch<25>((size_t)d * QUERIES);
  float* some = scratch<26>((size_t)QUERIES * d);
  for (int g = 0; g < s.groups; g++) {
    for (int i = 0; i < QUERIES; i++)
      std::memcpy(some + (size_t)i * d, query + ((size_t)g * s.tokens + asking[i]) * d, d * sizeof(float));
    transpose_any(QUERIES, d, some, d, turned, QUERIES);
    for (int i = 0; i < d * QUERIES; i += WIDTH) vec(turned + i) *= s.scale;
    float* own = scores + (size_t)g * s.tokens * QUERIES;
    multiply(s.tokens, QUERIES, d, key, d, turned, QUERIES, own, QUERIES);
    for (int part = 0; part < LOOKED_AT; part++) {
      Vec top = all(LOWEST), sum = {};
      for (const int j : tokens) {
        const Vec x = vec(own + (size_t)j * QUERIES + part * WIDTH);
        top = x > top ? x : top;
      }
      for (const int j : tokens) sum += exponential(vec(own + (size_t)j * QUERIES + part * WIDTH) - top);
      const Vec inverse = 1.0f / sum;
      for (const int j : tokens) {
        const Vec weight = exponential(vec(own + (size_t)j * QUERIES + part * WIDTH) - top) * inverse;
        worth[j] += sum_of(is_far(j, part) ? weight * weight : Vec{});
      }
    }
  }
  for (int j = 0; j < s.tokens; j++)
    if (!real[j]) worth[j] = -1;
  std::vector<int> order(s.tokens);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + s.heavy, order.end(),
                    [&](int i, int j) { return worth[i] != worth[j] ? worth[i] > worth[j] : i < j; });
  std::copy(order.begin(), order.begin() + s.heavy, places);
  std::vector<uint8_t> is_heavy(s.tokens);
  for (int i = 0; i < s.heavy; i++) is_heavy[places[i]] = 1;
  for (int g = 0; g < s.groups; g++) {
    const float* own = scores + (size_t)g * s.tokens * QUERIES;
    double total = 0;
    for (int part = 0; part < LOOKED_AT; part++) {
      Vec number = {}, sum = {}, squares = {}, top = all(LOWEST), mass = {};
      for (const int j : tokens) {
        const Ints seen = is_far(j, part) & -(int)!is_heavy[j];
        const Vec x = seen ? vec(own + (size_t)j * QUERIES + part * WIDTH) : Vec{};
        number += seen ? all(1) : Vec{};
        sum += x;
        squares += x * x;
        top = (seen & (x > top)) ? x : top;
      }
      for (const int j : tokens) {
        const Ints seen = is_far(j, part) & -(int)!is_heavy[j];
        mass += seen ? exponential(vec(own + (size_t)j * QUERIES + part * WIDTH) - top) : Vec{};
      }
      for (int i = 0; i < WIDTH; i++) {
        if (number[i] == 0) continue;
        const float mean = sum[i] / number[i], variance = std::max(squares[i] / number[i] - mean * mean, 0.0f);
        total += top[i] - mean + std::log(mass[i]) - log_mass(variance, number[i], 1);
      }
    }
    missed[g] = total / QUERIES;
  }
}

// Fill the keys and values of a rest: centred, and those that are seen exactly apart from the others.
void set_apart(const Shape& s, const float* key, const float* value, const uint8_t* real, const int* places,
               const Rest& rest) {
  const int d = s.head_dim, outputs = s.values + 1;
  std::vector<uint8_t> is_heavy(s.tokens);
  for (int i = 0; i < s.heavy; i++) is_heavy[places[i]] = 1;
  std::vector<float> centre(d);
  float count = 0;
  for (int j = 0; j < s.tokens; j++)
    if (real[j] && !is_heavy[j]) {
      count++;
      for (int i = 0; i < d; i++) centre[i] += key[(size_t)j * d + i];
    }
  for (float& x : centre) x /= std::max(count, 1.0f);
  const auto copy = [&](int j, bool counts, float* to_key, float* to_extended) {
    for (int i = 0; i < d; i++) to_key[i] = (real[j] ? key[(size_t)j * d + i] : 0.0f) - centre[i];
    for (int i = 0; i < s.values; i++) to_extended[i] = counts ? value[(size_t)j * s.values + i] : 0.0f;
    to_extended[s.values] = counts;
  };
  for (int j = 0; j < s.tokens; j++)
    copy(j, real[j] && !is_heavy[j], rest.key + (size_t)j * d, rest.extended + (size_t)j * outputs);
  for (int i = 0; i < s.heavy; i++)
    copy(places[i], real[places[i]], rest.heavy_key + (size_t)i * d, rest.heavy_values + (size_t)i * outputs);
}

constexpr int KEYS = 128;  // at a time

void sum_up(const Shape& s, const Second& second, const float* projection, const Rest& rest) {
  const int outputs = s.values + 1, d = s.head_dim, width = padded(d), wide = padded(s.tokens),
            D = padded(second.num_features);
  transpose_any(s.heavy, outputs, rest.heavy_values, outputs, rest.heavy_values, s.heavy);
  for (int i = 0; i < outputs; i++)
    std::fill(rest.values + (size_t)i * wide, rest.values + (size_t)(i + 1) * wide, 0.0f);
  std::fill(rest.total, rest.total + outputs, 0.0f);
  float* block = scratch<0>((size_t)KEYS * width);
  float* weighted = scratch<1>((size_t)KEYS * width);
  float* turned = scratch<2>((size_t)width * KEYS);
  float* projected = scratch<3>((size_t)second.width * KEYS);
  float* lanes = scratch<4>((size_t)D * KEYS);
  float* own = scratch<5>((size_t)KEYS * D);
  for (int start = 0; start < s.tokens; start += KEYS) {
    const int count = std::min(KEYS, s.tokens - start);
    transpose_any(count, outputs, rest.extended + (size_t)start * outputs, outputs, rest.values + start, wide);
    std::fill(block, block + (size_t)KEYS * width, 0.0f);
    for (int i = 0; i < count; i++) {
      std::memcpy(block + (size_t)i * width, rest.key + (size_t)(start + i) * d, d * sizeof(float));
      const float there = rest.extended[(size_t)(start + i) * outputs + s.values];
      for (int n = 0; n < width; n++) weighted[(size_t)i * width + n] = there * block[(size_t)i * width + n];
      for (int n = 0; n < outputs; n++) rest.total[n] += rest.extended[(size_t)(start + i) * outputs + n];
    }
    multiply(outputs, width, count, rest.values + start, wide, block, width, rest.first, width, start > 0);
    transpose(KEYS, width, block, width, turned, KEYS);
    multiply(d, width, count, turned, KEYS, weighted, width, rest.moment, width, start > 0);
    if (!second.num_features) continue;
    multiply(second.width, KEYS, d, projection, d, turned, KEYS, projected, KEYS);
    std::fill(lanes, lanes + (size_t)D * KEYS, 0.0f);
    multiply_coordinates(second, projected, lanes, KEYS, true);
    float* features = second.is_complete() ? own : rest.features + (size_t)start * D;
    transpose(D, KEYS, lanes, KEYS, own, D);
    if (features != own) std::memcpy(features, own, (size_t)count * D * sizeof(float));
    multiply(outputs, D, count, rest.values + start, wide, own, D, rest.second, D, start > 0);
  }
}

// One block of queries of one head: [count, head_dim] to [count, values].
void attend_block(const Shape& s, const Second& second, const float* projection, const Rest& rest, int from,
                  const float* query, int count, const float* kernel, float missed, float limit, float unexplained,
                  float* out) {
  const int outputs = s.values + 1, d = s.head_dim, width = padded(d), wide = padded(s.tokens),
            D = padded(second.num_features);
  const int lanes = padded(count), v = s.values;
  const int low = std::max(0, from - s.window), high = std::min(s.tokens, from + 2 * s.window), near = high - low;
  float* rows = scratch<10>((size_t)width * lanes);
  float* q = scratch<11>((size_t)width * lanes);
  transpose_any(count, d, query, d, q, lanes);
  for (int i = 0; i < d; i++) {
    for (int n = 0; n < count; n++) q[(size_t)i * lanes + n] *= s.scale;
    std::fill(q + (size_t)i * lanes + count, q + (size_t)(i + 1) * lanes, 0.0f);
  }

  float* scores = scratch<12>((size_t)(near + s.heavy) * lanes);
  float* far_scores = scores + (size_t)near * lanes;
  multiply(near, lanes, d, rest.key + (size_t)low * d, d, q, lanes, scores, lanes);
  if (s.heavy) multiply(s.heavy, lanes, d, rest.heavy_key, d, q, lanes, far_scores, lanes);

  // What the rest contains though it is seen exactly is taken off again.
  const float* values = rest.values + low;
  float* first = scratch<13>((size_t)outputs * lanes);
  float* taken = scratch<14>((size_t)std::max(outputs, near) * lanes);
  multiply(outputs, lanes, d, rest.first, width, q, lanes, first, lanes);
  multiply(outputs, lanes, near, values, wide, scores, lanes, taken, lanes);
  for (size_t i = 0; i < (size_t)outputs * lanes; i += WIDTH) vec(first + i) -= vec(taken + i);
  float* total = scratch<15>(padded(outputs));
  for (int i = 0; i < outputs; i++) {
    total[i] = rest.total[i];
    for (int j = 0; j < near; j++) total[i] -= values[(size_t)i * wide + j];
  }
  multiply(d, lanes, d, rest.moment, width, q, lanes, rows, lanes);
  float* higher = scratch<16>((size_t)outputs * lanes);
  if (second.num_features) {
    float* projected = scratch<17>((size_t)second.width * lanes);
    float* features = scratch<18>((size_t)D * lanes);
    float* products = scratch<19>((size_t)near * lanes);
    multiply(second.width, lanes, d, projection, d, q, lanes, projected, lanes);
    multiply_coordinates(second, projected, features, lanes, false);
    multiply(outputs, lanes, second.num_features, rest.second, D, features, lanes, higher, lanes);
    if (second.is_complete())
      for (size_t i = 0; i < (size_t)near * lanes; i += WIDTH)
        vec(products + i) = 0.5f * vec(scores + i) * vec(scores + i);
    else
      multiply(near, lanes, second.num_features, rest.features + (size_t)low * D, D, features, lanes, products, lanes);
    multiply(outputs, lanes, near, values, wide, products, lanes, taken, lanes);
    for (size_t i = 0; i < (size_t)outputs * lanes; i += WIDTH) vec(higher + i) -= vec(taken + i);
  }

  const float number = std::max(1.0f, total[v]), trust = number / (number + FEW_KEYS * unexplained);
  const float* there = values + (size_t)v * wide;
  float size = 0;
  for (int i = 0; i < d; i++) size += rest.moment[(size_t)i * width + i] / d;
  float* result = scratch<22>((size_t)padded(v) * lanes);
  for (int n = 0; n < lanes; n += WIDTH) {
    Vec square = {}, length = {};
    for (int i = 0; i < d; i++) {
      const Vec x = vec(q + (size_t)i * lanes + n);
      square += x * vec(rows + (size_t)i * lanes + n);
      length += x * x;
    }
    for (int j = 0; j < near; j++)
      square -= there[j] * vec(scores + (size_t)j * lanes + n) * vec(scores + (size_t)j * lanes + n);
    const Vec mean = vec(first + (size_t)v * lanes + n) / number;
    Vec variance = square / number - mean * mean;
    variance = variance > Vec{} ? variance : Vec{};
    const Vec squared_factor = limit / (variance > all(limit) ? variance : all(limit));
    const Vec factor = square_root(squared_factor);
    Vec reached = kernel[2] * squared_factor;
    if (second.num_features && !second.is_complete()) {
      const Vec isotropic = length * size;
      Vec ratio =
          square / (isotropic > all(1.17549435e-38f) ? isotropic : all(1.17549435e-38f)) * (rest.total[v] / number);
      ratio = ratio > Vec{} ? ratio : Vec{};
      ratio = ratio < all(1) ? ratio : all(1);
      ratio *= ratio;
      reached *= ratio / (second.share * ratio + (1 - second.share));
    }
    Vec level = kernel[0] + mean + missed;
    for (int i = 0; i < WIDTH; i++) level[i] += log_mass(variance[i], number, kernel[2]);
    Vec top = total[v] > 0 ? level : all(LOWEST / 2);
    for (int j = 0; j < near; j++)
      if (there[j] > 0) {
        const Vec x = vec(scores + (size_t)j * lanes + n);
        top = x > top ? x : top;
      }
    const float* heavy_there = rest.heavy_values + (size_t)v * s.heavy;
    for (int j = 0; j < s.heavy; j++)
      if (heavy_there[j] > 0) {
        const Vec x = vec(far_scores + (size_t)j * lanes + n);
        top = x > top ? x : top;
      }
    Vec sum = {};
    for (int j = 0; j < near + s.heavy; j++) {
      Vec& x = vec(scores + (size_t)j * lanes + n);
      const bool seen = j < near ? there[j] > 0 : heavy_there[j - near] > 0;
      x = seen ? exponential(x - top) : Vec{};
      sum += x;
    }
    const Vec weight = total[v] > 0 ? exponential(level - top) : Vec{};
    sum += weight;
    const Vec inverse = 1.0f / (sum > Vec{} ? sum : all(1));
    for (int j = 0; j < near + s.heavy; j++) vec(scores + (size_t)j * lanes + n) *= inverse;
    const Vec denominator =
        second.num_features ? number * (1 + kernel[2] * squared_factor * variance / 2) : all(number);
    for (int i = 0; i < v; i++) {
      const float value = total[i] / number;
      const Vec linear = vec(first + (size_t)i * lanes + n) - value * vec(first + (size_t)v * lanes + n);
      Vec output = kernel[1] * factor * linear;
      if (second.num_features)
        output += reached *
                  (vec(higher + (size_t)i * lanes + n) - value * vec(higher + (size_t)v * lanes + n) - mean * linear);
      vec(result + (size_t)i * lanes + n) = weight * inverse * (value + trust * output / denominator);
    }
  }
  multiply(v, lanes, near, values, wide, scores, lanes, result, lanes, true);
  if (s.heavy) multiply(v, lanes, s.heavy, rest.heavy_values, s.heavy, far_scores, lanes, result, lanes, true);
  transpose_any(v, count, result, lanes, out, v);
}

}  // namespace

// sizes: those of `Shape`, the number of runs, the width of projected vectors, threads. numbers: scale, share, limit,
// unexplained. query [sequences, groups, tokens, head_dim]; key, value [sequences, tokens, head_dim or values]; real
// [sequences, tokens]; kernel [sequences, groups, 3]: log a, b, c; projection [width, head_dim]; out [sequences,
// groups, tokens, values].
extern "C" void schoenbat_attend_sparse(const int* whole, const float* numbers, const int* runs, const float* squares,
                                        const float* query, const float* key, const float* value, const uint8_t* real,
                                        const float* kernel, const float* projection, float* out) {
  const Shape s = {whole[0], whole[1], whole[2], whole[3], whole[4], whole[5], whole[6], numbers[0]};
  Second second = {whole[7], whole[8], 0, runs, squares, numbers[1]};
  const int threads = whole[9];
  const float limit = numbers[2], unexplained = numbers[3];
  for (int r = 0; r < second.num_runs; r++) second.num_features += runs[3 * r + 2];
  const int outputs = s.values + 1, D = padded(second.num_features), d = padded(s.head_dim), wide = padded(s.tokens);
  const size_t tokens = s.tokens, features = second.is_complete() ? 0 : tokens * D;
  const size_t sizes[] = {
      tokens * s.head_dim,       tokens * outputs, (size_t)s.heavy * s.head_dim, (size_t)outputs * wide,
      (size_t)outputs * s.heavy, (size_t)outputs,  (size_t)outputs * d,          (size_t)d * d,
      (size_t)outputs * D,       features};
  size_t total = 0;
  for (const size_t size : sizes) total += size;
  std::vector<std::unique_ptr<float[]>> memory(s.sequences);
  std::vector<Rest> rests(s.sequences);
  std::vector<float> missed(s.sequences * s.groups);
  each(s.sequences, threads, [&](int i) {
    memory[i].reset(new float[total]);
    float* parts[10];
    float* at = memory[i].get();
    for (int p = 0; p < 10; p++) parts[p] = at, at += sizes[p];
    rests[i] = {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7], parts[8], parts[9]};
    const float* keys = key + i * tokens * s.head_dim;
    std::vector<int> places(s.heavy);
    choose_heavy(s, query + i * s.groups * tokens * s.head_dim, keys, real + i * tokens, places.data(),
                 &missed[i * s.groups]);
    set_apart(s, keys, value + i * tokens * s.values, real + i * tokens, places.data(), rests[i]);
    sum_up(s, second, projection, rests[i]);
  });
  const int blocks = (s.tokens + s.window - 1) / s.window, heads = s.sequences * s.groups;
  constexpr int TOGETHER = 16;
  const int parts = (blocks + TOGETHER - 1) / TOGETHER;
  each(heads * parts, threads, [&](int i) {
    const int head = i / parts, end = std::min(blocks, (i % parts + 1) * TOGETHER);
    for (int block = i % parts * TOGETHER; block < end; block++) {
      const int from = block * s.window, count = std::min(s.window, s.tokens - from);
      const size_t row = head * tokens + from;
      attend_block(s, second, projection, rests[head / s.groups], from, query + row * s.head_dim, count,
                   kernel + 3 * head, missed[head], limit, unexplained, out + row * s.values);
    }
  });
}
