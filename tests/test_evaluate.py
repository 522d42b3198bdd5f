"""evaluate.py: metrics equal to the public code's, probes against plain loops, every layout of data
in miniature, and the command line on a tiny transformer."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate as E
import model as M
import train
from train import SHIPPED
from test_reconstruct import save_small
from test_train import SMALL as TRAIN
from test_train import capture

GOLDEN = load_file(Path(__file__).parent / "golden.safetensors")
TEACHER = "--teacher dinov2_vits14 --teacher-weights random"  # that needs no download


def evaluate(flags, *more):
    E.main([*flags.split(), *more])


def settings_of(flags):
    return E.parse_settings(flags.split())


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(M.ARCHITECTURES, "dinov2_vits14", dict(dim=24, depth=2, heads=2))


# ------------------------------------------------------------------ parity with the public code


def test_depth_metrics_and_losses_equal_the_public_code():
    pred, gt = GOLDEN["depth_pred"], GOLDEN["depth_gt"]
    metrics = E.depth_metrics(pred[:, 0], gt[:, 0])
    for name in ("d1", "d2", "d3", "rmse"):
        torch.testing.assert_close(metrics[name], GOLDEN[f"depth_{name}"])
    known = gt[0, 0] > 0
    expected = ((pred[0, 0] - gt[0, 0]).abs() / gt[0, 0])[known].mean()
    torch.testing.assert_close(metrics["abs_rel"][0], expected)
    torch.testing.assert_close(E.sig_loss(pred, gt), GOLDEN["depth_sigloss"][0])
    torch.testing.assert_close(E.gradient_loss(pred, gt), GOLDEN["depth_gradloss"][0])


def test_normal_metrics_equal_the_public_code():
    pred, gt, valid = (GOLDEN[f"snorm_{k}"] for k in ("pred", "gt", "valid"))  # one of three images
    metrics = E.normal_metrics(pred[:, :3], gt * valid)
    for name in ("d1", "d2", "d3", "rmse"):
        torch.testing.assert_close(metrics[name], GOLDEN[f"snorm_{name}"][:1])


def test_match_errors_equal_the_public_code():
    feat0, feat1, depth0, depth1, K, Rt = (
        GOLDEN[f"corr_{k}"] for k in ("feat0", "feat1", "depth0", "depth1", "K", "Rt")
    )
    views = (feat0, feat1), (depth0[0], depth1[0]), (K, K)
    errors, start, end = E.match(*views, Rt, 200)
    assert start.shape == end.shape == (200, 2)
    torch.testing.assert_close(errors.sort().values, GOLDEN["corr_err"], rtol=0, atol=1e-4)
    recalls = torch.stack([(errors < r).float().mean() for r in (5, 10, 20)])
    torch.testing.assert_close(recalls, GOLDEN["corr_recall"])


# ------------------------------------------------------------------ correspondence


@pytest.mark.parametrize("P,Q,block", [(1, 2, 4), (7, 13, 3), (17, 5, 17), (40, 31, 64)])
def test_blocked_neighbours_are_the_dense_ones(P, Q, block):
    a, b = F.normalize(torch.randn(P, 6), dim=-1), F.normalize(torch.randn(Q, 6), dim=-1)
    cosine, index = E.nearest_two(a, b, block)
    expected = (a[:, None] * b).sum(-1).sort(dim=1, descending=True)
    torch.testing.assert_close(cosine, expected.values[:, :2])
    assert torch.equal(index, expected.indices[:, :2])


def test_features_that_tell_the_place_match_without_error():
    """Features that are a smooth code of the world point, on a slanted plane; with the wrong pose
    errors are large."""
    H, W, K = 48, 64, torch.tensor([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    Rt = torch.eye(4)[:3].clone()
    Rt[0, 3] = -0.4
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    rays = torch.stack([(x - 32) / 60, (y - 24) / 60, torch.ones_like(x)], -1)
    code = 3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    depths, features = [], []
    for t in (torch.zeros(3), -Rt[:, 3]):  # plane z = 2 + 0.3 x in camera 0's axes
        depth = (2 + 0.3 * t[0]) / (rays[..., 2] - 0.3 * rays[..., 0])
        point = rays * depth[..., None] + t
        angles = point[..., :2].flatten(0, 1) @ code
        depths.append(depth)
        features.append(torch.cat([angles.sin(), angles.cos()], -1).view(H, W, 32).permute(2, 0, 1))
    errors = E.match(features, depths, (K, K), Rt, 500)[0]
    assert len(errors) == 500 and errors.median() < 1 and errors.max() < 3
    wrong = Rt.clone()
    wrong[0, 3] = 0.4
    assert E.match(features, depths, (K, K), wrong, 500)[0].median() > 10
    # The second view at twice the size
    Ks = K, K * torch.tensor([[2.0, 2, 2], [2, 2, 2], [1, 1, 1]])
    feature, depth = (data.resized(t[1], (2 * H, 2 * W), "nearest") for t in (features, depths))
    views = (features[0], feature), (depths[0], depth), Ks
    assert E.match(*views, Rt, 500)[0].median() < 2.5


def test_the_task_hands_poses_and_sizes_on_rightly(monkeypatch):
    """Features that are a code of the world point make recall near 1, and poses of another scene
    spoil it. The angles of rooms' pairs go round the bins: each bin holds every fourth pair."""
    code = 2 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    views, error = [], []

    def place_codes(model, images, settings):  # in the order in which views are loaded
        features = []
        for image in images:
            view = next(v for v in views if torch.equal(v["images"], image))
            points = data.camera_points(view["depths"], view["Ks"]) @ view["extrinsics"][:3, :3].T
            angles = (points + view["extrinsics"][:3, 3]) @ code
            features.append(torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1))
        return torch.stack(features), None

    def loaded(pairs):
        for n in range(len(pairs)):
            a, b = pairs[n]
            views[:] = [a, b]
            if error:  # the second camera is said to stand elsewhere
                b = b | {"extrinsics": b["extrinsics"] + error[0]}
            yield a, b

    monkeypatch.setattr(E, "extract", place_codes)
    monkeypatch.setattr(E, "loaded", loaded)
    few = "--pairs 8 --image-size 112 112 --seeds 1 --matches 80"
    settings = settings_of(f"--task correspondence {few}")
    model = E.Model("place", [], None)
    (row,) = E.correspondence([model], settings, Path("."))[0]["place"]
    names = [f"recall_10px_{a}_{b}deg" for a, b in zip(data.BINS, data.BINS[1:])]
    assert row["recall_5px"] > 0.9 and all(row[name] > 0.9 for name in names)
    shift = torch.zeros(4, 4)
    shift[0, 3] = 1.0
    error.append(shift)
    (wrong,) = E.correspondence([model], settings, Path("."))[0]["place"]
    assert wrong["recall_5px"] < 0.7 * row["recall_5px"]
    mean = sum(wrong[name] for name in names) / 4
    assert mean == pytest.approx(wrong["recall_10px"])  # as many pairs in each


def colmap_room(root, size=112):
    """Two photos of a room as COLMAP has them, without depth; points that both see, and points
    elsewhere that it takes for the first photo's alone. Returns the room's two frames."""
    room, i, j = data.room_pair(data.Rooms("val")[0], np.random.default_rng(0), (10, 30))
    views = [room.frame(k, size, size) for k in (i, j)]
    (root / "sparse/0").mkdir(parents=True)
    (root / "images").mkdir()
    images = ""
    for k, view in enumerate(views, 1):
        train.to_image(view["images"].permute(1, 2, 0)).save(root / f"images/{k}.png")
        R, t = torch.linalg.inv(view["extrinsics"].double())[:3].split([3, 1], 1)
        w = (1 + R.trace()).sqrt() / 2
        turn = torch.stack([w, *(R.flatten()[[7, 2, 3]] - R.flatten()[[5, 6, 1]]) / (4 * w)])
        images += " ".join(map(str, [k, *turn.tolist(), *t[:, 0].tolist(), k, f"{k}.png"])) + "\n\n"
    K = [view["Ks"].flatten()[[0, 4, 2, 5]].tolist() for view in views]
    cameras = "".join(f"{k + 1} PINHOLE {size} {size} {' '.join(map(str, K[k]))}\n" for k in (0, 1))
    to_b = torch.linalg.inv(views[1]["extrinsics"]) @ views[0]["extrinsics"]
    points = data.camera_points(views[0]["depths"], views[0]["Ks"])[::7, ::7].flatten(0, 1)
    seen = points @ to_b[:3, :3].T + to_b[:3, 3]
    pixels = E.project(seen, views[1]["Ks"])
    x, y = pixels.long().clamp(0, size - 1).T
    both = (seen[:, 2] - views[1]["depths"][y, x]).abs() < 0.02  # not hidden
    both &= ((pixels >= 0) & (pixels < size)).all(1)
    world = points @ views[0]["extrinsics"][:3, :3].T + views[0]["extrinsics"][:3, 3]
    rows = [(xyz, "1 0 2 0") for xyz in world[both]] + [(xyz + 1, "1 0") for xyz in world]
    cloud = "".join(f"{k} {' '.join(map(str, xyz.tolist()))} 9 8 7 0.5 {track}\n"
                    for k, (xyz, track) in enumerate(rows))  # fmt: skip
    for name, text in (("cameras", cameras), ("images", images), ("points3D", cloud)):
        (root / f"sparse/0/{name}.txt").write_text(text)
    return views, int(both.sum())


def test_colmaps_points_are_matched_where_there_is_no_depth(tmp_path, monkeypatch):
    """Features that are a code of the place find the points that both photos see, and no others
    count; those of another place find few."""
    views, count = colmap_room(tmp_path / "scan")
    code, found = 2 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), []
    features = []
    for view in views:
        points = data.camera_points(view["depths"], view["Ks"]) @ view["extrinsics"][:3, :3].T
        angles = (points + view["extrinsics"][:3, 3]) @ code
        features.append(torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1))
    monkeypatch.setattr(E, "extract", lambda *_: (torch.stack(features), None))
    match = E.match
    monkeypatch.setattr(E, "match", lambda *a: found.append(len(match(*a)[0])) or match(*a))
    model = [E.Model("place", [], None)]
    settings = f"--task correspondence --data {tmp_path / 'scan'} --seeds 1 --image-size 112 112"
    (row,) = E.correspondence(model, settings_of(settings), tmp_path)[0]["place"]
    assert count > 60 and found[0] == count and row["recall_2px"] > 0.9
    features[1] = features[1].flip(2)
    (wrong,) = E.correspondence(model, settings_of(settings), tmp_path)[0]["place"]
    assert wrong["recall_5px"] < 0.6
    (tmp_path / "scan/sparse/0/points3D.txt").unlink()
    with pytest.raises(ValueError, match="cameras.txt: no depth maps and no points of COLMAP"):
        E.correspondence(model, settings_of(settings), tmp_path)


def test_masked_pixels_have_no_points_and_match_none(tmp_path, monkeypatch):
    """All points that lie where a photo is not valid are left out, and so are its pixels."""
    _, count = colmap_room(tmp_path / "scan")
    (tmp_path / "scan/masks").mkdir()
    valid = np.zeros((112, 112), np.uint8)
    valid[:, 56:] = 255
    Image.fromarray(valid).save(tmp_path / "scan/masks/2.png")
    found, features = [], torch.randn(2, 8, 28, 28, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(E, "extract", lambda *_: (features, None))
    match = E.match
    monkeypatch.setattr(E, "match", lambda *a: found.append((a, match(*a))) or found[-1][1])
    settings = f"--task correspondence --data {tmp_path / 'scan'} --seeds 1 --image-size 112 112"
    E.correspondence([E.Model("noise", [], None)], settings_of(settings), tmp_path)
    (_, _, Ks, Rt, _, points), (_, _, ends) = found[0]
    assert 20 <= len(points) < count - 20 and len(ends) == len(points)
    assert (E.project(points @ Rt[:3, :3].T + Rt[:3, 3], Ks[1])[:, 0] >= 14 - 1e-3).all()
    assert (ends[:, 0] >= 14).all()


def test_tables_have_short_names_unless_they_would_be_the_same():
    run, other = "runs/demo-1/student.safetensors", "/a/runs/demo-2/student.safetensors"
    names = ["weights/teacher.safetensors", run, f"{other} - {run}", "teacher dinov2_vits14"]
    short = ["teacher", "demo-1/", "demo-2/ - demo-1/", "teacher dinov2_vits14"]
    assert E.shortened(names) == short
    assert E.shortened(["a/x.pth", "b/x.pth"]) == ["a/x.pth", "b/x.pth"]


def test_overlap_is_of_pixels_with_depth():
    K, wall = torch.tensor([[10.0, 0, 5], [0, 10.0, 5], [0, 0, 1]]), torch.full((10, 10), 2.0)
    to_b = torch.eye(4)
    to_b[0, 3] = 0.8  # four pixels to the right: six of ten columns stay in view
    half = torch.where(torch.arange(10) < 5, wall, 0.0)  # all of its five columns do
    b = {"depths": wall, "Ks": K}
    share = [data.overlap({"depths": d, "Ks": K}, b, to_b) for d in (wall, half, 0 * wall)]
    assert share == pytest.approx([0.6, 1.0, 0.0])
    before = {"depths": wall / 2, "Ks": K}  # something hides the wall
    assert data.overlap(b, before, to_b) == 0


def test_pairs_of_a_capture_that_share_nothing_do_not_count(tmp_path, monkeypatch):
    capture(tmp_path / "scan", frames=3)
    monkeypatch.setattr(data, "overlap", lambda a, b, Rt: 0.29)
    with pytest.raises(SystemExit, match="scan: no two of its frames show enough of the same"):
        evaluate(f"--task correspondence --data scan --image-size 28 56 --matches 20 {TEACHER}")
    # Nothing was measured: nothing is left
    assert not Path("runs/evaluation/correspondence-1").exists()


def test_views_without_depth_have_no_matches():
    features, nothing = torch.randn(8, 3, 4), torch.zeros(6, 8)
    K = torch.tensor([[5.0, 0, 4], [0, 5, 3], [0, 0, 1]])
    views = (features, features), (nothing, nothing + 1), (K, K)
    assert [m.shape for m in E.match(*views, torch.eye(4), 10)] == [(0,), (0, 2), (0, 2)]
    views = (features, features), (nothing + 1, nothing + 1), (K, K)
    few = E.match(*views, torch.eye(4), 1000)[0]
    # A view against itself: each pixel is its own match
    assert few.shape == (48,) and few.max() < 1e-3


@pytest.mark.parametrize("degrees", [0.0, 1.0, 14.9, 90.0, 179.0])
def test_rotation_angle(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    Rt = torch.tensor([[c, 0, s, 1], [0, 1, 0, 1], [-s, 0, c, 1]], dtype=torch.float64)
    assert float(data.rotation_angle(Rt)) == pytest.approx(degrees, abs=0.01)


def test_pairs_of_rooms_fill_every_range_of_viewpoints():
    pairs = data.pairs(None, 8, 28, 28, seed=3)
    for n, (a, b) in enumerate(pairs[i] for i in range(8)):
        to_b = torch.linalg.inv(b["extrinsics"]) @ a["extrinsics"]
        assert data.BINS[n % 4] <= float(data.rotation_angle(to_b)) < data.BINS[n % 4 + 1]
        assert data.overlap(a, b, to_b) > 0.2
    again, other = data.pairs(None, 8, 28, 28, seed=3), data.pairs(None, 8, 28, 28, seed=4)
    key = lambda p: [(room.name, i, j) for room, i, j in p.entries]  # noqa: E731
    assert key(again) == key(pairs) != key(other)
    assert all(int(name[4:]) in data.SPLITS["probe"] for name, _, _ in key(pairs))


# ------------------------------------------------------------------ linear probes


def test_convolving_before_upsampling_is_the_protocols_order():
    """DINOv2 upsamples tokens, puts cls beside them and convolves; the probe convolves first."""
    probe = E.DepthProbe(6)
    features, classes = torch.randn(2, 6, 3, 5), torch.randn(2, 6)
    x = torch.cat([features, classes[:, :, None, None].expand(-1, -1, 3, 5)], 1)
    x = probe.conv(F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False))
    p = F.relu(x) + 0.1
    depth = (p / p.sum(1, keepdim=True) * torch.linspace(0.001, 10, 256)[:, None, None]).sum(1)
    torch.testing.assert_close(probe(features, classes, (12, 20)), depth, rtol=1e-4, atol=1e-4)
    probe = E.NormalsProbe(6)
    x = probe.conv(F.interpolate(features, scale_factor=4, mode="bilinear", align_corners=True))
    torch.testing.assert_close(probe(features, classes, (12, 20)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("probe", [E.DepthProbe, E.NormalsProbe, E.SegmentationProbe])
def test_predictions_have_the_labels_size(probe):
    """The last resize is smooth: nothing of it at the corners of a 3 x 5 map, and no step between
    neighbours."""
    probe = probe(6, names="abc").eval()
    features, classes = torch.randn(1, 6, 3, 5).cumsum(-1), torch.randn(1, 6)
    out = probe(features, classes, (130, 230))
    out = out[:, None] if out.ndim == 3 else out
    assert out.shape[-2:] == (130, 230)
    step = (out[..., 1:] - out[..., :-1]).abs().amax()
    assert step < 0.1 * (out.amax() - out.amin())


def test_depth_loss_is_the_sum_of_its_parts():
    prediction, truth = 1 + torch.rand(2, 12, 12), 1 + 11 * torch.rand(2, 12, 12)
    near = torch.where(truth <= 10, truth, 0.0)
    expected = E.sig_loss(prediction, near) + 0.5 * E.gradient_loss(prediction, near)
    torch.testing.assert_close(E.DepthProbe(3).loss(prediction, truth), expected)


def test_without_an_image_the_labels_of_each_pixel_decide():
    depths = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[9.0, 0.0]]])
    # Where nothing is known, the median of all
    assert E.from_labels(E.DepthProbe(3), depths).tolist() == [[2.0, 2.0]]
    tall = depths.expand(3, 70, 2) * torch.arange(1, 71)[:, None]  # more rows than are done at once
    assert E.from_labels(E.DepthProbe(3), tall)[:, 0].tolist() == [2.0 * i for i in range(1, 71)]
    normals = torch.eye(3).view(3, 3, 1, 1)
    said = E.from_labels(E.NormalsProbe(3), normals)
    torch.testing.assert_close(said[:, 0, 0], torch.full((3,), 1 / 3))
    classes = torch.tensor([[[c, -1]] for c in (2, 0, 2)])
    said = E.from_labels(E.SegmentationProbe(3, "abc"), classes)
    assert said[:, 0].tolist() == [[1, 0], [0, 0], [2, 0]]


def test_angular_loss_is_the_formula():
    pred, gt = torch.randn(2, 4, 3, 5), F.normalize(torch.randn(2, 3, 3, 5), dim=1)
    valid = torch.rand(2, 3, 5) > 0.3
    total = []
    for b, y, x in valid.nonzero().tolist():
        n = pred[b, :3, y, x]
        angle = math.acos(float(n @ gt[b, :, y, x] / n.norm()))
        k = float(F.elu(pred[b, 3, y, x])) + 1.01
        total.append(math.log(1 + math.exp(-k * math.pi)) - math.log(k * k + 1) + k * angle)
    loss = float(E.angular_loss(pred, gt * valid[:, None]))
    assert loss == pytest.approx(sum(total) / len(total), rel=1e-4)


def test_nothing_known_measures_nothing():
    nothing = torch.zeros(2, 4, 4)
    assert all(v.shape == (0,) for v in E.depth_metrics(nothing + 1, nothing).values())
    normals = torch.randn(2, 3, 4, 4)
    assert all(v.shape == (0,) for v in E.normal_metrics(normals, 0 * normals).values())


def test_iou_is_the_loop():
    pred, gt = torch.randint(0, 4, (1, 9, 11)), torch.randint(-1, 3, (1, 9, 11))
    result = E.mean_iou(E.confusion(pred, gt, 5), "abcde")
    expected = {}
    for c, name in enumerate("abcde"):
        known = gt >= 0
        both, either = ((pred == c) & (gt == c)).sum(), (((pred == c) | (gt == c)) & known).sum()
        if either:
            expected[f"iou_{name}"] = float(both / either)
    assert "iou_e" not in expected
    assert result.pop("miou") == pytest.approx(sum(expected.values()) / 4)
    assert result == pytest.approx(expected)


def shelf_of(name, features, classes, labels, places=None):
    shelf = data.Shelf(name)
    size = labels[0].shape[-2:]
    for i in range(len(features)):
        place = torch.tensor([[0, 0, *size, 0, *size]]) if places is None else places
        shelf.append(features[i : i + 1], classes[i : i + 1], labels[i], place)
    return shelf


def test_a_probe_learns_what_features_tell():
    """Features that hold the answer, against features of noise; and the checks on the way there."""
    g = torch.Generator().manual_seed(0)
    few = "--image-size 28 28 --epochs 80 --lr 0.1 --max-depth 10 --checks 4"
    settings = settings_of(f"--task depth {few}")
    depths = 1 + 4 * torch.rand(24, 1, 2, 2, generator=g)
    features = torch.cat([depths, 1 / depths, torch.ones_like(depths)], 1)
    labels = F.interpolate(depths, (28, 28), mode="bilinear", align_corners=False)[:, 0]
    errors = {}
    for name, f in (("telling", features), ("noise", torch.randn(features.shape, generator=g))):
        train_ = shelf_of(f"{name}-train", f[:16], torch.zeros(16, 3), labels[:16])
        test = shelf_of(f"{name}-test", f[16:], torch.zeros(8, 3), labels[16:])
        probes = E.fit(E.DepthProbe, None, train_, settings, 0)
        errors[name] = [E.over_frames(probe, test)[0]["abs_rel"] for probe in probes]
    assert len(errors["telling"]) == 4 and errors["telling"][-1] < 0.6 * errors["noise"][-1]
    assert errors["telling"][-1] < errors["telling"][0]


@pytest.mark.parametrize("task", ["depth", "normals", "segmentation"])
def test_batches_without_a_label_teach_nothing(task):
    """Nine windows of ten know nothing, and no weight becomes NaN for it."""
    head, g = E.TASKS[task].probe, torch.Generator().manual_seed(0)
    settings = E.parse_settings(["--task", task, "--epochs", "2", "--batch-size", "1"])
    settings.max_depth = 10.0
    shape = (10, 3, 4, 4) if task == "normals" else (10, 4, 4)
    dtype = torch.long if task == "segmentation" else torch.float
    labels = torch.full(shape, head.unknown, dtype=dtype)
    labels[3] = 0 if task == "segmentation" else 0.577
    if task == "depth":
        labels[5] = 11.0  # beyond what bins reach
    shelf = shelf_of("x", torch.randn(10, 2, 2, 2, generator=g), torch.zeros(10, 2), labels)
    (probe,) = E.fit(head, "ab", shelf, settings, 0)
    torch.manual_seed(0)
    first = E.new_probe(head, "ab", shelf, settings)
    weights = [p.detach() for p in probe.parameters()]
    assert all(w.isfinite().all() for w in weights)
    assert any((w != f).any() for w, f in zip(weights, first.parameters()))


def test_the_best_checkpoint_counts(monkeypatch):
    """Of three checks the second is best: its row, its predictions, whichever way is better."""
    monkeypatch.setattr(E, "fit", lambda *_: iter("abc"))
    shelf = shelf_of("s", torch.zeros(1, 2, 2, 2), torch.zeros(1, 2), torch.ones(1, 4, 4))
    settings = E.parse_settings(["--task", "depth", "--seeds", "1"])
    for head, values in ((E.DepthProbe, (0.3, 0.1, None)), (E.SegmentationProbe, (None, 0.5, 0.4))):
        rows = {probe: {head.best[0]: value} for probe, value in zip("abc", values)}
        monkeypatch.setattr(E, "over_frames", lambda probe, shelf: (rows[probe], [probe]))
        found, panels = E.probe_features("m", head, None, shelf, shelf, settings)
        assert found == [{head.best[0]: values[1]}] and panels == ["b"]


def test_windows_are_joined_where_they_were():
    """A photo's own pixels as the prediction come back whole: slid over, padded, mirrored."""
    photo = torch.rand(3, 61, 45)
    for options in (dict(pad=True, flip_test=True), dict(slide=(32, 20), pad=True), {}):
        framing = data.Framing(**options)
        seen = data.cut_windows(photo, framing)
        assert all(not framing.pad or size % 14 == 0 for size in seen["images"].shape[-2:])
        whole = data.joined(seen["images"], seen["places"], (61, 45))
        torch.testing.assert_close(whole, photo)
    seen = data.cut_windows(photo, data.Framing(slide=(32, 20), pad=True))
    assert seen["places"][:, :2].tolist() == [[t, l] for t in (0, 20, 29) for l in (0, 13)]
    rows = torch.arange(6.0).view(6, 1, 1).expand(6, 42, 42)
    whole = data.joined(rows, seen["places"], (61, 45))
    assert whole[0, 0] == 0 and whole[60, 44] == 5 and whole[25, 5] == (0 + 2) / 2  # both saw it


def test_a_shelf_gives_back_what_it_was_given(tmp_path):
    shelf = data.Shelf(tmp_path / "x")
    given = [(torch.randn(2, n, 3).half(), torch.randint(-300, 300, (n,))) for n in (1, 5, 2)]
    for tensors in given:
        shelf.append(*tensors)
    for i in (2, 0, 1):
        assert all(torch.equal(a, b) for a, b in zip(shelf[i], given[i]))
    # Two bytes a number
    count = sum(t.numel() for tensors in given for t in tensors)
    assert (tmp_path / "x").stat().st_size == 2 * count
    with open("/dev/full", "wb", buffering=0) as shelf.file:
        with pytest.raises(ValueError, match="/dev/full: cannot be written .No space left"):
            shelf.append(torch.zeros(3))


def test_what_will_be_kept_is_foretold():
    settings = E.parse_settings(["--task", "depth", "--layers", "0", "1"])
    vit = M.load_vit("dinov2_vits14", "random")
    frames, _, _ = data.labelled("depth", None, data.PUBLISHED["depth"], 2, 2)
    shelf = E.shelve(Path("train"), E.DepthProbe, E.Model("m", [vit], None), frames, settings)
    assert Path("train").stat().st_size == frames.kept_bytes(2 * 24) and len(shelf) == 2


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(SystemExit, match="take 0.0 GiB, and 0.0 are free; --cache FOLDER takes"):
        evaluate(f"--task depth {QUICK['depth']} {TEACHER}")


def test_a_disk_too_full_for_results_is_one_sentence(monkeypatch):
    def fsync(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("results.json.tmp"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    folder = Path("runs/evaluation/correspondence-1")
    with pytest.raises(SystemExit, match=f"^{folder}/results.json: cannot be written .No space"):
        evaluate(f"--task correspondence {QUICK['correspondence']} {TEACHER}")
    assert not list(folder.glob("results*"))


def test_what_is_kept_goes_at_the_end(tmp_path):
    depth = f"--task depth {QUICK['depth']} {TEACHER} --cache"
    with pytest.raises(SystemExit, match="nowhere.*no folder to keep features in"):
        evaluate(depth, str(tmp_path / "nowhere"))
    (tmp_path / "here").mkdir()
    seen = []
    kept = E.shelve

    def shelve(path, *rest):
        seen.append(path)
        return kept(path, *rest)

    E.shelve, before = shelve, E.shelve
    try:
        evaluate(depth, str(tmp_path / "here"))
    finally:
        E.shelve = before
    assert [path.name for path in seen] == ["train", "test"]
    assert seen[0].parent.parent == tmp_path / "here"
    assert not any((tmp_path / "here").iterdir())


PUBLISHED = {  # by the public configurations: FiT3D's and the paper's two, Probe3D's
    "depth": dict(steps=38_400, batch_size=16, lr=1e-4, weight_decay=0.01, schedule="half",
                  warmup=1 / 3, clip=35, checks=6, gradient_weight=0.0),
    "normals": dict(epochs=10, steps=0, batch_size=8, lr=5e-4, weight_decay=0.01,
                    schedule="quarter", warmup=0.15, checks=1),
    "segmentation": dict(steps=40_000, batch_size=16, lr=1e-3, weight_decay=1e-4,
                         schedule="linear", warmup=1500 / 40_000, checks=1),
}  # fmt: skip


@pytest.mark.parametrize("task", list(PUBLISHED))
def test_the_papers_protocol_is_for_data_and_the_quick_one_for_rooms(task):
    paper, quick = settings_of(f"--task {task} --data x"), settings_of(f"--task {task}")
    assert (paper.protocol, quick.protocol, paper.image_size) == ("paper", "quick", None)
    for name, value in PUBLISHED[task].items():
        right = value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
        assert getattr(paper, name) == right, name
    assert (paper.train_frames, paper.blocks, paper.stride) == (0, 1, 1)
    epochs = {"depth": 6, "normals": 60, "segmentation": 20}
    assert (quick.epochs, quick.steps, quick.lr) == (epochs[task], 0, 1e-2)
    assert settings_of(f"--task {task} --protocol paper").lr == paper.lr
    few = settings_of(f"--task {task} --data x --epochs 3")  # who gives epochs means them
    assert (few.epochs, few.steps) == (3, 0)
    assert settings_of(f"--task {task} --data x --protocol quick").image_size == [480, 640]


def made_up(task, root):
    if task == "depth":
        return bts(root)
    for i in range(5):
        part = "validation" if i > 2 else "training"
        if task == "normals":
            photo(root / f"image/{i}.png", (64, 48), i)
            normal = 127, 127, 255 * (i > 0)
            grey(root / f"normal/{i}.png", np.full((48, 64, 3), normal, np.uint8))
        else:
            photo(root / f"images/{part}/{i}.jpg", (48, 64), i)
            classes = np.arange(48 * 64).reshape(64, 48).astype(np.uint8) % 9
            grey(root / f"annotations/{part}/{i}.png", classes)
    return root


@pytest.mark.parametrize("task", list(PUBLISHED))
def test_the_papers_protocol_runs(task, tmp_path, capsys, monkeypatch):
    """Whole photos of odd sizes through windows, features on disk and back, to pictures."""
    seen = []
    head = E.TASKS[task].probe
    kept = head.measure

    def measure(*arguments):
        seen.append(tuple(tuple(t.shape[-2:]) for t in arguments[-2:]))  # prediction, truth
        return kept(*arguments)

    static = task == "normals"  # its metrics need nothing of the probe
    monkeypatch.setattr(head, "measure", staticmethod(measure) if static else measure)
    root = made_up(task, tmp_path / "data")
    evaluate(f"--task {task} --data {root} --steps 2 --batch-size 2 --seeds 1 {TEACHER}")
    whole = {"depth": (480, 640), "normals": (480, 480), "segmentation": (64, 48)}[task]
    assert set(seen) == {(whole, whole)}
    assert len(seen) == {"depth": 3, "normals": 2, "segmentation": 4}[task]
    report = results("runs", f"{task}-1")
    row = report["per_seed"]["dinov2_vits14"][0]
    key = head.best[0]
    assert report["settings"]["protocol"] == "paper" and row[key] > 0
    assert f"{key} {row[key]:.4f}" in capsys.readouterr().out
    pictures = list(Path("runs/evaluation", f"{task}-1").glob("*.png"))
    assert len(pictures) == (2 if task == "segmentation" else 1)


@pytest.mark.parametrize("schedule,ends", [("quarter", 0.01), ("half", 0.0), ("linear", 0.0)])
def test_learning_rates_climb_and_fall(schedule, ends):
    settings = E.parse_settings(["--task", "depth", "--schedule", schedule, "--warmup", "0.3"])
    rates = [E.learning_rate(i, 100, settings) for i in range(101)]
    assert rates[0] <= 0.01 and rates[100] == pytest.approx(ends, abs=1e-6)
    assert all(a < b for a, b in zip(rates[:29], rates[1:30]))
    assert all(a > b for a, b in zip(rates[31:], rates[32:]))
    quarter, half = math.cos(math.pi / 4 * (60 - 30) / 35), 0.5 + 0.5 * math.cos(0.6 * math.pi)
    middle = {"quarter": quarter, "half": half, "linear": 0.4}
    assert rates[60] == pytest.approx(middle[schedule], abs=0.03)


def test_recall_of_a_pair_counts_in_its_viewpoints_bin():
    row = E.recall(torch.tensor([1.0, 4.0, 6.0, 30.0]), 42.0)
    assert row["recall_2px"] == 0.25 and row["recall_5px"] == 0.5 and row["recall_20px"] == 0.75
    inside = {k for k in row if "deg" in k and row[k] is not None}
    assert inside == {f"recall_{r}px_30_60deg" for r in (2, 5, 10)}
    assert row["recall_10px_30_60deg"] == row["recall_10px"] == 0.75
    assert set(E.recall(torch.tensor([]), 42.0).values()) == {None}
    assert E.recall(torch.tensor([1.0]), 180.0)["recall_2px_60_180deg"] == 1.0


def test_paired_differences_by_hand():
    """What makes a pair hard for both cancels: means of 0.4 and 0.5, pairs better by 0.1 each."""
    none = {"recall_2px": None, "recall_5px": None}  # the last pair had no match
    a = [none | {"recall_2px": v} for v in (0.1, 0.4, 0.7)] + [none]
    b = [none | {"recall_2px": v} for v in (0.1, 0.5, 0.9)] + [none]
    rows = E.differences({"a": a, "b": b}, [("a", "b")])
    ((name, row),) = E.summarise(rows, "standard_error").items()
    assert name == "b - a"
    error = pytest.approx(0.1 / math.sqrt(3))
    assert row["recall_2px"] == {"mean": pytest.approx(0.1), "standard_error": error}
    assert row["recall_5px"] == {"mean": None, "standard_error": None}


def test_spread_and_differences_are_over_seeds():
    results = {"a": [{"x": 1.0}, {"x": 2.0}, {"x": 6.0}], "b": [{"x": 2.0}, {"x": 3.0}, {"x": 7.0}]}
    summary = E.summarise(results | E.differences(results, [("a", "b")]))
    assert summary["a"]["x"] == {"mean": 3.0, "spread": pytest.approx(math.sqrt(7))}
    assert summary["b - a"]["x"] == {"mean": 1.0, "spread": 0.0}  # what both saw alike cancels
    results = {"a": [{"x": 1.0}], "b": [{"x": None}]}
    assert E.differences(results, [("a", "b")]) == {"b - a": [{"x": None}]}
    row = E.summarise({"a": [{"x": 1.0, "y": None}]})["a"]
    assert row == {"x": {"mean": 1.0, "spread": None}, "y": {"mean": None, "spread": None}}


# ------------------------------------------------------------------ layouts


def photo(path, size=(64, 48), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def stripes(values, height=48, width=16):
    """Upright stripes, one of each value."""
    return np.repeat([values], height, 0).repeat(width, 1).astype(np.uint8)


def scannet(root):
    poses = {}
    for i in (0, 15, 30):
        photo(root / f"scene0707_00/color/{i}.jpg", (1296, 968), i)
        grey(root / f"scene0707_00/depth/{i}.png", np.full((480, 640), 2000 + i, np.uint16))
        pose = np.eye(4)
        pose[0, 3] = i / 10
        poses[i] = pose
        path = root / f"scene0707_00/pose/{i}.txt"
        path.parent.mkdir(exist_ok=True)
        np.savetxt(path, pose)
    np.savez(root / "test.npz", name=np.array([[707, 0, 15, 30], [707, 0, 30, 0]]))
    K = np.array([[577.0, 0, 319], [0, 578, 239], [0, 0, 1]])
    np.savez(root / "intrinsics.npz", scene0707_00=K)
    return root


def test_scannet_pairs(tmp_path):
    pairs = data.pairs(str(scannet(tmp_path / "scannet_test_1500")), 1500, 240, 320, seed=0)
    assert len(pairs) == 2
    a, b = pairs[1]
    assert a["images"].shape == (3, 240, 320) and float(a["depths"].unique()) == pytest.approx(2.03)
    assert float(a["extrinsics"][0, 3]) == 3.0 and float(b["extrinsics"][0, 3]) == 0.0
    # 1296 x 968 is a hair narrower than 4 : 3, and K is that of 640 x 480
    K = torch.tensor([[288.5, 0, 159.5], [0, 289, 119.5], [0, 0, 1]])
    torch.testing.assert_close(a["Ks"], K, atol=1.5, rtol=0)


def test_posed_captures_give_all_their_pairs(tmp_path):
    folder = capture(tmp_path / "scan", frames=4)
    pairs = data.pairs(folder, 1500, 40, 56, seed=0)
    assert sorted((i, j) for _, i, j in pairs.entries) == list(itertools.combinations(range(4), 2))
    assert len(data.pairs(folder, 3, 40, 56, seed=0)) == 3
    train_, test, names = data.labelled("depth", folder, data.Framing((42, 56)))
    assert (len(train_), len(test), names) == (3, 1, None)
    assert float(test[0]["depths"].unique()) == 2.0
    with pytest.warns(UserWarning, match="normals are derived from depth"):
        _, test, _ = data.labelled("normals", folder, data.Framing((42, 56)))
    torch.testing.assert_close(test[0]["normals"][:, 20, 20], torch.tensor([0.0, 0, -1]))


def test_nyu_split_files(tmp_path):
    for part in ("train", "test"):
        photo(tmp_path / f"{part}/rgb_0.jpg", (640, 480))
        grey(tmp_path / f"{part}/depth_0.png", np.full((480, 640), 1500, np.uint16))
        line = f"/{part}/rgb_0.jpg /{part}/depth_0.png 518.8579\n"
        (tmp_path / f"nyu_{part}.txt").write_text(line)
    train_, test, _ = data.labelled("depth", str(tmp_path), data.Framing((240, 320)))
    assert float(train_[0]["depths"].min()) == pytest.approx(1.5)
    # Eigen's, at half size
    for size, expected in (((240, 320), (22, 234, 20, 299)), ((240, 240), (22, 234, 0, 239))):
        inside = data.labelled("depth", str(tmp_path), data.Framing(size))[1][0]["depths"] > 0
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        assert (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) == expected
    (tmp_path / "nyu_test.txt").unlink()
    with pytest.raises(ValueError, match="nyu_test.txt: expected, beside the other"):
        data.labelled("depth", str(tmp_path), data.Framing((240, 320)))
    (tmp_path / "nyu_test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="nyu_test.txt: not a text file that can be read"):
        data.labelled("depth", str(tmp_path), data.Framing((240, 320)))


def bts(root):
    """BTS's layout, its lists where its repository has them, KITTI's beside them."""
    lists = root / "train_test_inputs"
    lists.mkdir(parents=True)
    for part, below, slash in (("train", "sync", "/"), ("test", "official_splits/test", "")):
        photo(root / below / "kitchen_0028b/rgb_00045.jpg", (640, 480))
        millimetres = np.full((480, 640), 1500 if part == "train" else 2500, np.uint16)
        grey(root / below / "kitchen_0028b/sync_depth_00045.png", millimetres)
        photo_, depth = (f"{slash}kitchen_0028b/{n}_00045" for n in ("rgb", "sync_depth"))
        line = f"{photo_}.jpg {depth}.png 518.8579\n"
        (lists / f"nyudepthv2_{part}_files_with_gt.txt").write_text(line)
        kitti = "2011_09_26/image_02/0000000000.png None 721.5377\n"
        (lists / f"eigen_{part}_files_with_gt.txt").write_text(kitti)
    return root


def test_nyu_as_bts_has_it(tmp_path):
    root = bts(tmp_path / "nyu")
    train_, test, _ = data.labelled("depth", str(root), data.PUBLISHED["depth"])
    assert "sync" in train_.entries[0][0].parts and "official_splits" in test.entries[0][0].parts
    frame = train_[0]
    assert float(frame["depths"].max()) == pytest.approx(1.5)
    assert frame["images"].shape == (1, 3, 420, 546)
    # Borders up to multiples of 14 are unknown, and ImageNet's mean
    assert not frame["depths"][:2].any() and not frame["depths"][:, -1].any()
    assert frame["depths"][2, 1] > 0
    assert M.normalise(frame["images"])[0, :, :2].abs().max() < 1e-5
    frame = test[0]
    assert float(frame["depths"].max()) == pytest.approx(2.5)
    assert frame["images"].shape == (2, 3, 490, 644)
    torch.testing.assert_close(frame["images"][1], frame["images"][0].flip(-1))
    inside = (frame["depths"] > 0).nonzero()
    assert inside.amin(0).tolist() == [45, 41] and inside.amax(0).tolist() == [470, 600]
    # One list of the two is an error, and KITTI's are never taken for them
    lists = root / "train_test_inputs"
    (lists / "nyudepthv2_test_files_with_gt.txt").unlink()
    expected = "nyudepthv2_test_files_with_gt.txt: expected, beside the other"
    with pytest.raises(ValueError, match=expected):
        data.labelled("depth", str(root), data.PUBLISHED["depth"])
    (lists / "nyudepthv2_train_files_with_gt.txt").unlink()
    refused = "eigen_train_files_with_gt.txt: not a list that is read here"
    with pytest.raises(ValueError, match=refused):
        data.labelled("depth", str(root), data.PUBLISHED["depth"])


def test_missing_photos_of_a_list_are_named(tmp_path):
    root = bts(tmp_path / "nyu")
    shutil.rmtree(root / "sync")
    train_, _, _ = data.labelled("depth", str(root), data.PUBLISHED["depth"])
    with pytest.raises(ValueError, match="sync/kitchen_0028b/rgb_00045.jpg: no such file"):
        train_[0]


def test_training_sees_random_windows_and_the_label_goes_along(tmp_path):
    """Each pixel's depth says which pixel it was; windows lie within the frame that NYUCrop leaves,
    half of them mirrored."""
    root = bts(tmp_path / "nyu")
    y, x = np.mgrid[:480, :640]
    grey(root / "sync/kitchen_0028b/sync_depth_00045.png", (1000 + x).astype(np.uint16))
    pixels = np.repeat((x * 255 / 639).astype(np.uint8)[..., None], 3, 2)
    Image.fromarray(pixels).save(root / "sync/kitchen_0028b/rgb_00045.jpg", quality=95)
    train_, _, _ = data.labelled("depth", str(root), data.PUBLISHED["depth"], copies=12)
    lefts, mirrored = set(), 0
    for n in range(len(train_)):
        frame = train_[n]
        columns = (1000 * frame["depths"][210, 1:-1]).round() - 1000
        step = columns.diff()
        assert (step == step[0]).all() and abs(step[0]) == 1
        mirrored += bool(step[0] < 0)
        assert columns.min() >= 43 and columns.max() <= 607 and len(columns) == 544
        lefts.add(int(columns.min()))
        shown = frame["images"][0, 0, 210, 1:-1]
        torch.testing.assert_close(shown, columns.float() / 639, atol=0.02, rtol=0)
    assert len(train_) == 12 and len(lefts) > 5 and 2 < mirrored < 10
    assert torch.equal(train_[3]["depths"], train_[3]["depths"])  # a function of n


@pytest.mark.parametrize("kind,test", [("nyu", "test"), ("scannetpp", "val")])
def test_other_lists(tmp_path, kind, test):
    for i, name in enumerate((f"{kind}_train.txt", f"{kind}_{test}.txt")):
        photo(tmp_path / f"a/{i}.jpg", (60, 45))
        grey(tmp_path / f"a/{i}.png", np.full((45, 60), 1000 + i, np.uint16))
        (tmp_path / name).write_text(f"a/{i}.jpg a/{i}.png 518.8\na/gone.jpg None 518.8\n")
    train_, test, _ = data.labelled("depth", str(tmp_path), data.Framing((45, 60)))
    assert float(train_[0]["depths"].max()) == 1.0
    assert float(test[0]["depths"].max()) == pytest.approx(1.001)
    assert (len(train_), len(test)) == (1, 1)
    # Eigen's crop is NYUv2's alone
    inside = 1.0 if kind == "scannetpp" else pytest.approx(0.78, abs=0.02)
    assert float((test[0]["depths"] > 0).float().mean()) == inside
    assert data.farthest(str(tmp_path)) == (20.0 if kind == "scannetpp" else 10.0)


def scannetpp(root):
    for part, scene in (("train", "0a5c013435"), ("val", "7b6477cb95")):
        (root / "splits").mkdir(parents=True, exist_ok=True)
        other = "f" * 10  # which has no labels
        (root / f"splits/nvs_sem_{part}.txt").write_text(f"{scene}\n{other}\n")
        dslr = root / "data" / scene / "dslr"
        photo(dslr / "resized_images/DSC00001.JPG", (96, 64), seed=1)
        photo(dslr / "resized_undistorted_images/DSC00001.JPG", (96, 64), seed=2)
        grey(dslr / "render_depth/DSC00001.png", np.full((64, 96), 15000, np.uint16))
        grey(root / f"semantics/{scene}/DSC00001.JPG.png", stripes([0, 1, 2, 255], 64, 24))
    (root / "top3.txt").write_text("wall\nceiling lamp\nfloor\n")
    return root


def test_scannetpp_itself(tmp_path):
    root = scannetpp(tmp_path / "scannetpp")
    train_, test, _ = data.labelled("depth", str(root), data.Framing((64, 96)))
    assert (len(train_), len(test)) == (1, 1) and "7b6477cb95" in test.entries[0][0].parts
    assert float(test[0]["depths"].min()) == pytest.approx(15) and data.farthest(str(root)) == 20.0
    fisheye = np.asarray(Image.open(root / "data/7b6477cb95/dslr/resized_images/DSC00001.JPG"))
    shown = (test[0]["images"][0].permute(1, 2, 0) * 255).round().numpy()
    assert (shown == fisheye).all()  # labels are as distorted as those photos
    with pytest.raises(ValueError, match="scannetpp: --classes FILE must name its classes"):
        data.labelled("segmentation", str(root), data.Framing((64, 96)))
    names = str(root / "top3.txt")
    framing = data.Framing((64, 96))
    train_, test, found = data.labelled("segmentation", str(root), framing, classes=names)
    assert found == ("wall", "ceiling lamp", "floor") and len(train_) == 1
    assert test[0]["classes"][0, ::24].tolist() == [0, 1, 2, -1]
    # The toolbox undistorted both
    photo(root / "undistorted/7b6477cb95/DSC00001.JPG.jpg", (96, 64), seed=3)
    _, test, _ = data.labelled("segmentation", str(root), framing, classes=names)
    assert "undistorted" in test.entries[0][0].parts
    (root / "top3.txt").write_text("wall\nfloor\n")
    train_, _, _ = data.labelled("segmentation", str(root), framing, classes=names)
    label = "semantics/0a5c013435/DSC00001.JPG.png"
    with pytest.raises(ValueError, match=f"{label}: class 2, where there are 2"):
        train_[0]
    shutil.rmtree(root / "semantics/0a5c013435")
    none = "none of the scenes in .*nvs_sem_train.txt has labels in semantics/SCENE/"
    with pytest.raises(ValueError, match=none):
        data.labelled("segmentation", str(root), framing, classes=names)


@pytest.mark.parametrize("asked,metres", [([], 20.0), (["--max-depth", "80"], 80.0)])
def test_depth_goes_as_far_as_the_data_or_as_told(tmp_path, asked, metres):
    arguments = ["--task", "depth", "--data", str(scannetpp(tmp_path)), *asked]
    settings = E.parse_settings(arguments)
    E.open_frames("depth", settings)
    shelf = shelf_of("x", torch.zeros(1, 2, 2, 2), torch.zeros(1, 3), torch.zeros(1, 4, 4))
    probe = E.new_probe(E.DepthProbe, None, shelf, settings)
    assert float(probe.bins[-1]) == metres and probe.conv.in_channels == 2 + 3
    far = torch.full((1, 4, 4), metres + 1)
    assert len(probe.measure(far, far)["d1"]) == 0  # beyond it is no truth
    # In effect the public code has no gradient loss
    prediction, truth = 1 + torch.rand(1, 9, 9), 1 + torch.rand(1, 9, 9)
    torch.testing.assert_close(probe.loss(prediction, truth), E.sig_loss(prediction, truth))


def test_scannetpp_as_fit3d_prepares_it(tmp_path):
    for part in ("training", "validation"):
        photo(tmp_path / f"images/{part}/a_DSC1.JPG")
        grey(tmp_path / f"annotations/{part}/a_DSC1.png", stripes([0, 1, 100, 7]))
    (tmp_path / "top100.txt").write_text("\n".join(f"name {i}" for i in range(100)))
    options = data.Framing((48, 64)), 0, 0, tmp_path / "top100.txt"
    _, test, names = data.labelled("segmentation", str(tmp_path), *options)
    assert test[0]["classes"][0, ::16].tolist() == [-1, 0, 99, 6] and names[99] == "name 99"


def test_whole_photos_are_slid_over_and_measured_at_their_own_size(tmp_path):
    """A portrait of 375 x 500 (a centre crop would lose 44 %): all of it is seen, labels are not
    scaled."""
    for part in ("training", "validation"):
        photo(tmp_path / f"images/{part}/a.jpg", (375, 500))
        classes = np.arange(500 * 375).reshape(500, 375).astype(np.uint8) % 150
        grey(tmp_path / f"annotations/{part}/a.png", classes)
    train_, test, _ = data.labelled("segmentation", str(tmp_path), data.PUBLISHED["segmentation"])
    frame = test[0]
    assert frame["classes"].shape == (500, 375) and len(frame["images"]) == 2
    assert frame["places"].tolist() == [[t, 0, 512, 512, 0, 518, 518] for t in (0, 171)]
    frame = train_[0]  # borders have no class
    assert frame["classes"].shape == (518, 518)
    assert (frame["classes"][:3] == -1).all() and (frame["classes"][200:300, 200:300] >= 0).any()
    # --image-size still crops both
    centre = data.PUBLISHED["segmentation"]._replace(size=(100, 200))
    _, test, _ = data.labelled("segmentation", str(tmp_path), centre)
    assert test[0]["classes"].shape == (100, 200)


def test_windows_that_one_class_fills_are_drawn_again():
    classes = torch.zeros(40, 400, dtype=torch.int64)
    classes[:, 350:] = torch.arange(50) % 2
    frame = {"images": torch.zeros(3, 40, 400), "classes": classes}
    framing = data.Framing(crop=(40, 40))
    good = 0
    for n in range(20):
        cut = data.random_window(frame, framing, np.random.default_rng(n))["classes"]
        good += float(cut.float().mean()) >= 0.25
    assert good >= 8  # one at random: 2 or 3


def test_normals_are_of_the_middle(tmp_path):
    for i in range(5):
        photo(tmp_path / f"image/{i}.png", (640, 480), i)
        encoded = np.full((480, 640, 3), (127, 127, 255), np.uint8)
        encoded[:, :80] = encoded[:, 560:] = 0
        (tmp_path / "normal").mkdir(exist_ok=True)
        Image.fromarray(encoded).save(tmp_path / f"normal/{i}.png")
    _, test, _ = data.labelled("normals", str(tmp_path), data.PUBLISHED["normals"])
    assert test[0]["images"].shape == (1, 3, 490, 490) and test[0]["normals"].shape == (3, 480, 480)
    assert (test[0]["normals"].square().sum(0) > 0.9).all()


def test_normal_folders(tmp_path):
    for i in range(5):
        photo(tmp_path / f"image/{i}.png")
        normals = np.zeros((48, 64, 3), np.float32)
        normals[:, 32:] = (0.6, 0, -0.8)
        (tmp_path / "normal").mkdir(exist_ok=True)
        if i == 4:
            np.save(tmp_path / "normal/4.npy", normals * 0.9)
        else:
            encoded = normals * 127.5 + 127.5
            encoded[:, :16] = 0  # unknown is grey to some, black to others
            Image.fromarray(encoded.round().astype(np.uint8)).save(tmp_path / f"normal/{i}.png")
    train_, test, _ = data.labelled("normals", str(tmp_path), data.Framing((48, 64)))
    assert (len(train_), len(test)) == (4, 1)
    for frame in (train_[0], test[0]):
        assert not frame["normals"][:, :, :32].any()
        normal = torch.tensor([0.6, 0, -0.8])
        torch.testing.assert_close(frame["normals"][:, 5, 40], normal, atol=0.01, rtol=0)
    for part in ("train", "test"):
        for kind in ("image", "normal"):
            (tmp_path / f"split/{part}/{kind}").mkdir(parents=True)
            for i in range(5 if part == "train" else 2):
                shutil.copy(tmp_path / f"{kind}/0.png", tmp_path / f"split/{part}/{kind}/{i}.png")
    train_, test, _ = data.labelled("normals", str(tmp_path / "split"), data.Framing((48, 64)))
    assert (len(train_), len(test)) == (5, 2)
    (tmp_path / "normal/2.png").unlink()
    with pytest.raises(ValueError, match="normal/2.png: no such file, which 2.png goes with"):
        data.labelled("normals", str(tmp_path), data.Framing((48, 64)))


def test_ade20k(tmp_path):
    for part in ("training", "validation"):
        photo(tmp_path / f"images/{part}/a.jpg")
        grey(tmp_path / f"annotations/{part}/a.png", stripes([0, 1, 150, 7]))
    train_, test, names = data.labelled("segmentation", str(tmp_path), data.Framing((48, 64)))
    assert test[0]["classes"][0, ::16].tolist() == [-1, 0, 149, 6]
    assert len(names) == 150 and len(train_) == 1
    grey(tmp_path / "annotations/training/a.png", stripes([0, 1, 151, 7]))
    with pytest.raises(ValueError, match="training/a.png: class 151, where there are 150"):
        train_[0]
    (tmp_path / "annotations/validation/a.png").unlink()
    with pytest.raises(ValueError, match="annotations/validation/a.png: no such file"):
        data.labelled("segmentation", str(tmp_path), data.Framing((48, 64)))


def test_voc2012(tmp_path):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    photo(tmp_path / "JPEGImages/2007_1.jpg")
    mask = Image.fromarray(stripes([0, 20, 255, 3]), "L").convert("P")
    mask.putdata([v for _ in range(48) for v in np.repeat([0, 20, 255, 3], 16).tolist()])
    (tmp_path / "SegmentationClass").mkdir()
    mask.save(tmp_path / "SegmentationClass/2007_1.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_1\n")
    with pytest.raises(ValueError, match="ImageSets/Segmentation/val.txt: no such file"):
        data.labelled("segmentation", str(tmp_path), data.Framing((48, 64)))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_1\n")
    _, test, names = data.labelled("segmentation", str(tmp_path), data.Framing((48, 64)))
    assert test[0]["classes"][0, ::16].tolist() == [0, 20, -1, 3] and names[20] == "tvmonitor"


def test_normals_from_depth_are_a_rooms_normals():
    frame = data.Room(5).frame(3, 112, 112)
    derived = data.normals_from_depth(frame["depths"], frame["Ks"])
    known = derived.square().sum(0) > 0
    angles = torch.rad2deg((derived * frame["normals"]).sum(0).clamp(-1, 1).acos())[known]
    assert known.float().mean() > 0.8 and angles.median() < 1 and (angles < 5).float().mean() > 0.9


LAYOUTS = "images/ and annotations/ .ADE20K., JPEGImages/ and ImageSets/ .VOC2012., or sem"


@pytest.mark.parametrize(
    "task,message",
    [
        ("correspondence", "found no transforms.json"),
        ("depth", "found no transforms.json"),
        ("normals", "found no transforms.json"),
        ("segmentation", f"expected {LAYOUTS}"),
    ],
)
def test_an_empty_folder_is_told_what_was_expected(task, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"empty.*{message}"):
        evaluate(f"--task {task} --data empty {TEACHER}")


def test_scannet_says_what_is_missing(tmp_path):
    root = scannet(tmp_path / "s")
    (root / "scene0707_00/pose/15.txt").unlink()
    with pytest.raises(ValueError, match="pose/15.txt: not a pose that can be read"):
        data.pairs(str(root), 10, 240, 320, 0)
    np.savetxt(root / "scene0707_00/pose/15.txt", np.diag([2.0, 1, 1, 1]))
    with pytest.raises(ValueError, match="pose/15.txt: not rigid"):
        data.pairs(str(root), 10, 240, 320, 0)
    np.savez(root / "intrinsics.npz", scene0707_00=np.zeros((3, 3)))
    wrong = "ScanNet-1500 were expected .not every K .* focal lengths above 0"
    with pytest.raises(ValueError, match=wrong):
        data.pairs(str(root), 10, 240, 320, 0)
    (root / "intrinsics.npz").unlink()
    expected = "test.npz and intrinsics.npz of ScanNet-1500 were expected"
    with pytest.raises(ValueError, match=expected):
        data.pairs(str(root), 10, 240, 320, 0)


# ------------------------------------------------------------------ the command line

QUICK = {
    "correspondence": "--pairs 2 --matches 50 --image-size 56 56",
    "depth": "--train-frames 8 --test-frames 4 --epochs 2 --image-size 42 56",
    "normals": "--train-frames 8 --test-frames 4 --epochs 2 --image-size 42 56",
    "segmentation": "--train-frames 8 --test-frames 4 --epochs 2 --image-size 42 56",
}


def results(folder, task):
    return json.loads(Path(folder, "evaluation", task, "results.json").read_text())


@pytest.mark.parametrize("task", list(QUICK))
def test_the_newest_runs_student_against_its_teacher(task, capsys):
    train.main([*TRAIN, "--steps", "2", "--name", "old"])
    train.main([*TRAIN, "--steps", "3", "--name", "new"])
    capsys.readouterr()
    evaluate(f"--task {task} {QUICK[task]}")
    out = capsys.readouterr().out
    report = results("runs/new", f"{task}-1")
    names = ["teacher dinov2_vits14", "student runs/new"]
    blind = [] if task == "correspondence" else [E.NO_IMAGE]
    assert list(report["per_seed"]) == names + blind
    assert f"{names[1]} - {names[0]}" in report["summary"]
    assert [len(rows) for rows in report["per_seed"].values()] == [3, 3] + [1] * len(blind)
    assert not any(f"{E.NO_IMAGE} -" in name for name in report["summary"])
    assert out.count(E.RANDOM) == 2
    assert report["warning"] == E.RANDOM and report["random_weights"] is True
    pictures = list(Path("runs/new/evaluation", f"{task}-1").glob("*.png"))
    assert len(pictures) == (2 if task == "correspondence" else 4)
    key = "recall_10px" if task == "correspondence" else E.TASKS[task].probe.best[0]
    value = report["summary"][names[0]][key]
    assert f"{value['mean']:.4f} +- {value['spread']:.4f}" in out and value["spread"] > 0
    assert report["per_seed"][names[0]] != report["per_seed"][names[1]]
    evaluate(f"--task {task} {QUICK[task]} --run runs/new")  # a second run prints the same
    assert results("runs/new", f"{task}-2")["per_seed"] == report["per_seed"]


def test_weights_are_compared_whatever_their_size(monkeypatch, capsys):
    monkeypatch.setitem(M.ARCHITECTURES, "dinov2_vitb14", dict(dim=36, depth=3, heads=2))
    small, large = (M.load_vit(f"dinov2_{n}", "random", 1) for n in ("vits14", "vitb14_reg"))
    save_file(small.state_dict(), "small.safetensors")
    torch.save(large.state_dict(), "large.pth")
    both = "--weights small.safetensors large.pth"
    options = f"{QUICK['correspondence']} --layers 0 1 --norm --seeds 1"
    evaluate(f"--task correspondence {both} {options}")
    report = results("runs", "correspondence-1")
    assert list(report["per_seed"]) == ["small.safetensors", "large.pth"]
    assert not report["random_weights"]
    assert report["summary"]["small.safetensors"]["recall_10px"]["spread"] is None
    with pytest.raises(SystemExit, match="--layers .0, 2.: small.safetensors has blocks 0 to 1"):
        evaluate(f"--task depth {both} --layers 0 2")


def test_quick_linear_probes_take_four_evenly_spaced_blocks():
    quick, paper = (settings_of(f"--task normals --protocol {p}") for p in ("quick", "paper"))
    for depth, four in ((6, [1, 2, 4, 5]), (12, [2, 5, 8, 11]), (2, [0, 1])):  # 12: DINOv2's lin. 4
        vit = SimpleNamespace(blocks=range(depth))
        assert E.layers_of(vit, quick) == four and E.layers_of(vit, paper) == [depth - 1]
        assert E.layers_of(vit, settings_of("--task correspondence")) == [depth - 1]
        assert E.layers_of(vit, settings_of("--task normals --layers 1 0")) == [1, 0]


def test_a_probe_trains_on_every_nth_pixel_alone(tmp_path):
    """What labels say elsewhere changes nothing; what they say there does."""
    found = []
    for row, column in ((0, 0), (1, 2), (1, 1)):
        torch.manual_seed(0)
        features, cls, label = torch.randn(1, 3, 2, 2), torch.randn(1, 3), 1 + torch.rand(28, 28)
        label[row::3, column::3] = 9.0
        shelf = data.Shelf(tmp_path / f"{row}{column}")
        shelf.append(features, cls, label, torch.zeros(1, 7))
        settings = settings_of("--task depth --stride 3 --epochs 3 --max-depth 10")
        (probe,) = E.fit(E.DepthProbe, None, shelf, settings, 0)
        found.append(probe.conv.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_features_are_of_the_layers_asked_for_and_concatenated():
    vits = [M.load_vit("dinov2_vits14", "random", seed) for seed in (1, 2)]
    images = torch.rand(2, 3, 30, 45)
    settings = E.parse_settings(["--task", "depth", "--layers", "0", "1", "--norm"])
    features, classes = E.extract(E.Model("both", vits, None), images, settings)
    resized = F.interpolate(images, (28, 42), mode="bilinear")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (M.IMAGENET_MEAN, M.IMAGENET_STD))
    x = (resized - mean) / std
    expected = [f for vit in vits for f in vit.get_intermediate_layers(x, [0, 1], True, True, True)]
    torch.testing.assert_close(features, torch.cat([f for f, _ in expected], 1).half())
    # The first one's cls tokens alone, of two layers, as the paper's code has it
    torch.testing.assert_close(classes, torch.cat([c for _, c in expected[:2]], 1).half())
    probe = E.DepthProbe(features.shape[1], classes.shape[1])
    assert probe(features.float(), classes.float(), (30, 45)).isfinite().all()
    assert probe.conv.in_channels == 6 * 24
    one, settings = E.Model("one", vits[:1], None), settings_of("--task depth --blocks 1")
    last = E.extract(one, images, settings)[0]
    expected = vits[0].get_intermediate_layers(x, 1, True, norm=False)[0]
    torch.testing.assert_close(last, expected.half())


def test_concat_puts_the_teacher_beside_the_student():
    train.main([*TRAIN, "--steps", "1", "--name", "x"])
    settings = E.parse_settings(["--task", "depth", "--concat"])
    (teacher, student), _ = E.load_models(settings)
    assert len(teacher.vits) == 1 and student.vits[0] is teacher.vits[0]
    assert student.name.endswith("+ first")


@pytest.mark.parametrize("asked", [TEACHER, ""])
def test_without_a_run_the_teacher_alone(asked, capsys, monkeypatch):
    def offline(*_):
        raise M.WeightsNotFound("no network here")

    monkeypatch.setattr(M, "_public_weights", offline)
    evaluate(f"--task correspondence {QUICK['correspondence']} {asked}")
    warning = E.RANDOM if asked else SHIPPED  # offline the shipped teacher stands in
    report = results("runs", "correspondence-1")
    assert list(report["summary"]) == ["dinov2_vits14" if asked else "vit_tiny14"]
    assert capsys.readouterr().out.count(warning) == 2 and report["warning"] == warning


def test_the_final_norm_is_the_protocols_unless_told(monkeypatch):
    used = {}
    monkeypatch.setattr(E, "run_task", lambda task, s, *_: used.update({task: s.norm}))
    evaluate(f"--task all {TEACHER}")
    assert used == {"correspondence": False, "depth": False, "normals": False, "segmentation": True}
    evaluate(f"--task segmentation --no-norm {TEACHER}")
    evaluate(f"--task depth --norm {TEACHER}")
    assert used["segmentation"] is False and used["depth"] is True


def test_weights_that_are_not_numbers_are_not_measured():
    state = M.load_vit("dinov2_vits14", "random").state_dict()
    for number, said in ((torch.nan, "NaN or infinite numbers"), (1e30, "features that are NaN")):
        torch.save({k: torch.full_like(v, number) for k, v in state.items()}, "bad.pth")
        with pytest.raises(SystemExit, match=f"bad.pth: {said}"):
            evaluate(f"--task correspondence {QUICK['correspondence']} --weights bad.pth")


def test_help_needs_no_task(capsys):
    with pytest.raises(SystemExit) as stop:
        E.main(["--help"])
    assert stop.value.code == 0 and "correspondence   the same point" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        E.main([])
    assert "--task is missing" in capsys.readouterr().err


def test_all_does_the_four(monkeypatch):
    done = []

    def run_task(task, settings, *_):
        done.append((task, vars(settings)))

    monkeypatch.setattr(E, "run_task", run_task)
    evaluate(f"--task all {TEACHER} --seeds 2")
    assert [task for task, _ in done] == ["correspondence", "depth", "normals", "segmentation"]
    assert all(s["seeds"] == 2 for _, s in done)
    assert [s["lr"] for t, s in done[1:]] == [E.TASKS[t].settings["lr"].demo for t, _ in done[1:]]


def test_reconstruction_measures_what_it_says(tmp_path, capsys):
    save_small(tmp_path / "small.safetensors")
    few = "--scenes 2 --image-size 64 64"
    evaluate(f"--task reconstruction --weights small.safetensors {few}")
    table = {k: v for k, v in results("runs", "reconstruction-1")["summary"].items()}
    assert list(table) == [
        "nearest context photo",
        "one constant depth",
        "photos alone, small.safetensors",
        "sensor depth",
    ]
    value = lambda row, key: table[row][key]["mean"]  # noqa: E731
    assert value("sensor depth", "psnr") > value("one constant depth", "psnr") > 5
    assert value("sensor depth", "abs_rel") < 0.05 < value("one constant depth", "abs_rel")
    low, high = value("one constant depth", "psnr"), value("sensor depth", "psnr")
    ours = value("photos alone, small.safetensors", "psnr")
    closed = value("photos alone, small.safetensors", "closed")
    assert closed == pytest.approx((ours - low) / (high - low))
    folder = Path("runs/evaluation/reconstruction-1")
    assert (folder / "scene.ply").read_bytes()[:3] == b"ply"
    assert len(list(folder.glob("scene_*.png"))) == 2
    # The nearest photo's error by hand
    view = data.Views(data.Rooms("probe"), 64, 64, seed=0, length=2)
    expected = []
    for sample in (view[0], view[1]):
        target = sample["target"]["extrinsics"][:3, 3]
        nearest = (sample["context"]["extrinsics"][:, :3, 3] - target).norm(dim=1).argmin()
        mse = (sample["context"]["images"][nearest] - sample["target"]["images"]).square().mean()
        expected.append(-10 * math.log10(float(mse)))
    assert value("nearest context photo", "psnr") == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_reconstruction_of_a_capture_without_depth(tmp_path, capsys):
    capture(tmp_path / "scan", depth=False)
    save_small(tmp_path / "small.safetensors")
    few = "--scenes 1 --image-size 32 48"
    evaluate(f"--task reconstruction --weights small.safetensors {few} --data scan")
    assert list(results("runs", "reconstruction-1")["summary"]) == [
        "nearest context photo",
        "photos alone, small.safetensors",
    ]
    assert "None" not in capsys.readouterr().out


def test_frames_of_which_nothing_is_known_do_not_count():
    probe = E.DepthProbe(3)
    frames = [torch.full((4, 4), depth) for depth in (2.0, 0.0, 50.0)]
    # The third is beyond what bins reach
    measured = probe.measure(torch.full((3, 4, 4), 3.0), torch.stack(frames))
    assert measured["abs_rel"].tolist() == [0.5]
    normals = torch.zeros(2, 3, 4, 4)
    normals[1, 2] = -1
    measured = E.NormalsProbe(3).measure(torch.cat([normals, normals[:, :1]], 1), normals)
    assert measured["rmse"].tolist() == [0.0] and measured["d1"].tolist() == [1.0]


def test_where_seeds_have_no_choice_there_is_no_spread(tmp_path, capsys):
    capture(tmp_path / "scan", frames=3)
    evaluate(f"--task correspondence --data scan --image-size 28 56 --matches 20 {TEACHER}")
    assert "there is no spread" in capsys.readouterr().out
    report = results("runs", "correspondence-1")
    assert len(report["per_seed"]["dinov2_vits14"]) == 1
    assert report["summary"]["dinov2_vits14"]["recall_10px"]["spread"] is None


def test_two_reconstructors_in_one_table(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_small(tmp_path / name)
    both = "--weights a.safetensors b.safetensors"
    evaluate(f"--task reconstruction {both} --scenes 1 --image-size 64 64")
    table = results("runs", "reconstruction-1")["summary"]
    seconds = [table[f"photos alone, {n}.safetensors"]["seconds"]["mean"] for n in "ab"]
    assert seconds[0] != seconds[1]
    with pytest.raises(SystemExit, match="names a file twice"):
        E.main(["--task", "reconstruction", "--weights", "a.safetensors", "a.safetensors"])


def test_segmentation_without_a_single_label_says_so(tmp_path):
    for part in ("training", "validation"):
        photo(tmp_path / f"ade/images/{part}/a.jpg")
        grey(tmp_path / f"ade/annotations/{part}/a.png", np.zeros((48, 64), np.uint8))
    with pytest.raises(SystemExit, match="ade: none of the train frames has known classes"):
        few = "--image-size 42 56 --epochs 1 --seeds 1"
        evaluate(f"--task segmentation --data ade {few} {TEACHER}")


@pytest.mark.parametrize("content", [b"", b"PK not a zip"])
def test_broken_archives_are_named(tmp_path, content):
    root = scannet(tmp_path / "s")
    (root / "test.npz").write_bytes(content)
    expected = "test.npz and intrinsics.npz of ScanNet-1500 were expected"
    with pytest.raises(ValueError, match=expected):
        data.pairs(str(root), 10, 240, 320, 0)


def test_rooms_to_train_on_are_not_those_to_test_on():
    with pytest.raises(ValueError, match="there are 5000 rooms each to train and to test"):
        data.labelled("depth", None, data.Framing((28, 28)), 6000, 4)
    train_, test, _ = data.labelled("depth", None, data.Framing((28, 28)), 5000, 5000)
    rooms = [{i for _, i in part.entries} for part in (train_, test)]
    assert [len(r) for r in rooms] == [5000, 5000] and not rooms[0] & rooms[1]


def test_a_single_frame_makes_no_pair(tmp_path):
    with pytest.raises(ValueError, match="scan: no two frames to compare"):
        data.pairs(capture(tmp_path / "scan", frames=1), 10, 28, 56, 0)


NO_STUDENT = "runs/none/student.safetensors: no such file; --run takes"
SMALL = "--image-size must be at least 14, a patch of dinov2_vits14, not 13 56"


@pytest.mark.parametrize(
    "flags,message",
    [
        ("correspondence --image-size 57 56", "must be 1 to 4096, multiples of 4, not 57 56"),
        ("depth --image-size 0 56", "--image-size must be 1 to 4096, not 0 56"),
        ("depth --image-size 56 1000000", "--image-size must be 1 to 4096, not 56 1000000"),
        (f"depth --image-size 13 56 {TEACHER}", SMALL),
        ("depth --layers 1 1", "--layers names a block twice"),
        (f"depth {TEACHER} --concat", "there is only"),
        ("reconstruction --image-size 40 56", "--image-size must be 1 to 4096, multiples of 16"),
        ("depth --epochs 0", "--epochs cannot be 0"),
        ("depth --lr nan", "--lr must be more than 0, not nan"),
        ("depth --weights x x", "--weights names a file twice"),
        ("depth --weights nothing.pth", "nothing.pth: no such file"),
        ("depth --run runs/none", NO_STUDENT),
        ("depth --run x --weights y", "choose one"),
        ("depth --teacher-weights random", "--teacher-weights goes with --teacher"),
        ("all --data x", "every task wants data of its own"),
    ],
)
def test_bad_arguments_get_one_sentence(flags, message):
    with pytest.raises(SystemExit, match=message) as error:
        evaluate(f"--task {flags}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "task,flag",
    [("correspondence", "--epochs"), ("depth", "--matches"), ("reconstruction", "--norm")],
)
def test_a_task_does_not_take_the_others_settings(task, flag, capsys):
    with pytest.raises(SystemExit):
        evaluate(f"--task {task} {flag} 1")
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_weights_that_are_no_dinov2_are_named(tmp_path):
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    with pytest.raises(SystemExit, match="other.safetensors: not a DINOv2"):
        E.main(["--task", "depth", "--weights", "other.safetensors"])
    save_file(M.load_vit("dinov2_vits14", "random").state_dict(), "runs-x.safetensors")
    Path("runs/x").mkdir(parents=True)
    Path("runs-x.safetensors").rename("runs/x/student.safetensors")
    no_settings = "runs/x/student.safetensors: its metadata has no settings"
    with pytest.raises(SystemExit, match=no_settings):
        evaluate("--task depth")


# ------------------------------------------------------------------ feature fields


def field_sample():
    context, held = E.field_views(data.Views(data.Rooms("probe"), 112, 112, seed=0, length=1), 0)
    vit = M.load_vit("vit_tiny14")
    with torch.no_grad():
        return context, held, *(M.patch_tokens(vit, v["photos"]) for v in (context, held)), vit


def test_field_errors_equal_plain_loops():
    context, held, inputs, own, _ = field_sample()
    shown = E.unwarped(context, inputs, held)
    shown["alpha"] = shown["alpha"].clone()
    shown["alpha"][:, :28, :56] = 0.3  # not seen: of 16 x 16 patches the first 4 rows, 8 columns
    row = E.field_errors(shown, own, held)
    found, squares = {"borders": [], "inside": []}, []
    for v in range(2):
        # The nearest context view, by hand
        eyes = [pose[:3, 3] for pose in context["extrinsics"]]
        away = [float((eye - held["extrinsics"][v, :3, 3]).norm()) for eye in eyes]
        nearest = away.index(min(away))
        squares.append(float((context["images"][nearest] - held["images"][v]).square().mean()))
        for y, x in itertools.product(range(16), range(16)):
            if y < 4 and x < 8:
                continue
            a, b = inputs[nearest, :, y, x].double(), own[v, :, y, x].double()
            ids = held["masks"][v, 7 * y : 7 * y + 7, 7 * x : 7 * x + 7].unique()
            found["borders" if len(ids) > 1 else "inside"].append(
                float(a @ b / (a.norm() * b.norm()))
            )
    for name, cosines in found.items():
        assert len(cosines) > 20
        assert row[f"cosine_{name}"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    every = found["borders"] + found["inside"]
    assert row["cosine"] == pytest.approx(sum(every) / len(every), abs=1e-5)
    psnr = [-10 * math.log10(mse) for mse in squares]
    assert row["psnr"] == pytest.approx(sum(psnr) / 2, rel=1e-4)
    assert row["holes"] == pytest.approx(28 * 56 / 112**2)
    # The teacher's own features agree with themselves
    shown["features"] = own
    assert E.field_errors(shown, own, held)["cosine_borders"] == pytest.approx(1, abs=1e-5)
    none = held | {"masks": torch.zeros_like(held["masks"])}
    assert E.field_errors(shown, own, none)["cosine_borders"] is None


def test_a_field_seen_from_a_wrong_camera_is_another_view():
    context, held, inputs, own, vit = field_sample()
    field = E.reconstruct(context, E.SensorDepth(), vit)
    right = E.field_errors(E.rendered(field, held), own, held)
    turn = torch.eye(4)
    turn[:3, :3] = torch.tensor([[0.94, 0, 0.342], [0, 1, 0], [-0.342, 0, 0.94]])  # 20 degrees
    wrong = E.rendered(field, held | {"extrinsics": held["extrinsics"] @ turn})
    wrong = E.field_errors(wrong, own, held)
    assert right["cosine"] > wrong["cosine"] + 0.1 and right["psnr"] > wrong["psnr"] + 2
    assert right["recall_2px"] > wrong["recall_2px"] + 0.15
    beside = E.field_errors(E.unwarped(context, inputs, held), own, held)
    assert right["cosine"] > beside["cosine"] and right["recall_2px"] > beside["recall_2px"]


def test_held_out_views_are_no_context_views(tmp_path):
    for seed in range(4):
        views = data.Views(data.Rooms("probe"), 32, 32, seed=seed, length=2)
        scene, context, target = views.draw(1)
        _, held = E.field_views(views, 1)
        assert held["numbers"][0] == target and len(set(held["numbers"]) | set(context)) == 4
        assert held["photos"].shape == (2, 3, 64, 64)
    capture(tmp_path / "scan", frames=3)  # no fourth photo: one view held out
    with pytest.warns(UserWarning, match="too few"):
        views = data.Views(data.open_scenes(tmp_path / "scan"), 32, 32, length=1)
    assert len(E.field_views(views, 0)[1]["images"]) == 1


def test_the_table_of_fields(tmp_path, capsys):
    few = "--scenes 1 --steps 2 5 --image-size 64 64 --teacher vit_tiny14"
    evaluate(f"--task fields {few}")
    table = results("runs", "fields-1")["summary"]
    assert list(table) == [
        "nearest view, unwarped", "feed-forward", "feed-forward, mean of views",
        "feed-forward, across segments", "sensor depth", "optimised, 2 steps", "optimised, 5 steps",
    ]  # fmt: skip
    value = lambda way, key: table[way][key]["mean"]  # noqa: E731
    ways = list(table)[1:]
    assert value("feed-forward", "seconds") < min(value(way, "seconds") for way in ways[-2:])
    assert value("optimised, 5 steps", "psnr") == value("feed-forward", "psnr")  # geometry stays
    assert value("optimised, 2 steps", "cosine") != value("optimised, 5 steps", "cosine")
    assert Path("runs/evaluation/fields-1/scene_0.png").is_file()
    assert SHIPPED in capsys.readouterr().out
    evaluate(f"--task fields {few} --optimise-geometry")
    moved = results("runs", "fields-2")["summary"]
    before, after = (moved[way]["psnr"]["mean"]
                     for way in ("feed-forward", "optimised with geometry, 5 steps"))  # fmt: skip
    assert value("feed-forward", "psnr") == before != after
    for flags, said in (("--steps 0", "--steps must be at least 1"), ("--image-size 40 40", "32")):
        with pytest.raises(SystemExit, match=said):
            settings_of(f"--task fields {flags}")
