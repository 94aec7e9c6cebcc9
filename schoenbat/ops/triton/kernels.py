r"""The kernels of `schoenbat.ops.triton`: sums of keys, look-up of queries, and their gradients.

Letters as in `schoenbat.ops._bounds`. Keys k_j have weights w_j = exp(l_j - level) of the sum 1 and the centre
c = sum_j w_j k_j; a = sum_j w_j v_j is the mean value, m the mean query. With x = q - m, y = k - c,

    sums = W^2 sum_j psi(y_j) w_j (v_j - a)^T,  ones = W^2 sum_j psi(y_j) w_j,  second = scale^2 sum_j w_j y_j y_j^T,
    out = a + trust psi(x) sums / max(constant^2 + psi(x) ones - excess, least),

or, where there are no bounds, a times what the denominator was over what it became, and trust 1.

Features come in tiles of TILE features of one degree: first the linear ones, then the quadratic ones, then higher ones.
A feature of degree n is a product of n projections, each of which is a column of one of the n matrices [TILE, d] of its
tile in `factors`; columns that fill up a tile are 0. A query that is multiplied by f has features f^n psi.

A program holds features of ROWS tokens in registers, never in memory. Vectors are rounded to the dtype of `factors`
before they are multiplied, but for moments, which say how far a query is cooled; all sums are in float32.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST = tl.constexpr(40.0)
"""Of a variance in an exponent. Beyond it the floor of a denominator lets nothing pass, and must not overflow."""
STANDARD_ERRORS = tl.constexpr(3.0)
LEVEL, NUMBER, TRUST, SMALLEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Columns of `stats` [G, 4]; the fourth is where a denominator without bounds is moved from 0."""


@triton.jit
def _dot(a, b, LIKE: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply matrices that are rounded to LIKE; the sum is in float32."""
    a, b = a.to(LIKE), b.to(LIKE)
    if INTERPRETED:  # The interpreter takes the bits of bfloat16 for integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _at(rows, there, stride, width: tl.constexpr, WIDTH: tl.constexpr):
    """Return where [rows, WIDTH] of a matrix lies, and what of it is there; rows of one block lie close."""
    columns = tl.arange(0, WIDTH)
    inside = there[:, None]
    if width != WIDTH:
        inside = inside & (columns < width)[None, :]
    return rows[:, None] * stride + columns[None, :], inside


@triton.jit
def _load(matrix, begin, there, stride, width: tl.constexpr, WIDTH: tl.constexpr):
    """Load the rows from `begin` on in float32, with 0 where `there` is False or a column is beyond `width`."""
    at, inside = _at(tl.arange(0, there.shape[0]), there, stride, width, WIDTH)
    block = matrix + tl.cast(begin, tl.int64) * stride
    return tl.load(block + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(matrix, x, begin, there, width: tl.constexpr):
    """Store x as the rows from `begin` on of a matrix with `width` columns."""
    at, inside = _at(tl.arange(0, there.shape[0]), there, width, width, x.shape[1])
    block = matrix + tl.cast(begin, tl.int64) * width
    tl.store(block + at, x.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def _tile(matrix, ROWS: tl.constexpr, width: tl.constexpr, WIDTH: tl.constexpr):
    """Load a whole matrix [ROWS, width], in its own dtype."""
    at = tl.arange(0, ROWS)[:, None] * width + tl.arange(0, WIDTH)[None, :]
    if width == WIDTH:
        return tl.load(matrix + at)
    return tl.load(matrix + at, mask=tl.arange(0, WIDTH)[None, :] < width, other=0.0)


@triton.jit
def _row(vector, width: tl.constexpr, WIDTH: tl.constexpr):
    """Load a vector of `width` numbers."""
    columns = tl.arange(0, WIDTH)
    return tl.load(vector + columns, mask=columns < width, other=0.0)


@triton.jit
def _store_row(vector, x, width: tl.constexpr):
    columns = tl.arange(0, x.shape[0])
    tl.store(vector + columns, x, mask=columns < width)


@triton.jit
def _of_head(tensor, head, heads, stride_b, stride_h):
    """Point to a head of [B, H, ...], counted through the batch."""
    return tensor + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h


@triton.jit
def _project(x, factors, index, dim: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Project [rows, d] by one matrix of `factors`: [rows, TILE]."""
    matrix = _tile(factors + index * TILE * dim, TILE, dim, x.shape[1])
    return _dot(x, tl.trans(matrix), factors.dtype.element_ty, PRECISION)


@triton.jit
def _power(x, exponent):
    power = tl.full(x.shape, 1.0, tl.float32)
    for _ in range(exponent):
        power *= x
    return power


# (a) The weights and the centre of keys


@triton.jit
def centre_kernel(
    key, value, mask, mean, logits, part_stats, part_sums,
    tokens, per_split, scale, heads,
    key_b, key_h, key_n, value_b, value_h, value_n,
    MASKED: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute l_j = scale <m, k_j>, and the sums of e^l, e^2l, e^l k and e^l v over a part of the keys, over e^top."""
    head, split = tl.program_id(0), tl.program_id(1)
    key, value = _of_head(key, head, heads, key_b, key_h), _of_head(value, head, heads, value_b, value_h)
    mean = _row(mean + head * dim, dim, DIM)
    top, total, squares = float("-inf"), 0.0, 0.0
    centre, average = tl.zeros([DIM], tl.float32), tl.zeros([WIDTH], tl.float32)
    end = tl.minimum(tokens, (split + 1) * per_split)
    for start in range(split * per_split, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < end
        there = inside
        if MASKED:
            there = inside & (tl.load(mask + (head // heads) * tokens + rows, mask=inside, other=0) != 0)
        k, v = _load(key, start, there, key_n, dim, DIM), _load(value, start, there, value_n, width, WIDTH)
        logit = tl.where(there, scale * tl.sum(k * mean[None, :], 1), float("-inf"))
        tl.store(logits + head.to(tl.int64) * tokens + rows, logit, mask=inside)
        highest = tl.maximum(top, tl.max(logit, 0))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        kept, weight = tl.exp(top - level), tl.exp(logit - level)
        total = kept * total + tl.sum(weight, 0)
        squares = kept * kept * squares + tl.sum(weight * weight, 0)
        centre = kept * centre + tl.sum(weight[:, None] * k, 0)
        average = kept * average + tl.sum(weight[:, None] * v, 0)
        top = highest
    at = split * tl.num_programs(0) + head
    tl.store(part_stats + at * 3, top)
    tl.store(part_stats + at * 3 + 1, total)
    tl.store(part_stats + at * 3 + 2, squares)
    part_sums += at * (dim + width)
    _store_row(part_sums, centre, dim)
    _store_row(part_sums + dim, average, width)


@triton.jit
def combine_kernel(
    part_stats, part_sums, centre, average, stats,
    splits, groups, few_keys, smallest,
    COUNTED: tl.constexpr, SPLITS: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Put the parts of `centre_kernel` together: c, a and `stats`."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    there, at = split < splits, split * groups + head
    top = tl.load(part_stats + at * 3, mask=there, other=float("-inf"))
    highest = tl.max(top, 0)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    part = tl.exp(top - level)
    total = tl.sum(part * tl.load(part_stats + at * 3 + 1, mask=there, other=0.0), 0)
    squares = tl.sum(part * part * tl.load(part_stats + at * 3 + 2, mask=there, other=0.0), 0)
    # Where no key is there, all sums are 0.
    total = tl.where(total > 0, total, 1.0)
    number = tl.where(squares > 0, total * total / squares, 1.0)
    share = part / total
    part_sums += head * (dim + width)
    k = _load(part_sums, 0, there, groups * (dim + width), dim, DIM)
    v = _load(part_sums + dim, 0, there, groups * (dim + width), width, WIDTH)
    _store_row(centre + head * dim, tl.sum(share[:, None] * k, 0), dim)
    _store_row(average + head * width, tl.sum(share[:, None] * v, 0), width)
    tl.store(stats + head * 4 + LEVEL, level + tl.log(total))
    tl.store(stats + head * 4 + NUMBER, number)
    tl.store(stats + head * 4 + TRUST, number / (number + few_keys))
    # Weights that count keys are divided by their number here.
    tl.store(stats + head * 4 + SMALLEST, smallest / total if COUNTED else smallest)


# (b) Sums over tokens


@triton.jit
def sum_kernel(
    vector, shift, value, average, logits, stats, row_values, factors, first, degrees,
    part_sums, part_ones, part_second,
    tokens, per_split, plane, tiles, cut, heads, groups,
    vector_b, vector_h, vector_n, value_b, value_h, value_n,
    OF_KEYS: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum psi(y) w (v - a)^T and psi(y) w of a tile over a part of the keys, or their moments w y y^T.

    For the gradient of these sums, over queries: psi of x that is multiplied by its factors, with the gradients of
    numerators for w (v - a) and those of denominators and of mean squares for w, from `row_values`.
    """
    head, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    LIKE: tl.constexpr = factors.dtype.element_ty
    of_keys = head // groups
    vector, value = _of_head(vector, head, heads, vector_b, vector_h), _of_head(value, head, heads, value_b, value_h)
    shift = _row(shift + of_keys * dim, dim, DIM)
    end = tl.minimum(tokens, (split + 1) * per_split)
    part = split * tl.num_programs(0) + head
    row_values, plane = row_values + head.to(tl.int64) * tokens, tl.cast(plane, tl.int64)
    if OF_KEYS:
        average = _row(average + of_keys * width, width, WIDTH)
        level = tl.load(stats + of_keys * 4 + LEVEL)
        logits += head.to(tl.int64) * tokens
    if tile == tiles:
        moments = tl.zeros([DIM, DIM], tl.float32)
        for start in range(split * per_split, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = rows < end
            if OF_KEYS:
                weight = tl.exp(tl.load(logits + rows, mask=inside, other=float("-inf")) - level)
                inside = weight > 0
            else:
                weight = tl.load(row_values + 2 * plane + rows, mask=inside, other=0.0)
            x = _load(vector, start, inside, vector_n, dim, DIM)
            x = tl.where(inside[:, None], x - shift[None, :], 0.0)
            moments += _dot(tl.trans(x * weight[:, None]), x, tl.float32, PRECISION)
        _store(part_second + part.to(tl.int64) * dim * dim, moments, 0, tl.arange(0, DIM) < dim, dim)
    else:
        index, degree = tl.load(first + tile), tl.load(degrees + tile)
        sums, ones = tl.zeros([TILE, WIDTH], tl.float32), tl.zeros([TILE], tl.float32)
        for start in range(split * per_split, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            inside = rows < end
            if OF_KEYS:
                weight = tl.exp(tl.load(logits + rows, mask=inside, other=float("-inf")) - level)
                inside = weight > 0
                v = _load(value, start, inside, value_n, width, WIDTH)
                v = (v - average[None, :]) * weight[:, None]
            else:
                weight = tl.load(row_values + plane + rows, mask=inside, other=0.0)
                v = _load(value, start, inside, value_n, width, WIDTH)
                v *= tl.load(row_values + rows, mask=inside, other=0.0)[:, None]
            x = _load(vector, start, inside, vector_n, dim, DIM)
            x = tl.where(inside[:, None], x - shift[None, :], 0.0)
            if not OF_KEYS:
                factor = tl.load(row_values + 3 * plane + rows, mask=inside, other=0.0)
                cooler = tl.load(row_values + 4 * plane + rows, mask=inside, other=0.0)
                x *= (factor * tl.where(tile < cut, 1.0, cooler))[:, None]
            # Features with their tokens in columns are the left factor of the sum as they are.
            x = tl.trans(x)
            psi = _dot(_tile(factors + index * TILE * dim, TILE, dim, DIM), x, LIKE, PRECISION)
            for i in range(1, degree):
                matrix = _tile(factors + (index + i) * TILE * dim, TILE, dim, DIM)
                psi *= _dot(matrix, x, LIKE, PRECISION)
            ones += tl.sum(psi * weight[None, :], 1)
            sums += _dot(psi, v, LIKE, PRECISION)
        at = (part * tiles + tile).to(tl.int64) * TILE
        features = tl.arange(0, TILE)
        _store(part_sums + at * width, sums, 0, features < TILE, width)
        tl.store(part_ones + at + features, ones)


# (c) Look-up


@triton.jit
def _limits(
    x, second, coefficients, number,
    num_coefficients, limit, excess, half, share,
    dim: tl.constexpr, DIM: tl.constexpr, IN_PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the limits of `schoenbat.ops._bounds`, for each row of x, and what their gradients need."""
    columns = tl.arange(0, DIM)
    second = _load(second, 0, columns < dim, dim, dim, DIM)
    size = tl.sum(tl.where(columns[:, None] == columns[None, :], second, 0.0)) / dim
    slope = _dot(x, second, tl.float32, PRECISION)
    square = tl.maximum(tl.sum(slope * x, 1), 0.0)
    isotropic = tl.sum(x * x, 1) * size
    cooled = limit / tl.maximum(square, limit)
    variance = tl.minimum(isotropic * cooled, LARGEST)
    described, steeper = tl.zeros(variance.shape, tl.float32), tl.zeros(variance.shape, tl.float32)
    for i in range(num_coefficients):
        steeper = steeper * variance + described
        described = described * variance + tl.load(coefficients + i)
    grown = tl.exp(variance)
    noise = tl.maximum(grown - described, 0.0) * grown
    least = tl.maximum(tl.sqrt(noise / number) * STANDARD_ERRORS, 1.0)
    even = excess * _power(tl.minimum(square, limit), half)
    ratio = tl.where(square < isotropic, square / isotropic, 1.0)
    cooler = ratio / (share * ratio + 1 - share) if IN_PART else tl.full(ratio.shape, 1.0, tl.float32)
    return slope, size, square, isotropic, cooled, grown, described, steeper, least, even, ratio, cooler


@triton.jit
def look_up_kernel(
    query, mean, average, stats, sums, ones, second, factors, first, degrees, coefficients, out, denominators,
    tokens, tiles, quadratic, higher, cut, num_coefficients, constant, limit, excess, half, share,
    heads, groups,
    query_b, query_h, query_n,
    BOUNDED: tl.constexpr, IN_PART: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr,
    width: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the output of ROWS queries; `denominators` are kept as they were before the bounds."""
    head = tl.program_id(0)
    LIKE: tl.constexpr = factors.dtype.element_ty
    of_keys = head // groups
    start = tl.program_id(1) * ROWS
    rows = start + tl.arange(0, ROWS)
    features = tl.arange(0, TILE)
    inside = rows < tokens
    query = _of_head(query, head, heads, query_b, query_h)
    m = _row(mean + of_keys * dim, dim, DIM)
    x = tl.where(inside[:, None], _load(query, start, inside, query_n, dim, DIM) - m[None, :], 0.0)
    cooler = tl.full([ROWS], 1.0, tl.float32)
    if BOUNDED:
        number = tl.load(stats + of_keys * 4 + NUMBER)
        _, _, _, _, cooled, _, _, _, least, even, _, cooler = _limits(
            x, second + of_keys * dim * dim, coefficients, number,
            num_coefficients, limit, excess, half, share, dim, DIM, IN_PART, PRECISION,
        )  # fmt: skip
        x *= tl.sqrt(cooled)[:, None]
    sums += (of_keys * tiles).to(tl.int64) * TILE * width
    ones += (of_keys * tiles).to(tl.int64) * TILE
    numerator, denominator = tl.zeros([ROWS, WIDTH], tl.float32), tl.full([ROWS], constant, tl.float32)
    for KIND in tl.static_range(1, KINDS + 1):
        begin = 0 if KIND == 1 else quadratic if KIND == 2 else higher
        end = quadratic if KIND == 1 else higher if KIND == 2 else tiles
        for tile in range(begin, end):
            index = tile if KIND == 1 else 2 * tile - quadratic if KIND == 2 else tl.load(first + tile)
            psi = _project(x, factors, index, dim, TILE, PRECISION)
            if KIND == 2:
                psi *= _project(x, factors, index + 1, dim, TILE, PRECISION)
            degree = KIND
            if KIND == 3:
                degree = tl.load(degrees + tile)
                for i in range(1, degree):
                    psi *= _project(x, factors, index + i, dim, TILE, PRECISION)
            if IN_PART:
                psi *= _power(tl.where(tile < cut, 1.0, cooler), degree)[:, None]
            own = _tile(sums + tile * TILE * width, TILE, width, WIDTH)
            numerator += _dot(psi, own, LIKE, PRECISION)
            denominator += tl.sum(psi * tl.load(ones + tile * TILE + features)[None, :], 1)
    tl.store(denominators + head.to(tl.int64) * tokens + rows, denominator, mask=inside)
    a = _row(average + of_keys * width, width, WIDTH)
    if BOUNDED:
        trust = tl.load(stats + of_keys * 4 + TRUST)
        found = a[None, :] + (trust / tl.maximum(denominator - even, least))[:, None] * numerator
    else:
        total = _away_from_zero(denominator, tl.load(stats + of_keys * 4 + SMALLEST))
        found = (denominator / total)[:, None] * a[None, :] + numerator / total[:, None]
    _store(out + head.to(tl.int64) * tokens * width, found, start, inside, width)


@triton.jit
def _away_from_zero(denominator, smallest):
    return tl.where(denominator < 0, tl.minimum(denominator, -smallest), tl.maximum(denominator, smallest))


# (d) Gradients of queries


@triton.jit
def _pull_back(
    x, grad, factors, index, degree,
    dim: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return psi(x) of a tile, and the gradient of x from `grad` [rows, TILE], that of psi(x)."""
    LIKE: tl.constexpr = factors.dtype.element_ty
    DIM: tl.constexpr = x.shape[1]
    matrix = _tile(factors + index * TILE * dim, TILE, dim, DIM)
    z = _dot(x, tl.trans(matrix), LIKE, PRECISION)
    if KIND == 1:
        psi = z
        pulled = _dot(grad, matrix, LIKE, PRECISION)
    elif KIND == 2:
        other = _tile(factors + (index + 1) * TILE * dim, TILE, dim, DIM)
        y = _dot(x, tl.trans(other), LIKE, PRECISION)
        psi = y * z
        pulled = _dot(grad * y, matrix, LIKE, PRECISION) + _dot(grad * z, other, LIKE, PRECISION)
    else:
        # As many factors as the degree has would not fit into registers: they are made anew for each.
        psi = z
        for i in range(1, degree):
            psi *= _project(x, factors, index + i, dim, TILE, PRECISION)
        pulled = tl.zeros(x.shape, tl.float32)
        for i in range(degree):
            others = grad
            for j in range(degree):
                others *= tl.where(i == j, 1.0, _project(x, factors, index + j, dim, TILE, PRECISION))
            own = _tile(factors + (index + i) * TILE * dim, TILE, dim, DIM)
            pulled += _dot(others, own, LIKE, PRECISION)
    return psi, pulled


@triton.jit
def query_grad_kernel(
    query, mean, average, stats, sums, ones, second, factors, first, degrees, coefficients, out, denominators, grad,
    grad_query, row_values, part_query, part_average, part_stats,
    tokens, plane, tiles, quadratic, higher, cut, num_coefficients, limit, excess, half, share,
    heads, groups,
    query_b, query_h, query_n, grad_b, grad_h, grad_n,
    BOUNDED: tl.constexpr, IN_PART: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr,
    width: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x, and those of a, of the number, the trust and the size, summed over ROWS queries.

    `row_values` are what `sum_kernel` takes for the gradients of sums: the factor of the gradient of a numerator, the
    gradients of the denominator and of the mean square, and the factors of a query.
    """
    head, block = tl.program_id(0), tl.program_id(1)
    LIKE: tl.constexpr = factors.dtype.element_ty
    of_keys = head // groups
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    features = tl.arange(0, TILE)
    inside = rows < tokens
    query = _of_head(query, head, heads, query_b, query_h)
    m = _row(mean + of_keys * dim, dim, DIM)
    x = tl.where(inside[:, None], _load(query, start, inside, query_n, dim, DIM) - m[None, :], 0.0)
    at, plane = head.to(tl.int64) * tokens + rows, tl.cast(plane, tl.int64)
    denominator = tl.load(denominators + at, mask=inside, other=1.0)
    g = _load(_of_head(grad, head, heads, grad_b, grad_h), start, inside, grad_n, width, WIDTH)
    found = _load(out + head.to(tl.int64) * tokens * width, start, inside, width, width, WIDTH)
    a = _row(average + of_keys * width, width, WIDTH)
    if BOUNDED:
        number, trust = tl.load(stats + of_keys * 4 + NUMBER), tl.load(stats + of_keys * 4 + TRUST)
        _, _, _, _, cooled, _, _, _, least, even, _, cooler = _limits(
            x, second + of_keys * dim * dim, coefficients, number,
            num_coefficients, limit, excess, half, share, dim, DIM, IN_PART, PRECISION,
        )  # fmt: skip
        factor = tl.sqrt(cooled)
        total = tl.maximum(denominator - even, least)
        along = tl.sum(tl.where(inside[:, None], g * (found - a[None, :]), 0.0), 1)
        of_total = -along / total
        of_denominator = tl.where(denominator - even >= least, of_total, 0.0)
        of_numerator = trust / total
        of_average = tl.sum(g, 0)
    else:
        factor, cooler = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 1.0, tl.float32)
        total = _away_from_zero(denominator, tl.load(stats + of_keys * 4 + SMALLEST))
        of_total = -tl.sum(g * found, 1) / total
        of_denominator = tl.sum(g * a[None, :], 1) / total + tl.where(total == denominator, of_total, 0.0)
        of_numerator = 1 / total
        of_average = tl.sum(g * (denominator / total)[:, None], 0)
    tl.store(row_values + at, of_numerator, mask=inside)
    tl.store(row_values + plane + at, of_denominator, mask=inside)
    tl.store(row_values + 3 * plane + at, factor, mask=inside)
    tl.store(row_values + 4 * plane + at, cooler, mask=inside)
    part = block * tl.num_programs(0) + head
    _store_row(part_average + part * width, of_average, width)
    u = g * of_numerator[:, None]

    sums += (of_keys * tiles).to(tl.int64) * TILE * width
    ones += (of_keys * tiles).to(tl.int64) * TILE
    grad_x = tl.zeros([ROWS, DIM], tl.float32)
    of_factor, of_cooler = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for KIND in tl.static_range(1, KINDS + 1):
        begin = 0 if KIND == 1 else quadratic if KIND == 2 else higher
        end = quadratic if KIND == 1 else higher if KIND == 2 else tiles
        for tile in range(begin, end):
            index = tile if KIND == 1 else 2 * tile - quadratic if KIND == 2 else tl.load(first + tile)
            degree = tl.load(degrees + tile) if KIND == 3 else KIND
            own = _tile(sums + tile * TILE * width, TILE, width, WIDTH)
            grad_psi = _dot(u, tl.trans(own), LIKE, PRECISION)
            grad_psi += of_denominator[:, None] * tl.load(ones + tile * TILE + features)[None, :]
            if BOUNDED:
                is_cooler = tile >= cut
                grad_psi *= _power(factor * tl.where(is_cooler, cooler, 1.0), degree)[:, None]
            psi, pulled = _pull_back(x, grad_psi, factors, index, degree, dim, KIND, TILE, PRECISION)
            grad_x += pulled
            if BOUNDED:
                along_psi = degree * tl.sum(psi * grad_psi, 1)
                of_factor += along_psi
                of_cooler += tl.where(is_cooler, along_psi, 0.0)

    if BOUNDED:
        # Made anew: it was not to be kept in registers so long.
        x = tl.where(inside[:, None], _load(query, start, inside, query_n, dim, DIM) - m[None, :], 0.0)
        slope, size, square, isotropic, cooled, grown, described, steeper, least, even, ratio, cooler = _limits(
            x, second + of_keys * dim * dim, coefficients, number,
            num_coefficients, limit, excess, half, share, dim, DIM, IN_PART, PRECISION,
        )  # fmt: skip
        is_free = denominator - even >= least
        of_least = tl.where(is_free, 0.0, of_total)
        # Where the floor is that of the noise:
        is_noisy = least > 1
        of_noise = tl.where(is_noisy, of_least * STANDARD_ERRORS * STANDARD_ERRORS / (2 * least * number), 0.0)
        of_number = tl.where(is_noisy, -of_least * least / (2 * number), 0.0)
        of_variance = of_noise * grown * (2 * grown - described - steeper)
        of_variance = tl.where((grown > described) & (isotropic * cooled < LARGEST), of_variance, 0.0)
        of_isotropic = of_variance * cooled
        of_cooled = of_factor / (2 * cooled) + of_variance * isotropic
        is_cooled = square > limit
        of_square = tl.where(is_cooled, -of_cooled * cooled / square, 0.0)
        steep = excess * half * _power(tl.minimum(square, limit), half - 1)
        of_square += tl.where(is_free & (square < limit), -of_total * steep, 0.0)
        if IN_PART:
            is_less = (square < isotropic) & (ratio > 0)
            by_ratio = tl.where(is_less, of_cooler * (1 - share) / (ratio * (share * ratio + 1 - share)), 0.0)
            of_square += tl.where(is_less, by_ratio / isotropic, 0.0)
            of_isotropic -= tl.where(is_less, by_ratio * ratio / isotropic, 0.0)
        tl.store(row_values + 2 * plane + at, of_square, mask=inside)
        grad_x += (2 * of_square)[:, None] * slope
        grad_x += (2 * size * of_isotropic)[:, None] * x
        tl.store(part_stats + part * 3, tl.sum(tl.where(inside, of_number, 0.0), 0))
        tl.store(part_stats + part * 3 + 1, tl.sum(tl.where(inside, along, 0.0), 0))
        tl.store(part_stats + part * 3 + 2, tl.sum(tl.where(inside, of_isotropic * tl.sum(x * x, 1), 0.0), 0))
    grad_x = tl.where(inside[:, None], grad_x, 0.0)
    _store(grad_query + head.to(tl.int64) * tokens * dim, grad_x, start, inside, dim)
    _store_row(part_query + part * dim, tl.sum(grad_x, 0), dim)


# (e) Gradients of keys and values


@triton.jit
def key_grad_kernel(
    key, centre, value, average, logits, stats, factors, first, degrees,
    grad_sums, grad_ones, grad_second, grad_average, grad_squares,
    grad_key, grad_value, grad_weight, part_key, part_weight,
    tokens, tiles, quadratic, higher, heads,
    key_b, key_h, key_n, value_b, value_h, value_n,
    BOUNDED: tl.constexpr, KINDS: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of y, of v and of the weights w of ROWS keys; w weights them once all is added up."""
    head, block = tl.program_id(0), tl.program_id(1)
    LIKE: tl.constexpr = factors.dtype.element_ty
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    features = tl.arange(0, TILE)
    inside = rows < tokens
    at = head.to(tl.int64) * tokens + rows
    level = tl.load(stats + head * 4 + LEVEL)
    weight = tl.exp(tl.load(logits + at, mask=inside, other=float("-inf")) - level)
    there = weight > 0
    x = _load(_of_head(key, head, heads, key_b, key_h), start, there, key_n, dim, DIM)
    x = tl.where(there[:, None], x - _row(centre + head * dim, dim, DIM)[None, :], 0.0)
    v = _load(_of_head(value, head, heads, value_b, value_h), start, there, value_n, width, WIDTH)
    of_average = _row(grad_average + head * width, width, WIDTH)
    u = v - _row(average + head * width, width, WIDTH)[None, :]
    grad_sums += (head * tiles).to(tl.int64) * TILE * width
    grad_ones += (head * tiles).to(tl.int64) * TILE
    grad_x, grad_v = tl.zeros([ROWS, DIM], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    of_weight = tl.sum(v * of_average[None, :], 1)
    if BOUNDED:
        matrix = _load(grad_second + head * dim * dim, 0, tl.arange(0, DIM) < dim, dim, dim, DIM)
        slope = _dot(x, matrix, tl.float32, PRECISION)
        grad_x += 2 * slope
        of_weight += tl.sum(slope * x, 1) + weight * tl.load(grad_squares + head)
    for KIND in tl.static_range(1, KINDS + 1):
        begin = 0 if KIND == 1 else quadratic if KIND == 2 else higher
        end = quadratic if KIND == 1 else higher if KIND == 2 else tiles
        for tile in range(begin, end):
            index = tile if KIND == 1 else 2 * tile - quadratic if KIND == 2 else tl.load(first + tile)
            degree = tl.load(degrees + tile) if KIND == 3 else KIND
            own = _tile(grad_sums + tile * TILE * width, TILE, width, WIDTH)
            grad_psi = _dot(u, tl.trans(own), LIKE, PRECISION)
            grad_psi += tl.load(grad_ones + tile * TILE + features)[None, :]
            psi, pulled = _pull_back(x, grad_psi, factors, index, degree, dim, KIND, TILE, PRECISION)
            grad_x += pulled
            grad_v += _dot(psi, own, LIKE, PRECISION)
            of_weight += tl.sum(psi * grad_psi, 1)
    grad_x *= weight[:, None]
    grad_v = (grad_v + of_average[None, :]) * weight[:, None]
    of_weight = tl.where(there, of_weight, 0.0)
    _store(grad_key + head.to(tl.int64) * tokens * dim, grad_x, start, inside, dim)
    _store(grad_value + head.to(tl.int64) * tokens * width, grad_v, start, inside, width)
    tl.store(grad_weight + at, of_weight, mask=inside)
    part = block * tl.num_programs(0) + head
    _store_row(part_key + part * dim, tl.sum(grad_x, 0), dim)
    tl.store(part_weight + part, tl.sum(weight * of_weight, 0))


# (f) Gradients of the centre and of the mean query


@triton.jit
def centre_grad_kernel(
    key, centre, mean, logits, stats, grad_centre, mean_weight, grad_y, grad_weight, grad_key, part_mean,
    tokens, scale, heads, key_b, key_h, key_n,
    SHIFTED: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of y what keys get through c, and, where l_j = scale <m, k_j>, through l; sum up m's."""
    head, block = tl.program_id(0), tl.program_id(1)
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    inside = rows < tokens
    at = head.to(tl.int64) * tokens + rows
    level = tl.load(stats + head * 4 + LEVEL)
    weight = tl.exp(tl.load(logits + at, mask=inside, other=float("-inf")) - level)
    of_centre = _row(grad_centre + head * dim, dim, DIM)
    grad_x = _load(grad_y + head.to(tl.int64) * tokens * dim, start, inside, dim, dim, DIM)
    grad_x += weight[:, None] * of_centre[None, :]
    if SHIFTED:
        there = weight > 0
        k = _load(_of_head(key, head, heads, key_b, key_h), start, there, key_n, dim, DIM)
        c = _row(centre + head * dim, dim, DIM)
        m = _row(mean + head * dim, dim, DIM)
        of_weight = tl.load(grad_weight + at, mask=inside, other=0.0) - tl.load(mean_weight + head)
        of_logit = scale * weight * (of_weight + tl.sum((k - c[None, :]) * of_centre[None, :], 1))
        grad_x += of_logit[:, None] * m[None, :]
        part = block * tl.num_programs(0) + head
        _store_row(part_mean + part * dim, tl.sum(of_logit[:, None] * k, 0), dim)
    _store(grad_key + head.to(tl.int64) * tokens * dim, grad_x, start, inside, dim)


@triton.jit
def mean_grad_kernel(
    grad_x, grad_mean, mask, number, grad_query, tokens, heads, groups,
    MASKED: tl.constexpr, ROWS: tl.constexpr, dim: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of x what queries get through m."""
    head = tl.program_id(0)
    start = tl.program_id(1) * ROWS
    rows = start + tl.arange(0, ROWS)
    inside = rows < tokens
    of_mean = _row(grad_mean + (head // groups) * dim, dim, DIM)
    of_mean *= 1 / tl.load(number + head // heads)
    there = inside
    if MASKED:
        there = inside & (tl.load(mask + (head // heads) * tokens + rows, mask=inside, other=0) != 0)
    g = _load(grad_x + head.to(tl.int64) * tokens * dim, start, inside, dim, dim, DIM)
    g += tl.where(there[:, None], of_mean[None, :], 0.0)
    _store(grad_query + head.to(tl.int64) * tokens * dim, g, start, inside, dim)
