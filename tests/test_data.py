"""Rooms against their own geometry, captures against numbers worked out by hand, and the sampler's bounds."""

import json
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import CLASSES, HITS, SPLITS, PosedFolder, Room, Rooms, Views, open_scenes, sample_views

FIXTURES = ("floor", "wall", "ceiling", "door", "window", "picture", "rug", "light")


def pixels(height, width):
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    return rows, columns


def unproject(frame):
    """World points (3, H, W) of a frame's depth map."""
    K, pose, depth = (frame[k].double().numpy() for k in ("Ks", "extrinsics", "depths"))
    rows, columns = pixels(*depth.shape)
    camera = np.stack([(columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1], np.ones_like(rows)]) * depth
    return np.einsum("ij,jhw->ihw", pose[:3, :3], camera) + pose[:3, 3, None, None]


def project(points, frame):
    """Columns, rows and depths of world points (3, ...) in a frame."""
    K, pose = frame["Ks"].double().numpy(), frame["extrinsics"].double().numpy()
    x, y, z = np.einsum("ji,j...->i...", pose[:3, :3], points - pose[:3, 3].reshape(3, *[1] * (points.ndim - 1)))
    return K[0, 0] * x / z + K[0, 2], K[1, 1] * y / z + K[1, 2], z


def warp(source, target):
    """Where target's depth agrees with source's points: (agree (H, W), target row, target column)."""
    height, width = target["depths"].shape
    u, v, z = project(unproject(source), target)
    inside = (z > 0.05) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    row, column = np.where(inside, v, 0).astype(int), np.where(inside, u, 0).astype(int)
    return inside & (np.abs(target["depths"].numpy()[row, column] / z - 1) < 0.01), row, column


# ---------------------------------------------------------------------------------------------------------
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
    colours = (1, 0, 0), (1, 0, 0), (0, 0, 1)
    room.solids = room.solids[:6] + [
        data.Solid(shape, centre, half, yaw, CLASSES.index("box"), 7 + i, "plain", colours, frame)
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
    angle = np.degrees(np.arccos(np.clip((cross * frame["normals"].numpy()[:, 1:-1, 1:-1]).sum(0), -1, 1)))
    on_it = (frame["masks"] == 7).numpy()[1:-1, 1:-1]
    assert on_it.sum() > 2000
    assert np.median(angle[on_it]) < 0.3 and np.quantile(angle[on_it], 0.9) < 3


def test_paint_turns_with_its_solid():
    c, s = np.cos(0.6), np.sin(0.6)
    room = room_with(("box", (0.1, 0, 0.8), (0.8, 0.25, 0.5), 0.6, 0.1))
    local = np.array([[0.0, 0.25, 0.0], [0.65, 0.25, 0.35], [0.75, 0.25, 0.0], [-0.75, 0.25, 0.0], [0.0, 0.25, 0.45]])
    world = np.stack([0.1 + c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], 0.8 + local[:, 2]])
    normal = np.array([-s, c, 0])[:, None].repeat(5, 1)
    red, _, blue = room.paint(world.astype(np.float32), np.full(5, 6), normal.astype(np.float32))
    assert red.tolist() == [1, 1, 0, 0, 0] and blue.tolist() == [0, 0, 1, 1, 1]  # a frame of 10 cm inside the edges


def test_a_camera_may_stand_within_the_bounds_of_a_large_thing():
    frame = room_with(("box", (0, 0, 0.01), (3, 3, 0.01), 0.0, 0.0)).frame(0, 60, 60)  # wall-to-wall carpet
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
    a, b, other = Room(9).frame(12, 48, 48), Room(9, num_frames=40).frame(12, 48, 48), Room(10).frame(12, 48, 48)
    for key in a:
        assert torch.equal(a[key], b[key]), key
        assert not torch.equal(a[key], other[key]), key
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
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
            drawn = torch.stack([frame["masks"], frame["classes"]], -1).view(-1, 2).unique(dim=0).tolist()
            assert all(labels[instance] == CLASSES[label] for instance, label in drawn) and len(drawn) > 4
    assert len(counts) > 4
    assert names == set(CLASSES) - {"unlabelled"}
    assert shapes == {"shell", *HITS}


def test_furniture_stands_in_the_room_and_off_the_path():
    for seed in range(25):
        room = Room(seed)
        for solid in room.solids[6:]:
            c, s = abs(np.cos(solid.yaw)), abs(np.sin(solid.yaw))
            reach = np.array(
                [c * solid.half[0] + s * solid.half[1], s * solid.half[0] + c * solid.half[1], solid.half[2]]
            )
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
            assert np.allclose(a[:3, :3].T @ a[:3, :3], np.eye(3), atol=1e-5) and np.linalg.det(a[:3, :3]) > 0
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
    start = time.perf_counter()
    for room in rooms:
        room.frame(8, 224, 224)
    speed = len(rooms) / (time.perf_counter() - start)
    print(f"{speed:.1f} images per second")
    assert speed > 1.5  # a guard against falling off a cliff, not a benchmark: others may use this machine


# ---------------------------------------------------------------------------------------------------------
# Captures on disk. Image i has the grey value 10 * i, which tells frames apart.

EYE = np.eye(4).tolist()


def write_capture(folder, count=4, top=None, change=lambda i, frame: frame, size=(40, 30), names="images/{:04d}.png"):
    (folder / "images").mkdir(parents=True)
    frames = []
    for i in range(count):
        Image.new("RGB", size, (10 * i,) * 3).save(folder / names.format(i))
        frames.append(change(i, {"file_path": names.format(i), "transform_matrix": EYE}))
    about = {"fl_x": 50.0, "w": size[0], "h": size[1], "frames": frames} if top is None else {**top, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(about))
    return folder


def shade_of(scene, i):
    return round(scene.frame(i, 10, 10)["images"].mean().item() * 255 / 10)


def test_opengl_poses_become_opencv(tmp_path):
    # A camera at (1, 2, 3) looking along world +x with world z up; OpenGL's columns: right -y, up +z, backward -x
    pose = np.array([[0, 0, -1, 1], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]], float)
    scene = PosedFolder(write_capture(tmp_path / "a", change=lambda i, f: f | {"transform_matrix": pose.tolist()}))
    got = scene.frame(0, 30, 40)["extrinsics"]
    right, down, forward = [0, -1, 0], [0, 0, -1], [1, 0, 0]
    assert torch.equal(got[:3], torch.tensor([right, down, forward, [1, 2, 3]], dtype=torch.float32).T)


def test_intrinsics_of_the_file_and_of_a_frame(tmp_path):
    def change(i, frame):
        return frame | ({"fl_x": 80.0, "fl_y": 90.0, "cx": 19.0, "cy": 16.0} if i == 1 else {})

    scene = PosedFolder(write_capture(tmp_path / "a", change=change))
    assert scene.frame(0, 30, 40)["Ks"].tolist() == [[50, 0, 20], [0, 50, 15], [0, 0, 1]]  # the rest by default
    assert scene.frame(1, 30, 40)["Ks"].tolist() == [[80, 0, 19], [0, 90, 16], [0, 0, 1]]
    # The photos are half the size that the file speaks of
    scene = PosedFolder(write_capture(tmp_path / "b", top={"fl_x": 100, "cx": 42, "cy": 28, "w": 80, "h": 60}))
    assert scene.frame(0, 30, 40)["Ks"].tolist() == [[50, 0, 21], [0, 50, 14], [0, 0, 1]]
    angles = {"camera_angle_x": np.pi / 2, "camera_angle_y": 2 * np.arctan(0.25)}
    scene = PosedFolder(write_capture(tmp_path / "both", top=angles))  # pixels that are not square
    assert np.allclose(scene.frame(0, 30, 40)["Ks"], [[20, 0, 20], [0, 60, 15], [0, 0, 1]])
    scene = PosedFolder(write_capture(tmp_path / "c", top={"camera_angle_x": np.pi / 2}))
    assert np.allclose(scene.frame(0, 30, 40)["Ks"], [[20, 0, 20], [0, 20, 15], [0, 0, 1]])


@pytest.mark.parametrize("height, width", [(48, 48), (30, 90), (120, 40), (60, 100)])
def test_what_is_at_a_point_stays_at_its_projection(tmp_path, height, width):
    """A photo with one bright dot where a world point projects; the file speaks of a photo of twice the size, and the
    depth map has half of the photo's. After scaling and cropping everything must still meet at the projection."""
    photo_w, photo_h, fx, fy, cx, cy = 200, 120, 150.0, 140.0, 104.0, 57.0
    turn = np.array([[0.96, 0.0, 0.28], [0.0, 1.0, 0.0], [-0.28, 0.0, 0.96]])
    eye, point = np.array([0.3, -0.2, 0.5]), np.array([-0.85, -0.08, -2.9])
    x, y, z = turn.T @ (point - eye)  # OpenGL axes: y up, looking along -z
    u, v = cx + fx * x / -z, cy - fy * y / -z
    rows, columns = pixels(photo_h, photo_w)
    dot = np.exp(-((columns - u) ** 2 + (rows - v) ** 2) / (2 * 4.0**2))
    folder = tmp_path / "scene"
    for name in ("images", "depth", "masks"):
        (folder / name).mkdir(parents=True)
    Image.fromarray((255 * dot).astype(np.uint8)).convert("RGB").save(folder / "images/a.png")
    near = np.hypot(columns - u, rows - v) < 6
    Image.fromarray(near.astype(np.uint8) * 7).save(folder / "masks/a.png")
    half = near.reshape(60, 2, 100, 2).any((1, 3))
    Image.fromarray(np.where(half, round(-z * 1000), 0).astype(np.uint16)).save(folder / "depth/a.png")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, eye
    about = {"fl_x": 2 * fx, "fl_y": 2 * fy, "cx": 2 * cx, "cy": 2 * cy, "w": 2 * photo_w, "h": 2 * photo_h, "frames": [
        {"file_path": "images/a.png", "depth_file_path": "depth/a.png", "transform_matrix": pose.tolist()}]}  # fmt: skip
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

    folder = write_capture(tmp_path / "a", 12, change=change, names="images/{}.png")  # 0 ... 11, not 0, 1, 10, 11, 2
    about = json.loads((folder / "transforms.json").read_text())
    about["frames"].reverse()
    (folder / "transforms.json").write_text(json.dumps(about))
    (folder / "images/7.png").unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scene = PosedFolder(folder)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "2 frames marked is_bad" in message and "1 without" in message and str(folder) in message
    assert [shade_of(scene, i) for i in range(len(scene))] == [0, 1, 3, 4, 6, 8, 9, 10, 11]


def test_images_are_found_where_other_tools_put_them(tmp_path):
    inner = tmp_path / "scan" / "dslr" / "nerfstudio"  # ScanNet++
    write_capture(inner, 3, change=lambda i, f: f | {"file_path": f["file_path"].split("/")[-1]})
    (inner / "images").rename(inner.parent / "resized_images")
    (scene,) = open_scenes(tmp_path / "scan")
    assert scene.name == "scan" and [shade_of(scene, i) for i in range(3)] == [0, 1, 2]
    blender = write_capture(tmp_path / "lego", 3, change=lambda i, f: f | {"file_path": "./" + f["file_path"][:-4]})
    (blender / "transforms.json").rename(blender / "transforms_train.json")
    assert shade_of(PosedFolder(blender), 2) == 2


def test_scenes_are_found_in_folders(tmp_path):
    for name in ("b", "a"):
        write_capture(tmp_path / "many" / "scenes" / name)
        write_capture(tmp_path / "plain" / name)
    (tmp_path / "plain" / "notes").mkdir()
    for below in ("many", "plain"):
        assert [s.name for s in open_scenes(tmp_path / below)] == ["a", "b"]
    assert [s.name for s in open_scenes(tmp_path / "plain" / "b")] == ["b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: found no transforms.json or transforms_train.json .*scenes"):
        open_scenes(tmp_path / "empty")
    with pytest.raises(ValueError, match="nothing: no such folder"):
        open_scenes(tmp_path / "nothing")


@pytest.mark.parametrize("folder, name", [("masks", "{}.png"), ("instance_segmentation", "{}.jpg.png")])
@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_masks_keep_their_ids(tmp_path, folder, name, mode):
    scene = write_capture(tmp_path / "a", 2, names="images/{:04d}.jpg")
    (scene / folder).mkdir()
    ids = np.zeros((30, 40), np.uint16 if mode == "I;16" else np.uint8)
    ids[:, 20:] = 3001 if mode == "I;16" else 201
    for i in range(2):
        mask = Image.fromarray(ids + i)
        if mode == "P":  # colours that no id can be read from
            mask.putpalette([5, 5, 5] * 256)
        assert mask.mode == mode
        mask.save(scene / folder / name.format(f"{i:04d}"))
    opened = PosedFolder(scene)
    assert opened.has_masks
    assert torch.equal(opened.frame(1, 30, 40)["masks"], torch.from_numpy(ids.astype(np.int64) + 1))
    (scene / folder / name.format("0001")).unlink()
    with pytest.warns(UserWarning, match="only 1 of 2 frames have a segment mask"):
        opened = PosedFolder(scene)
    assert not opened.has_masks and not opened.frame(0, 30, 40)["masks"].any()


def test_depth_is_in_metres_and_unknown_is_zero(tmp_path):
    folder = write_capture(tmp_path / "a", 2, change=lambda i, f: f | {"depth_file_path": ["d.png", "d.npy"][i]})
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
    about = json.loads((folder / "transforms.json").read_text()) | {"depth_unit_scale_factor": 0.0002}
    (folder / "transforms.json").write_text(json.dumps(about))
    assert np.allclose(PosedFolder(folder).frame(0, 30, 40)["depths"], metres / 5)
    assert np.allclose(PosedFolder(folder).frame(1, 30, 40)["depths"], metres)
    del about["frames"][0]["depth_file_path"]
    (folder / "transforms.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="only 1 of 2 frames have depth"):
        scene = PosedFolder(folder)
    assert not scene.has_depth and "depths" not in scene.frame(1, 30, 40)


@pytest.mark.parametrize(
    "extra, named", [({"k2": 0.1, "p1": 0.01}, "k2, p1"), ({"camera_model": "OPENCV_FISHEYE"}, "FISHEYE")]
)
def test_distortion_is_named_in_a_warning(tmp_path, extra, named):
    with pytest.warns(UserWarning, match=named):
        PosedFolder(write_capture(tmp_path / "a", top={"fl_x": 50} | extra))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PosedFolder(write_capture(tmp_path / "b", top={"fl_x": 50, "k1": 0.0, "camera_model": "OPENCV"}))


def matrix(value, row=0, column=0):
    pose = np.eye(4)
    pose[row, column] = value
    return pose.tolist()


BROKEN = {  # what to do to a good capture, and what the message must name
    "no JSON": (lambda f, j: (f / "transforms.json").write_text("{ 'frames': ["), "transforms.json"),
    "binary": (lambda f, j: (f / "transforms.json").write_bytes(b"\xff\xfe\x00"), "transforms.json"),
    "a list": (lambda f, j: (f / "transforms.json").write_text("[]"), 'transforms.json.*"frames"'),
    "no frames": (lambda f, j: j.pop("frames"), 'transforms.json.*"frames"'),
    "empty frames": (lambda f, j: j["frames"].clear(), "transforms.json"),
    "a frame without a path": (lambda f, j: j["frames"][1].pop("file_path"), "transforms.json.*file_path"),
    "all missing": (lambda f, j: [p.unlink() for p in (f / "images").iterdir()], "transforms.json.*none"),
    "no matrix": (lambda f, j: j["frames"][1].pop("transform_matrix"), "transforms.json.*0001.png is missing"),
    "null matrix": (lambda f, j: j["frames"][1].update(transform_matrix=None), "transforms.json.*0001.png"),
    "ragged": (lambda f, j: j["frames"][1].update(transform_matrix=[[1, 0], [0]]), "transforms.json.*0001.png"),
    "3 x 3": (lambda f, j: j["frames"][1].update(transform_matrix=np.eye(3).tolist()), "0001.png is not 4 x 4"),
    "words": (lambda f, j: j["frames"][1].update(transform_matrix=[["a"] * 4] * 4), "transforms.json.*0001.png"),
    "NaN": (lambda f, j: j["frames"][1].update(transform_matrix=matrix(np.nan, 1, 3)), "0001.png.*finite"),
    "scaled": (lambda f, j: j["frames"][1].update(transform_matrix=matrix(2.0)), "0001.png is not rigid"),
    "mirrored": (lambda f, j: j["frames"][1].update(transform_matrix=matrix(-1.0)), "0001.png is not rigid"),
    "no focal length": (lambda f, j: j.pop("fl_x"), "transforms.json: no focal length.*fl_x or camera_angle_x"),
    "focal length 0": (lambda f, j: j.update(fl_x=0), "transforms.json.*focal length"),
    "a word for cx": (lambda f, j: j.update(cx="middle"), "transforms.json: cx .*'middle'"),
    "depth unit a word": (
        lambda f, j: j.update(depth_unit_scale_factor="mm"),
        "transforms.json.*depth_unit_scale_factor.*'mm'",
    ),
    "depth path a number": (lambda f, j: j["frames"][1].update(depth_file_path=3), "transforms.json.*depth_file_path"),
    "corrupt image": (lambda f, j: (f / "images/0001.png").write_bytes(b"nothing"), "0001.png"),
    "cut image": (
        lambda f, j: (f / "images/0001.png").write_bytes((f / "images/0001.png").read_bytes()[:60]),
        "0001.png",
    ),
    "depth missing": (lambda f, j: (f / "1.npy").unlink(), "1.npy: no such file"),
    "depth empty": (lambda f, j: (f / "1.npy").write_bytes(b""), "1.npy"),
    "depth of objects": (lambda f, j: np.save(f / "1.npy", np.array([{}])), "1.npy"),
    "depth with channels": (lambda f, j: np.save(f / "1.npy", np.ones((30, 40, 3))), "1.npy"),
    "depth of another shape": (lambda f, j: np.save(f / "1.npy", np.ones((40, 40))), "1.npy.*40 x 40.*40 x 30"),
    "mask in colour": (lambda f, j: Image.new("RGB", (40, 30)).save(f / "masks/0001.png"), "masks/0001.png.*channels"),
    "mask of another shape": (
        lambda f, j: Image.new("L", (40, 10)).save(f / "masks/0001.png"),
        "masks/0001.png.*40 x 10",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_bad_captures_get_one_sentence_that_names_the_file(tmp_path, what):
    folder = write_capture(tmp_path / "scan", 2, change=lambda i, f: f | {"depth_file_path": f"{i}.npy"})
    (folder / "masks").mkdir()
    for i in range(2):
        np.save(folder / f"{i}.npy", np.ones((30, 40), np.float32))
        Image.new("L", (40, 30)).save(folder / f"masks/{i:04d}.png")
    PosedFolder(folder).frame(1, 20, 20)  # good before
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


# ---------------------------------------------------------------------------------------------------------
# The sampler


@given(st.integers(3, 200), st.integers(2, 15), st.integers(0, 15), st.integers(2, 5), st.integers(0, 2**32))
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
    assert a["scene"] == again["scene"] and torch.equal(a["target"]["images"], again["target"]["images"])
    assert len({a["scene"], b["scene"], other["scene"]}) == 3
    room = Room(int(a["scene"].removeprefix("room")))
    *context, target = a["frames"].tolist()
    for key in ("images", "extrinsics", "Ks", "depths", "masks"):
        assert torch.equal(a["target"][key], room.frame(target, 24, 32)[key])
        assert torch.equal(a["context"][key], torch.stack([room.frame(i, 24, 32)[key] for i in context]))
    assert a["has_masks"].item() is True
    batch = torch.utils.data.default_collate([a, b])
    assert torch.equal(batch["context"]["images"][1], b["context"]["images"]) and batch["scene"] == [
        a["scene"],
        b["scene"],
    ]
    assert batch["context"]["depths"].shape == (2, 3, 24, 32) and batch["has_masks"].tolist() == [True, True]
    with pytest.raises(IndexError):
        views[10]


def test_views_of_captures(tmp_path):
    with_depth = write_capture(tmp_path / "deep", 14, change=lambda i, f: f | {"depth_file_path": "d.npy"})
    np.save(with_depth / "d.npy", np.full((30, 40), 2, np.float32))
    write_capture(tmp_path / "flat", 14)
    scenes = open_scenes(tmp_path)
    with pytest.warns(UserWarning, match="flat .*no depth"):
        views = Views(scenes, 12, 16, length=40)
    samples = [views[i] for i in range(40)]
    assert {s["scene"] for s in samples} == {"deep", "flat"}
    for sample in samples:
        assert (sample["target"]["depths"] == (2 if sample["scene"] == "deep" else 0)).all()  # 0 is unknown
        assert sample["has_masks"].item() is False
        assert 8 <= sample["frames"][1] - sample["frames"][0] <= 12
        grey = sample["target"]["images"].mean().item() * 255 / 10
        assert round(grey) == sample["frames"][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (Views(scenes[:1], 12, 16, length=1)[0]["context"]["depths"] == 2).all()
    assert "depths" not in Views(scenes[1:], 12, 16, length=1)[0]["context"]


def test_short_captures(tmp_path):
    five, two = (PosedFolder(write_capture(tmp_path / name, n)) for name, n in (("five", 5), ("two", 2)))
    with pytest.warns(UserWarning, match="five: 5 frames are too few"):
        views = Views([five], 12, 16, length=20)
    assert {tuple(views[i]["frames"][:2].tolist()) for i in range(20)} == {(0, 4)}
    assert {views[i]["frames"][2].item() for i in range(20)} == {1, 2, 3}
    with pytest.raises(ValueError, match="two: .*there are 2,"):
        Views([two], 12, 16, length=1)
    with pytest.raises(ValueError, match="min_gap"):
        Views([five], 12, 16, min_gap=5, max_gap=3, length=1)


# --------------------------------------------------------------------------- single photos and crops


def test_crops_say_where_they_overlap(monkeypatch):
    """On a photo whose colours are its coordinates, each pixel of the first crop is found in the second."""
    monkeypatch.setattr(data, "jitter", lambda photo, rng: photo)
    y, x = torch.meshgrid((torch.arange(90) + 0.5) / 90, (torch.arange(120) + 0.5) / 120, indexing="ij")
    crops = data.Crops([torch.stack([x, y, 0 * x])], 56, length=12)
    compared = 0
    for index in range(12):
        sample = crops[index]
        first, second = sample["crops"]
        at = (torch.arange(56) + 0.5) / 56 * 2 - 1
        here = torch.stack([at.expand(56, 56), at[:, None].expand(56, 56)], -1)
        there = here @ sample["first_to_second"][:, :2].T + sample["first_to_second"][:, 2]
        inside = there.abs().amax(-1) < 0.95
        found = torch.nn.functional.grid_sample(second[None], there[None], align_corners=False)[0]
        torch.testing.assert_close(found[:2, inside], first[:2, inside], rtol=0, atol=0.012)  # a pixel
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
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    with pytest.raises(ValueError, match="broken.jpg: a photo that cannot be read"):
        data.Photos(tmp_path, 28, 42)[1]


def test_photos_of_rooms_are_their_frames():
    photos = data.Photos(None, 24, 32, 20, "val")
    first = photos[9].clone()
    room = data.Rooms("val")[1]
    assert any((room.frame(i, 24, 32)["images"] - first).abs().max() < 0.003 for i in range(len(room)))
    assert torch.equal(photos[9], first) and len(photos) == 20
