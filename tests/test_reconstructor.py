"""MVSplat in model.py: equal to the public code on golden values, and the laws that its parts obey."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model as M
from reference import random_rotation
from test_model import golden_state

GOLDEN = {k.removeprefix("mvsplat."): v for k, v in load_file(Path(__file__).parent / "golden.safetensors").items()}
INPUTS = [GOLDEN[k] for k in ("images", "extrinsics", "intrinsics", "near", "far")]
SMALL = M.ReconstructorConfig(stem=(8, 8, 8), dim=16, blocks=2, candidates=8, cost_dim=16, refine_dim=16)


def save_small(path, **changes):
    model = M.MVSplat(SMALL)
    state = golden_state(model) | changes
    save_file(state, path, {"config": json.dumps(dataclasses.asdict(SMALL))})
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return M.load_reconstructor(save_small(tmp_path_factory.mktemp("weights") / "small.safetensors"))


# --------------------------------------------------------------------------- parity


def test_published_checkpoint_equals_the_public_model(tmp_path):
    """471 tensors as Lightning saves them: under `encoder.`, beside what is not the encoder's."""
    with torch.device("meta"):
        shapes = M.MVSplat().state_dict()
    lines = "\n".join(f"{n} {list(p.shape)}" for n, p in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "939fef153985be3b" and len(shapes) == 471
    state = {"encoder." + k: v for k, v in golden_state(M.MVSplat()).items()} | {"losses.lpips": torch.zeros(3)}
    torch.save({"state_dict": state, "global_step": 300_000}, tmp_path / "re10k.ckpt")
    gaussians = M.load_reconstructor(tmp_path / "re10k.ckpt")(*INPUTS)
    assert not gaussians.means.requires_grad
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(gaussians.means[0, ::128], GOLDEN["means"], **close)
    torch.testing.assert_close(gaussians.covars[0, ::128], GOLDEN["covariances"], **close)
    torch.testing.assert_close(gaussians.harmonics[0, ::128], GOLDEN["harmonics"], **close)
    torch.testing.assert_close(gaussians.opacities[0, ::16], GOLDEN["opacities"], **close)


# --------------------------------------------------------------------------- parts


def test_windows_are_quarters_and_come_back():
    x = torch.arange(2 * 6 * 4).view(2, 6, 4, 1)
    assert torch.equal(M.windows(x)[:, 1].view(2, 3, 2), x[:, :3, 2:, 0])
    assert torch.equal(M.windows(M.windows(x), back=(6, 4)), x)


def test_shift_mask_parts_what_the_roll_brought_together():
    """Every token knows where it was before the roll; who was more than half an image away is masked."""
    h, w = 8, 12
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    where = torch.roll(torch.stack([y, x], -1), (-(h // 4), -(w // 4)), (0, 1))
    where = M.windows(where)  # (4, tokens, 2)
    apart = ((where[:, :, None] - where[:, None, :]).abs() >= torch.tensor([h // 2, w // 2])).any(-1)
    assert torch.equal(M.shift_mask(h, w) == -100, apart) and apart.any() and not apart[0].any()


@pytest.mark.parametrize("degree", range(5))
def test_rotated_harmonics_are_the_rotated_function(degree):
    g = torch.Generator().manual_seed(degree)
    R = torch.linalg.qr(random_rotation(g).double()).Q  # orthogonal to double precision
    R = R * torch.linalg.det(R)
    coefficients = torch.zeros(1, 25, dtype=torch.float64)
    band = slice(degree**2, (degree + 1) ** 2)
    coefficients[:, band] = torch.randn(2 * degree + 1, generator=g, dtype=torch.float64)
    turned = M.rotate_harmonics(coefficients, R[None])
    directions = F.normalize(torch.randn(20, 3, generator=g, dtype=torch.float64), dim=-1)
    before = M.real_harmonics(degree, directions) @ coefficients[0, band]
    after = M.real_harmonics(degree, directions @ R.T) @ turned[0, band]  # the turned function, at turned directions
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(turned.norm(), coefficients.norm())  # orthonormal, so rotation keeps the length
    assert not turned[:, : band.start].any() and not turned[:, band.stop :].any()


def test_first_degree_is_x_y_z():
    directions = F.normalize(torch.randn(5, 3), dim=-1)
    torch.testing.assert_close(M.real_harmonics(1, directions), directions)


def test_cost_volume_peaks_at_the_true_depth():
    """A plane at depth 2 with random features, seen from two places: the best candidate is 2, away from the border."""
    g = torch.Generator().manual_seed(0)
    h, w, n, depth = 12, 24, 9, 2.0
    plane = F.normalize(torch.randn(1, 32, h, w + 4, generator=g), dim=1)
    features = torch.stack([plane[..., :w], plane[..., 4:]], 1)  # the second camera sees it 4 pixels further on
    K = torch.tensor([[1.0, 0, 0.5], [0, 2.0, 0.5], [0, 0, 1]]).expand(1, 2, 3, 3)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = 4 * depth / w
    candidates = 1 / torch.linspace(1 / 10, 0.9, n).expand(1, 2, n)  # inverse depth 0.5 is the fifth
    cost = M.cost_volume(features, K, extrinsics, candidates, torch.tensor([[1], [0]]))
    best = cost.argmax(2)
    assert (best[0, 0, :, 4:] == 4).float().mean() > 0.95 and (best[0, 1, :, :-4] == 4).float().mean() > 0.95


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
    images, extrinsics, intrinsics, near, far = INPUTS
    both = small(
        *(torch.cat([t, other]) for t, other in zip(INPUTS, (images.flip(-1), extrinsics, intrinsics, near, far)))
    )
    for a, b in zip(small(*INPUTS), both):
        torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1e-4)


def test_gaussians_lie_on_their_pixels_rays(small):
    gaussians = small(*INPUTS)
    _, extrinsics, intrinsics, near, far = INPUTS
    H, W = GOLDEN["images"].shape[-2:]
    means = gaussians.means.view(2, H, W, 3)
    R, t = extrinsics[0, :, :3, :3], extrinsics[0, :, :3, 3]
    camera = torch.einsum("vji,vhwj->vhwi", R, means - t[:, None, None])
    pixels = camera @ intrinsics[0, 0].T
    pixels = pixels[..., :2] / pixels[..., 2:] * torch.tensor([W, H])
    x, y = torch.arange(W) + 0.5, torch.arange(H) + 0.5
    assert (pixels[..., 0] - x).abs().max() < 0.501 and (pixels[..., 1] - y[:, None]).abs().max() < 0.501
    assert (camera.norm(dim=-1) > near[0, 0] * 0.999).all() and (camera.norm(dim=-1) < far[0, 0] * 1.001).all()
    assert (torch.linalg.eigvalsh(gaussians.covars) > -1e-6).all()


def test_behind_the_methods_interface(small):
    """Ks in pixels are normalised by width and height; near and far are the setting's."""
    images, extrinsics, intrinsics, near, far = INPUTS
    H, W = images.shape[-2:]
    context = {"images": images, "extrinsics": extrinsics, "Ks": intrinsics * torch.tensor([W, H, 1.0])[:, None]}
    for a, b in zip(M.FeedForward(small, float(near[0, 0]), float(far[0, 0]))(context), small(*INPUTS)):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "index,change,message",
    [
        (0, lambda t: t[:, :1], "needs at least 2, not 1"),
        (0, lambda t: t[..., :-8], "multiples of 16 pixels high and wide, not 96 x 56"),
        (3, lambda t: t * 0, "0 < near < far must hold"),
        (4, lambda t: t * 0.01, "0 < near < far must hold"),
        (1, lambda t: t * 1.1, "extrinsics must be rigid"),
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
        M.load_reconstructor(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no reconstructor's configuration in its metadata"):
        M.load_reconstructor(path)
    save_file({"a": torch.zeros(1)}, path, {"config": '{"width": 3}'})
    with pytest.raises(ValueError, match="no reconstructor's configuration in its metadata .*width"):
        M.load_reconstructor(path)
    save_small(path, extra=torch.zeros(1))
    with pytest.raises(ValueError, match="reconstructor.safetensors: does not fit .* has unknown extra"):
        M.load_reconstructor(path)
    save_small(path, **{"depth_predictor.proj_feature.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="has wrongly shaped depth_predictor.proj_feature.bias"):
        M.load_reconstructor(path)
