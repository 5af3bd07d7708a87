"""What stands around the products of a layer of routed experts, each as one kernel.

Between two products of a few microseconds every small kernel counts, and a graph of a dozen of
them spends as long between kernels as in them. So routed pairs are put into blocks, the activation
formed and the experts' outputs added up by one launch each, none of which asks the host anything.

    slots   [blocks · BT]  numbers of routed pairs (token · top_k + choice), by expert; an expert's
                           last block is filled up with the number of pairs, which is no pair's
    expert  [blocks]       whose block it is. Blocks that no expert needs come last and start with
                           the number of pairs

AHEAD (compute capability 9, launch_pdl): a kernel is launched while the one before it still runs,
waits for it before it touches any memory, and then lets the next one be launched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["pairs", "most", "experts"])
def place_pairs(
    ids, slots, block_expert, padded, pairs, most, experts,
    BT: tl.constexpr, FILL: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program an expert: its pairs, found by looking at all, go to the blocks it comes to.

    `pairs` are at most CHUNK · CHUNKS and at least `most`, the blocks there is room for; WIDTH is a
    power of two above `experts`, FILL one not below BT (Humming has blocks of 48); `padded` becomes
    the number of slots that are in use.
    """
    expert = tl.program_id(0)
    within = tl.arange(0, CHUNK)
    counts = tl.zeros((WIDTH,), tl.int32)
    for number in range(CHUNKS):
        at = number * CHUNK + within
        found = tl.load(ids + at, mask=at < pairs, other=WIDTH - 1).to(tl.int32)
        counts += tl.histogram(found, WIDTH)
    each = tl.arange(0, WIDTH)
    blocks = tl.where(each < experts, (counts + BT - 1) // BT, 0)
    first = tl.sum(tl.where(each < expert, blocks, 0))
    own = tl.sum(tl.where(each == expert, blocks, 0))
    total = tl.sum(blocks)
    place = first * BT
    for number in range(CHUNKS):
        at = number * CHUNK + within
        found = tl.load(ids + at, mask=at < pairs, other=WIDTH - 1).to(tl.int32)
        mine = found == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(slots + place + rank, at, mask=mine)
        place += tl.sum(mine.to(tl.int32))
    fill = place + tl.arange(0, FILL)
    tl.store(slots + fill, fill * 0 + pairs, mask=fill < (first + own) * BT)
    for number in range(CHUNKS):
        block = number * CHUNK + within
        tl.store(block_expert + block, expert, mask=(block >= first) & (block < first + own))
        unused = (block >= total) & (block < most) & (expert == 0)
        tl.store(slots + block * BT, pairs, mask=unused)
    if expert == 0:
        tl.store(padded, total * BT)


@triton.jit
def gated(
    up, out, F: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr,
    AHEAD: tl.constexpr = False,
):  # fmt: skip
    """silu(gate) · up of one row [gate | up], rounded after each step as torch does.

    TURNED puts columns where a wide product wants them, as triton_kernel.turned does.
    """
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(up + row * 2 * F + column, mask=mask, other=0.0)
    other = tl.load(up + row * 2 * F + F + column, mask=mask, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    if TURNED:
        column = column // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2
    tl.store(out + row * F + column, (active * other).to(gate.dtype), mask=mask)


@triton.jit
def weighted_sum(
    outputs, weights, out, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    AHEAD: tl.constexpr = False,
):  # fmt: skip
    """Σ_k w_tk · y_tk of one token, in float32, in the order of k."""
    if AHEAD:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        value = tl.load(outputs + pair * D + column, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=mask)
