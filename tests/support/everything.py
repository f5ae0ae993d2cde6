"""One call of every kernel."""

from __future__ import annotations

from typing import Any

import torch

from sparcomm import wire
from sparcomm.layout import dealt
from sparcomm.sparse import Sparse
from support.kernels import data
from support.sketches import every_sketch


def everything(k: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """One call of each kernel on data of some size; all results."""
    n, layout = 3000, dealt(3000, 2)
    grad = data("normal", n, dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    residual, out = data("spread", n, working), torch.empty(n, dtype=working)
    flags = torch.zeros(1, dtype=torch.uint8)
    work = k.compensate(grad, residual, out, layout, 100, flags)
    k.merge(work, 1, torch.arange(0, 300, 3), torch.ones(100, dtype=working))
    index, value = k.select(work, 1, 100)
    sparse = Sparse(index, value, layout.length)
    message = torch.empty(100, dtype=torch.bfloat16)
    decoded = k.narrow(value, message)
    k.deduct(work, 1, decoded)
    k.settle(work, 1, index[:50])
    k.merge(work, 1, index[:20], value[:20])
    other = k.gather(out, index, layout, 0)
    survey = k.survey(out, layout, 100, flags, torch.tensor([0.5, -1], dtype=working))
    counts = torch.tensor([k.count_above(survey, b, t) for b in range(2) for t in (0.1, 1.0)])
    exceeding = [t for b in range(2) for t in k.above(survey, b, 1.0, 700)]
    places = [k.top(index, value, 30), k.sample(grad, residual, 64), k.sample(grad, None, 4096)]
    k.subtract(out, index, decoded, layout, 0)
    k.add(out, index + 1, value, layout, 0, flags)
    k.scatter(out, index[:9], value[:9], layout, 0)
    sparse_out = torch.empty(n, dtype=dtype)
    k.expand(sparse_out, [index, index], [value, other], layout)
    words = torch.empty(wire.elias_fano_words(100, 1500), dtype=torch.int32)
    k.elias_fano_encode(index, 1500, words)
    bitmap = torch.empty(wire.bitmap_words(1500), dtype=torch.int32)
    k.bitmap_encode(index, 1500, bitmap)
    short = torch.zeros(wire.rice_words(100, 1500), dtype=torch.int32)
    used = k.rice_encode(index, 1500, short)
    scale, code = torch.empty(wire.scales(100), dtype=torch.uint8), torch.empty(100, dtype=torch.int8)
    whole = [k.quantize(value, scale, code, None), k.quantize(value, scale, code, 5)]
    whole += [scale, code, k.dequantize(scale, code, working, flags)]
    both = k.merge_sum(sparse, Sparse(index + 1, value, layout.length))
    lists = [k.elias_fano_decode(words, 100, 1500, flags), k.bitmap_decode(bitmap, 100, 1500, flags)]
    lists += [short, k.rice_decode(short[:used], 100, 1500, flags), *whole]
    rounded = torch.empty(n, dtype=torch.bfloat16)
    k.round_stochastic(out.to(torch.float32), rounded, 7)
    checks = [k.checksum(words), k.widen(message, working), rounded, *signs_and_bitmaps(k, grad)]
    return [
        out,
        sparse_out,
        other,
        flags,
        index,
        value,
        decoded,
        words,
        bitmap,
        both.index,
        both.value,
        counts,
        *exceeding,
        *places,
        *lists,
        *checks,
        *every_sketch(k, torch.arange(0, 3000, 7), working),
    ]


def signs_and_bitmaps(k: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """One call of each kernel of ``interface_bits``; all results but for the last bits of a sum."""
    n, working = x.numel(), torch.float64 if x.dtype == torch.float64 else torch.float32
    flags = torch.zeros(1, dtype=torch.uint8)
    rows, present = (torch.empty(3, wire.bitmap_words(n), dtype=torch.int32) for _ in range(2))
    k.pack_signs(x, "alternate", 3, 1 << 40, rows[0], None, flags)
    k.pack_signs(x.flip(0), "positive", 3, 0, rows[1], present[0], flags)
    k.support(x, 1, rows[2])
    k.pack(x.abs() > 1, present[1])
    keys = [torch.empty(wire.bitmap_words(-(-n // width)), dtype=torch.int32) for width in (4, 5)]
    for width, out in zip((4, 5), keys, strict=True):
        k.support(x * (x > 2), width, out)
    outs = [torch.empty_like(rows[0]) for _ in range(4)]
    k.unite(present[:2], outs[0])
    present[2] = outs[0]
    k.vote(rows, None, "negative", 0, 0, outs[1], None)
    k.vote(rows, present, "alternate", 5, 7, outs[2], outs[3])
    spread, scale = torch.empty(n, dtype=working), torch.tensor(0.3, dtype=working)
    k.spread_signs(outs[2], outs[3], scale, spread)
    k.add_signs(outs[1], None, scale, spread)
    before, sum_ = k.prefix(outs[0]), k.absolute_sum(x)
    counted = [k.popcount(outs[0]), before, k.ones(outs[0]), k.rank(outs[0], before, torch.arange(-5, n + 99))]
    return [*keys, rows, present, *outs, spread, flags, *counted, k.unpack(outs[1], n), sum_.to(torch.float32)]
