"""Spar-All-Gather: ranks at the same position of all teams add up their blocks, each a list of a team's sums.

R-SAG (d a power of two): log2 d rounds; team t and team t XOR 2^j exchange their lists and each adds both, the lower
team's first, and cuts the sum to k_b again. B-SAG (any d): each team cuts to h entries (width.py), Bruck's all-gather,
the sum of all lists in the order of the teams, cut to k_b. Zhao et al., "SparDL", ICDE 2024.

Every sum is made in the order of the teams, by all that hold it, so copies have the same bits: the published code sums
in each team's own order, and its replicas drift apart from d = 3 on. What is cut from a sum that several ranks hold
goes whole to one of them, by a hash of step, unit, block and round; the published code leaves a share with each, which
is not the same mass once it is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.spardl.run import Cut, Run
from sparcomm.seeds import mixed
from sparcomm.sparse import Sparse


def meet_recursive(run: Run) -> Tensor:
    """R-SAG. Returns the sealed bag with the final sum of the own block, k_b entries."""
    peers = run.peers
    assert peers is not None
    packet, length = run.packet(), run.cut.length
    cut = run.pack([run.team.rank])
    for j in range((peers.size - 1).bit_length()):
        partner = peers.rank ^ (1 << j)
        arrived = run.swap(peers, cut.bag, partner, partner, packet)
        with run.clock.span("code"):
            own = Sparse(cut.index, cut.value, length)
            other = Sparse(*run.decode(packet, arrived, partner), length)
            whole = run.kernels.merge_sum(*((own, other) if peers.rank < partner else (other, own)))
        first = peers.rank >> (j + 1) << (j + 1)
        cut = cut_again(run, whole, first, 2 << j, functools.partial(run.encode, packet))
    return cut.bag


def meet_by_gather(run: Run, width: int) -> Tensor:
    """B-SAG with ``width`` = h. Returns the sealed bag: the size of the union (a word), the own block's final sum."""
    peers = run.peers
    assert peers is not None
    packet, final, length = run.packet(quota=width), run.packet(), run.cut.length
    rows = run.gather_rows(peers, run.pack([run.team.rank], width).bag, packet)
    with run.clock.span("code"):
        lists = [Sparse(*run.decode(packet, rows[t], t), length) for t in range(peers.size)]
        whole = functools.reduce(run.kernels.merge_sum, lists)
        union = whole.index.numel()
        whole = filled(whole, final.k, run)
    cut = cut_again(run, whole, 0, peers.size, functools.partial(run.encode, final, ahead=1))
    cut.bag[wire.HEADER_WORDS] = union
    run.bags.seal(cut.bag)
    return cut.bag


def cut_again(run: Run, whole: Sparse, first: int, copies: int, encode: Callable[[Tensor, Tensor, int], Cut]) -> Cut:
    """Cuts a sum that the teams from ``first`` on, ``copies`` of them, all hold, to k_b entries, and codes these."""
    peers, k = run.peers, run.packet().k
    assert peers is not None
    with run.clock.span("select"):
        run.bags.note_nonfinite(whole.value)  # before the bag is sealed, and at this position of every team
        place = run.kernels.top(whole.index, whole.value, k)
    with run.clock.span("code"):
        block = run.team.rank
        cut = encode(whole.index[place], whole.value[place], run.seed(first, block))
        keeper = first + mixed(run.bags.step, run.bags.unit, block, copies) % copies
        run.keep(whole, cut, place, keeper == peers.rank)
    return cut


def filled(entries: Sparse, k: int, run: Run) -> Sparse:
    """With zeros at the lowest positions that are free, up to k entries."""
    missing = k - entries.index.numel()
    if missing <= 0:
        return entries
    lowest = torch.arange(k, device=entries.index.device)  # at least as many as are missing are free among them
    free = lowest[torch.isin(lowest, entries.index, assume_unique=True, invert=True)][:missing]
    return run.kernels.merge_sum(entries, Sparse(free, entries.value.new_zeros(missing), entries.numel))
