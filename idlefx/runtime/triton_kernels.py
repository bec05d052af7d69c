"""Triton kernels for what a GPU would otherwise do in many small steps; `ops` says the same in plain operations."""

import triton
import triton.language as tl

_SIGN, _HIGHEST = tl.constexpr(0x80000000), tl.constexpr(0xFFFFFFFF)


@triton.jit
def choose_kernel(scores, role, index, place, tokens, leading, kept, working, BLOCK: tl.constexpr):
    """One image: the threshold is found bit by bit, then every token counts those that stand before it."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < tokens
    score = tl.load(scores + image * tokens + at, mask=inside, other=0.0).to(tl.float32)
    if role is not None:
        part = tl.load(role + image * tokens + at, mask=inside, other=0)
        always, free = part == 2, part == 1
    else:
        always, free = at < leading, inside & (at >= leading)

    # Whole numbers in the order of the scores: negative ones are turned round, both zeros are one, NaN is the highest.
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= _SIGN, bits ^ _HIGHEST, bits | _SIGN)
    key = tl.where(score != score, _HIGHEST, key)
    threshold = tl.zeros((), tl.uint32)  # the highest key that as many as are kept reach
    for bit in range(32):
        higher = threshold | (tl.full((), _SIGN, tl.uint32) >> bit)
        threshold = tl.where(tl.sum((free & (key >= higher)).to(tl.int32), 0) >= kept, higher, threshold)

    above, level = free & (key > threshold), free & (key == threshold)
    room = kept - tl.sum(above.to(tl.int32), 0)
    works = always | above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    before = tl.cumsum(works.to(tl.int32), 0)
    rank = tl.where(works, before - 1, working + at - before)
    tl.store(place + image * tokens + at, rank.to(tl.int64), mask=inside)
    tl.store(index + image * working + rank, at.to(tl.int64), mask=inside & works)


@triton.jit
def norm_linear_kernel(
    x, residual, norm_weight, norm_bias, weight, bias, out, images, outputs,
    x_token, residual_token, x_stride, residual_stride, weight_stride, epsilon,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, IMAGES: tl.constexpr, FEATURES: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Some outputs of some images; their statistics are taken anew for each group of outputs, which costs little."""
    image = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    here, wanted = (image < images)[:, None], output < outputs
    image = image.to(tl.int64)[:, None]
    x += x_token + image * x_stride
    if residual is not None:
        residual += residual_token + image * residual_stride

    every = tl.arange(0, BLOCK)[None, :]
    token = _load_sum(x, residual, every, here & (every < WIDTH))
    mean = tl.sum(token, 1)[:, None] / WIDTH
    away = tl.where(every < WIDTH, token - mean, 0.0)
    scale = tl.rsqrt(tl.sum(away * away, 1)[:, None] / WIDTH + epsilon)

    sums = tl.zeros((IMAGES, OUTPUTS), tl.float32)
    for start in range(0, WIDTH, FEATURES):
        at = start + tl.arange(0, FEATURES)
        known = at < WIDTH
        value = _load_sum(x, residual, at[None, :], here & known[None, :])
        value = (value - mean) * scale * tl.load(norm_weight + at, mask=known, other=0.0).to(tl.float32)[None, :]
        if norm_bias is not None:
            value += tl.load(norm_bias + at, mask=known, other=0.0).to(tl.float32)[None, :]
        both = known[:, None] & wanted[None, :]
        factors = tl.load(weight + output[None, :] * weight_stride + at[:, None], mask=both, other=0.0)
        sums = tl.dot(value.to(factors.dtype), factors, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    place = out + image * outputs + output[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=here & wanted[None, :])


@triton.jit
def nearest_kernel(
    unit, order, cosine, leaders, place, tokens, compared, count, leading, back, modulus,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Some tokens of one image: their products with the others, a few at a time, of which the largest is remembered."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    here = row < compared
    unit += image * tokens * WIDTH
    token = row.to(tl.int64)
    if order is not None:
        order += image * tokens
        place += image * tokens
        token = tl.load(order + count + row, mask=here, other=0)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    at_best = tl.full((ROWS,), 0, tl.int32)
    for start in range(0, count, OTHERS):
        slot = start + tl.arange(0, OTHERS)
        if order is not None:
            other = tl.load(order + slot, mask=slot < count, other=0)
            tl.store(place + other, slot.to(tl.int64), mask=(slot < count) & (tl.program_id(1) == 0))
            real = (slot >= leading) & (slot < count)
        else:
            rank = slot.to(tl.int64) * back % modulus
            real = (slot < count) & (rank < tokens - leading)
            other = tl.where(real, leading + rank, 0)
        sums = tl.zeros((ROWS, OTHERS), tl.float32)
        for first in range(0, WIDTH, FEATURES):
            at = first + tl.arange(0, FEATURES)
            known = at < WIDTH
            ours = tl.load(unit + token[:, None] * WIDTH + at[None, :], mask=here[:, None] & known[None, :], other=0.0)
            theirs = tl.load(
                unit + other[None, :] * WIDTH + at[:, None], mask=real[None, :] & known[:, None], other=0.0
            )
            sums = tl.dot(ours, theirs, sums, input_precision="ieee")
        sums = tl.where(real[None, :], sums, float("-inf"))
        highest = tl.max(sums, 1)
        lowest = tl.min(tl.where(sums == highest[:, None], slot[None, :], count), 1)
        at_best = tl.where(highest > best, lowest, at_best)
        best = tl.maximum(best, highest)
    if order is not None:
        tl.store(leaders + image * compared + row, at_best.to(tl.int64), mask=here)
        tl.store(place + token, at_best.to(tl.int64), mask=here)
    else:
        tl.store(cosine + image * compared + row, best, mask=here)


@triton.jit
def average_kernel(
    x, stand_for, order, leaders, means, sizes, x_image, x_token, x_feature, working, idle,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Some features of some groups of one image: the idle tokens, a few at a time, are added where they follow."""
    image = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    here, known = slot < working, at < WIDTH
    x += image * x_image + at[None, :] * x_feature
    order += image * (working + idle)
    token = tl.load(order + slot, mask=here, other=0)
    sums = tl.load(x + token[:, None] * x_token, mask=here[:, None] & known[None, :], other=0.0).to(tl.float32)
    size = tl.full((ROWS,), 1.0, tl.float32)
    if stand_for is not None:
        stand_for += image * (working + idle)
        size = tl.load(stand_for + token, mask=here, other=1.0)
        sums *= size[:, None]
    for start in range(0, idle, OTHERS):
        place = start + tl.arange(0, OTHERS)
        real = place < idle
        leader = tl.load(leaders + image * idle + place, mask=real, other=-1)
        follows = (slot[:, None] == leader[None, :]).to(tl.float32)
        idler = tl.load(order + working + place, mask=real, other=0)
        if stand_for is not None:
            follows *= tl.load(stand_for + idler, mask=real, other=0.0)[None, :]
        tokens = tl.load(x + idler[:, None] * x_token, mask=real[:, None] & known[None, :], other=0.0).to(tl.float32)
        sums = tl.dot(follows, tokens, sums, input_precision="ieee")
        size += tl.sum(follows, 1)
    place = (image * working + slot)[:, None] * WIDTH + at[None, :]
    tl.store(means + place, (sums / size[:, None]).to(means.dtype.element_ty), mask=here[:, None] & known[None, :])
    tl.store(sizes + image * working + slot, size, mask=here & (tl.program_id(2) == 0))


@triton.jit
def _load_sum(x, residual, at, mask):
    """Numbers of the residual stream in single precision, rounded as the stream itself would be."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + at, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)
