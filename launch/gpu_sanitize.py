#!/usr/bin/env python3
"""Calls every kernel once on short vectors, and compares with the reference: small enough for compute-sanitizer.

    compute-sanitizer --error-exitcode 1 python3 launch/gpu_sanitize.py --device cuda
    python3 launch/gpu_sanitize.py --device cpu

Sizes are those at which loops over words, warps and blocks end: 0, 1, 31, 32, 33, 1000, 4097. What kernels write to is
full of NaNs, or of ones, beforehand. Ends with 1 if a result differs from the reference's on the CPU. On a GPU without
CuPy there is nothing but the reference to call: that is an error, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.kernels import Kernels, kernels_for, reference
from sparcomm.kernels.interface_bits import RULES
from sparcomm.layout import contiguous, dealt, whole
from sparcomm.sparse import Sparse

SIZES = (0, 1, 31, 32, 33, 1000, 4097)
GRADIENTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEED = 7
Results = Iterator[tuple[str, Tensor]]


class Data:
    """Draws vectors on the CPU, the same for every device, and puts them on one."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.k, self.device = n, -(-n // 7), device
        self.grad_dtype = dtype
        self.working = torch.float64 if dtype == torch.float64 else torch.float32
        self._random = torch.Generator().manual_seed(n)

    def normal(self, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        """(numel,) with some zeros of both signs."""
        x = torch.randn(numel, generator=self._random, dtype=torch.float64)
        x = torch.where(x.abs() < 0.2, x * 0, x)
        return x.to(dtype or self.working).to(self.device)

    def index(self, m: int) -> Tensor:
        """int64, strictly increasing below m: about one position in seven."""
        count = -(-m // 7)
        return torch.randperm(m, generator=self._random)[:count].sort().values.to(self.device)

    def bits(self, *shape: int) -> Tensor:
        """int32, all bits at random."""
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=self._random).to(torch.int32).to(self.device)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """To be overwritten: NaNs, or all bits one."""
        dtype = dtype or self.working
        poison = float("nan") if dtype.is_floating_point else (1 << torch.iinfo(dtype).bits - 1) - 1
        return torch.full(shape, poison, dtype=dtype, device=self.device)

    def flags(self) -> Tensor:
        """(1,) uint8, nothing raised. Kernels OR bits into the word around it: so much of it there has to be."""
        return torch.zeros(4, dtype=torch.uint8, device=self.device)[:1]


def selecting(k: Kernels, data: Data) -> Results:
    """The sums of a step, on three layouts; and all that selects."""
    n, flags = data.n, data.flags()
    grad, residual = data.normal(n, data.grad_dtype), data.normal(n)
    for layout in (whole(n, data.device), dealt(n, 3, data.device), contiguous(n, 3, data.device)):
        out, quota = data.out(n), -(-layout.length // 7)
        work = k.compensate(grad, residual, out, layout, quota, flags)
        for block in range(layout.blocks):
            extra = data.index(layout.length)
            k.merge(work, block, extra, data.normal(extra.numel()))
            yield "count_above", torch.tensor(k.count_above(work, block, 1.0))
            index, value = k.select(work, block, quota)
            k.deduct(work, block, value)
            k.merge(work, block, extra, data.normal(extra.numel()))
            k.settle(work, block, index)
            yield from (("select", index), ("select", value))
        yield from (("compensate", out), ("flags", flags))
        survey = k.survey(out, layout, quota, flags)
        for block in range(layout.blocks):
            yield from (("above", part) for part in k.above(survey, block, 1.0, quota))
    index = data.index(n)
    yield "top", k.top(index, data.normal(index.numel()), index.numel() // 2)
    for count in (16, 1 << 13):
        yield "sample", k.sample(grad, residual, count)
    if n:  # its last bits may differ between devices
        yield "gaussian", k.gaussian(residual, 1.5, n / 9, 0.0, 3).round(decimals=6)


def adding(k: Kernels, data: Data) -> Results:
    """Sparse vectors and dense ones."""
    n, flags = data.n, data.flags()
    layout, x, out = dealt(n, 2, data.device), data.normal(n), data.out(n, dtype=data.grad_dtype)
    lists = [data.index(layout.length) for _ in range(2)]
    values = [data.normal(index.numel()) for index in lists]
    yield "gather", k.gather(x, lists[0], layout, 1)
    k.subtract(x, lists[0], values[0], layout, 0)
    k.add(x, lists[1], values[1], layout, 1, flags)
    k.scatter(x, lists[1], values[1], layout, 0)
    k.expand(out, lists, values, layout)
    yield from (("add", x), ("expand", out), ("flags", flags))
    total = k.merge_sum(*(Sparse(i, v, layout.length) for i, v in zip(lists, values, strict=True)))
    yield from (("merge_sum", total.index), ("merge_sum", total.value))


def coding(k: Kernels, data: Data) -> Results:
    """Codes of positions, and checksums."""
    n, flags = data.n, data.flags()
    index = data.index(n)
    count = index.numel()
    words = data.out(wire.elias_fano_words(count, n), dtype=torch.int32)
    bitmap = data.out(wire.bitmap_words(n), dtype=torch.int32)
    short = data.out(wire.rice_words(count, n), dtype=torch.int32)
    k.elias_fano_encode(index, n, words)
    k.bitmap_encode(index, n, bitmap)
    used = k.rice_encode(index, n, short)
    yield from (("elias_fano_encode", words), ("bitmap_encode", bitmap), ("rice_encode", short[:used]))
    yield "elias_fano_decode", k.elias_fano_decode(words, count, n, flags)
    yield "bitmap_decode", k.bitmap_decode(bitmap, count, n, flags)
    yield "rice_decode", k.rice_decode(short[:used], count, n, flags)
    yield "flags", flags
    for garbage in (words, bitmap, short):  # any bits at all are safe
        garbage.copy_(data.bits(garbage.numel()))
    yield "elias_fano_decode", k.elias_fano_decode(words, count, n, flags)
    yield "bitmap_decode", k.bitmap_decode(bitmap, count, n, flags)
    yield "rice_decode", k.rice_decode(short, count, n, flags)
    yield "checksum", k.checksum(data.bits(n + wire.HEADER_WORDS))


def narrowing(k: Kernels, data: Data) -> Results:
    """Values in fewer bits, and back."""
    n, flags = data.n, data.flags()
    value = data.normal(n)
    scale, code = data.out(wire.scales(n), dtype=torch.uint8), data.out(n, dtype=torch.int8)
    for seed in (None, SEED):
        yield "quantize", k.quantize(value, scale, code, seed)
        yield from (("quantize", scale), ("quantize", code))
    yield "dequantize", k.dequantize(scale, code, data.working, flags)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = data.out(n, dtype=dtype)
        yield "narrow", k.narrow(value, out)
        yield from (("narrow", out), ("widen", k.widen(out, data.working)))
    out = data.out(n, dtype=torch.bfloat16)
    k.round_stochastic(value.to(torch.float32), out, SEED)
    fixed = data.out(n, dtype=torch.int32)
    yield "to_fixed", k.to_fixed(value, -20, 1 << 30, fixed)
    yield from (("round_stochastic", out), ("to_fixed", fixed), ("from_fixed", k.from_fixed(fixed, -20, data.working)))


def voting(k: Kernels, data: Data) -> Results:
    """Bitmaps, signs and votes."""
    n, flags, words = data.n, data.flags(), wire.bitmap_words(data.n)
    x = data.normal(n, data.grad_dtype)
    made = [data.out(words, dtype=torch.int32) for _ in range(5)]
    k.pack(x > 0, made[0])
    k.support(x, 1, made[1])
    k.pack_signs(x, "alternate", SEED, 3, made[2], None, flags)
    k.pack_signs(x, "positive", 0, 0, made[3], made[4], flags)
    keys = data.out(wire.bitmap_words(-(-n // 5)), dtype=torch.int32)
    k.support(x, 5, keys)
    yield from (("pack", bitmap) for bitmap in (*made, keys, flags))
    yield from (("unpack", k.unpack(made[0], n)), ("popcount", k.popcount(made[1])), ("ones", k.ones(made[1])))
    before = k.prefix(made[2])
    yield from (("prefix", before), ("rank", k.rank(made[2], before, data.index(n))))
    for ranks in (1, 2, 5, 16, 33):
        rows, present = data.bits(ranks, words), data.bits(ranks, words)
        k.unite(rows, made[0])
        yield "unite", made[0]
        for rule in RULES:
            k.vote(rows, None, rule, SEED, 5, made[1], None)
            k.vote(rows, present, rule, SEED, 5, made[2], made[3])
            yield from (("vote", bitmap) for bitmap in made[1:4])
    scale, spread = torch.tensor(0.3, dtype=data.working, device=data.device), data.out(n)
    k.spread_signs(made[1], made[3], scale, spread)
    k.add_signs(made[2], None, scale, spread)
    # The last bits of a sum may differ between devices.
    yield from (("add_signs", spread), ("absolute_sum", k.absolute_sum(x).to(torch.float32)))


def sketching(k: Kernels, data: Data) -> Results:
    """Tables of hashed keys."""
    key = data.index(data.n)
    for width in (1, 3):
        value, columns = data.normal(key.numel() * width), key.numel() + 1
        table, counts = data.out(3, columns * width), data.out(3, columns, dtype=torch.int32)
        k.sketch(key, value, width, SEED, table)
        k.occupancy(key, SEED, columns, counts)
        yield from (("sketch", table), ("occupancy", counts))
        yield "estimate", k.estimate(table, key, width, SEED, None, "median")
        yield "estimate", k.estimate(table, key, width, SEED, None, "mean")
        yield "estimate", k.estimate(table, key, width, SEED, counts, "projection")
        whole_numbers = data.out(3, columns * width, dtype=torch.int32)
        k.sketch(key, data.bits(key.numel() * width), width, SEED, whole_numbers)
        yield "sketch", whole_numbers.clone()
        yield from (("peel", part) for part in k.peel(whole_numbers, key, width, SEED, counts))
        yield from (("peel", whole_numbers), ("peel", counts))


PARTS: tuple[Callable[[Kernels, Data], Results], ...] = (selecting, adding, coding, narrowing, voting, sketching)


def differing(kernels: Kernels, n: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Kernels whose results on ``device`` differ from the reference's on the CPU."""
    found: list[str] = []
    for part in PARTS:
        ours = part(kernels, Data(n, dtype, device))
        theirs = part(cast(Kernels, reference), Data(n, dtype, torch.device("cpu")))
        for (name, x), (_, y) in zip(ours, theirs, strict=True):
            if not same(x.cpu(), y):
                found.append(f"{name} of {part.__name__}, n = {n}, {str(dtype).removeprefix('torch.')}")
    return list(dict.fromkeys(found))


def same(x: Tensor, y: Tensor) -> bool:
    """Whether dtypes, shapes and bits are equal; NaNs of any bits are."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if not x.dtype.is_floating_point:
        return torch.equal(x, y)
    return bool(((x == y) & (x.signbit() == y.signbit()) | x.isnan() & y.isnan()).all())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all sizes; 1 if something differs."""
    lines = (__doc__ or "").partition("\n\n")
    form: Any = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=lines[0], epilog=lines[2], formatter_class=form)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="lengths of vectors")
    parser.add_argument("--dtypes", default="float32,bfloat16,float64", help="of gradients")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    kernels = kernels_for(torch.empty(0, device=device))
    if kernels is cast(Kernels, reference):
        print("error: no kernels but the reference for this device; is CuPy installed?", file=sys.stderr)
        return 2
    found: list[str] = []
    for n in map(int, options.sizes.split(",")):
        for dtype in options.dtypes.split(","):
            found += differing(kernels, n, getattr(torch, dtype), device)
    for line in found:
        print(f"differs: {line}", file=sys.stderr)
    print(f"{len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
