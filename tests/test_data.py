"""Rooms against their geometry, captures against numbers worked by hand, the sampler's bounds."""

import io
import json
import pickle
import resource
import shutil
import struct
import time
import tracemalloc
import warnings
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import CLASSES, HITS, SPLITS, PosedFolder, Room, Rooms, Views, open_scenes, sample_views
from reconstruct import Reconstruction, new_reconstructor
from test_model import build, wall

FIXTURES = ("floor", "wall", "ceiling", "door", "window", "picture", "rug", "light")


def pixels(height, width):
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    return rows, columns


def unproject(frame):
    """World points (3, H, W) of a frame's depth map."""
    K, pose, depth = (frame[k].double().numpy() for k in ("Ks", "extrinsics", "depths"))
    rows, columns = pixels(*depth.shape)
    x, y = (columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1]
    camera = np.stack([x, y, np.ones_like(rows)]) * depth
    return np.einsum("ij,jhw->ihw", pose[:3, :3], camera) + pose[:3, 3, None, None]


def project(points, frame):
    """Columns, rows and depths of world points (3, ...) in a frame."""
    K, pose = frame["Ks"].double().numpy(), frame["extrinsics"].double().numpy()
    from_camera = points - pose[:3, 3].reshape(3, *[1] * (points.ndim - 1))
    x, y, z = np.einsum("ji,j...->i...", pose[:3, :3], from_camera)
    return K[0, 0] * x / z + K[0, 2], K[1, 1] * y / z + K[1, 2], z


def warp(source, target):
    """Where target's depth agrees with source's points: agree (H, W), target row and column."""
    height, width = target["depths"].shape
    u, v, z = project(unproject(source), target)
    inside = (z > 0.05) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    row, column = np.where(inside, v, 0).astype(int), np.where(inside, u, 0).astype(int)
    return inside & (np.abs(target["depths"].numpy()[row, column] / z - 1) < 0.01), row, column


# -------------------------------------------------------------------------------------------------
# Rooms


@pytest.mark.parametrize("shape", HITS)
def test_rays_meet_a_shape_where_its_equation_says(shape):
    inside = {  # the solid as an inequality: f < 0 inside
        "box": lambda p: np.abs(p).max(0) - 1,
        "sphere": lambda p: np.linalg.norm(p, axis=0) - 1,
        "cylinder": lambda p: np.maximum(np.hypot(p[0], p[1]), np.abs(p[2])) - 1,
        "cone": lambda p: np.maximum(np.hypot(p[0], p[1]) - (1 - p[2]) / 2, -1 - p[2]),
    }[shape]
    rng = np.random.default_rng(0)
    for _ in range(8):
        o = rng.normal(size=3)
        o = 3 * o / np.linalg.norm(o)
        d = rng.uniform(-1.5, 1.5, (3, 400)) - o[:, None]
        t, normal = HITS[shape](o.astype(np.float32), d.astype(np.float32))
        walk = np.linspace(0, 2, 4001)
        f = inside(o[:, None, None] + d[..., None] * walk)  # (N, T)
        first = np.where((f < 0).any(1), walk[(f < 0).argmax(1)], np.inf)
        seen = np.isfinite(first) & np.isfinite(t)
        assert (np.isfinite(first) == np.isfinite(t)).mean() > 0.98  # up to rays that graze
        assert 0.1 < seen.mean() < 0.95
        assert np.quantile(np.abs(t[seen] - first[seen]), 0.98) < 1e-3
        hit = (o[:, None] + d * np.where(seen, t, 0))[:, seen]
        out = (normal / np.linalg.norm(normal, axis=0))[:, seen]
        assert np.abs(inside(hit)).max() < 1e-4
        assert ((out * d[:, seen]).sum(0) <= 1e-4).all()
        # f rises by the step along the normal (a cone's f by a little more: it is not a distance)
        rise = (inside(hit + 1e-3 * out) - inside(hit - 1e-3 * out)) / 2e-3
        assert np.quantile(np.abs(rise - 1), 0.9) < (0.13 if shape == "cone" else 0.01)


@pytest.mark.parametrize("seed", [0, 3, 11])
def test_a_room_is_one_world_from_every_view(seed):
    room = Room(seed)
    a, b = room.frame(20, 96, 128), room.frame(30, 96, 128)
    agree, row, column = warp(a, b)
    assert agree.mean() > 0.5
    colour = np.abs(a["images"].numpy() - b["images"].numpy()[:, row, column]).max(0)[agree]
    assert np.median(colour) < 4 / 255
    unwarped = (a["images"] - b["images"]).abs().amax(0).median().item()
    assert np.median(colour) < 0.5 * unwarped
    for key in ("masks", "classes"):
        assert (a[key].numpy() == b[key].numpy()[row, column])[agree].mean() > 0.97
    turn = [f["extrinsics"][:3, :3].numpy() for f in (a, b)]
    normal_a = np.einsum("ij,jhw->ihw", turn[0], a["normals"].numpy())
    normal_b = np.einsum("ij,jhw->ihw", turn[1], b["normals"].numpy())[:, row, column]
    assert ((normal_a * normal_b).sum(0)[agree] > 0.99).mean() > 0.95


@pytest.mark.parametrize("seed", [1, 4])
def test_normals_are_those_of_the_depth(seed):
    frame = Room(seed).frame(5, 150, 200)
    normal, mask = frame["normals"].double().numpy(), frame["masks"].numpy()
    camera = dict(frame, extrinsics=torch.eye(4))
    p = unproject(camera)
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-5
    assert ((normal * p).sum(0) < 0).all()  # towards the camera
    cross = np.cross(p[:, 2:, 1:-1] - p[:, :-2, 1:-1], p[:, 1:-1, 2:] - p[:, 1:-1, :-2], axis=0)
    cross /= np.linalg.norm(cross, axis=0)
    middle = normal[:, 1:-1, 1:-1]
    # Away from edges: one segment and one normal all around
    same = np.ones_like(mask[1:-1, 1:-1], bool)
    for i in range(3):
        for j in range(3):
            same &= mask[1:-1, 1:-1] == mask[i : i - 2 or None, j : j - 2 or None]
            same &= (middle * normal[:, i : i - 2 or None, j : j - 2 or None]).sum(0) > 0.98
    angle = np.degrees(np.arccos(np.clip((cross * middle).sum(0), -1, 1)))[same]
    assert same.mean() > 0.7
    assert np.median(angle) < 0.2 and np.quantile(angle, 0.99) < 4


def room_with(*solids):
    """Room 5 with nothing in it but these: (shape, centre, half, yaw, frame)."""
    room = Room(5)
    plain, colours = data.LOOKS["plain"], ((1, 0, 0), (1, 0, 0), (0, 0, 1))
    room.solids = room.solids[:6] + [
        data.Solid(shape, centre, half, yaw, CLASSES.index("box"), 7 + i, plain, colours, frame)
        for i, (shape, centre, half, yaw, frame) in enumerate(solids)
    ]
    room._stack()
    return room


@pytest.mark.parametrize("shape", ["sphere", "cylinder", "cone"])
def test_normals_of_a_stretched_and_turned_shape(shape):
    frame = room_with((shape, (0.1, 0, 0.8), (0.8, 0.25, 0.5), 0.6, 0.0)).frame(0, 240, 240)
    p = unproject(dict(frame, extrinsics=torch.eye(4)))
    cross = np.cross(p[:, 2:, 1:-1] - p[:, :-2, 1:-1], p[:, 1:-1, 2:] - p[:, 1:-1, :-2], axis=0)
    cross /= np.linalg.norm(cross, axis=0)
    cosine = (cross * frame["normals"].numpy()[:, 1:-1, 1:-1]).sum(0)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    on_it = (frame["masks"] == 7).numpy()[1:-1, 1:-1]
    assert on_it.sum() > 2000
    assert np.median(angle[on_it]) < 0.3 and np.quantile(angle[on_it], 0.9) < 3


def test_paint_turns_with_its_solid():
    c, s = np.cos(0.6), np.sin(0.6)
    room = room_with(("box", (0.1, 0, 0.8), (0.8, 0.25, 0.5), 0.6, 0.1))
    x = np.array([0, 0.65, 0.75, -0.75, 0])
    y = np.full(5, 0.25)
    z = np.array([0, 0.35, 0, 0, 0.45])
    world = np.stack([0.1 + c * x - s * y, s * x + c * y, 0.8 + z])
    normal = np.array([-s, c, 0])[:, None].repeat(5, 1)
    red, _, blue = room.paint(world.astype(np.float32), np.full(5, 6), normal.astype(np.float32))
    assert red.tolist() == [1, 1, 0, 0, 0]
    assert blue.tolist() == [0, 0, 1, 1, 1]  # a frame of 10 cm inside the edges


def test_a_camera_may_stand_within_the_bounds_of_a_large_thing():
    carpet = ("box", (0, 0, 0.01), (3, 3, 0.01), 0.0, 0.0)  # from wall to wall
    frame = room_with(carpet).frame(0, 60, 60)
    low = unproject(frame)[2] < 0.1
    on_carpet = (frame["masks"] == 7).numpy()
    assert low.mean() > 0.2 and on_carpet[low].mean() > 0.95
    assert np.abs(unproject(frame)[2][on_carpet] - 0.02).max() < 2e-3


def test_the_floor_is_at_zero_and_the_ceiling_at_the_top():
    room = Room(2)
    seen = set()
    for i in (0, 30, 60):
        frame = room.frame(i, 90, 90)
        height = unproject(frame)[2]
        for name, z in (("floor", 0), ("ceiling", room.size[2])):
            where = frame["classes"].numpy() == CLASSES.index(name)
            seen |= {name} if where.any() else set()
            assert np.abs(height[where] - z).max(initial=0) < 2e-3
        up = np.einsum("j,jhw->hw", frame["extrinsics"][2, :3].numpy(), frame["normals"].numpy())
        assert np.allclose(up[frame["classes"].numpy() == CLASSES.index("floor")], 1, atol=1e-4)
    assert seen == {"floor", "ceiling"}


def test_another_size_of_the_same_shape_shows_the_same_view():
    small, large = (Room(5).frame(7, h, w) for h, w in ((40, 56), (120, 168)))
    assert torch.allclose(3 * small["Ks"][:2], large["Ks"][:2])
    # With a factor of 3 the middle pixel of each 3 x 3 has the small picture's very ray
    assert torch.allclose(small["depths"], large["depths"][1::3, 1::3], rtol=1e-4)
    assert (small["masks"] == large["masks"][1::3, 1::3]).float().mean() > 0.999
    assert small["Ks"][0, 2] == 28 and small["Ks"][1, 2] == 20
    field = 2 * np.degrees(np.arctan(20 / small["Ks"][1, 1].item()))
    assert 60 <= field <= 75


def test_a_room_is_a_function_of_its_seed():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    rooms = Room(9), Room(9, num_frames=40), Room(10)
    a, b, other = (room.frame(12, 48, 48) for room in rooms)
    for key in a:
        assert torch.equal(a[key], b[key]), key
        assert not torch.equal(a[key], other[key]), key
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    with pytest.raises(IndexError, match="0 to 39, not 40"):
        Room(9, num_frames=40).frame(40, 8, 8)


def test_rooms_hold_8_to_16_things_each_in_its_own_segment():
    counts, names, shapes = set(), set(), set()
    for seed in range(30):
        room = Room(seed)
        labels = {}
        for solid in room.solids:
            assert labels.setdefault(solid.instance, CLASSES[solid.label]) == CLASSES[solid.label]
            shapes.add(solid.shape)
        assert sorted(labels) == list(range(1, len(labels) + 1))
        furniture = [name for name in labels.values() if name not in FIXTURES]
        counts.add(len(furniture))
        names |= set(labels.values())
        assert 8 <= len(furniture) == room.num_objects <= 16
        if seed < 5:
            frame = room.frame(seed, 60, 60)
            drawn = torch.stack([frame["masks"], frame["classes"]], -1).view(-1, 2)
            drawn = drawn.unique(dim=0).tolist()
            assert all(labels[instance] == CLASSES[label] for instance, label in drawn)
            assert len(drawn) > 4
    assert len(counts) > 4
    assert names == set(CLASSES) - {"unlabelled"}
    assert shapes == {"shell", *HITS}


def test_furniture_stands_in_the_room_and_off_the_path():
    for seed in range(25):
        room = Room(seed)
        for solid in room.solids[6:]:
            c, s = abs(np.cos(solid.yaw)), abs(np.sin(solid.yaw))
            x, y, z = solid.half
            reach = np.array([c * x + s * y, s * x + c * y, z])
            low, high = solid.centre - reach, solid.centre + reach
            assert low[2] > -1e-4 and high[2] < room.size[2] + 1e-4
            if CLASSES[solid.label] not in FIXTURES and low[2] < 1e-3:
                assert (np.maximum(-low, high)[:2] < room.size[:2] + 0.01).all()
                away = np.maximum(np.abs(room.eyes[:, :2] - solid.centre[:2]) - reach[:2], 0)
                assert np.hypot(*away.T).min() > 0.25


def test_the_path_moves_smoothly_and_neighbouring_views_overlap():
    for seed in range(6):
        room = Room(seed)
        poses = [room.frame(i, 6, 6)["extrinsics"].double().numpy() for i in range(0, 40)]
        for a, b in zip(poses, poses[1:]):
            step = np.linalg.norm(a[:3, 3] - b[:3, 3])
            angle = np.degrees(np.arccos(np.clip((a[:3, 2] * b[:3, 2]).sum(), -1, 1)))
            assert 0.003 < step < 0.055 and angle < 3.2
            assert np.allclose(a[:3, :3].T @ a[:3, :3], np.eye(3), atol=1e-5)
            assert np.linalg.det(a[:3, :3]) > 0
            assert a[2, 1] < -0.5  # the camera's y points down
        apart = [room.frame(i, 48, 48) for i in (0, 12)]
        assert warp(*apart)[0].mean() > 0.4
        assert apart[0]["depths"].min() > 0.3
        assert 0.15 < apart[0]["images"].mean() < 0.95 and apart[0]["images"].std() > 0.04


def test_splits_share_no_room():
    seeds = [set(SPLITS[name]) for name in SPLITS]
    assert list(SPLITS) == ["train", "val", "probe"] and len(Rooms("train")) == 1_000_000
    assert sum(map(len, seeds)) == len(set.union(*seeds))
    assert Rooms("val")[3].name == f"room{SPLITS['val'][3]}" != Rooms("probe")[3].name
    with pytest.raises(IndexError):
        Rooms("val")[len(Rooms("val"))]
    with pytest.raises(ValueError, match="unknown split 'test'"):
        Rooms("test")


def test_rooms_are_drawn_fast_enough():
    rooms = [Room(seed) for seed in range(4)]
    rooms[0].frame(0, 224, 224)
    start = time.process_time()  # of this process alone: others use the machine
    for room in rooms:
        room.frame(8, 224, 224)
    speed = len(rooms) / (time.process_time() - start)
    print(f"{speed:.1f} images per second")
    assert speed > 1.5  # a guard against falling off a cliff, not a benchmark


# --------------------------------------------------------------------------------------------------
# Captures on disk. Image i has the grey value 10 * i, which tells frames apart.

EYE = np.eye(4).tolist()


def write_capture(folder, count=4, top=None, change=lambda i, frame: frame, size=(40, 30),
                  names="images/{:04d}.png"):  # fmt: skip
    (folder / "images").mkdir(parents=True)
    frames = []
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / names.format(i))
        frames.append(change(i, {"file_path": names.format(i), "transform_matrix": EYE}))
    about = {"fl_x": 50.0, "w": size[0], "h": size[1]} if top is None else top
    about = about | {"frames": frames}
    (folder / "transforms.json").write_text(json.dumps(about))
    return folder


def shade_of(scene, i):
    return round(scene.frame(i, 10, 10)["images"].mean().item() * 255 / 10)


def test_opengl_poses_become_opencv(tmp_path):
    # A camera at (1, 2, 3) looking along world +x with world z up.
    # OpenGL's columns: right -y, up +z, backward -x
    pose = np.array([[0, 0, -1, 1], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]], float)
    own = {"transform_matrix": pose.tolist()}
    scene = PosedFolder(write_capture(tmp_path / "a", change=lambda i, f: f | own))
    got = scene.frame(0, 30, 40)["extrinsics"]
    right, down, forward = [0, -1, 0], [0, 0, -1], [1, 0, 0]
    assert torch.equal(got[:3], torch.tensor([right, down, forward, [1, 2, 3]]).float().T)


def test_intrinsics_of_the_file_and_of_a_frame(tmp_path):
    def change(i, frame):
        return frame | ({"fl_x": 80.0, "fl_y": 90.0, "cx": 19.0, "cy": 16.0} if i == 1 else {})

    scene = PosedFolder(write_capture(tmp_path / "a", change=change))
    nothing = scene.path / "transforms.json"  # null is as good as no value
    about = json.loads(nothing.read_text())
    nothing.write_text(json.dumps(about | dict(cx=None, w=None, camera_angle_x=None, k1=None)))
    # Frame 0 has the file's focal length, and the rest by default
    assert scene.frame(0, 30, 40)["Ks"].tolist() == [[50, 0, 20], [0, 50, 15], [0, 0, 1]]
    assert scene.frame(1, 30, 40)["Ks"].tolist() == [[80, 0, 19], [0, 90, 16], [0, 0, 1]]
    # The photos are half the size that the file speaks of
    twice = {"fl_x": 100, "cx": 42, "cy": 28, "w": 80, "h": 60}
    scene = PosedFolder(write_capture(tmp_path / "b", top=twice))
    assert scene.frame(0, 30, 40)["Ks"].tolist() == [[50, 0, 21], [0, 50, 14], [0, 0, 1]]
    angles = {"camera_angle_x": np.pi / 2, "camera_angle_y": 2 * np.arctan(0.25)}
    scene = PosedFolder(write_capture(tmp_path / "both", top=angles))  # pixels that are not square
    assert np.allclose(scene.frame(0, 30, 40)["Ks"], [[20, 0, 20], [0, 60, 15], [0, 0, 1]])
    scene = PosedFolder(write_capture(tmp_path / "c", top={"camera_angle_x": np.pi / 2}))
    assert np.allclose(scene.frame(0, 30, 40)["Ks"], [[20, 0, 20], [0, 20, 15], [0, 0, 1]])


@pytest.mark.parametrize("height, width", [(48, 48), (30, 90), (120, 40), (60, 100)])
def test_what_is_at_a_point_stays_at_its_projection(tmp_path, height, width):
    """A photo with one bright dot where a world point projects. The file speaks of a photo of twice
    the size, and the depth map has half of the photo's. After scaling and cropping everything must
    still meet at the projection."""
    photo_w, photo_h, fx, fy, cx, cy = 200, 120, 150.0, 140.0, 104.0, 57.0
    turn = np.array([[0.96, 0.0, 0.28], [0.0, 1.0, 0.0], [-0.28, 0.0, 0.96]])
    eye, point = np.array([0.3, -0.2, 0.5]), np.array([-0.85, -0.08, -2.9])
    x, y, z = turn.T @ (point - eye)  # OpenGL axes: y up, looking along -z
    u, v = cx + fx * x / -z, cy - fy * y / -z
    rows, columns = pixels(photo_h, photo_w)
    dot = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 4.0**2))
    folder = tmp_path / "scene"
    for name in ("images", "depth", "instance_segmentation"):
        (folder / name).mkdir(parents=True)
    Image.fromarray((255 * dot).astype(np.uint8)).convert("RGB").save(folder / "images/a.png")
    near = np.hypot(columns - u, rows - v) < 6
    Image.fromarray(near.astype(np.uint8) * 7).save(folder / "instance_segmentation/a.png")
    half = near.reshape(60, 2, 100, 2).any((1, 3))
    millimetres = np.where(half, round(-z * 1000), 0).astype(np.uint16)
    Image.fromarray(millimetres).save(folder / "depth/a.png")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, eye
    about = dict(fl_x=2 * fx, fl_y=2 * fy, cx=2 * cx, cy=2 * cy, w=2 * photo_w, h=2 * photo_h)
    entry = dict(file_path="images/a.png", depth_file_path="depth/a.png")
    about["frames"] = [entry | {"transform_matrix": pose.tolist()}]
    (folder / "transforms.json").write_text(json.dumps(about))

    frame = PosedFolder(folder).frame(0, height, width)
    column, row, depth = project(point, frame)
    rows, columns = pixels(height, width)
    grey = frame["images"].mean(0).double().numpy()
    scale = max(height / photo_h, width / photo_w)
    assert (grey * columns).sum() / grey.sum() == pytest.approx(column, abs=0.06 * max(1, scale))
    assert (grey * rows).sum() / grey.sum() == pytest.approx(row, abs=0.06 * max(1, scale))
    assert set(frame["masks"].unique().tolist()) == {0, 7}
    for found, slack in ((frame["masks"].numpy() == 7, 0.5), (frame["depths"].numpy() > 0, 1.0)):
        assert columns[found].mean() == pytest.approx(column, abs=slack * max(1, scale))
        assert rows[found].mean() == pytest.approx(row, abs=slack * max(1, scale))
    assert frame["depths"].max() == pytest.approx(depth, abs=1e-3)


def test_frames_come_in_natural_order_without_bad_and_missing_ones(tmp_path):
    def change(i, frame):
        return frame | ({"is_bad": True} if i in (2, 5) else {})

    # 0 ... 11, not 0, 1, 10, 11, 2
    folder = write_capture(tmp_path / "a", 12, change=change, names="images/{}.png")
    about = json.loads((folder / "transforms.json").read_text())
    about["frames"].reverse()
    (folder / "transforms.json").write_text(json.dumps(about))
    (folder / "images/7.png").unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scene = PosedFolder(folder)
        assert len(scene) == 9
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(folder) in message and "2 frames marked is_bad" in message
    assert "1 frames without their image" in message
    assert [shade_of(scene, i) for i in range(len(scene))] == [0, 1, 3, 4, 6, 8, 9, 10, 11]


def test_images_are_found_where_other_tools_put_them(tmp_path):
    inner = tmp_path / "scan" / "dslr" / "nerfstudio"  # ScanNet++
    write_capture(inner, 3, change=lambda i, f: f | {"file_path": f["file_path"].split("/")[-1]})
    (inner / "images").rename(inner.parent / "rgb")
    (scene,) = open_scenes(tmp_path / "scan")
    assert scene.name == "scan" and [shade_of(scene, i) for i in range(3)] == [0, 1, 2]
    change = lambda i, f: f | {"file_path": "./" + f["file_path"][:-4]}  # noqa: E731
    blender = write_capture(tmp_path / "lego", 3, change=change)
    (blender / "transforms.json").rename(blender / "transforms_train.json")
    assert shade_of(PosedFolder(blender), 2) == 2


@pytest.mark.parametrize("where", ["here", "above", "scene"])
def test_photos_may_lie_beside_the_capture_or_behind_a_link(tmp_path, monkeypatch, where):
    """What json says stays in the folder above the capture, or in ScanNet++'s scene; whoever
    unpacked it may link to another disk."""
    inner = tmp_path / "scan" / ("dslr/nerfstudio" if where == "scene" else "")
    up = "../../" if where == "scene" else "../"
    change = lambda i, f: f | {"file_path": up + f["file_path"]}  # noqa: E731
    write_capture(inner, 3, change=change)
    (inner / "images").rename(tmp_path / "disk")
    (inner / up / "images").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(inner if where == "here" else tmp_path)
    (scene,) = open_scenes("." if where == "here" else "scan")
    assert [shade_of(scene, i) for i in range(3)] == [0, 1, 2]


def test_digits_of_any_script_and_length_sort():
    names = ["f3", "f20", "f\u00b2", "f" + "1" * 5000, "f" + "2" * 5000, "f\u0663"]
    assert sorted(reversed(names), key=data.natural) == [*names[:2], *names[3:5], *names[2:6:3]]


def test_scenes_are_found_in_folders(tmp_path):
    for name in ("b", "a"):
        write_capture(tmp_path / "many" / "scenes" / name)
        write_capture(tmp_path / "plain" / name)
    (tmp_path / "plain" / "notes").mkdir()
    for below in ("many", "plain"):
        assert [s.name for s in open_scenes(tmp_path / below)] == ["a", "b"]
    assert [s.name for s in open_scenes(tmp_path / "plain" / "b")] == ["b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: found no transforms.json .*scenes"):
        open_scenes(tmp_path / "empty")
    with pytest.raises(ValueError, match="nothing: no such folder"):
        open_scenes(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["{}.png", "{}.jpg.png"])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_segments_keep_their_ids(tmp_path, name, mode):
    scene = write_capture(tmp_path / "a", 2, names="images/{:04d}.jpg")
    folder = scene / "instance_segmentation"
    folder.mkdir()
    ids = np.zeros((30, 40), np.uint16 if mode == "I;16" else np.uint8)
    ids[:, 20:] = 3001 if mode == "I;16" else 201
    for i in range(2):
        mask = Image.fromarray(ids + i)
        if mode == "P":  # colours that no id can be read from
            mask.putpalette([5, 5, 5] * 256)
        assert mask.mode == mode
        mask.save(folder / name.format(f"{i:04d}"))
    opened = PosedFolder(scene)
    assert opened.has_masks
    frame = opened.frame(1, 30, 40)
    assert torch.equal(frame["masks"], torch.from_numpy(ids.astype(np.int64) + 1))
    assert frame["valid"].all()
    (folder / name.format("0001")).unlink()
    opened = PosedFolder(scene)
    with pytest.warns(UserWarning, match="only 1 of 2 frames have a segment mask"):
        assert not opened.has_masks
    assert not opened.frame(0, 30, 40)["masks"].any()


def test_depth_is_in_metres_and_unknown_is_zero(tmp_path):
    own = [{"depth_file_path": "d.png"}, {"depth_file_path": "d.npy"}]
    folder = write_capture(tmp_path / "a", 2, change=lambda i, f: f | own[i])
    metres = np.full((30, 40), 2.5, np.float32)
    metres[:, :20] = 0
    Image.fromarray((metres * 1000).astype(np.uint16)).save(folder / "d.png")
    holes = metres.copy()
    holes[:, :10], holes[:, 10:20] = np.nan, -1
    np.save(folder / "d.npy", holes)
    scene = PosedFolder(folder)
    assert scene.has_depth
    for i in range(2):
        assert np.allclose(scene.frame(i, 30, 40)["depths"], metres)
    about = json.loads((folder / "transforms.json").read_text())
    about["depth_unit_scale_factor"] = 0.0002
    (folder / "transforms.json").write_text(json.dumps(about))
    assert np.allclose(PosedFolder(folder).frame(0, 30, 40)["depths"], metres / 5)
    assert np.allclose(PosedFolder(folder).frame(1, 30, 40)["depths"], metres)
    del about["frames"][0]["depth_file_path"]
    (folder / "transforms.json").write_text(json.dumps(about))
    scene = PosedFolder(folder)
    with pytest.warns(UserWarning, match="only 1 of 2 frames have depth"):
        assert not scene.has_depth
    assert "depths" not in scene.frame(1, 30, 40)


def matrix(value, row=0, column=0):
    pose = np.eye(4)
    pose[row, column] = value
    return pose.tolist()


def top(**change):  # of the file's keys
    return lambda f, j: j.update(change)


def second(**change):  # of the second frame's
    return lambda f, j: j["frames"][1].update(change)


def array(values):  # in place of the second frame's depth
    return lambda f, j: np.save(f / "1.npy", values)


def picture(name, mode, size, *colour):
    form = "TIFF" if mode == "F" else "PNG"
    return lambda f, j: Image.new(mode, size, *colour).save(f / name, format=form)


def depth_picture(mode):
    def change(f, j):
        picture("depth.png", mode, (40, 30), 200)(f, j)
        j["frames"][1]["depth_file_path"] = "depth.png"

    return change


def npy_header(shape):  # and a few bytes
    about = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(about)) + about.encode()
    return lambda f, j: (f / "1.npy").write_bytes(start + bytes(4800))


def png_header(side):  # of a square, and no pixels
    chunks = (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc32(name + data))
        for name, data in chunks
    )


def content(name, change):
    return lambda f, j: (f / name).write_bytes(change((f / name).read_bytes()))


def on_a_bad_disk(f, j):  # the kernel refuses to read byte 0 of one's own memory
    (f / PHOTO).unlink()
    (f / PHOTO).symlink_to("/proc/self/mem")


JSON, PHOTO, MASK = "transforms.json", "images/0001.png", "masks/0001.png"
BROKEN = {  # what to do to a good capture, and what the message must name
    "no JSON": (content(JSON, lambda old: b"{ 'frames': ["), JSON),
    "binary": (content(JSON, lambda old: b"\xff\xfe\x00"), JSON),
    "a list": (content(JSON, lambda old: b"[]"), "transforms.json.*'list'"),
    "no frames": (lambda f, j: j.pop("frames"), "transforms.json.*no 'frames'"),
    "empty frames": (lambda f, j: j["frames"].clear(), JSON),
    "a frame without a path": (
        lambda f, j: j["frames"][1].pop("file_path"),
        "transforms.json.*file_path",
    ),
    "all missing": (
        lambda f, j: [p.unlink() for p in (f / "images").iterdir()],
        "transforms.json.*none",
    ),
    "no matrix": (
        lambda f, j: j["frames"][1].pop("transform_matrix"),
        "transforms.json.*0001.png: not a pose",
    ),
    "null matrix": (second(transform_matrix=None), "transforms.json.*0001.png"),
    "ragged": (second(transform_matrix=[[1, 0], [0]]), "transforms.json.*0001.png"),
    "3 x 3": (second(transform_matrix=np.eye(3).tolist()), "0001.png: not a pose"),
    "words": (second(transform_matrix=[["a"] * 4] * 4), "transforms.json.*0001.png"),
    "NaN": (second(transform_matrix=matrix(np.nan, 1, 3)), "0001.png.*finite"),
    "scaled": (second(transform_matrix=matrix(2.0)), "0001.png: not rigid"),
    "mirrored": (second(transform_matrix=matrix(-1.0)), "0001.png: not rigid"),
    "no focal length": (
        lambda f, j: j.pop("fl_x"),
        "transforms.json.*no focal length.*fl_x or camera_angle_x",
    ),
    "focal length 0": (top(fl_x=0), "transforms.json.*fl_x is 0, no number from 0.001"),
    "a word for cx": (top(cx="middle"), "transforms.json.*cx .*'middle'"),
    "depth unit a word": (
        top(depth_unit_scale_factor="mm"),
        "transforms.json.*depth_unit_scale_factor.*'mm'",
    ),
    "depth path a number": (second(depth_file_path=3), "transforms.json.*'int'"),
    "corrupt image": (content(PHOTO, lambda old: b"nothing"), "0001.png"),
    "cut image": (content(PHOTO, lambda old: old[:60]), "0001.png"),
    "depth missing": (lambda f, j: (f / "1.npy").unlink(), "1.npy: no such file"),
    "depth empty": (content("1.npy", lambda old: b""), "1.npy"),
    "depth of objects": (array(np.array([{}])), "1.npy"),
    "depth with channels": (array(np.ones((30, 40, 3))), "1.npy"),
    "depth of another shape": (array(np.ones((40, 40))), "1.npy.*40 x 40.*40 x 30"),
    "mask in colour": (picture(MASK, "RGB", (40, 30)), "masks/0001.png.*channels"),
    "mask of another shape": (picture(MASK, "L", (40, 10)), "masks/0001.png.*40 x 10"),
    "mask of segments": (
        picture(MASK, "L", (40, 30), 3),
        "masks/0001.png: a validity mask holds 0 and 255, not 3; .*instance_segmentation",
    ),
    "mask path a number": (second(mask_path=3), "transforms.json.*'int'"),
    "unknown lens": (
        top(camera_model="FOV"),
        "transforms.json.*camera model FOV is none of SIMPLE_PINHOLE",
    ),
    "a pinhole that bends": (
        top(camera_model="PINHOLE", k1=0.1),
        "transforms.json.*camera model PINHOLE has no k1",
    ),
    "a lens beyond reason": (
        top(camera_model="OPENCV", k1=-900.0),
        "transforms.json: the camera of 0001.png.*leaves nothing of a photo of 40 x 30",
    ),
    "photo across": (
        picture(PHOTO, "RGB", (30, 40)),
        "0001.png: .*it is 30 x 40 where 40 x 30 is expected",
    ),
    "photo of floats": (picture(PHOTO, "F", (40, 30)), "0001.png: .*floating point"),
    "test frames a number": (top(test_frames=3), JSON),
    "depth unit null": (top(depth_unit_scale_factor=None), f"{JSON}.*unit_scale_factor is None"),
    "PostScript by a photo's name": (
        content(PHOTO, lambda old: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n"),
        "0001.png: an image that cannot be read .cannot identify",
    ),
    "photo that a bad disk holds": (on_a_bad_disk, "0001.png: .*Input/output error"),
    "depth unit beyond float32": (top(depth_unit_scale_factor=1e39), f"{JSON}.*unit_scale.*1e.39"),
    "depth of 8 bits": (depth_picture("L"), "depth.png: .*16-bit PNG or .npy, not .* mode L"),
    "depth of a palette": (depth_picture("P"), "depth.png: .*not .* mode P"),
    "depth of floats": (depth_picture("F"), "depth.png: .*not .* mode F"),
    "depth of complex numbers": (array(np.ones((30, 40), "complex64")), "1.npy.*complex64"),
    "depth of 40 TB": (npy_header((10**7, 10**6)), "1.npy: .*length is greater than file size"),
    "depth of 3.6 GB": (npy_header((30_000, 30_000)), "1.npy: .*greater than file size"),
    "a bomb": (content(PHOTO, lambda old: png_header(30_000)), "0001.png.*900000000 pixels"),
    "nested": (content(JSON, lambda old: b"[" * 100_000), f"{JSON}.*recursion"),
    "moved beyond float32": (second(transform_matrix=matrix(1e39, 0, 3)), "0001.png: not rigid"),
}
for key, value in (  # in float32 these are inf or 0, in Python too long, or no pinhole's
    ("fl_x", True), ("fl_x", 1e39), ("fl_x", 1e-40), ("w", 1e300), ("w", 1e-40), ("cx", 1e39),
    ("cx", 10**400), ("k1", 1e39), ("camera_angle_x", -1), ("camera_angle_x", 69.4),
    ("camera_angle_x", 3.14159), ("camera_angle_y", 0), ("camera_angle_y", 1e-30),
):  # fmt: skip
    BROKEN[f"{key} of {value!r:.8}"] = (
        top(**{key: value}), f"{JSON}: .*{key} is .*, no number from"
    )  # fmt: skip
for key in ("file_path", "depth_file_path", "mask_path"):
    for path in ("/etc/x.png", "../../x.png", "images/../../../x.png"):
        BROKEN[f"{key} {path}"] = second(**{key: path}), f"{JSON}: .*'{path}' lies outside"


@pytest.mark.parametrize("what", BROKEN)
def test_bad_captures_get_one_sentence_that_names_the_file(tmp_path, what):
    own = [{"depth_file_path": "0.npy"}, {"depth_file_path": "1.npy"}]
    folder = write_capture(tmp_path / "scan", 2, change=lambda i, f: f | own[i])
    (folder / "masks").mkdir()
    for i in range(2):
        np.save(folder / f"{i}.npy", np.ones((30, 40), np.float32))
        Image.new("L", (40, 30)).save(folder / f"masks/{i:04d}.png")
    assert not PosedFolder(folder).frame(1, 20, 20)["valid"].any()  # good before, and read
    about = json.loads((folder / "transforms.json").read_text())
    change, named = BROKEN[what]
    original = (folder / "transforms.json").read_text()
    change(folder, about)
    if (folder / "transforms.json").read_bytes() == original.encode():
        (folder / "transforms.json").write_text(json.dumps(about))
    with warnings.catch_warnings(), pytest.raises(ValueError, match=named) as error:
        warnings.simplefilter("ignore")
        PosedFolder(folder).frame(1, 20, 20)
    message = str(error.value)
    assert str(tmp_path) in message and "\n" not in message and len(message) < 400


# --------------------------------------------------------------------------------------------------
# Lenses

LENSES = {
    "SIMPLE_RADIAL": dict(k1=-0.18),
    "RADIAL": dict(k1=0.12, k2=-0.05),
    "OPENCV": dict(k1=-0.2, k2=0.06, p1=0.006, p2=-0.008),
    "OPENCV with k3": dict(k1=0.05, k3=-0.02),
    "OPENCV_FISHEYE": dict(k1=0.03, k2=-0.008, k3=0.002, k4=-0.0005),
}
LINES = (-0.6, -0.25, 0.1, 0.45)  # x, or y, of straight lines, at z = 1


def bend(name, x, y):
    """OpenCV's documentation, written out: from normalised coordinates to those on the photo."""
    k1, k2, k3, k4, p1, p2 = (LENSES[name].get(k, 0.0) for k in data.DISTORTION)
    r = np.hypot(x, y)
    if "FISHEYE" in name:
        t = np.arctan(r)
        d = t * (1 + k1 * t**2 + k2 * t**4 + k3 * t**6 + k4 * t**8)
        return x * d / r, y * d / r
    radial = 1 + k1 * r**2 + k2 * r**4 + k3 * r**6
    return (x * radial + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
            y * radial + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y)  # fmt: skip


def straighten(name, bent_x, bent_y):
    """What `bend` bends to these, by Newton's method with differences."""
    x, y, h = bent_x.copy(), bent_y.copy(), 1e-6
    if "FISHEYE" in name:  # an equidistant lens is a better start
        r = np.hypot(x, y)
        x, y = x / r * np.tan(r), y / r * np.tan(r)
    for _ in range(12):
        ex, ey = (b - w for b, w in zip(bend(name, x, y), (bent_x, bent_y)))
        (ax, ay), (bx, by) = bend(name, x + h, y), bend(name, x, y + h)
        a, c, b, d = ((v - w - e) / h for v, w, e in (
            (ax, bent_x, ex), (ay, bent_y, ey), (bx, bent_x, ex), (by, bent_y, ey)))  # fmt: skip
        x, y = x - (d * ex - b * ey) / (a * d - b * c), y - (a * ey - c * ex) / (a * d - b * c)
    return x, y


def bent_capture(folder, name, w=320, h=240, f=190.0, cx=166.0, cy=117.0):
    """Lines upright in red and level in green, seen through a lens; depth is 3 + x at z = 1."""
    for inner in ("images", "depth", "instance_segmentation"):
        (folder / inner).mkdir(parents=True)
    rows, columns = pixels(h, w)
    x, y = straighten(name, (columns - cx) / f, (rows - cy) / f)
    width = 2.0 / f
    lines = [sum(np.exp(-(((v - c) / width) ** 2) / 2) for c in LINES) for v in (x, y)]
    colours = np.stack([*lines, np.ones_like(x)], -1)
    Image.fromarray((255 * colours.clip(0, 1)).astype(np.uint8)).save(folder / "images/a.png")
    half = x.reshape(h // 2, 2, w // 2, 2).mean((1, 3))
    Image.fromarray((1000 * (3 + half)).astype(np.uint16)).save(folder / "depth/a.png")
    Image.fromarray((1 + (x > 0)).astype(np.uint8)).save(folder / "instance_segmentation/a.png")
    camera = dict(fl_x=f, fl_y=f, cx=cx, cy=cy, w=w, h=h, camera_model=name.split()[0])
    camera |= LENSES[name]
    entry = dict(file_path="images/a.png", depth_file_path="depth/a.png", transform_matrix=EYE)
    (folder / "transforms.json").write_text(json.dumps(camera | {"frames": [entry]}))
    return PosedFolder(folder)


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize("height, width", [(240, 320), (120, 120)])
def test_straight_lines_are_straight(tmp_path, name, height, width):
    """Through each lens to 0.1 pixels, where the intrinsics say; nothing beside the photo shows."""
    frame = bent_capture(tmp_path / "a", name).frame(0, height, width)
    K, images = frame["Ks"].double().numpy(), frame["images"].double().numpy()
    rows, columns = pixels(height, width)
    seen = 0
    for channel, axis, places in ((0, 0, columns), (1, 1, rows)):
        for c in LINES:
            line = K[axis, axis] * c + K[axis, 2]
            if not 9 < line < (width, height)[axis] - 9:
                continue
            near = images[channel] * (np.abs(places - line) < 9)
            centre = (near * places).sum(axis ^ 1) / near.sum(axis ^ 1)  # of every row, or column
            assert np.abs(centre - line)[2:-2].max() < 0.1
            seen += 1
    assert seen >= 5 and images[2].min() > 0.99
    x = (columns - K[0, 2]) / K[0, 0]
    assert np.abs(frame["depths"].numpy() - 3 - x).max() < 4 / 190
    wrong = (frame["masks"].numpy() == 2) != (x > 0)
    assert np.abs(x[wrong]).max(initial=0) < 2 / 190 and 0 < (x > 0).mean() < 1


def test_a_lens_is_needed_for_that(tmp_path):
    """The same photo with its lens taken for a pinhole bends the lines by pixels."""
    file = bent_capture(tmp_path / "a", "OPENCV").path / "transforms.json"
    about = json.loads(file.read_text()) | {"camera_model": "PINHOLE"}
    file.write_text(json.dumps({k: v for k, v in about.items() if k[0] not in "kp"}))
    image = PosedFolder(tmp_path / "a").frame(0, 240, 320)["images"][0].double().numpy()
    columns, line = pixels(240, 320)[1], 190 * 0.45 + 166
    near = image * (np.abs(columns - line) < 9)
    centre = (near * columns).sum(1) / near.sum(1)
    assert np.abs(centre - line).max() > 2


def test_what_no_lens_bends_is_scaled_as_ever(tmp_path):
    rng = np.random.default_rng(0)
    folder = write_capture(tmp_path / "a", 1, top=dict(fl_x=50.0, k1=0.0, camera_model="OPENCV"))
    photo = Image.fromarray(rng.integers(0, 255, (30, 40, 3)).astype(np.uint8))
    photo.save(folder / "images/0000.png")
    small = photo.resize((21, 21), Image.Resampling.BICUBIC, box=(5, 0, 35, 30))
    expected = np.asarray(small, np.float32) / 255
    frame = PosedFolder(folder).frame(0, 21, 21)
    assert np.array_equal(frame["images"].permute(1, 2, 0).numpy(), expected)
    assert frame["Ks"].tolist() == [[35, 0, 10.5], [0, 35, 10.5], [0, 0, 1]]


# --------------------------------------------------------------------------------------------------
# Photos of all kinds


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("w, h", [(40, 30), (30, 40)])
def test_photos_are_turned_where_the_cameras_size_says_so(tmp_path, orientation, w, h):
    """Stored 40 x 30, red at its left. Orientation 6 is to be shown with that at its top."""
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:, :10, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = write_capture(tmp_path / "a", 1, top=dict(fl_x=50.0, w=w, h=h))
    Image.fromarray(stored).save(folder / "images/0000.png", exif=exif)
    if (w, h) == (30, 40) and orientation < 5:
        with pytest.raises(ValueError, match="0000.png: .*it is 40 x 30 where 30 x 40 is expected"):
            PosedFolder(folder).frame(0, h, w)
        return
    red = PosedFolder(folder).frame(0, h, w)["images"][0].numpy()
    sides = dict(left=red[:, :5], right=red[:, -5:], top=red[:5], bottom=red[-5:])
    turned = {5: "top", 6: "top", 7: "bottom", 8: "bottom"}[orientation] if w == 30 else "left"
    assert max(sides, key=lambda side: sides[side].mean()) == turned


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P with transparency", "RGBA", "CMYK",
                                  "I;16", "I"])  # fmt: skip
def test_photos_of_all_modes(tmp_path, mode):
    grey = np.zeros((30, 40), np.uint8)
    grey[:, 20:] = 200 if mode != "1" else 255
    photo = Image.fromarray(grey)
    suffix, options = "png", {}
    if mode in ("I;16", "I"):
        photo = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
        suffix = "png" if mode == "I;16" else "tiff"
    elif mode == "CMYK":
        photo, suffix, options = photo.convert("RGB").convert("CMYK"), "jpg", dict(quality=100)
    else:
        photo = photo.convert(mode.split()[0])
        options = dict(transparency=bytes([255] * 256)) if "with" in mode else {}
    folder = write_capture(tmp_path / "a", 1, names="images/{:04d}." + suffix)
    photo.save(folder / f"images/0000.{suffix}", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = PosedFolder(folder).frame(0, 30, 40)["images"]
    assert np.abs(255 * image.numpy()[:, :, 2:18]).max() < 3
    assert np.abs(255 * image.numpy()[:, :, 22:38] - grey.max()).max() < 3


# --------------------------------------------------------------------------------------------------
# Layouts, in their exact names. Fisheye photos are dark, undistorted ones 100 brighter.

FISHEYE = dict(fl_x=20.0, fl_y=20.0, cx=20.0, cy=15.0, w=40, h=30, k1=0.03, k2=0.0, k3=0.0, k4=0.0,
               camera_model="OPENCV_FISHEYE")  # fmt: skip
PINHOLE = FISHEYE | dict(fl_x=16.0, fl_y=16.0, k1=0.0, camera_model="PINHOLE")
DSC = (1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15)  # two are bad, of test_frames


def scannetpp(root, scene="0a5c013435", photos=("resized_images",), files=("transforms.json",)):
    """ROOT/data/SCENE/dslr/; masks leave the left of a fisheye photo, the right of others."""
    dslr = root / "data" / scene / "dslr"
    (dslr / "nerfstudio").mkdir(parents=True)
    masks = {"resized_images": "resized_anon_masks", "undistorted_images": "undistorted_anon_masks",
             "resized_undistorted_images": "resized_undistorted_masks"}  # fmt: skip
    for folder in photos:
        (dslr / folder).mkdir()
        (dslr / masks[folder]).mkdir()
        fisheye = folder == "resized_images"
        for i in (*DSC, 90):
            shade = 5 * i % 100 + 100 * (not fisheye)
            Image.new("RGB", (40, 30), (shade,) * 3).save(dslr / folder / f"DSC{i:05d}.JPG")
            mask = np.zeros((30, 40), np.uint8)
            mask[:, slice(0, 20) if fisheye else slice(20, 40)] = 255
            Image.fromarray(mask).save(dslr / masks[folder] / f"DSC{i:05d}.png")

    def entry(i):
        return dict(file_path=f"DSC{i:05d}.JPG", mask_path=f"DSC{i:05d}.png", is_bad=i == 3,
                    transform_matrix=matrix(0.1 * i, 0, 3))  # fmt: skip

    for file in files:
        camera = PINHOLE if "undistorted" in file else FISHEYE
        tests = [entry(90)]
        # The toolbox lists the test frames among the others when it undistorts
        frames = [entry(i) for i in DSC] + tests * ("undistorted" in file)
        about = camera | dict(frames=frames, test_frames=tests)
        (dslr / "nerfstudio" / file).write_text(json.dumps(about))
    return dslr


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


@pytest.mark.parametrize("start", ["", "data", "data/0a5c013435", "data/0a5c013435/dslr"])
def test_scannetpp_is_found_from_wherever_one_stands(tmp_path, start):
    scannetpp(tmp_path)
    (tmp_path / "splits").mkdir()
    (scene,) = open_scenes(tmp_path / start)
    assert scene.name == "0a5c013435"
    with pytest.warns(UserWarning, match="json: 1 frames marked is_bad are left out$"):
        assert scene.numbers.tolist() == [i for i in DSC if i != 3]


@pytest.mark.parametrize("folder", [None, "resized_undistorted_images", "undistorted_images"])
def test_scannetpp_pairs_photos_lens_and_masks(tmp_path, folder):
    """With undistorted photos their file and masks; without, the fisheye is undistorted."""
    photos = ("resized_images", folder) if folder else ("resized_images",)
    scannetpp(tmp_path, photos=photos, files=("transforms.json", "transforms_undistorted.json"))
    (scene,) = open_scenes(tmp_path)
    frame = quietly(scene.frame, 0, 30, 40)
    assert len(scene) == len(DSC) - 1  # neither the bad nor the test frame
    assert round(255 * frame["images"].mean().item()) == (105 if folder else 5)
    x = (np.arange(40) + 0.5 - frame["Ks"][0, 2].item()) / frame["Ks"][0, 0].item()
    valid = frame["valid"].numpy()
    if folder:
        assert frame["Ks"][0, 0] == 16 and (valid == (x > 0)).all()
    else:  # the photo's upper edge is at 15 / 20 of its angle's polynomial, and on the image's edge
        angle = np.linspace(0, 1, 100_001)
        edge = np.tan(np.interp(15 / 20, angle * (1 + 0.03 * angle**2), angle))
        assert frame["Ks"][1, 1].item() == pytest.approx(15 / edge, rel=1e-3)
        assert (valid == (x < 0)).all()


@pytest.mark.parametrize(
    "photos, files",
    [
        (("resized_images",), ("transforms_undistorted.json",)),
        (("resized_undistorted_images",), ("transforms.json",)),
        (("undistorted_images",), ("transforms.json",)),
    ],
)
def test_scannetpps_lens_and_photos_are_not_mixed(tmp_path, photos, files):
    dslr = scannetpp(tmp_path, photos=photos, files=files)
    with pytest.raises(ValueError, match="none of its frames.*11 .* photos of another lens"):
        len(open_scenes(tmp_path)[0])
    (dslr / "nerfstudio" / files[0]).rename(dslr / "nerfstudio" / "transforms_train.json")
    with pytest.raises(ValueError, match="transforms_train.json.*of another lens"):
        len(open_scenes(tmp_path)[0])


@pytest.mark.parametrize("beside", ["dslr/nerfstudio", "dslr", "."])
def test_scannetpps_segments_are_found(tmp_path, beside):
    folder = scannetpp(tmp_path).parent / beside / "instance_segmentation"
    folder.mkdir()
    for i in DSC:
        Image.new("L", (40, 30), 40 + i).save(folder / f"DSC{i:05d}.JPG.png")
    (scene,) = open_scenes(tmp_path)
    assert quietly(lambda: scene.has_masks)
    assert (scene.frame(3, 30, 40)["masks"] == 48).all()


@pytest.mark.parametrize("photos, doubt", [
    (("resized_images",), "resized_images"),
    (("resized_images", "undistorted_images"), "undistorted_images"),
    (("undistorted_images",), None),
])  # fmt: skip
def test_ids_that_may_be_of_another_lens_are_not_taken_without_a_word(tmp_path, photos, doubt):
    """Ids of fisheye and of undistorted photos have one name and one size."""
    files = ("transforms.json", "transforms_undistorted.json")
    folder = scannetpp(tmp_path, photos=photos, files=files).parent / "instance_segmentation"
    folder.mkdir()
    for i in DSC:
        Image.new("L", (40, 30), 7).save(folder / f"DSC{i:05d}.JPG.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (scene,) = open_scenes(tmp_path)
        assert scene.has_masks
    said = [str(w.message) for w in caught if "fisheye" in str(w.message)]
    assert len(said) == (doubt is not None)
    if doubt:
        assert said[0].startswith(f"{folder}: ") and said[0].endswith(f"dslr/{doubt}")
    Image.new("L", (40, 34)).save(folder / "DSC00001.JPG.png")  # that of another size is an error
    with pytest.raises(ValueError, match="DSC00001.JPG.png: .*its 40 x 34 pixels do not cover"):
        scene.frame(0, 30, 40)


def test_splits_choose_scenes(tmp_path):
    for scene in ("aa", "bb", "cc"):
        scannetpp(tmp_path, scene)
    split = tmp_path / "nvs_sem_train.txt"
    split.write_text("cc\naa\n\n")
    assert [s.name for s in open_scenes(tmp_path, split)] == ["aa", "cc"]
    split.write_text("aa\ndd\n")
    with pytest.warns(UserWarning, match="nvs_sem_train.txt: 1 of its 2 scenes are not in"):
        assert [s.name for s in open_scenes(tmp_path, split)] == ["aa"]
    split.write_text("dd\n")
    with pytest.raises(ValueError, match="nvs_sem_train.txt: none of its 1 scenes is in"):
        open_scenes(tmp_path, split)
    with pytest.raises(ValueError, match="nothing.txt: no such file"):
        open_scenes(tmp_path, tmp_path / "nothing.txt")


def test_fit3ds_layout(tmp_path):
    """What its preprocessing moves: undistorted photos, their masks and their file."""
    file = "transforms_undistorted.json"
    dslr = scannetpp(tmp_path / "raw", photos=("undistorted_images",), files=(file,))
    scene = tmp_path / "db" / "scenes" / "0a5c013435"
    scene.mkdir(parents=True)
    (dslr / "undistorted_images").rename(scene / "images")
    (dslr / "undistorted_anon_masks").rename(scene / "masks")
    (dslr / "nerfstudio" / file).rename(scene / "transforms_train.json")
    (opened,) = open_scenes(tmp_path / "db")
    frame = quietly(opened.frame, 1, 30, 40)
    assert opened.name == "0a5c013435" and len(opened) == len(DSC) - 1 and not opened.has_masks
    assert frame["Ks"][0].tolist() == [16, 0, 20]
    assert round(255 * frame["images"].mean().item()) == 110
    assert not frame["valid"][:, :20].any() and frame["valid"][:, 20:].all()


@pytest.mark.parametrize("named", [True, False])
def test_what_a_validity_mask_leaves_out_has_no_depth(tmp_path, named):
    def change(i, frame):
        own = {"mask_path": f"hidden/{i}.png"} if named else {}
        return frame | own | {"depth_file_path": "d.npy"}

    folder = write_capture(tmp_path / "a", 2, change=change)
    np.save(folder / "d.npy", np.full((30, 40), 2.0))
    mask = np.full((30, 40), 255, np.uint8)
    mask[:, :10] = 0
    path = folder / ("hidden/1.png" if named else "masks/0001.png.png")
    path.parent.mkdir()
    Image.fromarray(mask).convert("1").save(path)  # one of the two frames has one
    scene = PosedFolder(folder)
    if named:
        with pytest.warns(UserWarning, match="1 frames lack the mask of their mask_path"):
            len(scene)
    whole, masked = (scene.frame(i, 30, 40) for i in range(2))
    assert whole["valid"].all() and (whole["depths"] == 2).all() and not scene.has_masks
    assert torch.equal(masked["valid"], torch.from_numpy(mask > 0))
    assert torch.equal(masked["depths"], 2.0 * masked["valid"])


# Four cameras that COLMAP 4.2 made of real photos: its numbers, world to camera, and those of the
# instant-ngp file of the same photos, camera to world in OpenGL's axes; one world each.
COLMAP = {
    "0001.jpg": (1, [0.72079, 0.056749, -0.689652, 0.04027, 2.570982, -0.765467, 3.332998],
                 [[0.89264, 0.088, 0.44209, 3.16836], [0.44642, -0.03675, -0.89407, -5.47949],
                  [-0.06243, 0.99544, -0.07209, -0.97917]]),
    "0012.jpg": (9, [0.838903, 0.096696, -0.535603, -0.004524, 0.815399, -0.5593, 2.211287],
                 [[0.65178, 0.03056, 0.75779, 4.93333], [0.75693, 0.03602, -0.6525, -3.67364],
                  [-0.04723, 0.99888, 0.00034, -0.69265]]),
    "0030.jpg": (19, [0.995409, 0.02878, -0.091215, 0.003532, -2.178764, -0.26559, 2.68055],
                 [[-0.2294, 0.16718, 0.95887, 5.67396], [0.97107, -0.02781, 0.23717, 0.62566],
                  [0.06632, 0.98553, -0.15596, -0.69716]]),
    "0115.jpg": (50, [0.990779, -0.051521, -0.123371, -0.021965, -3.073569, -1.778545, 0.497611],
                 [[-0.18636, 0.30028, 0.93547, 3.32134], [0.98235, 0.07227, 0.17251, 0.80299],
                  [-0.0158, 0.95111, -0.30845, -1.89328]]),
}  # fmt: skip
OPENCV = [343.657687, 343.606116, 135, 240, 0.0544042, -0.0764641, -0.0011481, -0.0022049]
POINTS = [((0.1, -0.2, 4.0), (1, 9)), ((0.4, 0.1, 6.0), (1, 9, 19)), ((0.0, 0.3, 9.0), (50,))]


def colmap(root, kind="bin", sparse="sparse/0", photos="images", poses=COLMAP):
    """What COLMAP writes, by its documentation; two 2D points with every image."""
    (root / sparse).mkdir(parents=True)
    (root / photos).mkdir()
    images = list(poses.items())[::-1]
    for k, (name, _) in enumerate(images):
        Image.new("RGB", (27, 48), (20 * k,) * 3).save(root / photos / name)
    if kind == "bin":
        cameras = struct.pack("<QiiQQ8d", 1, 1, 4, 270, 480, *OPENCV)
        views, cloud = struct.pack("<Q", len(images)), struct.pack("<Q", len(POINTS))
        for name, (number, pose, _) in images:
            views += struct.pack("<i7di", number, *pose, 1) + name.encode() + b"\0"
            views += struct.pack("<Q", 2) + struct.pack("<2dq", 1.5, 2.5, -1) * 2
        for k, (xyz, track) in enumerate(POINTS):
            cloud += struct.pack("<Q3d3BdQ", k, *xyz, 9, 8, 7, 0.5, len(track))
            cloud += b"".join(struct.pack("<ii", number, 0) for number in track)
    else:
        say = lambda *values: " ".join(map(str, values)) + "\n"  # noqa: E731
        cameras = "# Camera list\n" + say(1, "OPENCV", 270, 480, *OPENCV)
        views = "# Image list\n"
        for k, (name, (number, pose, _)) in enumerate(images):
            views += say(number, *pose, 1, name) + say(*[1.5, 2.5, -1] * (k % 2))
        cloud = "# 3D point list\n" + "".join(
            say(k, *xyz, 9, 8, 7, 0.5, *(v for number in track for v in (number, 0)))
            for k, (xyz, track) in enumerate(POINTS))  # fmt: skip
    for name, content in (("cameras", cameras), ("images", views), ("points3D", cloud)):
        content = content if kind == "bin" else content.encode()
        (root / sparse / f"{name}.{kind}").write_bytes(content)
    return root


@pytest.mark.parametrize("kind", ["bin", "txt"])
@pytest.mark.parametrize("sparse, photos", [
    ("sparse/0", "images"), ("sparse", "images_2"), ("colmap/sparse/0", "images_4"),
])  # fmt: skip
def test_colmap_gives_the_cameras_that_others_give(tmp_path, kind, sparse, photos):
    """Moves are those of the same photos' transforms.json to 1 %, after a similarity."""
    (scene,) = open_scenes(colmap(tmp_path / "fox", kind, sparse, photos))
    assert scene.name == "fox" and not scene.has_depth
    assert scene.numbers.tolist() == [1, 12, 30, 115]
    frame = scene.frame(1, 480, 270)
    assert round(255 * frame["images"].mean().item()) == 40  # of 0012.jpg, the third that is listed
    flip = np.diag([1.0, -1, -1, 1])
    theirs = [np.vstack([m, [0, 0, 0, 1]]) @ flip for _, _, m in COLMAP.values()]
    ours = [scene.frame(i, 48, 27)["extrinsics"].double().numpy() for i in range(4)]
    a, b = (np.array([p[:3, 3] for p in poses]) for poses in (theirs, ours))
    a, b = a - a.mean(0), b - b.mean(0)
    U, S, Vt = np.linalg.svd(a.T @ b)
    turn = Vt.T @ np.diag([1, 1, np.linalg.det(Vt.T @ U.T)]) @ U.T
    a = S.sum() / (a**2).sum() * a @ turn.T
    for i in range(4):
        for j in range(i):
            move = b[i] - b[j]
            assert np.linalg.norm(a[i] - a[j] - move) < 0.01 * np.linalg.norm(move)
            m, n = (p[i][:3, :3].T @ p[j][:3, :3] for p in (ours, theirs))
            assert np.degrees(np.arccos(np.clip((np.trace(m.T @ n) - 1) / 2, -1, 1))) < 0.6
    # The photos are a tenth of the size, and bent
    lens = data.lens_of(scene.shots[0].camera)
    assert lens == (False, 0.0544042, -0.0764641, 0, 0, -0.0011481, -0.0022049)
    assert frame["Ks"][0, 0].item() == pytest.approx(343.657687, rel=0.03)


def test_colmaps_points_are_where_it_says(tmp_path):
    """Its mean error of a point in pixels, which it writes too, follows from its poses and lens as
    they are read here. Two images of COLMAP 4.2's, the points that they alone see, where it found
    them. (Of all 4,692 points of that reconstruction the worst differs by 2e-13.)"""
    pose = [0.873257, 0.087332, -0.479076, -0.016763, 0.275934, -0.483387, 2.137687]
    two = {"0012.jpg": COLMAP["0012.jpg"], "0014.jpg": (10, pose, None)}
    (scene,) = open_scenes(colmap(tmp_path / "a", poses=two))
    for point, error, *found in [
        ([4.378608, 6.003281, 0.91097], 0.013821, (193.8945, 456.2726), (208.2841, 468.0435)),
        ([4.343734, 5.992534, 0.849641], 0.024323, (196.2635, 458.1022), (210.4907, 470.0222)),
        ([1.569879, -0.892708, 2.115653], 0.421015, (108.217, 84.8578), (87.3291, 95.7148)),
        ([3.809144, 5.584256, 1.723218], 0.013041, (151.5624, 441.2911), (162.9524, 450.0984)),
    ]:
        errors = []
        for shot, seen in zip(scene.shots, found):
            x, y, z = (np.linalg.inv(shot.pose) @ [*point, 1])[:3]
            bent = data.distort(data.lens_of(shot.camera), x / z, y / z)
            fx, fy, cx, cy = data.pinhole(shot.camera, 270, 480)
            errors.append(np.hypot(fx * bent[0] + cx - seen[0], fy * bent[1] + cy - seen[1]))
        assert np.mean(errors) == pytest.approx(error, abs=1e-3)


def test_colmaps_points_bound_the_depths(tmp_path):
    (scene,) = open_scenes(colmap(tmp_path / "a"))
    depths = scene.point_depths()
    world = np.array([xyz for xyz, _ in POINTS])
    for i, (number, pose, _) in enumerate(COLMAP.values()):
        seen = [k for k, (_, track) in enumerate(POINTS) if number in track]
        w, x, y, z = pose[:4]
        forward = [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]  # row 3 of R
        assert depths[i] == pytest.approx(world[seen] @ forward + pose[6], abs=1e-4)
    views = Views([scene], 16, 16, min_gap=2, max_gap=40, target="any", length=1)
    near, far = views.point_range()
    poses = [shot.pose for shot in scene.shots]
    ratios = []
    for i, j in ((0, 1), (0, 2), (1, 2)):  # no others are 2 to 40 apart in their names' numbers
        baseline = np.linalg.norm(poses[i][:3, 3] - poses[j][:3, 3])
        ratios += [d / baseline for k in (i, j) for d in depths[k] if d > 0]
    assert 0.8 * min(ratios) <= near <= min(ratios) and max(ratios) <= far <= 1.25 * max(ratios)
    (tmp_path / "a/sparse/0/points3D.bin").unlink()
    views.scenes = open_scenes(tmp_path / "a")
    assert views.point_range() is None


def test_points_are_read_scene_by_scene_and_not_kept(tmp_path, monkeypatch):
    """Of a folder of many captures the points of all would not fit in memory."""
    for name in "abc":
        colmap(tmp_path / name)
    rows, read = data.colmap_rows, []
    monkeypatch.setattr(data, "colmap_rows", lambda file: read.append(file.stem) or rows(file))
    pairs = data.pairs(tmp_path, 100, 16, 16, 0)
    assert len(pairs) == 3 * 6 and "points3D" not in read
    size = len(pickle.dumps(pairs))
    for n, (scene, i, j) in enumerate(pairs.entries):
        numbers = [number for number, _, _ in COLMAP.values()]
        shared = [xyz for xyz, track in POINTS if {numbers[i], numbers[j]} <= {*track}]
        found = pairs[n][0]["points"]
        assert found.dtype == torch.float32 and found.shape == (len(shared), 3)
        assert found.flatten().tolist() == pytest.approx(np.array(shared).flatten(), abs=1e-6)
    assert read.count("points3D") == 3 and len(pickle.dumps(pairs)) == size


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def other_camera(model):
    return lambda f: (f / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 1, model, 270, 480))


def count(name, at, number):  # in place of the one at that byte
    def change(f):
        old = (f / name).read_bytes()
        (f / name).write_bytes(old[:at] + struct.pack("<Q", number) + old[at + 8 :])

    return change


def renamed(f):
    path = f / "images.bin"
    path.write_bytes(path.read_bytes().replace(b"0012.jpg", b"../../0012.jpg"))
    (f.parents[2] / "0012.jpg").write_bytes(b"")


@pytest.mark.parametrize("change, message", [
    (other_camera(6), "cameras.bin.*camera model number 6 is none of"),
    (other_camera(99), "cameras.bin.*camera model number 99 is none of"),
    (lambda f: cut(f / "cameras.bin", 60), "cameras.bin: not COLMAP's cameras .unpack requires"),
    (lambda f: cut(f / "images.bin", 100), "images.bin: not COLMAP's images"),
    (renamed, "images.bin: not COLMAP's images ..../../0012.jpg' lies outside"),
    *((count("images.bin", at, n), "images.bin: not COLMAP's images") for at in (0, 81)
      for n in (2**26, 2**60, 2**64 - 1)),
    *((count("points3D.bin", at, n), "points3D.bin: not COLMAP's points") for at in (0, 51)
      for n in (2**26, 2**60, 2**64 - 1)),
    (lambda f: (f / "images.bin").unlink(), "images.bin: not COLMAP's images .*No such file"),
    (lambda f: shutil.rmtree(f.parent.parent / "images"), "images.bin.*none of its 4 photos is in"),
    (lambda f: cut(f / "points3D.bin", 70), "points3D.bin: not COLMAP's points"),
])  # fmt: skip
def test_a_bad_reconstruction_is_named(tmp_path, change, message):
    change(colmap(tmp_path / "a") / "sparse/0")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as error:
        open_scenes(tmp_path / "a")[0].point_depths()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(error.value)
    assert said.startswith(str(tmp_path)) and "\n" not in said and peak < 2**24


def realestate(root, parts=("train", "test"), frames=14):
    """Two files of two scenes each; photo i of scene k has the grey value 10 i + k."""
    for part in parts:
        (root / part).mkdir(parents=True)
        index = {}
        for file in range(2):
            scenes = []
            for k in range(2):
                cameras, images = np.zeros((frames, 18), np.float32), []
                cameras[:, :4] = 0.5, 0.9, 0.5, 0.45
                for i in range(frames):
                    pose = np.eye(4)
                    pose[:3, :3] = [[0.96, 0, 0.28], [0, 1, 0], [-0.28, 0, 0.96]]
                    pose[:3, 3] = i, 2 * file + k, 0  # camera to world
                    cameras[i, 6:] = np.linalg.inv(pose)[:3].reshape(-1)
                    buffer = io.BytesIO()
                    shade = 10 * i + 2 * file + k
                    Image.new("RGB", (64, 36), (shade,) * 3).save(buffer, "JPEG", quality=100)
                    images.append(torch.tensor(list(buffer.getvalue()), dtype=torch.uint8))
                key = f"{part}{file}{k}"
                index[key] = f"{file:06d}.torch"
                scenes.append(dict(key=key, url="", timestamps=torch.arange(frames) * 33367,
                                   cameras=torch.from_numpy(cameras), images=images))  # fmt: skip
            torch.save(scenes, root / part / f"{file:06d}.torch")
        (root / part / "index.json").write_text(json.dumps(index))
    return root


def test_realestate10k(tmp_path):
    root = realestate(tmp_path / "re10k")
    scenes = open_scenes(root)
    assert [s.name for s in scenes] == ["train00", "train01", "train10", "train11"]
    assert [s.name for s in open_scenes(root / "test")][:1] == ["test00"]
    frame = scenes[3].frame(5, 36, 64)
    assert np.allclose(frame["Ks"], [[32, 0, 32], [0, 32.4, 16.2], [0, 0, 1]])
    assert np.allclose(frame["extrinsics"][:3, 3], [5, 3, 0], atol=1e-5)
    assert np.allclose(frame["extrinsics"][:3, :3], [[0.96, 0, 0.28], [0, 1, 0], [-0.28, 0, 0.96]])
    assert round(255 * frame["images"].mean().item()) == 53 and "depths" not in frame
    views = Views(scenes, 18, 32, length=6)
    for sample in (views[i] for i in range(6)):
        shade = 255 * sample["target"]["images"].mean().item()
        number = int(sample["scene"][-2]) * 2 + int(sample["scene"][-1])
        assert round(shade) == 10 * sample["frames"][-1] + number
        assert "depths" not in sample["target"]
    split = tmp_path / "split.txt"
    split.write_text("train10\n")
    assert [s.name for s in open_scenes(root, split)] == ["train10"]


def test_a_short_scene_of_realestate10k_is_passed_over(tmp_path):
    root = realestate(tmp_path, ("train",), frames=2)
    with pytest.raises(ValueError, match="train.*: 2 context views and a target .* need 3 frames"):
        Views(open_scenes(root), 18, 32, length=1)[0]


def other_scene(f):
    scene = {"key": "train00", "cameras": torch.ones(2, 18), "images": []}
    torch.save([scene], f / "000000.torch")


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "index.json").unlink(), "index.json: not the index of RealEstate10K's files"),
    (lambda f: (f / "index.json").write_text("[1]"), "index.json: not the index"),
    (lambda f: (f / "index.json").write_text("{}"), "index.json: .*it lists no scenes"),
    (lambda f: (f / "index.json").write_text('{"other": "000000.torch"}'),
     "000000.torch: .*scene other .no 'other'"),
    (lambda f: (f / "index.json").write_text('{"train00": "../../0.torch"}'),
     "index.json: .*'../../0.torch' lies outside"),
    (lambda f: (f / "000000.torch").unlink(), "000000.torch: not RealEstate10K's file of scenes"),
    (lambda f: (f / "000000.torch").write_bytes(b"x"), "000000.torch: not RealEstate10K's file"),
    (other_scene, "000000.torch: not .* scene train00 .its cameras are .2, 18., its images 0"),
])  # fmt: skip
def test_a_bad_file_of_realestate10k_is_named(tmp_path, change, message):
    change(realestate(tmp_path, ("train",)) / "train")
    with pytest.raises(ValueError, match=message) as error:
        open_scenes(tmp_path)[0].frame(0, 18, 32)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_thousand_scenes_open_at_once(tmp_path):
    """1,000 scenes of 300 frames, files linked: 15 s of the processor and 1 GiB at most."""
    dslr = scannetpp(tmp_path / "one")
    about = json.loads((dslr / "nerfstudio/transforms.json").read_text())
    (tmp_path / "photos").mkdir()
    entries = []
    for i in range(300):
        entries.append(about["frames"][0] | {"file_path": f"DSC{i:05d}.JPG"})
        (tmp_path / f"photos/DSC{i:05d}.JPG").hardlink_to(dslr / "resized_images/DSC00001.JPG")
    (tmp_path / "all.json").write_text(json.dumps(about | {"frames": entries}, indent=4))
    for k in range(1000):
        folder = tmp_path / f"all/data/{k:010x}/dslr/nerfstudio"
        folder.mkdir(parents=True)
        (folder / "transforms.json").hardlink_to(tmp_path / "all.json")
        (folder.parent / "resized_images").symlink_to(tmp_path / "photos")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    scenes = open_scenes(tmp_path / "all")
    sample = quietly(lambda: Views(scenes, 14, 14, length=1)[0])
    spent = time.process_time() - started
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{spent:.1f} s, {more / 2**10:.0f} MiB")
    assert len(scenes) == 1000 and len(scenes[999]) == 299 and len(sample["frames"]) == 3
    assert spent < 15 and more < 2**20


# -------------------------------------------------------------------------------------------------
# The sampler


@given(st.integers(3, 200), st.integers(2, 15), st.integers(0, 15), st.integers(2, 5),
       st.integers(0, 2**32))  # fmt: skip
def test_sampled_views_keep_their_bounds(frames, least, more, num_context, seed):
    most, rng = least + more, np.random.default_rng(seed)
    if min(least, most, frames - 1) < num_context:
        with pytest.raises(ValueError, match=f"{num_context} context views"):
            sample_views(frames, rng, num_context, least, most)
        return
    context, target = sample_views(frames, rng, num_context, least, most)
    assert len(context) == num_context and context == sorted(set(context))
    assert 0 <= context[0] < target < context[-1] < frames and target not in context
    assert min(least, frames - 1) <= context[-1] - context[0] <= most
    assert max(np.diff(context)) - min(np.diff(context)) <= 1  # spread evenly


def test_every_gap_and_target_comes_up():
    rng = np.random.default_rng(0)
    drawn = [sample_views(30, rng) for _ in range(2000)]
    assert {c[1] - c[0] for c, _ in drawn} == {8, 9, 10, 11, 12}
    assert {t - c[0] for c, t in drawn} == set(range(1, 12))
    assert {c[0] for c, _ in drawn} == set(range(22))


def test_a_sample_is_what_its_frames_show():
    views = Views(Rooms("train"), 24, 32, num_context=3, seed=5, length=10)
    a, b = views[3], views[4]
    again = Views(Rooms("train"), 24, 32, num_context=3, seed=5, length=500)[3]
    other = Views(Rooms("train"), 24, 32, num_context=3, seed=6, length=10)[3]
    assert a["scene"] == again["scene"]
    assert torch.equal(a["target"]["images"], again["target"]["images"])
    assert len({a["scene"], b["scene"], other["scene"]}) == 3
    room = Room(int(a["scene"].removeprefix("room")))
    *context, target = a["frames"].tolist()
    for key in ("images", "extrinsics", "Ks", "depths", "masks"):
        assert torch.equal(a["target"][key], room.frame(target, 24, 32)[key])
        shown = torch.stack([room.frame(i, 24, 32)[key] for i in context])
        assert torch.equal(a["context"][key], shown)
    assert a["has_masks"].item() is True
    batch = torch.utils.data.default_collate([a, b])
    assert torch.equal(batch["context"]["images"][1], b["context"]["images"])
    assert batch["scene"] == [a["scene"], b["scene"]]
    assert batch["context"]["depths"].shape == (2, 3, 24, 32)
    assert batch["has_masks"].tolist() == [True, True]
    with pytest.raises(IndexError):
        views[10]


def test_views_of_captures(tmp_path):
    deep = lambda i, f: f | {"depth_file_path": "d.npy"}  # noqa: E731
    with_depth = write_capture(tmp_path / "deep", 14, change=deep)
    np.save(with_depth / "d.npy", np.full((30, 40), 2, np.float32))
    write_capture(tmp_path / "flat", 14)
    scenes = open_scenes(tmp_path)
    with pytest.warns(UserWarning, match="flat .*no depth"):
        views = Views(scenes, 12, 16, length=40)
    samples = [views[i] for i in range(40)]
    assert {s["scene"] for s in samples} == {"deep", "flat"}
    for sample in samples:
        depth = 2 if sample["scene"] == "deep" else 0  # unknown
        assert (sample["target"]["depths"] == depth).all()
        assert sample["has_masks"].item() is False
        assert 8 <= sample["frames"][1] - sample["frames"][0] <= 12
        grey = sample["target"]["images"].mean().item() * 255 / 10
        assert round(grey) == sample["frames"][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (Views(scenes[:1], 12, 16, length=1)[0]["context"]["depths"] == 2).all()
    assert "depths" not in Views(scenes[1:], 12, 16, length=1)[0]["context"]


def test_short_captures(tmp_path):
    sizes = {"five": 5, "two": 2}
    five, two = (PosedFolder(write_capture(tmp_path / name, n)) for name, n in sizes.items())
    with pytest.warns(UserWarning, match="five: 5 frames are too few"):
        views = Views([five], 12, 16, length=20)
    assert {tuple(views[i]["frames"][:2].tolist()) for i in range(20)} == {(0, 4)}
    assert {views[i]["frames"][2].item() for i in range(20)} == {1, 2, 3}
    with pytest.raises(ValueError, match="two: .*there are 2,"):
        Views([two], 12, 16, length=1)
    with pytest.raises(ValueError, match="min_gap"):
        Views([five], 12, 16, min_gap=5, max_gap=3, length=1)


def test_rooms_are_drawn_as_they_always_were():
    """Golden: the random numbers are asked for in the same order, so that runs can be compared."""
    drawn = [sample_views(120, np.random.default_rng([0, i])) for i in range(4)]
    assert drawn == [([68, 80], 74), ([97, 107], 106), ([8, 20], 12), ([98, 108], 107)]
    numbers = Room(0).numbers
    drawn = [sample_views(numbers, np.random.default_rng([3, i]), 3, 4, 9) for i in range(4)]
    assert drawn == [([9, 13, 17], 11), ([28, 32, 37], 34), ([2, 6, 11], 7), ([11, 13, 16], 12)]


@given(st.sets(st.integers(0, 60), min_size=5, max_size=40), st.integers(2, 4),
       st.sampled_from(["between", "any"]), st.integers(0, 999))  # fmt: skip
def test_dropped_frames_bring_no_distant_ones_together(numbers, num_context, target, seed):
    """Gaps are counted in numbers, whichever frames are there; else the largest gap is taken."""
    numbers, least, most = sorted(numbers), 6, 9
    others, rng = num_context - 2 + (target == "between"), np.random.default_rng(seed)
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 + others :]]
    gaps = {b - a for a, b in pairs if b - a <= most}
    if not gaps:
        with pytest.raises(ValueError, match=f"there are {len(numbers)}, numbered"):
            sample_views(numbers, rng, num_context, least, most, target)
        return
    context, shown = sample_views(numbers, rng, num_context, least, most, target)
    gap = numbers[context[-1]] - numbers[context[0]]
    assert gap in gaps and (gap >= least or gap == max(gaps))
    assert len(set(context)) == num_context and context == sorted(context)
    assert context[0] <= shown <= context[-1]
    if target == "between":
        assert shown not in context


def test_any_target_may_be_a_context_view():
    """As in the paper's code 2 of the 9 frames from the first to the last are context frames."""
    rng = np.random.default_rng(0)
    drawn = [sample_views(30, rng, 2, 8, 8, "any") for _ in range(900)]
    assert {t - c[0] for c, t in drawn} == set(range(9))
    assert 150 < sum(t in c for c, t in drawn) < 250
    with pytest.raises(ValueError, match="the target is between the .* views or any, not 'all'"):
        Views(Rooms("train"), 8, 8, target="all", length=1)


def test_views_are_drawn_along_the_numbers_of_the_names(tmp_path):
    """DSC 1 to 3 and 7 to 15: never 3 with 7 to 11 as if they were neighbours."""
    scannetpp(tmp_path)
    views = quietly(lambda: Views(open_scenes(tmp_path), 14, 21, min_gap=4, max_gap=5, length=60))
    numbers = views.scenes[0].numbers
    seen = set()
    for i in range(60):
        _, context, target = views.draw(i)
        seen.add(tuple(numbers[context].tolist()))
        assert numbers[context[0]] < numbers[target] < numbers[context[1]]
    assert {b - a for a, b in seen} == {4, 5} and (2, 7) not in seen and (7, 11) in seen
    sample = views[0]
    assert sample["context"]["valid"].dtype == torch.bool and not sample["context"]["valid"].all()


def test_numbers_that_do_not_rise_are_not_counted(tmp_path):
    def numbers(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "images").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 3)).save(folder / "images" / name)
        frames = [dict(file_path=f"images/{name}", transform_matrix=EYE) for name in names]
        (folder / "transforms.json").write_text(json.dumps(dict(fl_x=4.0, frames=frames)))
        return PosedFolder(folder).numbers.tolist()

    assert numbers("frame_2.png", "frame_10.png", "frame_11.png") == [2, 10, 11]
    assert numbers("a_1_007.png", "a_1_009.png") == [7, 9]
    assert numbers("a.png", "b_7.png", "c_9.png") == [0, 1, 2]
    assert numbers("cam1_5.png", "cam2_4.png") == [0, 1]
    assert numbers("a_\u0663.png", "a_\u0664.png") == [0, 1]
    assert numbers(f"{'1' * 30}.png", f"{'2' * 30}.png") == [int("1" * 18), int("2" * 18)]


def test_a_scene_without_enough_frames_is_left_out(tmp_path):
    two, many = (PosedFolder(write_capture(tmp_path / str(n), n)) for n in (2, 14))
    with pytest.warns(UserWarning, match="2: .* need 3 frames .*1 of 2 scenes are left out"):
        views = Views([two, many], 12, 16, length=9)
    assert {views[i]["scene"] for i in range(9)} == {"14"}


@pytest.mark.parametrize("side", ["context", "target"])
def test_masked_pixels_carry_no_gaussian_and_no_loss(side):
    """The method on a painted wall, half of it masked out."""
    batch = wall()
    shape = batch[side]["images"].shape
    valid = (torch.arange(shape[-1]) >= shape[-1] // 2).expand(*shape[:-3], *shape[-2:])
    hidden = {**batch, side: batch[side] | {"valid": valid}}
    method = build().eval()
    whole, drawn = (method(b)[2] for b in (batch, hidden))
    assert not whole["holes"].any()
    if side == "context":
        opacities = drawn["gaussians"].opacities.view_as(valid)
        assert (opacities[valid] == 1).all() and (opacities[~valid] == 0).all()
    else:
        columns = drawn["holes"].shape[-1]
        assert drawn["holes"][..., : columns // 2].all()
        assert not drawn["holes"][..., columns // 2 + 1 :].any()
        assert torch.equal(drawn["gaussians"].opacities, whole["gaussians"].opacities)


def test_masked_pixels_are_no_error_of_a_rendering():
    """A reconstructor's loss is of valid pixels, whatever is painted over the others."""
    batch = wall(H=64, W=96)
    network = Reconstruction(new_reconstructor(), 3.0, 50.0, 0.0)
    valid = (torch.arange(96) >= 40).expand(1, 64, 96)
    painted = torch.where(valid[:, None], batch["target"]["images"], 1.0)
    with torch.no_grad():
        photo = network(batch)[2]["photo"]
        targets = [batch["target"] | {"images": images, "valid": valid}
                   for images in (batch["target"]["images"], painted)]  # fmt: skip
        losses = [float(network({**batch, "target": target})[0]) for target in targets]
    error = (photo - batch["target"]["images"]).square().mean(1)[valid].mean()
    assert losses[0] == losses[1] == pytest.approx(float(error), rel=1e-4)


# -------------------------------------------------------------------------------------------------
# Single photos and crops


def test_crops_say_where_they_overlap(monkeypatch):
    """On a photo of its own coordinates each pixel of the first crop is found in the second."""
    monkeypatch.setattr(data, "jitter", lambda photo, rng: photo)
    rows, columns = (torch.arange(90) + 0.5) / 90, (torch.arange(120) + 0.5) / 120
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    crops = data.Crops([torch.stack([x, y, 0 * x])], 56, warp=1.0, length=12)
    compared = 0
    for index in range(12):
        sample = crops[index]
        first, second = sample["crops"]
        at = (torch.arange(56) + 0.5) / 56 * 2 - 1
        here = torch.stack([at.expand(56, 56), at[:, None].expand(56, 56)], -1)
        there = here @ sample["first_to_second"][:, :2].T + sample["first_to_second"][:, 2]
        inside = there.abs().amax(-1) < 0.95
        found = torch.nn.functional.grid_sample(second[None], there[None], align_corners=False)[0]
        a, b = found[:2, inside], first[:2, inside]
        torch.testing.assert_close(a, b, rtol=0, atol=0.012)  # a pixel
        compared += int(inside.sum())
    assert compared > 3000


def test_crops_are_a_function_of_seed_and_index():
    photos = [torch.rand(3, 60, 80) for _ in range(3)]
    a, b = (data.Crops(photos, 28, seed=4, length=5) for _ in range(2))
    b[0], b[1]
    for key in ("crops", "first_to_second"):
        assert torch.equal(a[3][key], b[3][key])
        assert not torch.equal(a[3][key], data.Crops(photos, 28, seed=5, length=5)[3][key])
    with pytest.raises(IndexError, match="sample 5 of 5"):
        a[5]


def test_crops_show_the_share_that_is_asked_for():
    crops = data.Crops([torch.rand(3, 60, 80)], 28, (0.2, 0.3), 1.0, length=30)
    sides = torch.stack([crops[i]["windows"][:, :, :2].det().abs().sqrt() for i in range(30)])
    assert 0.2 <= sides.min() < 0.22 and 0.28 < sides.max() <= 0.3


def test_crops_without_warp_are_upright():
    for warp in (0.0, 1.0):
        crops = data.Crops([torch.rand(3, 60, 80)], 28, warp=warp, length=5)
        windows = torch.stack([crops[i]["windows"] for i in range(5)])[..., :2]  # [5, 2, 2, 2]
        upright = torch.diag_embed(windows[..., 0, :1].expand(-1, -1, 2))
        assert torch.allclose(windows, upright) == (warp == 0)


def test_photos_of_a_folder_and_below(tmp_path):
    for name, size in (("b.png", (80, 40)), ("deep/er/a.JPG", (50, 50))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    photos = data.Photos(tmp_path, 28, 42)
    assert [f.name for f in photos.files] == ["b.png", "a.JPG"] and photos[1].shape == (3, 28, 42)
    assert (photos[0] - torch.tensor([200, 100, 50]).view(3, 1, 1) / 255).abs().max() < 0.02
    with pytest.raises(ValueError, match="notes.*: no photos"):
        data.Photos(tmp_path / "notes.txt", 28, 42)
    deep = np.full((40, 80), 30_000, np.uint16)  # 16 bit, which must not be cut off at white
    Image.fromarray(deep).save(tmp_path / "c.png")
    assert (data.Photos(tmp_path, 28, 42)[1] - 30_000 / 65_535).abs().max() < 0.01
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    with pytest.raises(ValueError, match="broken.jpg: an image that cannot be read"):
        data.Photos(tmp_path, 28, 42)[1]  # b, broken, c, deep/er/a


def test_photos_of_rooms_are_their_frames():
    photos = data.Photos(None, 24, 32, 20, "val")
    first = photos[9].clone()
    room = data.Rooms("val")[1]
    frames = (room.frame(i, 24, 32)["images"] for i in range(len(room)))
    assert any((frame - first).abs().max() < 0.003 for frame in frames)
    assert torch.equal(photos[9], first) and len(photos) == 20


def test_how_fast_a_capture_loads_is_a_commands_output(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock, 9.0))
    data.main("--height 8 --width 10 --workers 0 --samples 6".split())
    # Two context views and a target each
    assert capsys.readouterr().out == "4.5 images of 8 x 10 a second by 0 processes\n"
    with pytest.raises(SystemExit, match=f"^{tmp_path}/nothing: "):
        data.main([str(tmp_path / "nothing"), "--workers", "1"])
    for flag, message in (
        ("--samples=0", "--samples at least 1"), ("--width=1000000", "--width must be 1 to 4096"),
        ("--workers=100000", "--workers must be 0 to 256"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            data.main([flag])
