"""kernels.rasterize: both backends against a float64 loop, the laws of any renderer, bad input.

The Triton kernels run compiled where there is a GPU, and in Triton's interpreter elsewhere.
"""

import functools
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kernels
from kernels import Mixture
from reference import DEVICE, make_scene, random_rotation, rasterize_dense

# Values and gradients are compared at full precision; what TF32 costs has a test of its own
rasterize = functools.partial(kernels.rasterize, precision="ieee")
NAMES = ("means", "covars", "opacities", "features")
both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(params=["ieee", "tf32"])
def precision(request, monkeypatch):
    """Both ways of launching float32 kernels, where both compute exactly: in the interpreter."""
    if request.param == "tf32" and torch.cuda.is_available():
        pytest.skip("TF32 is not exact on a GPU")
    monkeypatch.setitem(rasterize.keywords, "precision", request.param)


def values_and_gradients(render, scene, seed=1, mask=None, **options):
    """Images, alphas and the four gradients of a random linear function of them (in the mask)."""
    inputs = [t.detach().clone().requires_grad_() for t in scene[:4]]
    out, alphas, *rest = render(*inputs, *scene[4:], **options)
    g = torch.Generator().manual_seed(seed)
    v_out, v_alphas = (torch.randn(t.shape, generator=g).to(t) for t in (out, alphas))
    mask = rest[0] if rest else mask
    if mask is not None:
        v_out, v_alphas = v_out * mask[..., None], v_alphas * mask
    if out.requires_grad:  # the dense loop's does not where it blends nothing
        torch.autograd.backward([out, alphas], [v_out, v_alphas])
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
    return out.detach(), alphas.detach(), gradients, mask


def close(name, actual, expected, rtol, atol):
    """As assert_close, with atol in units of the largest expected value: gradients span a lot."""
    scale = max(1e-6, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * scale,
        msg=lambda m: f"{name}: {m}",
    )  # fmt: skip


def check_against_dense(scene, *backends, rtol=1e-3, atol=2e-5, **options):
    out, alphas, gradients, certain = values_and_gradients(rasterize_dense, scene, **options)
    for backend in backends:
        got_out, got_alphas, got_gradients, _ = values_and_gradients(
            rasterize, scene, mask=certain, backend=backend, **options
        )
        close("features", got_out[certain], out[certain], rtol, atol)
        close("alphas", got_alphas[certain], alphas[certain], rtol, atol)
        for name, got, expected in zip(NAMES, got_gradients, gradients):
            close(f"{backend} gradient of {name}", got, expected, rtol, atol)
    return certain, alphas


# --------------------------------------------------------------------------- values and gradients

AWKWARD = [  # B, V, N, C, width, height
    (1, 1, 1, 1, 1, 1),
    (1, 1, 15, 1, 16, 16),
    (1, 2, 17, 15, 17, 15),
    (2, 1, 31, 17, 13, 23),
    (2, 3, 7, 3, 11, 5),
    (1, 1, 53, 67, 19, 7),
    (2, 1, 29, 384, 10, 9),
    (1, 1, 23, 1000, 9, 10),
]


@both_backends
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("B,V,N,C,width,height", AWKWARD)
def test_matches_dense_loop_at_awkward_sizes(backend, B, V, N, C, width, height):
    scene = make_scene(N + C, B, V, N, C, width, height)
    certain, _ = check_against_dense(scene, backend)
    assert certain.float().mean() > 0.8  # or little was compared


@pytest.mark.parametrize("B,V,N,C,width,height", AWKWARD)
def test_torch_backend_in_float64_is_the_dense_loop(B, V, N, C, width, height):
    scene = make_scene(N + C, B, V, N, C, width, height, dtype=torch.float64)
    check_against_dense(scene, "torch", rtol=1e-8, atol=1e-10)


# Tolerances of 1e-3 of the largest gradient below: wide discs, edge-on, are ill-conditioned
scenes = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**31),
        B=st.integers(1, 2),
        V=st.integers(1, 2),
        N=st.sampled_from([0, 1, 2, 15, 16, 17, 29, 40]),
        C=st.sampled_from([1, 3, 16, 17, 31]),
        width=st.integers(1, 20),
        height=st.integers(1, 20),
        sigma=st.sampled_from([1e-4, 0.01, 0.1, 1.0]),  # far below a pixel to beyond the image
        opacity=st.sampled_from([None, 0.0, 1 / 255, 0.5, 1.0]),
        flat=st.sampled_from([1.0, 0.01, 0.0]),
    )
)
limits = st.fixed_dictionaries(
    dict(
        near_plane=st.sampled_from([0.01, 3.0]),
        far_plane=st.sampled_from([1e10, 4.5]),
        eps2d=st.sampled_from([0.3, 3.0]),
    )
)


@settings(max_examples=30)
@given(scenes, limits)
@example(
    dict(seed=3, B=1, V=1, N=40, C=3, width=18, height=9, sigma=1.0, opacity=1.0, flat=1.0), {}
)
def test_triton_matches_dense_loop(scene, limits):
    check_against_dense(make_scene(**scene), "triton", atol=1e-3, **limits)


@settings(max_examples=150)
@given(scenes, limits)
def test_torch_matches_dense_loop(scene, limits):
    check_against_dense(make_scene(**scene), "torch", atol=1e-3, **limits)


@pytest.mark.usefixtures("precision")
@settings(
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the same for all examples
)
@given(
    st.fixed_dictionaries(dict(
        seed=st.integers(0, 2**31), B=st.just(1), V=st.integers(1, 2), C=st.sampled_from([1, 17]),
        N=st.sampled_from([1, 40, 90]), width=st.integers(1, 11), height=st.integers(1, 11),
        sigma=st.sampled_from([0.1, 1.0]), opacity=st.sampled_from([0.02, 0.3]),
    )),
    st.sampled_from([1, 12, 31, 40, 100]), st.integers(1, 4),
)  # fmt: skip
def test_triton_mixtures_match_torch(scene, M, J):
    """Long lists: tokens that come late, and more than a program holds."""
    scene = make_scene(**scene)
    certain = rasterize_dense(*scene)[2]
    mixture, results = mixture_for(scene, M, J), []
    for backend in ("torch", "triton"):
        def render(means, covars, opacities, tokens, *camera):
            features = mixture._replace(tokens=tokens)
            return rasterize(means, covars, opacities, features, *camera, backend=backend)

        inputs = *scene[:3], mixture.tokens, *scene[4:]
        results.append(values_and_gradients(render, inputs, mask=certain))
    (out, alphas, gradients, _), (got_out, got_alphas, got_gradients, _) = results
    close("features", got_out[certain], out[certain], 1e-3, 2e-5)
    close("alphas", got_alphas[certain], alphas[certain], 1e-3, 2e-5)
    for name, got, expected in zip((*NAMES[:3], "tokens"), got_gradients, gradients):
        close(f"gradient of {name}", got, expected, 1e-3, 1e-3)


@settings(max_examples=12)
@given(scenes)
def test_triton_matches_torch(scene):
    scene = make_scene(**scene)
    certain = rasterize_dense(*scene)[2]
    out, alphas, gradients, _ = values_and_gradients(
        rasterize, scene, mask=certain, backend="torch"
    )
    got_out, got_alphas, got_gradients, _ = values_and_gradients(
        rasterize, scene, mask=certain, backend="triton"
    )
    close("features", got_out[certain], out[certain], 1e-3, 2e-5)
    close("alphas", got_alphas[certain], alphas[certain], 1e-3, 2e-5)
    for name, got, expected in zip(NAMES, got_gradients, gradients):
        close(f"gradient of {name}", got, expected, 1e-3, 1e-3)


@pytest.mark.parametrize("faint", [True, False])
def test_two_thousand_gaussians_in_one_tile(faint):
    """Past faint specks every pixel sees to the end of the list; a few bright ones close it."""
    g = torch.Generator().manual_seed(0)
    N, C, size = 2000, 5, 8
    z = 1 + 3 * torch.rand(N, 1, generator=g)
    means = torch.cat([(torch.rand(N, 2, generator=g) - 0.5) * z, z], 1)[None]
    covars = torch.eye(3).expand(1, N, 3, 3) * (0.02 * z**2)[None, ..., None] / size**2
    opacities = (0.1 if faint else 0.9) * torch.rand(1, N, generator=g)
    features = torch.randn(1, N, C, generator=g)
    K = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]])[None, None]
    tensors = (means, covars, opacities, features, torch.eye(4)[None, None], K)
    scene = [*(t.to(DEVICE).contiguous() for t in tensors), size, size]
    certain, alphas = check_against_dense(scene, "torch", "triton", atol=1e-3)
    assert certain.float().mean() > 0.2
    assert 0.5 < alphas.min() and alphas.max() < 0.999 if faint else alphas.min() > 0.999


def test_gradients_by_finite_differences():
    means, covars, opacities, features, *cameras = make_scene(
        5, V=2, N=4, C=2, width=6, height=5, dtype=torch.float64
    )

    def render(means, factors, opacities, features):  # covars by a factor, so they stay symmetric
        covars = factors @ factors.transpose(-1, -2)
        return rasterize(means, covars, opacities, features, *cameras, backend="torch")

    factors = torch.linalg.cholesky(covars)
    inputs = [t.detach().requires_grad_() for t in (means, factors, opacities, features)]
    assert torch.autograd.gradcheck(render, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@both_backends
def test_covariance_gradient_is_per_entry(backend):
    """Every one of the nine entries of a covariance may be moved alone, also against symmetry."""
    means, covars, opacities, features, *cameras = make_scene(5, N=3, C=2, width=6, height=5)
    covars.requires_grad_()
    out, _ = rasterize(means, covars, opacities, features, *cameras, backend=backend)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    (gradient,) = torch.autograd.grad((out * g).sum(), covars)
    wide = [t.double() for t in (means, covars.detach(), opacities, features)]
    cameras = [t.double() if torch.is_tensor(t) else t for t in cameras]
    for i, j in [(0, 1), (1, 0), (2, 2)]:
        moved = [wide[1].clone() for _ in range(2)]
        moved[0][:, 0, i, j] -= 1e-6
        moved[1][:, 0, i, j] += 1e-6
        low, high = (rasterize(wide[0], m, *wide[2:], *cameras, backend="torch")[0] for m in moved)
        expected = ((high - low) / 2e-6 * g).sum()
        assert float(gradient[0, 0, i, j]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="only a GPU multiplies in TF32; the interpreter is exact"
)
def test_tf32_costs_little():
    """The default for float32 features, against float64, relative to the largest value."""
    scene = make_scene(24, N=200, C=384, width=64, height=48)
    exact, _, certain = rasterize_dense(*scene)
    for precision, most in (("tf32", 7e-4), ("tf32x3", 1e-4), ("ieee", 1e-4)):
        out = rasterize(*scene, precision=precision)[0].double()
        assert float((out - exact)[certain].abs().max() / exact.abs().max()) < most, precision


# --------------------------------------------------------------------------- closed forms


def one_pixel_row(
    opacities, depths=None, sigma=0.3, width=8, features=None, backend="torch", **options
):
    """Gaussians on the optical axis, which passes between pixels 3 and 4 of 8."""
    N = len(opacities)
    depths = torch.arange(1.0, N + 1) if depths is None else torch.tensor(depths)
    means = torch.stack([torch.zeros(N), torch.zeros(N), depths], -1)[None]
    covars = (sigma**2 * torch.eye(3)).repeat(1, N, 1, 1)
    features = torch.eye(N)[None] if features is None else features
    K = torch.tensor([[[[10.0, 0, 4.0], [0, 10.0, 0.5], [0, 0, 1]]]])
    tensors = (means, covars, torch.tensor([opacities]), features, torch.eye(4)[None, None], K)
    out, alphas = rasterize(*(t.to(DEVICE) for t in tensors), width, 1, backend=backend, **options)
    return out[0, 0, 0].cpu(), alphas[0, 0, 0].cpu()


@both_backends
def test_one_gaussian_is_the_formula(backend):
    _, alphas = one_pixel_row([0.8], depths=[2.0], backend=backend)
    variance = (10.0 / 2.0 * 0.3) ** 2 + 0.3
    d = torch.arange(8) + 0.5 - 4.0
    expected = 0.8 * torch.exp(-0.5 * d**2 / variance)
    torch.testing.assert_close(
        alphas, torch.where(expected >= 1 / 255, expected, 0.0), rtol=1e-5, atol=1e-7
    )


@both_backends
def test_two_opaque_gaussians_stop_after_the_first(backend):
    """0.01 * 0.01 is 1e-4 to rounding: blending must stop *before* the Gaussian that gets there."""
    out, alphas = one_pixel_row([1.0, 1.0], sigma=50.0, backend=backend)
    torch.testing.assert_close(alphas, torch.full((8,), 0.99))
    torch.testing.assert_close(out, torch.tensor([0.99, 0.0]).expand(8, 2))


@both_backends
def test_front_to_back_and_ties_by_index(backend):
    out, _ = one_pixel_row([0.5, 0.5, 0.5], depths=[3.0, 2.0, 3.0], sigma=50.0, backend=backend)
    torch.testing.assert_close(out[4], torch.tensor([0.25, 0.5, 0.125]), rtol=1e-3, atol=1e-4)


@both_backends
def test_near_and_far_are_exclusive(backend):
    out, _ = one_pixel_row(
        [0.5] * 4, depths=[1.0, 2.0, 3.0, 4.0], backend=backend, near_plane=1.0, far_plane=4.0
    )
    assert [bool(c) for c in out[4] > 0] == [False, True, True, False]


@both_backends
def test_slope_is_clamped_outside_the_image(backend):
    """Far off to the side the Jacobian is that at the border plus 0.3 of the half field of view."""
    x, sigma = 5.0, 1.0
    means = torch.tensor([[[x, 0.0, 1.0]]], device=DEVICE)
    covars = (sigma**2 * torch.eye(3, device=DEVICE))[None, None]
    K = torch.tensor([[[[4.0, 0, 4.0], [0, 4.0, 0.5], [0, 0, 1]]]], device=DEVICE)
    ones = torch.ones(1, 1, 1, device=DEVICE)
    _, alphas = rasterize(
        means, covars, 0.9 * ones[0], ones, torch.eye(4, device=DEVICE)[None, None], K, 8, 1,
        backend=backend,
    )  # fmt: skip
    u = (8 - 4) / 4 + 0.3 * 0.5 * 8 / 4
    variance = (4 * sigma) ** 2 * (1 + u * u) + 0.3
    d = torch.arange(8) + 0.5 - (4 * x + 4)
    expected = 0.9 * torch.exp(-0.5 * d**2 / variance)
    expected = torch.where(expected >= 1 / 255, expected, 0.0)
    torch.testing.assert_close(alphas[0, 0, 0].cpu(), expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- laws


@both_backends
def test_linear_in_features(backend):
    scene = make_scene(2, N=23, C=5)
    other = torch.randn_like(scene[3])
    render = lambda f: rasterize(*scene[:3], f, *scene[4:], backend=backend)[0]  # noqa: E731
    expected = 2 * render(scene[3]) - 3 * render(other)
    torch.testing.assert_close(render(2 * scene[3] - 3 * other), expected, rtol=1e-4, atol=1e-5)


@both_backends
def test_constant_feature_is_alpha(backend):
    scene = make_scene(3, N=23)
    out, alphas = rasterize(*scene[:3], torch.ones_like(scene[3]), *scene[4:], backend=backend)
    assert alphas.max() > 0.5
    torch.testing.assert_close(out, alphas[..., None].expand_as(out), rtol=1e-5, atol=1e-6)


@both_backends
def test_unchanged_under_permutation(backend):
    scene = make_scene(4, N=23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    permuted = [t[:, order] for t in scene[:4]] + scene[4:]
    for a, b in zip(rasterize(*scene, backend=backend), rasterize(*permuted, backend=backend)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@both_backends
def test_unchanged_under_rigid_motion_of_world_and_camera(backend):
    means, covars, opacities, features, viewmats, Ks, *size = make_scene(6, N=23)
    motion = torch.eye(4, device=DEVICE)
    motion[:3, :3] = random_rotation(torch.Generator().manual_seed(1)).to(DEVICE)
    motion[:3, 3] = torch.tensor([0.5, -1.0, 2.0])
    R = motion[:3, :3]
    moved = (
        means @ R.T + motion[:3, 3],
        R @ covars @ R.T,
        opacities,
        features,
        viewmats @ torch.linalg.inv(motion),
        Ks,
        *size,
    )
    still = means, covars, opacities, features, viewmats, Ks, *size
    for a, b in zip(rasterize(*still, backend=backend), rasterize(*moved, backend=backend)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@both_backends
def test_feature_gradient_is_the_adjoint(backend):
    """<rasterize(f), g> = <f, gradient>: the product and its transpose are of the same matrix."""
    scene = make_scene(7, B=2, V=2, N=17, C=5, width=11, height=9)
    scene[3].requires_grad_()
    out, _ = rasterize(*scene, backend=backend)
    g = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * g).sum(), scene[3])
    assert (out * g).sum().item() == pytest.approx((scene[3] * gradient).sum().item(), rel=1e-4)


def test_independent_of_tile_size():
    scene = make_scene(8, N=40, C=4, width=37, height=21)
    small, large = (
        kernels._rasterize_triton((*scene, 0.01, 1e10, 0.3), "ieee", tile=tile) for tile in (8, 16)
    )
    for a, b in zip(small, large):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@both_backends
def test_forward_is_bitwise_repeatable(backend):
    """Says most on a GPU; the interpreter runs one program after the other anyway."""
    scene = make_scene(9, N=60, C=7, sigma=0.5)
    for a, b in zip(rasterize(*scene, backend=backend), rasterize(*scene, backend=backend)):
        assert torch.equal(a, b)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [5, 450])  # a backward pass holds v_out of up to 384 channels
def test_half_precision_features(backend, dtype, C):
    """Products are of this type on a GPU, but float32 in the interpreter, which tests the ends."""
    scene = make_scene(10, N=23, C=C)
    scene[3] = scene[3].to(dtype)
    inputs = [t.requires_grad_() for t in scene[:4]]
    out, _ = rasterize(*scene, backend=backend)
    assert out.dtype == dtype
    expected, _, certain = rasterize_dense(*scene)
    tolerance = 4 * torch.finfo(dtype).eps
    close("features", out[certain], expected[certain], tolerance, tolerance)
    g = torch.randn_like(out) * certain[..., None]
    gradients = (torch.autograd.grad((o * g).sum(), inputs) for o in (out, expected))
    for name, got, wanted in zip(NAMES, *gradients):
        assert got.dtype == (dtype if name == "features" else torch.float32)
        close(f"gradient of {name}", got, wanted, tolerance, tolerance)


# --------------------------------------------------------------------------- factored features


def mixture_for(scene, M, J=4):
    """Four of M random tokens for each Gaussian of a scene, some with weight 0, some twice."""
    (B, N, C), device = scene[3].shape, scene[3].device
    g = torch.Generator().manual_seed(N + M)
    weights = torch.rand(B, N, J, generator=g) * (torch.rand(B, N, J, generator=g) > 0.3)
    indices = torch.randint(0, M, (B, N, J), generator=g)
    return Mixture(
        torch.randn(B, M, C, generator=g).to(device), indices.to(device), weights.to(device)
    )


@both_backends
def test_a_mixture_of_bfloat16_tokens(backend):
    """What training on a GPU splats. In the interpreter the products are float32."""
    scene = make_scene(25, N=29, C=33)
    mixture = mixture_for(scene, M=7)
    tokens = mixture.tokens.bfloat16().requires_grad_()
    out, _ = rasterize(*scene[:3], mixture._replace(tokens=tokens), *scene[4:], backend=backend)
    wide = tokens.detach().double().requires_grad_()
    dense = (wide[0][mixture.indices[0]] * mixture.weights[0, ..., None]).sum(1)[None]
    expected, _, certain = rasterize_dense(*scene[:3], dense, *scene[4:])
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    g = g * certain[..., None]
    gradients = [
        torch.autograd.grad((o * g).sum(), t)[0] for o, t in ((out, tokens), (expected, wide))
    ]
    assert out.dtype == gradients[0].dtype == torch.bfloat16
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    close("features", out[certain], expected[certain], tolerance, tolerance)
    close("gradient of tokens", *gradients, tolerance, tolerance)


@both_backends
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
    "B,V,N,M,C,J",
    [(1, 1, 23, 5, 7, 4), (2, 2, 17, 31, 33, 4), (2, 1, 9, 1, 1, 2), (1, 1, 0, 3, 4, 4),
     (1, 1, 29, 100, 7, 4), (1, 2, 61, 64, 17, 3), (1, 1, 16, 32, 5, 2),  # more than 32 in a tile
     (1, 1, 80, 14, 5, 1), (1, 1, 80, 31, 5, 1)],  # new ones late in a tile's list
)  # fmt: skip
def test_a_mixture_is_the_features_that_it_stands_for(backend, B, V, N, M, C, J):
    """Values, and gradients of all four, against the float64 loop on dense features."""
    scene = make_scene(21, B, V, N, C, width=19, height=11)
    mixture = mixture_for(scene, M, J)
    tokens = mixture.tokens.requires_grad_()
    inputs = [t.requires_grad_() for t in scene[:3]]
    out, alphas = rasterize(*inputs, mixture._replace(tokens=tokens), *scene[4:], backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (*inputs, tokens)]
    each = torch.arange(B, device=tokens.device)[:, None, None]
    dense = (wide[3][each, mixture.indices] * mixture.weights[..., None]).sum(2)
    expected, expected_alphas, certain = rasterize_dense(*wide[:3], dense, *scene[4:])
    close("features", out[certain], expected[certain], 1e-3, 2e-5)
    close("alphas", alphas[certain], expected_alphas[certain], 1e-3, 2e-5)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    g = g * certain[..., None]
    h = torch.randn(alphas.shape, generator=torch.Generator().manual_seed(1)).to(alphas) * certain
    got = torch.autograd.grad((out * g).sum() + (alphas * h).sum(), (*inputs, tokens))
    if N == 0:  # the loop has done nothing, and knows no gradient
        assert not any(t.any() for t in got)
        return
    wanted = torch.autograd.grad((expected * g).sum() + (expected_alphas * h).sum(), wide)
    for name, a, b in zip(("means", "covars", "opacities", "tokens"), got, wanted):
        close(f"gradient of {name}", a, b, 1e-3, 1e-3)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("asked", [(0,), (3,), (2, 3)])
def test_gradients_that_are_asked_for_are_those_of_all(factored, asked):
    """And no others are made: of features alone, of Gaussians alone."""
    scene = make_scene(31, V=2, N=19, C=5, width=11, height=9)
    if factored:
        scene[3] = mixture_for(scene, M=9)

    def gradients(asked):
        inputs = [*scene[:3], scene[3].tokens if factored else scene[3]]
        inputs = [t.detach().requires_grad_(i in asked) for i, t in enumerate(inputs)]
        features = scene[3]._replace(tokens=inputs[3]) if factored else inputs[3]
        out, alphas = rasterize(*inputs[:3], features, *scene[4:], backend="triton")
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        loss = (out * g).sum() + (alphas.square()).sum()
        return torch.autograd.grad(loss, [inputs[i] for i in asked])

    every = gradients((0, 1, 2, 3))
    for i, got in zip(asked, gradients(asked)):
        assert got.abs().max() > 0
        close(f"gradient of {NAMES[i]}", got, every[i], 1e-5, 1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_without_gradients_the_image_is_the_same(factored):
    scene = make_scene(32, N=37, C=5, sigma=0.5)
    if factored:
        scene[3] = mixture_for(scene, M=9)
    with_grad = rasterize(scene[0].requires_grad_(), *scene[1:], backend="triton")
    with torch.no_grad():
        without = rasterize(*scene, backend="triton")
    for a, b in zip(with_grad, without):
        assert torch.equal(a.detach(), b)


# --------------------------------------------------------------------------- parts of images


@both_backends
@pytest.mark.parametrize("B,V,N,mixed", [
    (1, 1, 23, 0), (2, 3, 17, 0), (2, 1, 0, 0), (2, 3, 17, 7), (2, 1, 0, 7),
    (1, 1, 23, 40),  # tokens; so many take the Triton kernels several walks
])  # fmt: skip
def test_parts_of_images_are_those_of_the_whole(backend, B, V, N, mixed):
    """Some rows and columns, and means over labels, one of which no pixel has."""
    scene = make_scene(26, B, V, N, C=5, width=19, height=11)
    if mixed:
        scene[3] = mixture_for(scene, M=mixed)
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (B, V, 11, 19), generator=g)
    labels[labels == 2] = 4
    at = torch.tensor([1, 2, 7], device=DEVICE), torch.tensor([0, 18], device=DEVICE)
    labels = labels.to(DEVICE)
    inputs = [
        t.detach().requires_grad_() for t in (*scene[:3], scene[3].tokens if mixed else scene[3])
    ]
    features = scene[3]._replace(tokens=inputs[3]) if mixed else inputs[3]
    out, alphas = rasterize(*inputs[:3], features, *scene[4:], backend=backend)
    some, again, means = rasterize(
        *inputs[:3], features, *scene[4:], backend=backend, at=at, labels=labels
    )
    inside = (labels[..., None] == torch.arange(5, device=DEVICE)).to(out)  # (B, V, H, W, L)
    expected = torch.einsum("bvhwl,bvhwc->bvlc", inside, out)
    expected = expected / inside.sum((2, 3)).clamp(min=1)[..., None]
    wanted = out[:, :, [1, 2, 7]][:, :, :, [0, 18]], alphas, expected
    gradients = []
    for what, a, b in zip(("pixels", "alphas", "means"), (some, again, means), wanted):
        close(what, a, b, 1e-4, 1e-5)
    for parts in ((some, again, means), wanted):
        g = torch.Generator().manual_seed(4)
        loss = sum((t * torch.randn(t.shape, generator=g).to(t)).sum() for t in parts)
        gradients.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    for name, a, b in zip(NAMES, *gradients):
        close(f"gradient of {name}", a, b, 1e-4, 1e-4)


# --------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("mixed,compiler", [(False, "inductor"), (True, "aot_eager")])
def test_compiles_into_one_graph_without_a_break(mixed, compiler):
    """Values and gradients are those without the compiler; fullgraph raises at a break."""
    scene = make_scene(22, B=2, V=2, N=11, C=5, width=11, height=7)
    if mixed:
        scene[3] = mixture_for(scene, M=6)

    def loss(means, covars, opacities, tokens):
        features = scene[3]._replace(tokens=tokens) if mixed else tokens
        out, alphas = rasterize(
            means * 1.01, covars, opacities, features, *scene[4:], backend="triton"
        )
        return (out.sin().sum() + alphas.square().sum()) * 2

    inputs = [
        t.detach().requires_grad_() for t in (*scene[:3], scene[3].tokens if mixed else scene[3])
    ]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    a, b = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(a, b)
    for name, p, q in zip(NAMES, torch.autograd.grad(b, inputs), torch.autograd.grad(a, inputs)):
        close(f"gradient of {name}", p, q, 1e-4, 1e-5)


@pytest.mark.parametrize("op", ["project", "list_tiles", "blend", "blend_mixture"])
def test_operators_keep_torchs_rules(op):
    """torch.library.opcheck: schema, fake implementation and autograd registration of each."""
    from kernels.launch import blend
    from kernels.projection import project
    from kernels.tiles import list_tiles

    scene = make_scene(23, B=1, V=2, N=5, C=3, width=9, height=7)
    means, covars, opacities, features, viewmats, Ks, width, height = scene
    tensors = means.requires_grad_(), covars.requires_grad_(), opacities, viewmats, Ks
    arguments = *tensors, width, height, 0.01, 1e10, 0.3
    splats, depths, radii, bad = (t.detach() for t in project(*arguments))
    splats, depths, radii = (t.flatten(0, 1) for t in (splats, depths, radii))
    listing = splats, depths, radii, bad, width, height, 8
    lists = list_tiles(*listing)
    tokens, indices, mix = mixture_for(scene, M=5)
    splats, features, tokens = (t.clone().requires_grad_() for t in (splats, features, tokens))
    rows = (torch.arange(126, dtype=torch.int32).view(2, height, width) - 5).clamp(min=-1)
    labels = torch.zeros(2, height, width, dtype=torch.int32)
    rest = 2, width, height, 8, "ieee", True
    calls = {
        "project": (project, arguments), "list_tiles": (list_tiles, listing),
        "blend": (blend, (splats, features, None, None, *lists, None, None, *rest, 126, 0)),
        "blend_mixture": (
            blend, (splats, tokens, indices.int(), mix, *lists, rows, labels, *rest, 121, 1)
        ),
    }  # fmt: skip
    torch.library.opcheck(*calls[op])


# --------------------------------------------------------------------------- edges


@both_backends
@pytest.mark.parametrize(
    "change",
    [
        dict(N=0),
        dict(N=0, B=2, V=2),
        dict(B=0),
        dict(opacity=0.0),
        dict(sigma=30.0, opacity=1.0),  # every Gaussian larger than the image
        dict(flat=0.0, sigma=0.5),  # discs
        dict(width=1, height=1),
    ],
    ids=str,
)
def test_edge_scenes(backend, change):
    check_against_dense(make_scene(11, **change), backend, atol=1e-4)


@both_backends
def test_everything_behind_the_camera(backend):
    scene = make_scene(12, N=9)
    scene[0] = scene[0] - torch.tensor([0, 0, 100.0], device=DEVICE)
    out, alphas, gradients, _ = values_and_gradients(rasterize, scene, backend=backend)
    assert not out.any() and not alphas.any()
    assert not any(g.any() for g in gradients)


@both_backends
def test_gradients_stay_finite_for_needles_and_points(backend):
    """A needle 4,000 times as long as wide, and a point: covariances of rank one and zero."""
    scene = make_scene(13, N=8)
    direction = torch.nn.functional.normalize(torch.tensor([1.0, 0.7, 0.3]), dim=0).to(DEVICE)
    scene[1][:, ::2] = 4.0 * direction[:, None] * direction
    scene[1][:, 1::2] = 0.0
    out, alphas, gradients, _ = values_and_gradients(rasterize, scene, backend=backend)
    assert alphas.max() > 0.1
    assert all(torch.isfinite(t).all() for t in (out, alphas, *gradients))


@both_backends
def test_memory_layout_does_not_matter(backend):
    scene = make_scene(16, B=2, V=2, N=17, C=5, width=11, height=9)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in scene[:6]] + scene[6:]
    assert not any(t.is_contiguous() for t in strided[:6])
    for a, b in zip(rasterize(*scene, backend=backend), rasterize(*strided, backend=backend)):
        torch.testing.assert_close(a, b)


@both_backends
def test_autocast_changes_nothing(backend):
    scene = make_scene(14)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = rasterize(*scene, backend=backend)
    for a, b in zip(inside, rasterize(*scene, backend=backend)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_torch_backend_is_usable():
    """100,000 pixel-sized Gaussians, 384 features, 224 x 224: meant for 2 s on two idle cores.
    As a test only a guard, at twice that, since machines are shared; -s shows the time."""
    g = torch.Generator().manual_seed(0)
    N, C, size, f = 100_000, 384, 224, 200.0
    z = 2 + 2 * torch.rand(N, 1, generator=g)
    means = torch.cat([(torch.rand(N, 2, generator=g) - 0.5) * size / f * z, z], 1)[None]
    covars = (0.5 * z / f)[None, ..., None] ** 2 * torch.eye(3)
    K = torch.tensor([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]])[None, None]
    features = torch.randn(1, N, C, generator=g)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _, alphas = rasterize(
            means, covars, torch.ones(1, N), features, torch.eye(4)[None, None], K, size, size
        )
        seconds.append(time.perf_counter() - start)
    print(
        f"\ntorch backend, {N} Gaussians, C = {C}, {size} x {size}, forward: {min(seconds):.2f} s"
    )
    assert alphas.mean() > 0.9 and min(seconds) < 4


# --------------------------------------------------------------------------- bad input


def _with(index, value):
    scene = make_scene(15)
    scene[index] = value(scene[index])
    return scene


def _poison(t):
    t = t.clone()
    t.view(-1)[4] = float("nan")
    return t


def _mixed(**changes):
    scene = make_scene(15)
    mixture = mixture_for(scene, M=11)._asdict()
    mixture["indices"][0, 0, 0] = 10
    scene[3] = Mixture(**{k: changes[k](v) if k in changes else v for k, v in mixture.items()})
    return scene


@both_backends
@pytest.mark.parametrize(
    "index,name", list(enumerate(("means", "covars", "opacities", "features", "viewmats", "Ks")))
)
def test_nan_is_named(backend, index, name):
    """But for features of the triton backend, which reads them once: there the image has NaN."""
    if (backend, name) == ("triton", "features"):
        assert rasterize(*_with(index, _poison), backend=backend)[0].isnan().any()
        return
    with pytest.raises(ValueError, match=f"^{name} has values that are NaN"):
        rasterize(*_with(index, _poison), backend=backend)


def test_values_whose_sum_overflows_are_said_to_be_too_large():
    with pytest.raises(ValueError, match="so large that their sums overflow float32"):
        rasterize(*_with(1, lambda t: t * 0 + 3e38), backend="triton")


LABELS = torch.zeros(1, 1, 17, 19, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "scene,options,message",
    [
        (_with(4, lambda t: t.requires_grad_()), {}, "viewmats requires gradients, but is data"),
        (_with(5, lambda t: t.requires_grad_()), {}, "Ks requires gradients, but is data"),
        (_with(1, lambda t: t[:, :-1]), {}, r"covars must be \[1, 20, 3, 3\]"),
        (_with(0, lambda t: t[0]), {}, r"means must be \[B, N, 3\]"),
        (_with(3, lambda t: t[..., :0]), {}, "at least one channel"),
        (_with(2, lambda t: t.double()), {}, "opacities must be torch.float32, not torch.float64"),
        (_with(3, lambda t: t.int()), {}, "features must be .*torch.float16.*, not torch.int32"),
        (make_scene(width=0), {}, "at least one channel, one token and one whole pixel"),
        (make_scene(width=4.5), {}, "at least one channel, one token and one whole pixel"),
        (make_scene(), dict(near_plane=2.0, far_plane=1.0), "near_plane < far_plane must hold"),
        (make_scene(), dict(eps2d=-1.0), "eps2d is a variance"),
        (make_scene(), dict(eps2d=float("nan")), "eps2d is a variance"),
        (make_scene(), dict(near_plane=float("nan")), "near_plane < far_plane must hold"),
        (_with(2, lambda t: t.tolist()), {}, "must be tensors with values; one is a list"),
        (_with(5, lambda t: None), {}, "must be tensors with values; one is a NoneType"),
        (_with(3, lambda t: t.to("meta")), {}, "tensors with values; one is on the meta device"),
        ([*make_scene()[:6], 10**6, 10**6], {}, "1000000000000 pixels, over 2.31"),
        (make_scene(), dict(backend="cuda"), "backend is 'cuda'"),
        (make_scene(), dict(precision="fp32"), "precision is 'fp32'"),
        (_mixed(indices=lambda t: t + 1), {}, r"indices must lie in 0\.\.10, where the mixture's"),
        (_mixed(indices=lambda t: t[:, :-1]), {}, r"indices must be \[1, 20, 4\]"),
        (_mixed(indices=lambda t: t.float()), {}, "indices must be torch.int32 or torch.int64"),
        (_mixed(weights=lambda t: t.requires_grad_()), {}, "weights requires gradients, but is"),
        (_mixed(weights=_poison), {}, "weights has values that are NaN"),
        (_mixed(weights=_poison), dict(backend="triton"), "weights has values that are NaN"),
        (_mixed(indices=lambda t: t + 1), dict(backend="triton"), r"indices must lie in 0\.\.10"),
        (make_scene(dtype=torch.float64), dict(backend="triton"), "takes float32 Gaussians"),
        (make_scene(), dict(labels=LABELS - 1), "labels must be at least 0, not -1"),
        (make_scene(), dict(labels=LABELS.float()), "labels must be torch.int32 or torch.int64"),
    ],
)
def test_bad_arguments_get_one_sentence(scene, options, message):
    with pytest.raises(ValueError, match=message):
        rasterize(*scene, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about CPU tensors")
def test_triton_on_cpu_tensors_needs_the_interpreter():
    code = (
        "import torch, kernels; t = torch.eye(4)[None, None]; one = torch.ones(1, 1, 3);"
        "R = t[..., :3, :3]; scene = one, R, one[..., 0], one, t, R;"
        "kernels.rasterize(*scene, 4, 4, backend='triton')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(kernels.__file__))
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert re.search(
        'ValueError: backend "triton" needs CUDA tensors .* use backend="torch"', run.stderr
    )
