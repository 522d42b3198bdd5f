"""Blending of mixtures: Gaussian k has the feature f_k = sum_j mix_kj token_(index_kj).

A tile meets few tokens: 15 on average and at most 18 where patch tokens are upsampled to pixels.
With the weights w [P, K] of blend.py, and m_kt the weight of token t in Gaussian k,

    out_p = sum_k w_pk sum_t m_kt token_t = sum_t W_pt token_t,     W = sum over chunks of w @ m

So a program accumulates W [P, SLOTS] and multiplies by the tokens once, at the end: the cost per
Gaussian hardly depends on C. A tile with more than SLOTS tokens is walked again for the next SLOTS
of them, in the order of their indices, and adds to its output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blend import (
    KO, MIN_TRANSMITTANCE, add_sums, as_matrix, chunk_backward, chunk_forward, geometry_backward,
    get_tile, load_ahead, load_block, load_chunk, load_ends, load_rows, load_v_out, new_ends,
    operand, places, rows_of, store_ends, store_rows,
)  # fmt: skip

NONE = tl.constexpr(2**30)  # above every index of a token
LISTED = tl.constexpr(32)  # Gaussians whose tokens are listed at a time
BLOCK = 1024  # indices that a program checks


@triton.jit
def next_tokens(gaussians_ptr, indices_ptr, count, low, SLOTS: tl.constexpr, J: tl.constexpr,
                J_UP: tl.constexpr):  # fmt: skip
    """The SLOTS smallest token indices above `low` among the tile's Gaussians: [SLOTS], unordered,
    at least NONE in slots that stay empty."""
    # Each empty slot has a number of its own, below PAST: a token takes one slot
    tokens = NONE + tl.arange(0, SLOTS)
    PAST: tl.constexpr = NONE + SLOTS
    K: tl.constexpr = LISTED
    e, j = tl.arange(0, K * J_UP) // J_UP, tl.arange(0, K * J_UP) % J_UP
    for k in range(0, count, K):
        used = (k + e < count) & (j < J)
        n = tl.load(gaussians_ptr + k + e, used, 0).to(tl.int64)
        index = tl.load(indices_ptr + n * J + j, used, -1)
        known = tl.min(index[None, :] ^ tokens[:, None], 0) == 0
        new = tl.where(known | (index <= low), PAST, index)
        smallest = tl.min(new)
        while smallest < tl.max(tokens):
            tokens = tl.where(tokens == tl.max(tokens), smallest, tokens)
            new = tl.where(new == smallest, PAST, new)
            smallest = tl.min(new)
    return tokens


@triton.jit
def mixed(indices_ptr, mix_ptr, n, used, tokens, J: tl.constexpr):
    """m [K, SLOTS]: the weight of each token in each of the Gaussians n [K]; 0 where not used."""
    m = tl.zeros([n.shape[0], tokens.shape[0]], tl.float32)
    for j in tl.static_range(J):
        index = tl.load(indices_ptr + n.to(tl.int64) * J + j, used, -1)
        mix = tl.load(mix_ptr + n.to(tl.int64) * J + j, used, 0.0)
        m = tl.where(index[:, None] == tokens[None, :], m + mix[:, None], m)
    return m


@triton.jit
def store_mixture(parts, tokens_ptr, W, tokens, pixel, inside, C, first_walk,
                  BLOCK_C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
                  FAST: tl.constexpr):  # fmt: skip
    """out = W @ tokens; out += W @ tokens after the first walk. Sums by label likewise."""
    if not first_walk:
        tl.debug_barrier()  # wait for other threads' stores to the pixels loaded below
    W, token, real = operand(W, DTYPE, PRECISION, FAST), tokens.to(tl.int64), tokens < NONE
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        f = load_block(tokens_ptr, token, real, c, C, DTYPE, PRECISION, FAST)
        # [P, SLOTS] @ [SLOTS, BLOCK_C] -> [P, BLOCK_C]
        out = tl.dot(W, f, input_precision=PRECISION)
        add_sums(parts, out, pixel, inside, c, C)
        if not first_walk:
            row, there = rows_of(parts[2], pixel, inside)
            out += load_rows(parts[0], row, there, c, C).to(tl.float32)
        store_rows(parts, out, pixel, inside, c, C)


@triton.jit
def mixture_forward_kernel(
    splats_ptr,  # [I, N, 8]
    tokens_ptr,  # [B, M, C]
    indices_ptr,  # [B, N, J] int32
    mix_ptr,  # [B, N, J]
    gaussians_ptr, offsets_ptr, rows_ptr, labels_ptr,  # as blend_forward_kernel's, as all outputs
    out_ptr, sums_ptr, alphas_ptr, transmittance_ptr, last_ptr,
    N, M, C, V, width, height,
    TILE: tl.constexpr, KI: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, J_UP: tl.constexpr,  # J_UP: the next power of 2
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = TILE * TILE
    K: tl.constexpr = KI * KO
    image, start, count, xy, pixel, inside = get_tile(offsets_ptr, width, height, TILE)
    scene = image // V
    splats_ptr, tokens_ptr = splats_ptr + image * N * 8, tokens_ptr + scene * M * C
    indices_ptr, mix_ptr = indices_ptr + scene * N * J, mix_ptr + scene * N * J
    gaussians_ptr += start
    parts = out_ptr, sums_ptr, rows_ptr, labels_ptr
    k, place = tl.arange(0, K), places(KI)
    low, more = -1, True
    while more:  # usually once
        tokens = next_tokens(gaussians_ptr, indices_ptr, count, low, SLOTS, J, J_UP)
        W, ends = tl.zeros([P, SLOTS], tl.float32), new_ends(TILE)
        # As in blend_forward_kernel, with weights m of tokens in place of features
        row = tl.load(gaussians_ptr + k, k < count, 0)
        n = tl.load(gaussians_ptr + place, place < count, 0)
        ahead, n = load_ahead(splats_ptr, gaussians_ptr, n, 0, place, count, K)
        chunk = 0
        while (chunk < count) & (tl.max(ends[0]) > MIN_TRANSMITTANCE):
            m = mixed(indices_ptr, mix_ptr, row, chunk + k < count, tokens, J)
            splats, next = ahead, chunk + K
            row = tl.load(gaussians_ptr + next + k, next + k < count, 0)
            ahead, n = load_ahead(splats_ptr, gaussians_ptr, n, next, place, count, K)

            w, ends = chunk_forward(splats, xy, ends, chunk + 1 + place, KI, FAST, SAVE)
            # [P, K] @ [K, SLOTS] -> [P, SLOTS]
            w = as_matrix(operand(w, DTYPE, PRECISION, FAST), P, K)
            W = tl.dot(w, operand(m, DTYPE, PRECISION, FAST), W, input_precision=PRECISION)
            chunk += K

        store_mixture(parts, tokens_ptr, W, tokens, pixel, inside, C, low < 0, BLOCK_C, DTYPE,
                      PRECISION, FAST)  # fmt: skip
        store_ends(alphas_ptr, transmittance_ptr, last_ptr, ends, pixel, inside, SAVE)
        low = tl.max(tokens)
        more = low < NONE  # all slots are full: there may be more tokens


# Backward. As in blend.py, with
#
#     g         = G @ m' + v_alpha,    G = v_out @ tokens', once a tile
#     v_token   = W' @ v_out,          W as in the forward pass
#
# The gradients of splats are linear in g. So each walk over a tile adds the part of its own tokens,
# and the first walk the part of v_alpha.
@triton.jit
def token_products(v_parts, tokens_ptr, tokens, pixel, inside, C, BLOCK_C: tl.constexpr,
                   DTYPE: tl.constexpr, PRECISION: tl.constexpr,
                   FAST: tl.constexpr):  # fmt: skip
    """G = v_out @ tokens' [P, SLOTS]"""
    G = tl.zeros([inside.shape[0], tokens.shape[0]], tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        v_out = load_v_out(v_parts, pixel, inside, c, C, DTYPE, PRECISION, FAST)
        f = load_block(
            tokens_ptr, tokens.to(tl.int64), tokens < NONE, c, C, DTYPE, PRECISION, FAST
        )
        # [P, BLOCK_C] @ [BLOCK_C, SLOTS] -> [P, SLOTS]
        G = tl.dot(v_out, tl.trans(f), G, input_precision=PRECISION)
    return operand(G, DTYPE, PRECISION, FAST)


@triton.jit
def add_tokens(v_tokens_ptr, v_parts, W, tokens, pixel, inside, C, BLOCK_C: tl.constexpr,
               DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """v_tokens += W' @ v_out"""
    W = operand(W, DTYPE, PRECISION, FAST)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        v_out = load_v_out(v_parts, pixel, inside, c, C, DTYPE, PRECISION, FAST)
        # [SLOTS, P] @ [P, BLOCK_C] -> [SLOTS, BLOCK_C]
        v_token = tl.dot(tl.trans(W), v_out, input_precision=PRECISION)
        at = v_tokens_ptr + tokens.to(tl.int64)[:, None] * C + c[None, :]
        tl.atomic_add(at, v_token, (tokens < NONE)[:, None] & (c < C)[None, :], sem="relaxed")


@triton.jit
def mixture_backward_kernel(
    splats_ptr, tokens_ptr, indices_ptr, mix_ptr, gaussians_ptr, offsets_ptr,  # as forward
    rows_ptr, labels_ptr, transmittance_ptr, last_ptr,  # as forward
    v_out_ptr, v_sums_ptr, v_alphas_ptr,  # [rows, C], [labels, C] or None, and [I, H, W]
    v_splats_ptr,  # out [I, N, 8], accumulated; None: not wanted
    v_tokens_ptr,  # out [B, M, C] float32, accumulated; None: not wanted
    N, M, C, V, width, height,
    TILE: tl.constexpr, KI: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
    J: tl.constexpr, J_UP: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = TILE * TILE
    K: tl.constexpr = KI * KO
    image, start, count, xy, pixel, inside = get_tile(offsets_ptr, width, height, TILE)
    scene = image // V
    splats_ptr, tokens_ptr = splats_ptr + image * N * 8, tokens_ptr + scene * M * C
    indices_ptr, mix_ptr = indices_ptr + scene * N * J, mix_ptr + scene * N * J
    gaussians_ptr += start
    v_parts = v_out_ptr, v_sums_ptr, rows_ptr, labels_ptr
    T_end, last = load_ends(transmittance_ptr, last_ptr, pixel, inside, TILE)
    v_alpha = tl.load(v_alphas_ptr + pixel, inside, 0.0)
    low, more = -1, True
    while more:  # usually once
        tokens = next_tokens(gaussians_ptr, indices_ptr, count, low, SLOTS, J, J_UP)
        if v_splats_ptr is not None:
            G = token_products(v_parts, tokens_ptr, tokens, pixel, inside, C, BLOCK_C, DTYPE,
                               PRECISION, FAST)  # fmt: skip
        W, S, T = tl.zeros([P, SLOTS], tl.float32), tl.zeros([TILE, KO, TILE], tl.float32), T_end
        chunks = tl.cdiv(tl.max(last), K)
        for chunk in range(chunks):
            first = (chunks - 1 - chunk) * K
            row, used, place, splats = load_chunk(splats_ptr, gaussians_ptr, first, count, KI)
            m = mixed(indices_ptr, mix_ptr, row, used, tokens, J)
            m = operand(m, DTYPE, PRECISION, FAST)
            alpha, R_before, T = chunk_backward(splats, xy, place, last, T, KI, FAST)
            if v_tokens_ptr is not None:
                # [P, K] @ [K, SLOTS] -> [P, SLOTS]
                w = as_matrix(operand(alpha * R_before, DTYPE, PRECISION, FAST), P, K)
                W = tl.dot(w, m, W, input_precision=PRECISION)
            if v_splats_ptr is not None:
                # [P, SLOTS] @ [SLOTS, K] -> [P, K]
                g = tl.dot(G, tl.trans(m), input_precision=PRECISION)
                g += tl.where(low < 0, v_alpha, 0.0)[:, None]
                S = geometry_backward(v_splats_ptr + image * N * 8, splats_ptr, row, used, xy,
                                      alpha, R_before, g, S, KI, FAST)  # fmt: skip
        if v_tokens_ptr is not None:
            add_tokens(v_tokens_ptr + scene * M * C, v_parts, W, tokens, pixel, inside, C,
                       BLOCK_C, DTYPE, PRECISION, FAST)  # fmt: skip
        low = tl.max(tokens)
        more = low < NONE


@triton.jit
def check_kernel(indices_ptr, mix_ptr, bad_ptr, size, M, BLOCK: tl.constexpr):
    """Set bad if an index is outside 0..M-1, or a weight is NaN or infinite."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index, mix = tl.load(indices_ptr + i, i < size, 0), tl.load(mix_ptr + i, i < size, 0.0)
    bad = (index < 0) | (index >= M) | ((mix - mix) != 0)
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.atomic_max(bad_ptr, 1)


@torch.library.custom_op("splat::check_mixture", mutates_args=("bad",))
def check_mixture(indices: Tensor, mix: Tensor, tokens: Tensor, bad: Tensor) -> None:
    """Indices [B, N, J] int32 and weights mix, contiguous, of tokens [B, M, C]. Sets bad [1]."""
    size = indices.numel()
    if size:
        with torch.cuda.device_of(mix):
            grid = (triton.cdiv(size, BLOCK),)
            check_kernel[grid](indices, mix, bad, size, tokens.shape[1], BLOCK=BLOCK)
