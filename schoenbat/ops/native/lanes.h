// Products of small matrices, transposition and elementary functions, in vectors of the machine's width.
//
// Blocks are stored with a coordinate or feature as a row and a token as a column ("lanes"). Not for -ffast-math: NaN at
// masked places must not spread.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int WIDTH = 8, TILE_ROWS = 4;
#else
constexpr int WIDTH = 4, TILE_ROWS = 6;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

inline Vec& vec(float* x) { return *reinterpret_cast<Vec*>(x); }
inline const Vec& vec(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline Vec all(float x) { return Vec{} + x; }
inline int padded(int n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// Memory of a thread that is kept between blocks and calls, one piece for each slot.
template <int slot>
float* scratch(size_t count) {
  static thread_local struct Own {
    float* at = nullptr;
    size_t size = 0;
    ~Own() { std::free(at); }
  } own;
  if (own.size < count) {
    std::free(own.at);
    own.size = (count + 15) / 16 * 16;
    own.at = static_cast<float*>(std::aligned_alloc(64, own.size * sizeof(float)));
  }
  return own.at;
}

template <class Function>
void each(int count, int threads, Function function) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::min(threads, count)) if (threads > 1 && count > 1)
  for (int i = 0; i < count; i++) function(i);
}

// ---- products of matrices

template <int M, int V>
void multiply_tile(int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc, bool add) {
  Vec sum[M][V] = {};
  for (int k = 0; k < depth; k++, b += ldb) {
    Vec row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) row[j] = vec(b + j * WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      const Vec x = all(a[(size_t)i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) {
      Vec& out = vec(c + (size_t)i * ldc + j * WIDTH);
      out = add ? out + sum[i][j] : sum[i][j];
    }
}

typedef void (*Tile)(int, const float*, int, const float*, int, float*, int, bool);
template <int V>
Tile tile_of(int rows) {
  static const Tile tiles[] = {multiply_tile<1, V>, multiply_tile<2, V>, multiply_tile<3, V>, multiply_tile<4, V>,
                               multiply_tile<5, V>, multiply_tile<6, V>, multiply_tile<7, V>, multiply_tile<8, V>};
  return tiles[rows - 1];
}

// C [rows, columns] = A [rows, depth] B [depth, columns], added to what is there if `add`; columns in whole vectors.
void multiply(int rows, int columns, int depth, const float* a, int lda, const float* b, int ldb, float* c, int ldc,
              bool add = false) {
  const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
  for (int j = 0; j < columns;) {
    const int left = (columns - j) / WIDTH, vectors = left == 4 ? 2 : std::min(left, 3);
    for (int t = 0, i = 0; t < tiles; t++) {
      const int m = (rows - i) / (tiles - t);
      const Tile tile = vectors == 3 ? tile_of<3>(m) : vectors == 2 ? tile_of<2>(m) : tile_of<1>(m);
      tile(depth, a + (size_t)i * lda, lda, b + j, ldb, c + (size_t)i * ldc + j, ldc, add);
      i += m;
    }
    j += vectors * WIDTH;
  }
}

inline float sum_of(Vec x) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += x[i];
  return total;
}

float dot(const float* x, const float* y, int n) {
  Vec sum = {};
  int i = 0;
  for (; i + WIDTH <= n; i += WIDTH) sum += vec(x + i) * vec(y + i);
  float total = sum_of(sum);
  for (; i < n; i++) total += x[i] * y[i];
  return total;
}

// ---- transposition, WIDTH x WIDTH at a time

template <int S>
inline void exchange(Vec& x, Vec& y) {
  Ints low, high;
  for (int j = 0; j < WIDTH; j++) {
    low[j] = j & S ? WIDTH + j - S : j;
    high[j] = j & S ? WIDTH + j : j + S;
  }
#if defined(__clang__)
  Vec a, b;
  for (int j = 0; j < WIDTH; j++) a[j] = j & S ? y[j - S] : x[j], b[j] = j & S ? y[j] : x[j + S];
#else
  const Vec a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
#endif
  x = a, y = b;
}

template <int S>
inline void exchange_all(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
}

// [rows, columns] to [columns, rows], both in whole vectors.
void transpose(int rows, int columns, const float* from, int ld_from, float* to, int ld_to) {
  for (int r = 0; r < rows; r += WIDTH)
    for (int c = 0; c < columns; c += WIDTH) {
      Vec x[WIDTH];
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; i++) x[i] = vec(from + (size_t)(r + i) * ld_from + c);
      exchange_all<1>(x);
      exchange_all<2>(x);
      if constexpr (WIDTH >= 8) exchange_all<4>(x);
      if constexpr (WIDTH >= 16) exchange_all<8>(x);
#pragma GCC unroll 16
      for (int i = 0; i < WIDTH; i++) vec(to + (size_t)(c + i) * ld_to + r) = x[i];
    }
}

// ---- elementary functions

inline Vec exponential(Vec x) {
  x = x > all(88.7f) ? all(88.7f) : x < all(-87.3f) ? all(-87.3f) : x;
  const Vec magic = all(12582912.0f);
  const Vec n = (x * 1.44269504f + magic) - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return (p * r * r + r + 1.0f) * scale;
}

inline Vec square_root(Vec x) {
  for (int i = 0; i < WIDTH; i++) x[i] = std::sqrt(x[i]);
  return x;
}

}  // namespace
