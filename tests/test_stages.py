"""The stages of the Triton rasteriser, down to the helpers: each against a few lines of torch."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import blend, projection, tiles, torch_backend
from reference import DEVICE, make_scene

LIMITS = dict(near_plane=0.01, far_plane=1e10, eps2d=0.3)

# --------------------------------------------------------------------------- helpers


@triton.jit
def _quadratic(m_ptr, n_ptr, covar_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    valid = i < BLOCK
    covar = projection.load_covar(covar_ptr + 9 * i, valid)
    m, n = projection.load_vector(m_ptr + 3 * i), projection.load_vector(n_ptr + 3 * i)
    tl.store(out_ptr + i, projection.dot(m, projection.transform(covar, n)))


def test_quadratic_form_of_a_loaded_covariance():
    g = torch.Generator().manual_seed(0)
    m, n = (torch.randn(16, 3, generator=g) for _ in range(2))
    S = torch.randn(16, 3, 3, generator=g)
    out = torch.empty(16, device=DEVICE)
    _quadratic[(1,)](m.to(DEVICE), n.to(DEVICE), S.to(DEVICE), out, BLOCK=16)
    symmetric = 0.5 * (S + S.mT)  # what is stored need not be symmetric to the bit
    expected = torch.einsum("bi,bij,bj->b", m, symmetric, n)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@triton.jit
def _clamp_slope(slope_ptr, out_ptr, within_ptr, f, c, size, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    out, within = projection.clamp_slope(tl.load(slope_ptr + i), f, c, size)
    tl.store(out_ptr + i, out)
    tl.store(within_ptr + i, within.to(tl.int32))


def test_clamp_slope():
    slope = torch.linspace(-3, 3, 16, device=DEVICE)
    out, within = torch.empty_like(slope), torch.empty(16, dtype=torch.int32, device=DEVICE)
    _clamp_slope[(1,)](slope, out, within, 10.0, 4.0, 12.0, BLOCK=16)
    low, high = -4 / 10 - 0.3 * 0.6, 8 / 10 + 0.3 * 0.6
    torch.testing.assert_close(out, slope.clamp(low, high))
    assert torch.equal(within.bool(), (slope > low) & (slope < high))


@triton.jit
def _tile(offsets_ptr, out_ptr, TILE: tl.constexpr):
    image, start, count, xy, pixel, inside = blend.get_tile(offsets_ptr, 11, 9, TILE)
    out_ptr += tl.program_id(0) * (3 + TILE * TILE)
    tl.store(out_ptr, image)
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, count)
    i = tl.arange(0, TILE * TILE)
    tl.store(out_ptr + 3 + i, tl.where(inside, pixel, -1))


def test_a_program_finds_its_tile():
    """Two images of 11 x 9 pixels, three times three tiles of 4 x 4 each."""
    offsets = torch.arange(19, device=DEVICE) ** 2
    out = torch.empty(18, 3 + 16, dtype=torch.int64, device=DEVICE)
    _tile[(18,)](offsets, out, TILE=4)
    for t, (image, start, count, *pixels) in enumerate(out.tolist()):
        assert (image, start, count) == (t // 9, t * t, 2 * t + 1)
        ys, xs = (range(4 * i, 4 * i + 4) for i in (t % 9 // 3, t % 3))
        at = [(image * 9 + y) * 11 + x if x < 11 and y < 9 else -1 for y in ys for x in xs]
        assert pixels == at


@triton.jit
def _weights(splats_ptr, before_ptr, out_ptr, KI: tl.constexpr, TILE: tl.constexpr):
    """Alpha, w, R and R after the chunk of 4 KI Gaussians, of the tile in the image's corner."""
    P: tl.constexpr = TILE * TILE
    K: tl.constexpr = KI * 4
    place = blend.places(KI)
    rows = blend.load_splats(splats_ptr, place, place < K)
    xy = blend.centres((tl.arange(0, TILE), tl.arange(0, TILE)))
    alpha = blend.pair_alpha(blend.columns(rows, KI), xy, False)
    i = tl.arange(0, TILE)
    before = tl.load(before_ptr + i[:, None, None] * TILE + i[None, None, :])
    before = tl.broadcast_to(before, (TILE, 4, TILE))
    w, R, after = blend.scan(alpha, alpha, before, KI)
    at = out_ptr + tl.arange(0, P)[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(at, blend.as_matrix(alpha, P, K))
    tl.store(at + P * K, blend.as_matrix(w, P, K))
    tl.store(at + 2 * P * K, blend.as_matrix(R, P, K))
    tl.store(at + 3 * P * K, blend.as_matrix(R * 0 + after[None], P, K))


def test_weights_of_a_chunk():
    """Alpha is cut off above and skipped below; weights are the products of the definition."""
    g = torch.Generator().manual_seed(0)
    P, K = 16, 16
    factor = torch.randn(K, 2, 2, generator=g)
    conic = factor @ factor.mT + 0.05 * torch.eye(2)
    means, opacities = 4 * torch.rand(K, 2, generator=g), torch.linspace(0.01, 1, K)
    means[-1] = 0.5  # opacity 1, on a pixel's centre
    exponent = torch.stack([0.5 * conic[:, 0, 0], conic[:, 0, 1], 0.5 * conic[:, 1, 1]], 1)
    splats = torch.cat([
        means, opacities.log2()[:, None], opacities.clamp(max=0.99)[:, None],
        -exponent / math.log(2), torch.zeros(K, 1),
    ], 1)  # fmt: skip
    before = torch.rand(P, generator=g)
    out = torch.empty(4, P, K, device=DEVICE)
    _weights[(1,)](splats.to(DEVICE), before.to(DEVICE), out, KI=4, TILE=4)
    alpha, w, R, after = out.cpu().double()

    pixels = torch.stack(torch.meshgrid(*[torch.arange(4) + 0.5] * 2, indexing="xy"), -1)
    d = (pixels.view(P, 1, 2) - means).double()
    raw = opacities * torch.exp(-0.5 * torch.einsum("pki,kij,pkj->pk", d, conic.double(), d))
    expected = torch.where(raw < 1 / 255, 0, raw.clamp(max=0.99))
    torch.testing.assert_close(alpha, expected, rtol=1e-4, atol=1e-6)
    assert alpha.max() == torch.tensor(0.99) and (alpha == 0).any()
    passed = torch.cumprod(torch.cat([before[:, None], 1 - expected], 1), 1)
    torch.testing.assert_close(w, expected * passed[:, :-1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(R, passed[:, 1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after, passed[:, -1:].expand(P, K), rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- projection


@pytest.mark.parametrize("B,V,N", [(1, 1, 1), (2, 3, 17), (1, 2, 131)])
def test_projection_and_its_gradients(B, V, N):
    means, covars, opacities, _, viewmats, Ks, width, height = make_scene(
        N, B, V, N, width=23, height=13, sigma=0.3
    )

    def gradients(project, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (means, covars, opacities)]
        splats, visible = project(*inputs, viewmats.to(dtype), Ks.to(dtype))
        g = torch.Generator().manual_seed(0)
        weights = torch.randn(splats.shape, generator=g).to(splats) * visible[..., None]
        weights[..., 3] = 0  # by cap no gradient flows
        loss = (torch.where(visible[..., None], splats, 0.0) * weights).sum()
        return splats.detach(), visible, *torch.autograd.grad(loss, inputs)

    def by_torch(means, covars, opacities, viewmats, Ks):
        means2d, conics, covars2d, _, visible = torch_backend.project(
            means, covars, viewmats, Ks, width, height, **LIMITS
        )
        visible = torch_backend.image_radii(covars2d, opacities, visible)[0] >= 0
        opacities = opacities[:, None].expand_as(visible)
        exponent = torch.stack([-0.5 * conics[0], -conics[1], -0.5 * conics[2]]) / math.log(2)
        columns = *means2d, opacities.log2(), opacities.clamp(max=0.99), *exponent, 0 * opacities
        return torch.stack(columns, -1), visible

    def by_triton(*tensors):
        splats, _, radii, bad = projection.project(*tensors, width, height, *LIMITS.values())
        assert not bad
        return splats, radii[..., 0] >= 0

    expected, got = gradients(by_torch, torch.float64), gradients(by_triton, torch.float32)
    visible = expected[1]
    assert torch.equal(visible, got[1]) and (N == 1 or 0 < visible.float().mean() < 1)
    torch.testing.assert_close(
        got[0][visible].double(), expected[0][visible], rtol=1e-3, atol=1e-4
    )
    for name, a, b in zip(("means", "covars", "opacities"), got[2:], expected[2:]):
        scale = float(b.abs().max())
        torch.testing.assert_close(
            a.double(), b, rtol=1e-3, atol=1e-5 * scale, msg=lambda m: f"gradient of {name}: {m}"
        )


# --------------------------------------------------------------------------- tile lists


@settings(max_examples=25)
@given(
    st.integers(0, 2**31), st.integers(1, 2), st.sampled_from([0, 1, 15, 17, 130, 257]),
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 16]),
)  # fmt: skip
def test_tile_lists_are_complete_sorted_and_tight(seed, images, N, width, height, tile):
    g = torch.Generator().manual_seed(seed)
    means2d = (torch.rand(images, N, 2, generator=g) * 2 - 0.5) * torch.tensor([width, height])
    radii = torch.exp(2 * torch.randn(images, N, 2, generator=g))
    radii[torch.rand(images, N, generator=g) < 0.2] = -1
    depths = 1 + torch.randint(0, 5, (images, N), generator=g).float()  # many ties
    splats = torch.nn.functional.pad(means2d, (0, 6))
    tensors = (t.to(DEVICE) for t in (splats, depths, radii, torch.zeros(1, dtype=torch.int32)))
    gaussians, offsets = tiles.list_tiles(*tensors, width, height, tile)
    tiles_x, tiles_y = -(-width // tile), -(-height // tile)
    assert offsets.shape == (images * tiles_x * tiles_y + 1,) and offsets[0] == 0
    for t, (start, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist())):
        image, ty, tx = t // (tiles_x * tiles_y), t // tiles_x % tiles_y, t % tiles_x
        listed = gaussians[start:end].tolist()
        assert listed == sorted(listed, key=lambda n: (float(depths[image, n]), n))
        assert len(set(listed)) == len(listed)
        # Distance from each box to the nearest and pixel-centre rectangle of the tile, in x and y
        low = torch.tensor([tx, ty]) * tile + 0.5
        high = torch.minimum(low + tile - 1, torch.tensor([width, height]) - 0.5)
        gap = torch.maximum(low - means2d[image], means2d[image] - high) - radii[image]
        touches = (gap <= 0).all(1) & (radii[image, :, 0] >= 0)
        may_touch = (gap <= 0.02).all(1) & (radii[image, :, 0] >= 0)
        # A box between two columns of pixels touches neither, and may be left out
        holds_centre = (
            torch.floor(torch.minimum(high, means2d[image] + radii[image]) - 0.5)
            >= torch.ceil(torch.maximum(low, means2d[image] - radii[image]) - 0.5)
        ).all(1)
        assert set(torch.nonzero(touches & holds_centre)[:, 0].tolist()) <= set(listed)
        assert set(listed) <= set(torch.nonzero(may_touch)[:, 0].tolist())


def test_a_gaussian_over_many_tiles_is_in_every_one_once():
    """All lanes share its tiles: more of them than a program has lanes, and two such at once."""
    width, height, tile = 131, 97, 8
    means2d = torch.tensor([[[60.0, 50.0], [3.0, 3.0], [70.0, 40.0], [20.0, 20.0]]])
    radii = torch.tensor([[[500.0, 500.0], [1.0, 1.0], [50.0, 500.0], [9.0, 5.0]]])
    depths = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    splats = torch.nn.functional.pad(means2d, (0, 6))
    tensors = (t.to(DEVICE) for t in (splats, depths, radii, torch.zeros(1, dtype=torch.int32)))
    gaussians, offsets = tiles.list_tiles(*tensors, width, height, tile)
    tiles_x, tiles_y = 17, 13
    assert tiles.BLOCK < tiles_x * tiles_y
    for t in range(tiles_x * tiles_y):
        x, y = t % tiles_x * tile, t // tiles_x * tile
        expected = [1] * (x <= 3 and y <= 3) + [2] * (13 <= x <= 119) + [0]
        expected += [3] * (8 <= x <= 28 and 8 <= y <= 24)
        assert gaussians[offsets[t] : offsets[t + 1]].tolist() == expected, (x, y)


@triton.jit
def _load_run(offsets_ptr, range_ptr, number_ptr, out_ptr, count, RUN: tl.constexpr):
    start, end, first = tiles.load_run(offsets_ptr, range_ptr, number_ptr, count, RUN)
    out = out_ptr + 3 * tl.program_id(0)
    tl.store(out, start)
    tl.store(out + 1, end)
    tl.store(out + 2, first)


def test_a_program_finds_its_run():
    offsets, owner, number = (
        torch.tensor(t, device=DEVICE) for t in ([0, 40, 45], [0, 0, 0, 1, 2], [0, 1, 2, 0, 0])
    )
    out = torch.empty(5, 3, dtype=torch.int64, device=DEVICE)
    _load_run[(5,)](offsets, owner, number, out, 2, RUN=16)
    first, last = [[0, 40, 0], [0, 40, 16], [0, 40, 32]], [[40, 45, 40]]
    assert out.tolist() == first + last + [[0, 0, 0]]  # the fifth has none


@settings(max_examples=25)
@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 64, 100, 131]), min_size=1, max_size=5),
    st.sampled_from([16, 32]),
)  # fmt: skip
def test_ranges_are_sorted_whatever_their_length(seed, lengths, run):
    """Against torch.sort, with runs so short that lists of a hundred take several merges."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    depth = torch.randint(0, 4, (sum(lengths),), generator=g)  # ties: the lower half decides
    keys = (depth << 32) | torch.randperm(sum(lengths), generator=g)
    before, tiles.RUN = tiles.RUN, run
    try:
        if sum(lengths):
            given = keys.clone().to(DEVICE), offsets.to(DEVICE)
            got = tiles.sort_ranges(*given, max(lengths)).cpu()
            parts = [keys[a:b].sort().values for a, b in zip(offsets, offsets[1:])]
            assert torch.equal(got, torch.cat(parts).int())  # the lower halves
    finally:
        tiles.RUN = before


@pytest.mark.parametrize("length", [500, 513, 1100])
def test_a_long_list_is_sorted(length):
    """With the runs of a GPU: 1,100 keys are three runs, the last one short, and two merges."""
    keys = torch.randperm(length + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = torch.tensor([0, length, length, length + 3], device=DEVICE)
    got = tiles.sort_ranges(keys.clone(), offsets, length)
    assert torch.equal(got[:length], keys[:length].sort().values.int())
    assert torch.equal(got[length:], keys[length:].sort().values.int())
