"""The stages of the Triton rasteriser, down to the helpers: each against a few lines of torch."""

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
def _pixel_centres(x_ptr, y_ptr, tile, tiles_x, TILE: tl.constexpr):
    x, y = blend.pixel_centres(tile, tiles_x, TILE)
    i = tl.arange(0, TILE * TILE)
    tl.store(x_ptr + i, x)
    tl.store(y_ptr + i, y)


def test_pixel_centres_of_a_tile():
    x, y = (torch.empty(16, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _pixel_centres[(1,)](x, y, 7, 3, TILE=4)  # tile 7 of 3 a row: third row, second column
    assert x.tolist() == [4, 5, 6, 7] * 4
    assert y.tolist() == [8] * 4 + [9] * 4 + [10] * 4 + [11] * 4


@triton.jit
def _pair_alpha(p_ptr, g_ptr, alpha_ptr, P: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, P), tl.arange(0, K)
    px, py = tl.load(p_ptr + 2 * i), tl.load(p_ptr + 2 * i + 1)
    g = g_ptr + 6 * k
    mean, conic = (tl.load(g), tl.load(g + 1)), (tl.load(g + 2), tl.load(g + 3), tl.load(g + 4))
    _, _, _, alpha = blend.pair_alpha((px, py), mean, conic, tl.load(g + 5))
    tl.store(alpha_ptr + i[:, None] * K + k[None, :], alpha)


def test_pair_alpha_is_cut_off_above_and_skipped_below():
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 12, (16, 2), generator=g).float()
    factor = torch.randn(16, 2, 2, generator=g)
    conic = factor @ factor.mT + 0.05 * torch.eye(2)
    mean, opacity = 12 * torch.rand(16, 2, generator=g), torch.linspace(0, 1, 16)
    rows = torch.cat([mean, conic[:, 0], conic[:, 1, 1:], opacity[:, None]], 1)
    mean[-1] = rows[-1, :2] = pixels[0] + 0.5  # opacity 1, on a pixel's centre
    alpha = torch.empty(16, 16, device=DEVICE)
    _pair_alpha[(1,)](pixels.to(DEVICE), rows.contiguous().to(DEVICE), alpha, P=16, K=16)
    d = pixels[:, None] + 0.5 - mean
    raw = opacity * torch.exp(-0.5 * torch.einsum("pki,kij,pkj->pk", d, conic, d))
    expected = torch.where(raw < 1 / 255, 0, raw.clamp(max=0.99))
    torch.testing.assert_close(alpha.cpu(), expected, rtol=1e-4, atol=1e-6)
    assert alpha.max() == torch.tensor(0.99) and (alpha == 0).any()


# --------------------------------------------------------------------------- projection


@pytest.mark.parametrize("B,V,N", [(1, 1, 1), (2, 3, 17), (1, 2, 131)])
def test_projection_and_its_gradients(B, V, N):
    means, covars, opacities, _, viewmats, Ks, width, height = make_scene(
        N, B, V, N, width=23, height=13, sigma=0.3
    )

    def gradients(project, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (means, covars)]
        means2d, conics, visible = project(
            *inputs, opacities.to(dtype), viewmats.to(dtype), Ks.to(dtype)
        )
        g = torch.Generator().manual_seed(0)
        loss = 0
        for t in (means2d, conics):
            weights = torch.randn(t.shape, generator=g).to(t) * visible[..., None]
            loss = loss + (torch.where(visible[..., None], t, 0.0) * weights).sum()
        return means2d.detach(), conics.detach(), visible, *torch.autograd.grad(loss, inputs)

    def by_torch(means, covars, opacities, viewmats, Ks):
        means2d, conics, covars2d, _, visible = torch_backend.project(
            means, covars, viewmats, Ks, width, height, **LIMITS
        )
        visible = torch_backend.image_radii(covars2d, opacities, visible)[0] >= 0
        return means2d.movedim(0, -1), conics.movedim(0, -1), visible

    def by_triton(*tensors):
        means2d, conics, _, radii = projection.project(*tensors, width, height, *LIMITS.values())
        return means2d, conics, radii[..., 0] >= 0

    expected, got = gradients(by_torch, torch.float64), gradients(by_triton, torch.float32)
    visible = expected[2]
    assert torch.equal(visible, got[2]) and (N == 1 or 0 < visible.float().mean() < 1)
    for name, a, b in zip(("means2d", "conics"), got, expected):
        torch.testing.assert_close(
            a[visible].double(), b[visible], rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}"
        )
    for name, a, b in zip(("means", "covars"), got[3:], expected[3:]):
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
    gaussians, ranges = tiles.list_tiles(
        means2d.to(DEVICE), depths.to(DEVICE), radii.to(DEVICE), width, height, tile
    )
    tiles_x, tiles_y = -(-width // tile), -(-height // tile)
    assert ranges.shape == (images * tiles_x * tiles_y, 2)
    for t, (start, end) in enumerate(ranges.tolist()):
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


@triton.jit
def _load_run(ranges_ptr, range_ptr, number_ptr, out_ptr, count, RUN: tl.constexpr):
    start, end, first = tiles.load_run(ranges_ptr, range_ptr, number_ptr, count, RUN)
    out = out_ptr + 3 * tl.program_id(0)
    tl.store(out, start)
    tl.store(out + 1, end)
    tl.store(out + 2, first)


def test_a_program_finds_its_run():
    ranges, owner, number = (
        torch.tensor(t, device=DEVICE)
        for t in ([[0, 40], [40, 45]], [0, 0, 0, 1, 2], [0, 1, 2, 0, 0])
    )
    out = torch.empty(5, 3, dtype=torch.int64, device=DEVICE)
    _load_run[(5,)](ranges, owner, number, out, 2, RUN=16)
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
    ends = torch.tensor(lengths).cumsum(0)
    ranges = torch.stack([ends - torch.tensor(lengths), ends], 1)
    depth = torch.randint(0, 4, (sum(lengths),), generator=g)  # ties: the lower half decides
    keys = (depth << 32) | torch.randperm(sum(lengths), generator=g)
    before, tiles.RUN = tiles.RUN, run
    try:
        if sum(lengths):
            got = tiles.sort_ranges(keys.clone().to(DEVICE), ranges.to(DEVICE), max(lengths)).cpu()
            expected = torch.cat([keys[a:b].sort().values for a, b in ranges.tolist()])
            assert torch.equal(got, expected)
    finally:
        tiles.RUN = before


def test_a_list_of_thousands_is_sorted():
    """With the runs of a GPU: 5,000 keys are twenty runs, the last one short, and five merges."""
    keys = torch.randperm(5003, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ranges = torch.tensor([[0, 5000], [5000, 5000], [5000, 5003]], device=DEVICE)
    got = tiles.sort_ranges(keys.clone(), ranges, 5000)
    assert torch.equal(got[:5000], keys[:5000].sort().values)
    assert torch.equal(got[5000:], keys[5000:].sort().values)
