"""R.py: equal to the public code on golden values, and the laws that its parts obey."""

import dataclasses
import hashlib
import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import reconstruct as R
from model import SHIPPED_TEACHER, load_vit, patch_tokens, upsample_features
from reference import random_rotation
from test_model import golden_state

GOLDEN = {
    k.removeprefix("mvsplat."): v
    for k, v in load_file(Path(__file__).parent / "golden.safetensors").items()
}
INPUTS = [GOLDEN[k] for k in ("images", "extrinsics", "intrinsics", "near", "far")]
SMALL = R.ReconstructorConfig(
    stem=(8, 8, 8), dim=16, blocks=2, candidates=8, cost_dim=16, refine_dim=16
)
OURS = dataclasses.replace(R.SMALL, stem=(8, 8, 8), dim=16, candidates=8, cost_dim=16)


def context_of(images, extrinsics, intrinsics, *_):
    """Context views, with Ks in pixels."""
    H, W = images.shape[-2:]
    Ks = intrinsics * torch.tensor([W, H, 1.0])[:, None]
    return {"images": images, "extrinsics": extrinsics, "Ks": Ks}


def z_of(means, extrinsics):  # Gaussians [1, V * H * W, 3] -> depths [1, V, 1, H * W]
    forwards = torch.linalg.inv(extrinsics)[:, :, None, 2]
    return forwards @ F.pad(means, (0, 1), value=1.0).view(1, 2, -1, 4).mT


def save_small(path, **changes):
    model = R.MVSplat(SMALL)
    state = golden_state(model) | changes
    save_file(state, path, {"config": json.dumps(dataclasses.asdict(SMALL))})
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return R.load_reconstructor(save_small(path))


# --------------------------------------------------------------------------- parity


def test_published_checkpoint_equals_the_public_model(tmp_path):
    """471 tensors as Lightning saves them: under `encoder.`, beside what is not the encoder's."""
    with torch.device("meta"):
        shapes = R.MVSplat().state_dict()
    lines = "\n".join(f"{n} {list(p.shape)}" for n, p in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "939fef153985be3b"
    assert len(shapes) == 471
    state = {"encoder." + k: v for k, v in golden_state(R.MVSplat()).items()}
    state["losses.lpips"] = torch.zeros(3)
    torch.save({"state_dict": state, "global_step": 300_000}, tmp_path / "re10k.ckpt")
    gaussians = R.load_reconstructor(tmp_path / "re10k.ckpt")(*INPUTS)
    assert not gaussians.means.requires_grad
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(gaussians.means[0, ::128], GOLDEN["means"], **close)
    torch.testing.assert_close(gaussians.covars[0, ::128], GOLDEN["covariances"], **close)
    torch.testing.assert_close(gaussians.harmonics[0, ::128], GOLDEN["harmonics"], **close)
    torch.testing.assert_close(gaussians.opacities[0, ::16], GOLDEN["opacities"], **close)


# --------------------------------------------------------------------------- parts


def test_windows_are_quarters_and_come_back():
    x = torch.arange(2 * 6 * 4).view(2, 6, 4, 1)
    assert torch.equal(R.to_windows(x)[:, 1].view(2, 3, 2), x[:, :3, 2:, 0])
    assert torch.equal(R.from_windows(R.to_windows(x), 6, 4), x)


def test_shift_mask_parts_what_the_roll_brought_together():
    """Every token knows where it was before the roll; those half an image away are masked."""
    h, w = 8, 12
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    where = torch.roll(torch.stack([y, x], -1), (-(h // 4), -(w // 4)), (0, 1))
    where = R.to_windows(where)  # (4, tokens, 2)
    away = (where[:, :, None] - where[:, None, :]).abs()
    apart = (away >= torch.tensor([h // 2, w // 2])).any(-1)
    assert torch.equal(R.shift_mask(h, w) == -100, apart)
    assert apart.any() and not apart[0].any()
    assert R.shift_mask(h, w) is R.shift_mask(h, w)  # made once
    R.shift_mask.cache_clear()
    with torch.inference_mode():  # whoever needs it first, it can be trained with
        assert not R.shift_mask(h, w).is_inference()


@pytest.mark.parametrize("degree", range(5))
def test_rotated_harmonics_are_the_rotated_function(degree):
    g = torch.Generator().manual_seed(degree)
    turn = torch.linalg.qr(random_rotation(g).double()).Q  # orthogonal to double precision
    turn = turn * torch.linalg.det(turn)
    coefficients = torch.zeros(1, 25, dtype=torch.float64)
    band = slice(degree**2, (degree + 1) ** 2)
    coefficients[:, band] = torch.randn(2 * degree + 1, generator=g, dtype=torch.float64)
    turned = R.rotate_harmonics(coefficients, turn[None])
    directions = F.normalize(torch.randn(20, 3, generator=g, dtype=torch.float64), dim=-1)
    before = R.real_harmonics(degree, directions) @ coefficients[0, band]
    # The turned function, at turned directions
    after = R.real_harmonics(degree, directions @ turn.T) @ turned[0, band]
    torch.testing.assert_close(after, before)
    # Orthonormal, so rotation keeps the length
    torch.testing.assert_close(turned.norm(), coefficients.norm())
    assert not turned[:, : band.start].any() and not turned[:, band.stop :].any()


def test_first_degree_is_x_y_z():
    directions = F.normalize(torch.randn(5, 3), dim=-1)
    torch.testing.assert_close(R.real_harmonics(1, directions), directions)


def test_cost_volume_peaks_at_the_true_depth():
    """A plane at depth 2 with random features, seen twice: away from the border 2 is best."""
    g = torch.Generator().manual_seed(0)
    h, w, n, depth = 12, 24, 9, 2.0
    plane = F.normalize(torch.randn(1, 32, h, w + 4, generator=g), dim=1)
    # The second camera sees it 4 pixels further on
    features = torch.stack([plane[..., :w], plane[..., 4:]], 1)
    K = torch.tensor([[1.0, 0, 0.5], [0, 2.0, 0.5], [0, 0, 1]]).expand(1, 2, 3, 3)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = 4 * depth / w
    # Inverse depth 0.5 is the fifth
    candidates = 1 / torch.linspace(1 / 10, 0.9, n).expand(1, 2, n)
    cost = R.cost_volume(features, K, extrinsics, candidates, torch.tensor([[1], [0]]))
    best = cost.argmax(2)
    assert (best[0, 0, :, 4:] == 4).float().mean() > 0.95
    assert (best[0, 1, :, :-4] == 4).float().mean() > 0.95


def test_views_are_treated_alike(small):
    """Three views in another order give the same Gaussians in that order."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 3, 32, 48, generator=g)
    extrinsics = torch.eye(4).repeat(1, 3, 1, 1)
    extrinsics[0, :, :3, 3] = 0.3 * torch.randn(3, 3, generator=g)
    intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]]).expand(1, 3, 3, 3)
    near, far = torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[20.0, 30.0, 40.0]])
    inputs, order = (images, extrinsics, intrinsics, near, far), [2, 0, 1]
    plain, turned = small(*inputs), small(*(t[:, order] for t in inputs))
    for a, b in zip(plain, turned):
        a = a.unflatten(1, (3, -1))[:, order].flatten(1, 2)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_scenes_of_a_batch_do_not_mix(small):
    images, *cameras = INPUTS
    other = images.flip(-1), *cameras
    both = small(*(torch.cat(pair) for pair in zip(INPUTS, other)))
    for a, b in zip(small(*INPUTS), both):
        torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1e-4)


def test_gaussians_lie_on_their_pixels_rays(small):
    gaussians = small(*INPUTS)
    _, extrinsics, intrinsics, near, far = INPUTS
    H, W = GOLDEN["images"].shape[-2:]
    means = gaussians.means.view(2, H, W, 3)
    rotations, t = extrinsics[0, :, :3, :3], extrinsics[0, :, :3, 3]
    camera = torch.einsum("vji,vhwj->vhwi", rotations, means - t[:, None, None])
    pixels = camera @ intrinsics[0, 0].T
    pixels = pixels[..., :2] / pixels[..., 2:] * torch.tensor([W, H])
    x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
    assert (pixels[..., 0] - x).abs().max() < 0.501
    assert (pixels[..., 1] - y[:, None]).abs().max() < 0.501
    distance = camera.norm(dim=-1)
    assert (distance > near[0, 0] * 0.999).all() and (distance < far[0, 0] * 1.001).all()
    assert (torch.linalg.eigvalsh(gaussians.covars) > -1e-6).all()


def test_behind_the_methods_interface(small):
    """Ks in pixels are normalised by width and height; near and far are in baselines."""
    images, extrinsics, intrinsics, near, far = INPUTS
    context, (H, W) = context_of(*INPUTS), images.shape[-2:]
    b = float((extrinsics[0, 0, :3, 3] - extrinsics[0, 1, :3, 3]).norm())
    unit = extrinsics.clone()
    unit[..., :3, 3] /= b  # scaled to a baseline of 1, and the Gaussians back
    bounds = torch.full_like(near, 2.0), torch.full_like(near, 60.0)
    expected = small(images, unit, intrinsics, *bounds)
    got = R.FeedForward(small, 2.0, 60.0)(context)
    torch.testing.assert_close(got.means, expected.means * b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.covars, expected.covars * b * b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.opacities, expected.opacities)
    # No parallax, no depth: nothing to see, no error
    context["extrinsics"] = extrinsics[:, :1].expand(-1, 2, -1, -1)
    gaussians = R.FeedForward(small, 1.0, 100.0)(context)
    _, _, alphas = R.render(gaussians, extrinsics[:, 0], context["Ks"][:, 0], W, H)
    assert not alphas.any()


# --------------------------------------------------------------------------- our own configuration


@pytest.fixture(scope="module")
def ours():
    """The small configuration as shipped, in miniature, before training."""
    torch.manual_seed(0)
    return R.new_reconstructor(OURS).eval()


@torch.no_grad()
def test_untrained_gaussians_show_their_pixels(ours):
    """Depth is within bounds, along z; colour the photo's; opacity and size as initialised."""
    images, extrinsics, intrinsics, near, far = INPUTS
    H, W = images.shape[-2:]
    gaussians = ours(*INPUTS)
    assert gaussians.harmonics.shape == (1, 2 * H * W, 3, 1)  # as many as its degree has
    colours = 0.5 + 0.28209479177387814 * gaussians.harmonics[..., 0]
    colours = colours.view(1, 2, H, W, 3).movedim(-1, 2)
    torch.testing.assert_close(colours, images, rtol=0, atol=1e-4)
    z = z_of(gaussians.means, extrinsics)
    assert (z > near[..., None, None] * 0.999).all() and (z < far[..., None, None] * 1.001).all()
    fx, fy = intrinsics[0, 0, 0, 0] * W, intrinsics[0, 0, 1, 1] * H
    footprint = z.flatten() * 0.5 * (1 / fx + 1 / fy)
    sigmas = torch.linalg.det(gaussians.covars[0]) ** (1 / 6)
    assert ((sigmas / footprint - 0.45).abs() < 0.2).all()
    assert (gaussians.opacities - 0.88).abs().max() < 0.01


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.001, 30.0])
def test_the_unit_of_a_capture_does_not_matter(ours, scale):
    """Cameras, near and far times s give means times s and covariances times s squared."""
    images, extrinsics, intrinsics, near, far = INPUTS
    scaled = extrinsics.clone()
    scaled[..., :3, 3] *= scale
    a, b = ours(*INPUTS), ours(images, scaled, intrinsics, near * scale, far * scale)
    torch.testing.assert_close(b.means / scale, a.means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b.covars / scale**2, a.covars, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(b.opacities, a.opacities, rtol=1e-3, atol=1e-4)
    H, W = images.shape[-2:]
    K = intrinsics[:, 0] * torch.tensor([W, H, 1.0])[:, None]
    shown = [R.render(g, e[:, 0], K, W, H)[0] for g, e in ((a, extrinsics), (b, scaled))]
    torch.testing.assert_close(shown[1], shown[0], rtol=1e-2, atol=1e-2)
    assert shown[0].max() > 0.3


def test_a_training_step_reaches_every_parameter():
    ours = R.new_reconstructor(OURS)
    images, extrinsics, intrinsics, near, far = INPUTS
    context, (H, W) = context_of(*INPUTS), images.shape[-2:]
    context["depths"] = torch.full((1, 2, H, W), 3.0)
    target = {k: v[:, 0] for k, v in context.items()}
    with torch.no_grad():  # away from the start, where branches that end in zeros get no gradient
        for p in ours.parameters():
            p += 0.02 * torch.randn_like(p)
    step = R.Reconstruction(ours, 1.0, 100.0, 0.2)
    loss, metrics, drawn = step({"context": context, "target": target})
    loss.backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())
    # By hand: the photo's squared error, and the log depth of every context pixel's Gaussian
    mse = (drawn["photo"] - target["images"]).square().mean()
    z = z_of(drawn["gaussians"].means, extrinsics)
    torch.testing.assert_close(loss, mse + 0.2 * (z / 3).log().abs().mean(), rtol=1e-4, atol=1e-5)
    context["depths"][:, :, : H // 2] = 0  # unknown depth counts nothing
    half = step({"context": context, "target": target})[1]["log_depth"]
    lower = z.view(1, 2, H, W)[:, :, H // 2 :].detach()
    torch.testing.assert_close(half, (lower / 3).log().abs().mean())
    del context["depths"]
    torch.testing.assert_close(step({"context": context, "target": target})[0], mse)


def test_a_coarse_step_trains_what_matches_and_nothing_else():
    images, extrinsics, intrinsics, near, far = INPUTS
    H, W = images.shape[-2:]
    network = R.new_reconstructor(OURS)
    context = context_of(*INPUTS)
    context["depths"] = torch.full((1, 2, H, W), 3.0)
    context["depths"][..., : W // 2] = 0
    step = R.Reconstruction(network, 1.0, 100.0, 0.2)
    loss, metrics, _ = step({"context": context, "target": {}}, coarse=True)
    loss.backward()
    b = (extrinsics[0, 0, :3, 3] - extrinsics[0, 1, :3, 3]).norm().expand(1, 2)
    depths = network(images, extrinsics, intrinsics, b, 100 * b, coarse=True)
    assert depths.shape == (1, 2, H // 4, W // 4)
    torch.testing.assert_close(loss, 0.2 * (depths[..., W // 8 :] / 3).log().abs().mean())
    moved = {n.split(".")[1] for n, p in network.named_parameters() if p.grad is not None}
    matching = {"corr_refine_net", "regressor_residual", "depth_head_lowres"}
    assert moved == {"backbone", "transformer"} | matching


def test_an_untrained_reconstructor_is_stereo_already():
    """A textured wall at depth 4, seen twice: matching alone, untrained, finds most of it."""
    H, W, f, depth, baseline = 96, 128, 100.0, 4.0, 0.64
    texture = F.interpolate(torch.rand(1, 3, 48, 72), scale_factor=2, mode="bilinear")[0]
    # 16 pixels = f * baseline / depth
    images = torch.stack([texture[:, :, :W], texture[:, :, 16 : 16 + W]])[None]
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = baseline
    intrinsics = torch.tensor([[f / W, 0, 0.5], [0, f / H, 0.5], [0, 0, 1]]).expand(1, 2, 3, 3)
    near, far = torch.full((1, 2), 3 * baseline), torch.full((1, 2), 50 * baseline)
    with torch.no_grad():
        depths = R.new_reconstructor()(images, extrinsics, intrinsics, near, far, coarse=True)
    seen = depths[0, 0, 2:-2, 8:-2]  # what the second camera sees too
    assert (seen / depth - 1).abs().median() < 0.15


def test_shipped_weights_know_depth():
    """A room unseen in training, at another size: far better than any one depth could do."""
    assert R.SHIPPED.stat().st_size <= 8e6
    with safe_open(R.SHIPPED, "pt") as file:
        about = file.metadata()
    assert {"config", "command", "step", "device", "hours", "measured"} <= about.keys()
    errors, constant = [], []
    views = data.Views(data.Rooms("val"), 160, 192, seed=7, length=4)
    for sample in (views[i] for i in range(4)):
        context = {k: v[None] for k, v in sample["context"].items()}
        means = R.FeedForward(R.load_reconstructor(), 3.0, 50.0)(context).means
        z = z_of(means, context["extrinsics"])
        truth = context["depths"].flatten()
        errors.append((z.flatten() / truth - 1).abs().mean())
        constant.append((truth.median() / truth - 1).abs().mean())
    assert sum(errors) < 0.5 * sum(constant)


# --------------------------------------------------------------------------- colours, .ply


def test_harmonics_are_3d_gaussian_splattings():
    """Its 16 functions as polynomials: the textbook's real harmonics with the phase (-1)^m."""
    d = F.normalize(torch.randn(50, 3, dtype=torch.float64), dim=-1)
    x, y, z = d.unbind(-1)
    s = math.sqrt
    pi = math.pi
    expected = [
        0.5 * s(1 / pi) * torch.ones_like(x),
        -s(3 / (4 * pi)) * y, s(3 / (4 * pi)) * z, -s(3 / (4 * pi)) * x,
        0.5 * s(15 / pi) * x * y, -0.5 * s(15 / pi) * y * z, 0.25 * s(5 / pi) * (3 * z * z - 1),
        -0.5 * s(15 / pi) * x * z, 0.25 * s(15 / pi) * (x * x - y * y),
        -0.25 * s(35 / (2 * pi)) * y * (3 * x * x - y * y), 0.5 * s(105 / pi) * x * y * z,
        -0.25 * s(21 / (2 * pi)) * y * (5 * z * z - 1), 0.25 * s(7 / pi) * (5 * z**3 - 3 * z),
        -0.25 * s(21 / (2 * pi)) * x * (5 * z * z - 1), 0.25 * s(105 / pi) * (x * x - y * y) * z,
        -0.25 * s(35 / (2 * pi)) * x * (x * x - 3 * y * y),
    ]  # fmt: skip
    torch.testing.assert_close(R.sh_basis(3, d), torch.stack(expected, -1))


def one_gaussian(**changes):
    harmonics = torch.zeros(1, 1, 3, 25)
    harmonics[0, 0, :, 0] = torch.tensor([0.5, -0.5, 1.0])
    harmonics[0, 0, 0, 3] = 0.7  # red grows towards -x
    parts = dict(means=torch.tensor([[[0.5, 0.2, 2.0]]]), covars=0.04 * torch.eye(3)[None, None],
                 opacities=torch.tensor([[0.9]]), harmonics=harmonics)  # fmt: skip
    return R.Gaussians(**parts | changes)


def test_colour_depends_on_where_it_is_seen_from():
    """Colour over alpha is 0.5 + the harmonics along the camera's ray; depth is along z."""
    gaussians = one_gaussian()
    K = torch.tensor([[[20.0, 0, 16], [0, 20, 16], [0, 0, 1]]])
    for position in ([0.0, 0.0, 0.0], [1.0, 0.3, 0.5]):
        extrinsics = torch.eye(4)[None].clone()
        extrinsics[0, :3, 3] = torch.tensor(position)
        photo, depth, alphas = R.render(gaussians, extrinsics, K, 32, 32)
        y, x = divmod(int(alphas[0].argmax()), 32)
        direction = F.normalize(gaussians.means[0, 0] - torch.tensor(position), dim=0)
        expected = 0.5 + 0.28209479 * torch.tensor([0.5, -0.5, 1.0])
        expected[0] += -0.48860251 * 0.7 * direction[0]
        shown = photo[0, :, y, x] / alphas[0, y, x]
        torch.testing.assert_close(shown, expected, rtol=1e-4, atol=1e-4)
        assert depth[0, y, x] == pytest.approx(2.0 - position[2], rel=1e-5)
        assert depth[0, 0, 31] == 0 and alphas[0, 0, 31] == 0
    dark = one_gaussian(harmonics=torch.full((1, 1, 3, 1), -5.0))
    photo = R.render(dark, torch.eye(4)[None], K, 32, 32)[0]
    assert (photo == 0).all()  # colours are never below 0


def read_ply(path):
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert lines[2].startswith("element vertex ")
    names = [line.removeprefix("property float ") for line in lines[3:]]
    values = torch.frombuffer(bytearray(body), dtype=torch.float32)
    return dict(zip(names, values.view(int(lines[2].split()[2]), len(names)).T))


def test_ply_holds_the_gaussians(tmp_path):
    """Read as a viewer does, it has the same covariances, colours and opacities."""
    g = torch.Generator().manual_seed(0)
    N = 40
    A = torch.randn(1, N, 3, 3, generator=g)
    means, opacities = torch.randn(1, N, 3, generator=g), torch.rand(1, N, generator=g)
    harmonics = torch.randn(1, N, 3, 25, generator=g)
    gaussians = R.Gaussians(means, A @ A.mT, opacities, harmonics)
    gaussians.opacities[0, 7] = 0.001  # never to be seen: left out
    R.save_ply(tmp_path / "scene.ply", gaussians)
    ply = read_ply(tmp_path / "scene.ply")
    kept = [i for i in range(N) if gaussians.opacities[0, i] > 1 / 255]
    assert 7 not in kept and len(ply) == 3 + 3 + 3 + 45 + 1 + 3 + 4
    stack = lambda *names: torch.stack([ply[n] for n in names], -1)  # noqa: E731
    torch.testing.assert_close(stack("x", "y", "z"), gaussians.means[0, kept])
    torch.testing.assert_close(torch.sigmoid(ply["opacity"]), gaussians.opacities[0, kept])
    colours = stack("f_dc_0", "f_dc_1", "f_dc_2")
    torch.testing.assert_close(colours, gaussians.harmonics[0, kept, :, 0])
    rest = stack(*(f"f_rest_{i}" for i in range(45)))  # green's come together
    torch.testing.assert_close(rest[:, 15:30], gaussians.harmonics[0, kept, 1, 1:16])
    scales = stack("scale_0", "scale_1", "scale_2").exp()
    w, x, y, z = stack("rot_0", "rot_1", "rot_2", "rot_3").T
    axes = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], -1).view(-1, 3, 3)  # fmt: skip
    covars = axes @ torch.diag_embed(scales**2) @ axes.mT
    torch.testing.assert_close(covars, gaussians.covars[0, kept], rtol=1e-3, atol=1e-3)
    two = R.Gaussians(*(t.expand(2, *t.shape[1:]) for t in gaussians))
    flat, nan = R.Gaussians(*(t[0, :1] for t in gaussians)), gaussians.covars * torch.nan
    for wrong, message in (
        (two, r"holds one scene, means \[1, N, 3\], not \[2, 40, 3\]"),
        (flat, r"holds one scene, .* not \[1, 3\]"),
        (gaussians._replace(covars=nan), "the Gaussians are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=f"wrong.ply: .*{message}"):
            R.save_ply(tmp_path / "wrong.ply", wrong)
    assert not (tmp_path / "wrong.ply").exists()


def test_quaternions_of_half_turns_too():
    g = torch.Generator().manual_seed(1)
    diagonals = ([1.0, -1, -1], [-1.0, 1, -1], [-1.0, -1, 1], [1.0, 1, 1])
    half_turns = [torch.diag(torch.tensor(d)) for d in diagonals]
    rotations = torch.stack([random_rotation(g) for _ in range(20)] + half_turns)
    w, x, y, z = R.quaternions(rotations).unbind(-1)
    v = torch.randn(3, generator=g)
    u = torch.stack([x, y, z], -1)
    across = torch.linalg.cross(u, v.expand_as(u))
    turned = v + 2 * w[:, None] * across + 2 * torch.linalg.cross(u, across)
    torch.testing.assert_close(turned, rotations @ v, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- how good it is


def test_depth_errors_by_hand():
    depth, truth = torch.tensor([[2.0, 4.0, 6.0, 1.0]]), torch.tensor([[1.0, 2.0, 4.0, 0.0]])
    errors = R.depth_errors(depth, truth, torch.tensor([[True, True, True, True]]))
    assert errors["abs_rel"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert errors["abs_rel_scaled"] == pytest.approx((0 + 0 + 0.25) / 3)
    unseen = R.depth_errors(depth, truth, torch.zeros(1, 4, dtype=torch.bool))
    assert unseen == {"abs_rel": None, "abs_rel_scaled": None}


# --------------------------------------------------------------------------- bad input


MULTIPLES = "images must be multiples of 16 pixels high and wide"


@pytest.mark.parametrize(
    "index,change,message",
    [
        (0, lambda t: t[:, :1], "needs at least 2, not 1"),
        (0, lambda t: t[..., :-8], f"{MULTIPLES}, such as 96 x 64, not 96 x 56"),
        (0, lambda t: (255 * t).byte(), "images must be finite numbers of a floating-point type"),
        (0, lambda t: t / 0, "images must be finite"),
        (1, lambda t: t + torch.tensor([0, 0, 0, torch.inf]), "extrinsics must be finite"),
        (2, lambda t: t * torch.nan, "intrinsics must be finite"),
        (3, lambda t: t * 0, "0 < near < far must hold"),
        (4, lambda t: t * 0.01, "0 < near < far must hold"),
        (1, lambda t: t * 1.1, "extrinsics must be rigid"),
        (1, lambda t: t.mT, "extrinsics must be rigid: .* 0 0 0 1 in the last row"),
    ],
)
def test_bad_views_get_one_sentence(small, index, change, message):
    inputs = list(INPUTS)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message):
        small(*inputs)


def test_bad_files_get_one_sentence(tmp_path):
    path = tmp_path / "reconstructor.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        R.load_reconstructor(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no reconstructor's configuration in its metadata"):
        R.load_reconstructor(path)
    none = "reconstructor.safetensors: no reconstructor's configuration in its metadata"
    for config in ('{"dim": "32"}', '{"candidates": -1}', '{"stem": [1, 2]}', '{"cost_dim": 12}'):
        save_file({"a": torch.zeros(1)}, path, {"config": config})
        with pytest.raises(ValueError, match=none):
            R.load_reconstructor(path)
    for layers in ("blocks", "cost_levels", "refine_levels"):
        save_file({"a": torch.zeros(1)}, path, {"config": json.dumps({layers: 10**9})})
        with pytest.raises(ValueError, match=f"{none} .more layers than the file has tensors"):
            R.load_reconstructor(path)
    save_file({"a": torch.zeros(1)}, path, {"config": '{"width": 3}'})
    with pytest.raises(ValueError, match=f"{none} .*width"):
        R.load_reconstructor(path)
    save_small(path, extra=torch.zeros(1))
    unexpected = 'reconstructor.safetensors: does not fit .* Unexpected .* "extra"'
    with pytest.raises(ValueError, match=unexpected):
        R.load_reconstructor(path)
    save_small(path, **{"depth_predictor.proj_feature.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="size mismatch for depth_predictor.proj_feature.bias"):
        R.load_reconstructor(path)


# --------------------------------------------------------------------------- the per-scene way


class Painter(torch.nn.Module):
    """A teacher whose patch tokens are the mean colour of each 8 x 8 patch, as 5 channels."""

    embed_dim, patch_size, cls_token = 5, 8, torch.zeros(1)

    def forward_features(self, images):  # normalised as for DINOv2
        colours = F.avg_pool2d(images, 8).flatten(2).mT  # [B, h*w, 3]
        return {"x_norm_patchtokens": torch.cat([colours, -colours[..., :2]], -1)}


def scene_in_three_views(seed=0, N=600, size=32):
    """A field with features of a few directions, and the views that it shows: no outside truth."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731
    means = (random(1, N, 3) - 0.5) * torch.tensor([2.4, 2.4, 0.4]) + torch.tensor([0, 0, 3.0])
    covars = 0.004 * torch.eye(3).expand(1, N, 3, 3).clone()
    colours = torch.stack([means[0, :, 0] > 0, means[0, :, 1] > 0, means[0, :, 0] < 0.4], -1)
    harmonics = (0.8 * colours[None].float() + 0.1 - 0.5)[..., None] / R.SH_C0
    gaussians = R.Gaussians(means, covars, torch.full((1, N), 0.8), harmonics)
    extrinsics = torch.eye(4).repeat(3, 1, 1)
    extrinsics[:, 0, 3] = torch.tensor([-0.3, 0.0, 0.3])
    K = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    features = torch.randn(N, 5, generator=generator)
    field = R.Field(gaussians, features, torch.zeros(N, dtype=torch.int32), means[0] * 0, {})
    photos = [field.render(E, K, size, size)["photo"] for E in extrinsics]
    views = dict(images=torch.stack(photos), extrinsics=extrinsics, Ks=K.repeat(3, 1, 1))
    return field, views


def shown_features(field, views, i):
    H, W = views["images"].shape[2:]
    shown = field.render(views["extrinsics"][i], views["Ks"][i], W, H)
    return torch.where(shown["alpha"][..., None] > 0.5, shown["features"], 0.0)


def test_optimising_recovers_features_that_views_show(monkeypatch):
    truth, views = scene_in_three_views()
    cameras = zip(views["extrinsics"], views["Ks"])
    shown = [truth.render(E, K, 32, 32)["features"] for E, K in cameras]
    maps = [shown_features(truth, views, i) for i in range(3)]

    def lifted(vit, views, i, factored):  # one token a pixel: the features that the truth shows
        each = torch.arange(32 * 32)[None, :, None]
        return R.Mixture(shown[i].view(1, -1, 5), each, torch.ones_like(each).float())

    monkeypatch.setattr(R, "lifted", lifted)
    unseen = truth._replace(features=torch.zeros_like(truth.features))
    error = lambda field: mean_error(field, views, maps)  # noqa: E731
    before = error(unseen)
    few, many = (error(R.optimise(unseen, views, None, steps)) for steps in (30, 400))
    assert many < 0.01 * before and many < few < 0.5 * before
    # In a camera that it was not fitted to as well
    aside = views | {"extrinsics": views["extrinsics"] + 0.0}
    aside["extrinsics"][:, 0, 3] = 0.15
    fitted = R.optimise(unseen, views, None, 400)
    away, expected = shown_features(fitted, aside, 0), shown_features(truth, aside, 0)
    assert F.cosine_similarity(away, expected, dim=-1)[expected.norm(dim=-1) > 0].mean() > 0.98
    (start, end), steps = fitted.meta["loss"], fitted.meta["optimised"]
    assert end < 0.2 * start and steps == 400
    for now, then in zip(fitted.gaussians, truth.gaussians):
        assert torch.equal(now, then)  # only features move
    assert unseen.features.abs().max() == 0  # in a field of their own


def mean_error(field, views, maps):
    shown = [shown_features(field, views, i) for i in range(3)]
    return sum(float((a - b).square().mean()) for a, b in zip(shown, maps))


def test_the_listed_map_and_its_transpose_are_the_rasteriser():
    field, views = scene_in_three_views()
    camera = torch.linalg.inv(views["extrinsics"][1:2])[:, None], views["Ks"][1:2, None], 32, 32
    at = torch.arange(1, 32, 4), torch.arange(2, 32, 4)
    pixels = (at[0][:, None] * 32 + at[1]).flatten()
    A, At, alpha = R.linear_map(field.gaussians, camera, pixels)
    features = field.features[None].clone().requires_grad_(True)
    options = dict(near_plane=R.NEAR_PLANE, at=at)
    drawn, alphas = R.rasterize(*field.gaussians[:3], features, *camera, **options)
    torch.testing.assert_close(A @ field.features, drawn.detach().flatten(0, 3))
    torch.testing.assert_close(alpha[:, 0], alphas.flatten()[pixels])
    upstream = torch.randn(len(pixels), 5, generator=torch.Generator().manual_seed(1))
    drawn.backward(upstream.view_as(drawn))
    torch.testing.assert_close(At @ upstream, features.grad[0])


def test_optimising_geometry_brings_the_photo_nearer():
    truth, views = scene_in_three_views()
    generator = torch.Generator().manual_seed(2)
    means, grey = truth.gaussians.means, 0.2 * truth.gaussians.harmonics
    means = means + 0.03 * torch.randn(means.shape, generator=generator)
    shaken = truth._replace(gaussians=truth.gaussians._replace(means=means, harmonics=grey))

    def error(field):
        drawn = R.render(field.gaussians, views["extrinsics"][:1], views["Ks"][:1], 32, 32)[0]
        return float((drawn[0] - views["images"][0]).square().mean())

    fitted = R.optimise(shaken, views, Painter(), 150, geometry=True)
    assert error(fitted) < 0.3 * error(shaken)
    covars, opacities = fitted.gaussians.covars, fitted.gaussians.opacities
    assert torch.linalg.eigvalsh(covars).min() > 0 and 0 < opacities.min() < opacities.max() < 1
    left = R.optimise(shaken, views, Painter(), 5)
    assert error(left) == error(shaken) and torch.equal(left.gaussians.means, means)


def test_masked_pixels_teach_nothing():
    field, views = scene_in_three_views()
    zero = field._replace(features=torch.zeros_like(field.features))
    nothing = views | {"valid": torch.zeros(3, 32, 32, dtype=torch.bool)}
    assert R.optimise(zero, nothing, Painter(), 3).features.abs().max() == 0
    half = views | {"valid": torch.arange(32).expand(3, 32, 32) < 16}
    learnt = R.optimise(zero, half, Painter(), 96).features.norm(dim=1) > 0
    right = field.gaussians.means[0, :, 0] > 0.6  # beyond the middle in every view
    left = field.gaussians.means[0, :, 0] < -0.6
    assert not learnt[right].any() and learnt[left].float().mean() > 0.5


def test_what_cannot_be_optimised_is_said_in_a_sentence():
    field, views = scene_in_three_views()
    none = {k: t[:0] for k, t in views.items()}
    with pytest.raises(ValueError, match="there are 0 views, 5 channels and 3 steps"):
        R.optimise(field, none, Painter(), 3)
    with pytest.raises(ValueError, match="3 views, 0 channels"):
        R.optimise(field._replace(features=field.features[:, :0]), views, Painter(), 3)
    with pytest.raises(ValueError, match="and 0 steps"):
        R.optimise(field, views, Painter(), 0)
    broken = views | {"images": views["images"] * torch.nan}
    with pytest.raises(ValueError, match="the loss is nan in step 1"):
        R.optimise(field, broken, Painter(), 3)
    with pytest.raises(SystemExit, match="--optimise-geometry goes with --optimise STEPS"):
        R.parse_settings(["--optimise-geometry"])


# --------------------------------------------------------------------------- fields


def wall_views(*shifts, depth=2.0, size=32):
    """Cameras side by side before a wall of noise at z = depth, which each sees alike."""
    V = len(shifts)
    extrinsics = torch.eye(4).repeat(V, 1, 1)
    extrinsics[:, 0, 3] = torch.tensor(shifts)
    K = torch.tensor([[float(size), 0, size / 2], [0, size, size / 2], [0, 0, 1]])
    return {
        "images": torch.rand(V, 3, size, size), "extrinsics": extrinsics,
        "Ks": K.expand(V, 3, 3), "depths": torch.full((V, size, size), depth),
    }  # fmt: skip


def test_a_wall_that_two_views_see_is_kept_once():
    """The second camera is 8 of 32 pixels to the right: only its last 8 columns are new."""
    field = R.reconstruct(wall_views(0.0, 0.5), R.SensorDepth())
    assert field.frames.bincount().tolist() == [32 * 32, 8 * 32]
    x = field.gaussians.means[0, field.frames == 1, 0]
    assert x.min() > 1.0  # where the first one's image ends
    # A nearer camera sees it finer: all of its own are kept, and of the first the border
    views = wall_views(0.0, 0.0)
    views["extrinsics"][1, 2, 3] = 1.0
    views["depths"][1] = 1.0
    field = R.reconstruct(views, R.SensorDepth())
    assert field.frames.bincount().tolist() == [32 * 32 - 16 * 16, 32 * 32]
    inner = field.normals[field.frames == 1].view(32, 32, 3)[1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.tensor([0.0, 0, -1]).expand(30, 30, 3))


def test_features_are_streamed_in_the_gaussians_order(tmp_path):
    """From a file, row by row what the ViT says of the pixels that are kept; and a .npz is written
    of a mapped file without a copy in memory."""
    views, vit = wall_views(0.0, 0.5), load_vit("vit_tiny14")
    field = R.reconstruct(views, R.SensorDepth(), vit, folder=tmp_path)
    tokens = patch_tokens(vit, views["images"])
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    pixels = upsample_features(tokens, masks, centred=True).permute(0, 2, 3, 1).half()
    expected = torch.cat([pixels[0].flatten(0, 1), pixels[1, :, 24:].flatten(0, 1)])
    torch.testing.assert_close(field.features, expected, rtol=0, atol=2e-3)
    mapped = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(2**18, 128))  # 64 MiB
    mapped[::1000] = 1
    tracemalloc.start()
    R.save_npz(tmp_path / "rows.npz", {"features": mapped, "one": np.array("é")})
    assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    tracemalloc.stop()
    with np.load(tmp_path / "rows.npz") as read:
        assert np.array_equal(read["features"], mapped) and str(read["one"]) == "é"


def test_what_most_views_see_through_is_dropped():
    """Something a metre before the wall, in one view of three; behind it nothing is known."""
    views = wall_views(0.0, 0.0, 0.0)
    views["depths"][1, 10:20, 10:20] = 1.0
    field = R.reconstruct(views, R.SensorDepth())
    assert len(field.frames) == 32 * 32 and (field.frames == 0).all()
    # With the others' depth unknown nothing contradicts it
    views["depths"][[0, 2], 5:25, 5:25] = 0.0
    field = R.reconstruct(views, R.SensorDepth())
    near = field.gaussians.means[0, :, 2] < 1.5
    assert near.sum() == 100 and (field.frames[near] == 1).all()


@pytest.fixture(scope="module")
def room():
    """Seven views of a room, 8 frames apart, and one between the last two."""
    room = data.Rooms("val")[0]
    frames = [room.frame(i, 96, 96) for i in (*range(0, 56, 8), 44)]
    views = {k: torch.stack([f[k] for f in frames[:-1]]) for k in frames[0]}
    return views | {"numbers": torch.arange(0, 56, 8)}, frames[-1]


def psnr(photo, truth):
    return float(-10 * (photo - truth).square().mean().log10())


def test_merged_views_show_more_than_one_pair(room, tmp_path):
    """A view held out, by the pair at the path's other end and by all views; by geometry of both
    kinds. Features are those of the ViT, lifted; written to a file or not, they are the same."""
    views, held_out = room
    vit = load_vit("vit_tiny14")
    shipped = R.FeedForward(R.load_reconstructor(), 3.0, 50.0)
    camera = held_out["extrinsics"], held_out["Ks"], 96, 96
    for geometry, least, most in ((R.SensorDepth(), 25, 0.02), (shipped, 22, 0.1)):
        two = {k: v[:2] for k, v in views.items()}
        few = R.reconstruct(two, geometry).render(*camera)
        field = R.reconstruct(views, geometry, vit, folder=tmp_path)
        seen = field.render(*camera)
        shown = psnr(seen["photo"], held_out["images"])
        assert shown > least and shown > psnr(few["photo"], held_out["images"]) + 3
        assert (few["alpha"] < 0.5).sum() > (seen["alpha"] < 0.5).sum()
        error = (seen["depth"] / held_out["depths"] - 1).abs()[seen["alpha"] > 0.5]
        assert error.median() < most
    assert not list(tmp_path.iterdir())  # scratch files are gone, and features still there
    # What the command streams is what the ViT says of a pixel
    i, xyz = int(field.frames[5000]), field.gaussians.means[0, 5000]
    x, y, z = (xyz - views["extrinsics"][i, :3, 3]) @ views["extrinsics"][i, :3, :3]
    column, row = (int(n) for n in (views["Ks"][i, :2, :2].diagonal() * torch.stack([x, y]) / z
                                    + views["Ks"][i, :2, 2]))  # fmt: skip
    tokens = patch_tokens(vit, views["images"][i : i + 1])
    pixels = upsample_features(tokens, views["masks"][i : i + 1], centred=True)[0]
    torch.testing.assert_close(field.features[5000], pixels[:, row, column].half())
    # Rendered features are means of the Gaussians' by what they add: of ones they are ones
    ones = field._replace(features=torch.ones(len(field.frames), 200, dtype=torch.float16))
    drawn = ones.render(*camera)
    known = drawn["features"][drawn["alpha"] > 0.5]
    torch.testing.assert_close(known, torch.ones_like(known), rtol=0, atol=1e-3)


def test_culled_gaussians_would_not_be_seen(room):
    views, held_out = room
    field = R.reconstruct(views, R.SensorDepth())
    extrinsics = held_out["extrinsics"].clone()
    extrinsics[:3, 3] += extrinsics[:3, 2]  # forward, so that some are behind
    whole = R.render(field.gaussians, extrinsics[None], held_out["Ks"][None], 96, 96)
    seen = field.render(extrinsics, held_out["Ks"], 96, 96)
    assert len(field.seen_by(extrinsics, held_out["Ks"], 96, 96)) < 0.8 * len(field.frames)
    torch.testing.assert_close(seen["photo"], whole[0][0], rtol=0, atol=1e-4)


def test_partners_overlap_and_have_the_baseline():
    """On a circle of 36 cameras that look at its middle, 10 degrees apart, a tenth of the radius
    is nearest to one step; two cameras back to back see nothing in common."""
    angle = torch.arange(36.0) * math.radians(10)
    E = torch.eye(4).repeat(36, 1, 1)
    E[:, :3, 2] = torch.stack([-angle.cos(), -angle.sin(), 0 * angle], -1)  # forward
    E[:, :3, 1] = torch.tensor([0.0, 0, -1])
    E[:, :3, 0] = torch.linalg.cross(E[:, :3, 1], E[:, :3, 2])
    E[:, :3, 3] = -5 * E[:, :3, 2]
    K = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(36, 3, 3)
    views = {"images": torch.zeros(36, 3, 32, 32), "extrinsics": E, "Ks": K}
    distances = R.distances_of(views, E.double())
    torch.testing.assert_close(distances.float(), torch.full((36,), 5.0), rtol=1e-4, atol=1e-4)
    pairs = R.pairs_of(views)
    assert {i for pair in pairs for i in pair} == set(range(36))
    assert all((i - j) % 36 in (1, 35) for i, j in pairs)
    two = {k: v[[0, 1]].clone() for k, v in views.items()}
    two["ranges"] = torch.tensor([[1.0, 3.0]] * 2)
    turn = torch.diag(torch.tensor([-1.0, 1, -1]))
    two["extrinsics"][1, :3, :3] = two["extrinsics"][0, :3, :3] @ turn
    with pytest.raises(ValueError, match="no two photos overlap"):
        R.reconstruct(two, R.FeedForward(R.new_reconstructor(), 3.0, 50.0))
    with pytest.warns(UserWarning, match="1 of 3 photos overlap no other"):
        three = {k: v[[0, 1, 20]].clone() for k, v in views.items()}
        three["extrinsics"][2, :3, 3] += 100
        R.pairs_of(three | {"ranges": torch.tensor([[4.0, 6]] * 3)})


def test_ranges_are_chosen_by_what_renders_better(room):
    """Near and far planes that cut the room off lose; those that hold it stay."""
    views = {k: v for k, v in room[0].items() if k != "depths"}
    network, distances = R.load_reconstructor(), R.distances_of(views, views["extrinsics"].double())
    for near, far, better in ((3.0, 50.0, False), (0.2, 0.6, True)):  # in baselines
        with torch.no_grad():
            chosen = R.choose_ranges(views, R.FeedForward(network, near, far))
        assert ("ranges" in chosen) == better
    shares = chosen["ranges"] / distances[:, None].float()
    torch.testing.assert_close(shares, torch.tensor([[0.4, 2.0]]).expand(len(distances), 2))


def test_a_camera_that_stands_still_for_a_while_has_no_ranges():
    """On a slider, whose optical axes do not meet: some distances are 0."""
    E = torch.eye(4).repeat(24, 1, 1)
    E[12:, 0, 3] = 0.05 * torch.arange(1, 13)
    K = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(24, 3, 3)
    views = {"images": torch.rand(24, 3, 32, 32), "extrinsics": E, "Ks": K}
    geometry = R.FeedForward(R.load_reconstructor(), 3.0, 50.0)
    with torch.no_grad():
        assert R.choose_ranges(views, geometry) is views


def test_saved_field_is_the_same_scene(room, tmp_path):
    """An independent reader of the .ply gets an image within 0.5 dB of the field's."""
    views, held_out = room
    shipped = R.FeedForward(R.load_reconstructor(), 3.0, 50.0)
    field = R.reconstruct(views, shipped, load_vit("vit_tiny14"))
    field.save(tmp_path)
    ply = read_ply(tmp_path / "scene.ply")
    stack = lambda *names: torch.stack([ply[n] for n in names], -1)  # noqa: E731
    w, x, y, z = stack("rot_0", "rot_1", "rot_2", "rot_3").T
    axes = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], -1).view(-1, 3, 3)  # fmt: skip
    scales = stack("scale_0", "scale_1", "scale_2").exp()
    harmonics = stack("f_dc_0", "f_dc_1", "f_dc_2")[..., None]
    covars, opacities = axes @ torch.diag_embed(scales**2) @ axes.mT, torch.sigmoid(ply["opacity"])
    parts = stack("x", "y", "z"), covars, opacities, harmonics
    read = R.Gaussians(*(part[None] for part in parts))
    camera = held_out["extrinsics"][None], held_out["Ks"][None], 96, 96
    ours, theirs = (R.render(scene, *camera)[0][0] for scene in (field.gaussians, read))
    assert psnr(theirs, ours) > 40
    ours, theirs = (psnr(photo, held_out["images"]) for photo in (ours, theirs))
    assert ours == pytest.approx(theirs, abs=0.5)
    with np.load(tmp_path / "points.npz") as points:  # no pickle is in it
        assert {k: (v.shape[1:], v.dtype.name) for k, v in points.items() if k != "meta"} == {
            "xyz": ((3,), "float32"), "rgb": ((3,), "float32"), "opacity": ((), "float32"),
            "normal": ((3,), "float32"), "features": ((192,), "float16"), "frame": ((), "int32"),
        }  # fmt: skip
        assert np.array_equal(points["features"], field.features.numpy())
        np.testing.assert_allclose(points["xyz"], stack("x", "y", "z").numpy())
        assert json.loads(str(points["meta"])) == {}


def test_voxels_are_plain_means(room):
    """What a Minkowski or point network takes, against a loop over Gaussians."""
    two = {k: v[:2] for k, v in room[0].items()}
    field = R.reconstruct(two, R.SensorDepth(), load_vit("vit_tiny14"))
    arrays, side = R.voxels(field, 0.25), 0.25
    bins = {}
    for n, xyz in enumerate(field.gaussians.means[0].tolist()):
        bins.setdefault(tuple(math.floor(c / side) for c in xyz), []).append(n)
    assert [tuple(i) for i in arrays["indices"].tolist()] == sorted(bins)
    assert arrays["indices"].dtype == torch.int32 and min(arrays["indices"].flatten()) < 0
    assert arrays["counts"].tolist() == [len(bins[i]) for i in sorted(bins)]
    for m, i in list(enumerate(sorted(bins)))[::40]:
        expected = field.features[bins[i]].double().mean(0)
        torch.testing.assert_close(arrays["features"][m].double(), expected, rtol=2e-3, atol=2e-3)
        xyz = field.gaussians.means[0, bins[i]].mean(0)
        torch.testing.assert_close(arrays["xyz"][m], xyz, rtol=0, atol=1e-4)
        assert ((xyz / side).floor().int() == arrays["indices"][m]).all()
        torch.testing.assert_close(arrays["rgb"][m], field.rgb()[bins[i]].mean(0))


def capture(folder, scene, indices, size=64, depth=True):
    """Frames of a scene written as a capture of nerfstudio's layout."""
    folder.mkdir(exist_ok=True)
    frames = []
    for i in indices:
        frame = scene.frame(i, size, size)
        image = (frame["images"].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(image).save(folder / f"{i:03d}.png")
        pose = frame["extrinsics"].clone()
        pose[:3, 1:3] *= -1
        row = {"file_path": f"{i:03d}.png", "transform_matrix": pose.tolist()}
        if depth:
            np.save(folder / f"{i:03d}.npy", frame["depths"].numpy())
            row["depth_file_path"] = f"{i:03d}.npy"
        frames.append(row)
    (K, w) = (frame["Ks"].tolist(), size)
    about = dict(fl_x=K[0][0], fl_y=K[1][1], cx=K[0][2], cy=K[1][2], w=w, h=w, frames=frames)
    (folder / "transforms.json").write_text(json.dumps(about))
    return folder


def test_command(tmp_path, monkeypatch, capsys):
    """What it writes can be looked at; what --render draws is what the camera's photo shows."""
    monkeypatch.chdir(tmp_path)
    folder = capture(tmp_path / "scan", data.Rooms("val")[0], (0, 8, 16))
    poses = capture(tmp_path / "poses", data.Rooms("val")[0], (4, 12), size=48) / "transforms.json"
    R.main([str(folder), "--features", "vit_tiny14", "--voxel", "0.1", "--render", str(poses),
            "--height", "64", "--width", "64"])  # fmt: skip
    said, out = capsys.readouterr().out, tmp_path / "runs" / "field-1"
    assert "geometry depth" in said and "s left" in said and "of the photos, rendered" in said
    drawn = [f"{n:04d}_{what}.png" for n in range(2) for what in ("depth", "features", "photo")]
    names = [*drawn, "orbit.gif", "points.npz", "scene.ply", "sheet.png", "voxels.npz"]
    assert sorted(path.name for path in out.iterdir()) == names
    truth = data.Rooms("val")[0].frame(12, 48, 48)
    photo = torch.tensor(np.array(Image.open(out / "0001_photo.png"))).permute(2, 0, 1) / 255
    assert psnr(photo, truth["images"]) > 20
    depth = torch.tensor(np.array(Image.open(out / "0001_depth.png")).astype(np.float32)) / 1000
    # On a slanted surface the nearer Gaussians come first, and 64 pixels are coarse
    assert (depth / truth["depths"] - 1).abs().median() < 0.04
    with Image.open(out / "orbit.gif") as orbit:
        assert orbit.n_frames == 24 and orbit.size == (64, 64)
    with np.load(out / "points.npz") as points, np.load(out / "voxels.npz") as grid:
        meta = json.loads(str(points["meta"]))
        assert meta["teacher"] == "vit_tiny14"
        assert meta["photos"] == ["000.png", "008.png", "016.png"]
        assert meta["geometry"] == "depth" and meta["settings"]["voxel"] == 0.1
        assert grid["counts"].sum() == len(points["xyz"]) and grid["side"] == np.float32(0.1)
    with pytest.raises(SystemExit, match="field-1: there is something of that name"):
        R.main([str(folder), "--features", str(SHIPPED_TEACHER), "--name", "field-1"])


@pytest.mark.parametrize("flags,said", [
    ("missing", "missing: no such folder"),
    ("plain --geometry depth", "plain: not all photos have depth maps; with --geometry shipped"),
    ("one", "one: 1 photo, where at least 2 are needed"),
    ("apart", "no two photos overlap"),
    ("plain --render broken.json", "broken.json: not poses in the layout of transforms.json"),
    ("plain --render turned.json", "turned.json: frame 0: not rigid"),
    ("plain --render huge.json", "huge.json: not poses .*w and h must be 1 to 4096"),
    ("plain --render none.json", "none.json: no.* such file|none.json: .*No such file"),
    ("plain --features none.pth", "unknown model 'none.pth'"),
    ("plain --geometry none.pth", "none.pth: no such file"),
    ("plain --height 50", "multiples of 16 pixels high and wide"),
    ("plain --voxel -1", "--voxel must be at least 0"),
    ("plain --height 1000000", "--height must be at most 4096, not 1000000"),
    ("plain --name ../x", "--name is a folder's in runs/, .* not '../x'"),
])  # fmt: skip
def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    room = data.Rooms("val")[0]
    capture(tmp_path / "plain", room, (0, 8), depth=False)
    capture(tmp_path / "one", room, (0,))
    capture(tmp_path / "apart", room, (0, 8), depth=False)
    about = json.loads((tmp_path / "apart" / "transforms.json").read_text())
    turned = torch.tensor(about["frames"][0]["transform_matrix"])
    turned[:3, [0, 2]] *= -1  # the other way
    turned[:3, 3] += 5 * turned[:3, 2]
    about["frames"][1]["transform_matrix"] = turned.tolist()
    (tmp_path / "apart" / "transforms.json").write_text(json.dumps(about))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "huge.json").write_text(json.dumps(about | {"w": 40000}))
    about["frames"][0]["transform_matrix"] = [[2.0, 0, 0, 0]] * 4
    (tmp_path / "turned.json").write_text(json.dumps(about))
    usual = [] if "--features" in flags else ["--features", "vit_tiny14"]
    with pytest.raises(SystemExit) as stop:
        R.main(flags.split() + usual)
    assert re.search(said, str(stop.value)) and "\n" not in str(stop.value)
    assert not list(tmp_path.glob("runs/*"))


def test_averaged_features_are_means_by_a_plain_loop():
    """Weights of one Gaussian alone are what it adds to an image as a single channel of 1."""
    field, views = scene_in_three_views(N=40)
    field = field._replace(features=field.features.half())
    views |= {"valid": torch.arange(32).expand(3, 32, 32) < 20}
    vit, H = Painter(), 32
    total, weight = torch.zeros(40, 5), torch.zeros(40, 1)
    for i in range(3):
        wanted = R.lifted(vit, views, i, False)[0]  # [H * W, 5]
        camera = torch.linalg.inv(views["extrinsics"][i])[None, None], views["Ks"][i][None, None]
        for n in range(40):
            one = torch.zeros(1, 40, 1)
            one[0, n] = 1
            options = dict(near_plane=R.NEAR_PLANE)
            adds = R.rasterize(*field.gaussians[:3], one, *camera, H, H, **options)[0].view(-1, 1)
            adds = adds * views["valid"][i].view(-1, 1)
            total[n] += (adds * wanted).sum(0)
            weight[n] += adds.sum()
    shown = weight[:, 0] > 1e-3
    assert 10 < shown.sum() < 40
    found = R.averaged(field, views, vit)
    expected = (total / weight.clamp(min=1e-9))[shown]
    torch.testing.assert_close(found.features[shown].float(), expected, atol=2e-3, rtol=2e-3)
    unseen = weight[:, 0] == 0
    assert unseen.any() and torch.equal(found.features[unseen], field.features[unseen])
    assert found.meta["averaged"] and "averaged" not in field.meta
