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
def _load_sum(x, residual, at, mask):
    """Numbers of the residual stream in single precision, rounded as the stream itself would be."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + at, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)
