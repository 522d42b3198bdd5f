"""Captures as they lie on disk: of nerfstudio, instant-ngp, ScanNet++, COLMAP and RealEstate10K.

`open_scenes` finds them by `LAYOUTS`. Each layout lists its frames as `Shot`s; from there on all
are alike: a photo is opened, straightened where a lens bent it, scaled and cropped (`Crop`), and
with it its depth, validity mask and segment ids. What scenes offer is said in data.py.
"""

import contextlib
import functools
import io
import json
import os
import re
import struct
import warnings
from os.path import basename, dirname, isdir, join, splitext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
SIZES = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
CAMERA = {"camera_model", "is_fisheye", *SIZES, *DISTORTION}  # keys of transforms.json
MODELS = {  # cameras that are known, in COLMAP's order, and their parameters
    "SIMPLE_PINHOLE": "fl_x cx cy",
    "PINHOLE": "fl_x fl_y cx cy",
    "SIMPLE_RADIAL": "fl_x cx cy k1",
    "RADIAL": "fl_x cx cy k1 k2",
    "OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2",
    "OPENCV_FISHEYE": "fl_x fl_y cx cy k1 k2 k3 k4",
}
COLMAPS = (*MODELS, "FULL_OPENCV", "FOV", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE",
           "THIN_PRISM_FISHEYE")  # fmt: skip
PHOTOS = ("images", "resized_images", "resized_undistorted_images", "undistorted_images", "rgb")
SCANNETPP = {  # its photos: are they as the lens bent them, and which validity masks are theirs
    "resized_images": (True, "resized_anon_masks"),
    "resized_undistorted_images": (False, "resized_undistorted_masks"),
    "undistorted_images": (False, "undistorted_anon_masks"),
}


def natural(name):
    """Sort key that puts frame10 after frame9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


@contextlib.contextmanager
def naming(path, what):
    """Whatever json, PIL, numpy or torch say of a file becomes one sentence that names it."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        no = "no " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path}: {what} ({no}{said})") from None


def lines_of(path):
    """The lines of a text file that are not blank."""
    with naming(path, "not a text file that can be read"):
        return [line for line in path.read_text().splitlines() if line.strip()]


def open_scenes(path, split=None):
    """The captures of a folder: itself, or those in data/*/, scenes/*/ or */ (see LAYOUTS).

    split: a text file of scenes' names, one a line; other scenes are left out. Returns a list of
    scenes, none of them read yet, or the `Chunks` of a RealEstate10K. Raises ValueError if there
    is none, saying what was looked for.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    for group in ([path], *(sorted(path.glob(f)) for f in ("data/*/", "scenes/*/", "*/"))):
        scenes = [scene for folder in group if (scene := open_scene(folder)) is not None]
        if scenes:
            break
    else:
        found = "transforms.json (nerfstudio, ScanNet++), sparse/0/cameras.bin (COLMAP) or *.torch"
        places = "here, in data/*/, scenes/*/ or */"
        raise ValueError(f"{path}: found no {found} (RealEstate10K) {places}")
    scenes = scenes[0] if isinstance(scenes[0], Chunks) else scenes
    if split is None:
        return scenes
    wanted = {line.split()[0] for line in lines_of(Path(split))}
    if isinstance(scenes, Chunks):
        scenes.keys = [key for key in scenes.keys if key in wanted]
    else:
        scenes = [scene for scene in scenes if scene.name in wanted]
    if not len(scenes):
        raise ValueError(f"{split}: none of its {len(wanted)} scenes is in {path}")
    if len(scenes) < len(wanted):
        missing = f"{len(wanted) - len(scenes)} of its {len(wanted)} scenes"
        warnings.warn(f"{split}: {missing} are not in {path}")
    return scenes


def open_scene(folder):
    """What LAYOUTS opens a folder as, or None."""
    for marks, inside, opens in LAYOUTS:
        for inner in inside:
            if any(any((folder / inner).glob(mark)) for mark in marks):
                return opens(folder / inner)


# -- pictures


def open_picture(path, what, listed_in, packed=None):
    """A PIL image, of a picture or of a .npy of numbers [H, W].

    packed: the picture's bytes, where a larger file holds them and path only names them.
    """
    path = Path(path)
    if packed is None and not path.is_file():
        raise ValueError(f"{path}: no such file ({what} in {listed_in})")
    with naming(path, f"{what} that cannot be read"):
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False).astype(np.float32)
            if array.ndim != 2 or not array.size:
                shape = " x ".join(map(str, array.shape))
                raise ValueError(f"its array is {shape}, not height x width")
            return Image.fromarray(array)
        picture = Image.open(path if packed is None else io.BytesIO(bytes(packed)))
        picture.load()
        return picture


def open_photo(shot, listed_in):
    """A shot's photo in RGB, 8 bit; turned as its EXIF says where its camera's w and h say so."""
    picture = open_picture(shot.photo, "an image", listed_in, shot.packed)
    with naming(shot.photo, "an image that cannot be used"):
        w, h = (shot.camera.get(k) for k in "wh")
        if w and h and not alike(picture.size, (w, h)) and alike(picture.size, (h, w)):
            if picture.getexif().get(0x0112, 1) < 5:  # none of the orientations that lie
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"it is {size} where {w:g} x {h:g} is expected")
            picture = ImageOps.exif_transpose(picture)
        return rgb(picture)


def rgb(picture):
    """A picture of any mode in 8-bit RGB. ValueError: it holds floating point."""
    if picture.mode == "F":
        raise ValueError("floating point is no photo")
    if picture.mode.startswith("I"):  # 16 bit, which PIL would clip
        array = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray((array + 0.5).astype(np.uint8))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def alike(size, other):
    """Have two (width, height) the same shape, to 2 %?"""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= 0.02


class Crop:
    """The part of a photo that is kept where it is scaled to cover height x width and cropped
    about the centre, and the same part of what goes with it, whatever the size of that.

    With a lens (`Lens`) and the photo's camera (fx, fy, cx, cy, pixels) it is a part of the
    pinhole's image of `zoomed`: each pixel is looked up where the lens put it.
    """

    def __init__(self, photo, height, width, lens=None, camera=None):
        self.photo, self.size = photo, (width, height)
        self.scale = max(width / photo.width, height / photo.height)
        self.left = (photo.width - width / self.scale) / 2
        self.top = (photo.height - height / self.scale) / 2
        right, bottom = self.left + width / self.scale, self.top + height / self.scale
        window = np.array([self.left, self.top, right, bottom])
        self.share = np.clip(window / np.array([photo.width, photo.height] * 2), 0, 1)
        self.camera, self.where = camera, None
        if lens:
            self.camera = zoomed(lens, camera, photo.size)
            kept = self.left, self.top, self.scale
            self.where = lookup(lens, camera, self.camera, photo.size, kept, self.size)

    def intrinsics(self):  # (3, 3), pixels of the part that is kept
        fx, fy, cx, cy = (v * self.scale for v in self.camera)
        cx, cy = cx - self.left * self.scale, cy - self.top * self.scale
        return torch.from_numpy(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32))

    def colours(self):  # (3, H, W) in 0..1
        if self.where is None:
            image = self(self.photo, Image.Resampling.BICUBIC, None).astype(np.float32) / 255
            return torch.from_numpy(image).permute(2, 0, 1).contiguous()
        # Shrunk first, to the lookups' spacing at the centre, so that nothing aliases
        x, y = (n // 2 for n in self.size)
        step = np.abs(self.where[y, x] - self.where[y - 1, x - 1])  # in shares of the photo
        size = [min(n, round(1 / max(s, 1e-6))) for n, s in zip(self.photo.size, step.tolist())]
        photo = self.photo.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
        grid = torch.from_numpy(2 * self.where - 1)[None]
        options = dict(mode="bicubic", padding_mode="border", align_corners=False)
        return torch.nn.functional.grid_sample(pixels, grid, **options)[0].clamp(0, 1)

    def __call__(self, picture, resample, path):
        if not alike(picture.size, self.photo.size):
            its, photos = (f"{p.width} x {p.height}" for p in (picture, self.photo))
            raise ValueError(f"{path}: {its} pixels do not cover what its photo of {photos} shows")
        size = np.array(picture.size)
        if self.where is None:
            box = tuple(self.share * np.tile(size, 2))
            return np.array(picture.resize(self.size, resample, box=box))
        column, row = np.minimum((self.where * size).astype(int), size - 1).transpose(2, 0, 1)
        return np.array(picture)[row, column]  # nearest: colours do not come here

    def depths(self, path, unit, listed_in):  # (H, W), 0 where unknown
        picture = open_picture(path, "a depth map", listed_in)
        depth = self(picture, Image.Resampling.NEAREST, path).astype(np.float32)
        if depth.ndim != 2:
            raise ValueError(f"{path}: a depth map has one channel, not {depth.shape[-1]}")
        depth = depth * np.float32(1.0 if Path(path).suffix == ".npy" else unit)
        return torch.from_numpy(np.where(np.isfinite(depth) & (depth > 0), depth, 0))

    def ids(self, path, listed_in):  # (H, W) int64
        picture = open_picture(path, "a mask", listed_in)
        picture = picture.convert("L") if picture.mode == "1" else picture
        mask = self(picture, Image.Resampling.NEAREST, path)
        if mask.ndim != 2:
            raise ValueError(f"{path}: a mask has one id per pixel, not {mask.shape[-1]} channels")
        return torch.from_numpy(mask.astype(np.int64))

    def valid(self, path, listed_in):  # (H, W) bool
        mask = self.ids(path, listed_in)
        for value in mask[(mask != 0) & (mask != 255)][:1]:
            raise ValueError(f"{path}: a validity mask holds 0 and 255, not {value}; segment ids "
                             "are looked for in instance_segmentation/")  # fmt: skip
        return mask > 0


# -- lenses


class Lens(NamedTuple):
    """OpenCV's polynomials (COLMAP's too) of the radius, or for a fisheye of the angle.

    lens(x, y) takes a pinhole's normalised coordinates to those on the photo.
    """

    fisheye: bool
    k1: float
    k2: float
    k3: float
    k4: float
    p1: float
    p2: float

    def __call__(self, x, y):
        _, k1, k2, k3, k4, p1, p2 = self
        square = x * x + y * y
        r = np.maximum(np.sqrt(square), 1e-12)
        s = np.arctan(r) ** 2 if self.fisheye else square
        stretch = 1 + s * (k1 + s * (k2 + s * (k3 + s * k4)))
        if self.fisheye:
            stretch = stretch * np.arctan(r) / r
            return x * stretch, y * stretch
        return (x * stretch + 2 * p1 * x * y + p2 * (square + 2 * x * x),
                y * stretch + 2 * p2 * x * y + p1 * (square + 2 * y * y))  # fmt: skip


def parameters(model):
    if model not in MODELS:
        raise ValueError(f"camera model {model} is none of {', '.join(MODELS)}")
    return MODELS[model].split()


def lens_of(camera):
    """The Lens of a camera (transforms.json's keys), None if it bends nothing.

    Raises ValueError: which model is not known, or which of its numbers cannot be.
    """
    for key in (*SIZES, *DISTORTION):
        value = camera.get(key)
        if value is not None and not (isinstance(value, (int, float)) and np.isfinite(value)):
            raise ValueError(f"{key} is {value!r}, which is no number")
    above = [camera[k] for k in ("fl_x", "fl_y", "w", "h") if camera.get(k) is not None]
    if not (camera.get("fl_x") or camera.get("camera_angle_x")) or min(above, default=1) <= 0:
        raise ValueError("no focal length: fl_x or camera_angle_x must be above 0, and w and h")
    model = camera.get("camera_model") or "OPENCV"
    model = "OPENCV_FISHEYE" if camera.get("is_fisheye") else model  # instant-ngp's key
    bends = {k: float(camera[k]) for k in DISTORTION if camera.get(k)}
    for key in bends.keys() - {*parameters(model), *(("k3", "k4") if model == "OPENCV" else ())}:
        raise ValueError(f"camera model {model} has no {key}")
    if bends or model == "OPENCV_FISHEYE":
        return Lens(model == "OPENCV_FISHEYE", *(bends.get(k, 0.0) for k in DISTORTION))


def pinhole(camera, width, height):
    """fx, fy, cx, cy in pixels of an image, which may have another size than the camera says."""

    def get(key, default):
        return default if camera.get(key) is None else camera[key]

    def focal(name, angle, size):  # pixels, or from the field of view in radians
        view = camera.get(angle)
        return get(name, 0.5 * size / np.tan(0.5 * view) if view is not None else None)

    w, h = get("w", width), get("h", height)
    fx = focal("fl_x", "camera_angle_x", w)
    fy = focal("fl_y", "camera_angle_y", h) or fx
    cx, cy = get("cx", w / 2), get("cy", h / 2)
    return fx * width / w, fy * height / h, cx * width / w, cy * height / h


@functools.lru_cache(256)
def zoomed(lens, camera, size):
    """The pinhole camera whose image of this size (w, h) is all on the photo, and as wide as it
    can be about the photo's centre; at most twice as wide as the photo without the lens.

    Cameras are (fx, fy, cx, cy) in pixels. Raises ValueError where the lens leaves nothing.
    """
    f, c = np.array(camera).reshape(2, 2, 1)
    half = np.array(size)[:, None] / 2
    side, one = np.linspace(-1, 1, 17), np.ones(17)
    edge = np.hstack([(side, one), (side, -one), (one, side), (-one, side)]) * half / f  # (2, 68)
    out = np.linspace(0, 1, 33)[:, None, None]
    low, high = 0.0, 2.0  # of the width that there would be without the lens
    for _ in range(32):
        middle = (low + high) / 2
        x, y = np.moveaxis((half - c) / f + out * middle * edge, 1, 0)  # (33, 68), outwards
        seen = np.stack(lens(x, y)) * f[..., None] + c[..., None]
        inside = (np.abs(seen / half[..., None] - 1) <= 1 + 1e-9).all()
        # Where a polynomial turns back it is no lens any more
        grows = (np.diff(np.hypot(*(seen - seen[:, :1])), axis=0) > 0).all()
        low, high = (middle, high) if inside and grows else (low, middle)
    if low < 0.1:
        raise ValueError(f"{lens} leaves nothing of a photo of {size[0]} x {size[1]}")
    return (*(f[:, 0] / low).tolist(), *(half + (c - half) / low)[:, 0].tolist())


@functools.lru_cache(8)
def lookup(lens, camera, ideal, size, kept, out):
    """Where the pixels of a part of the image of the camera `ideal` lie on the photo of `camera`.

    kept: the part's left, top and scale; out: its width and height. Returns float32 [H, W, 2],
    x and y in shares of the photo's size.
    """
    left, top, scale = kept
    x = (left + (np.arange(out[0]) + 0.5) / scale - ideal[2]) / ideal[0]
    y = (top + (np.arange(out[1]) + 0.5) / scale - ideal[3]) / ideal[1]
    x, y = lens(*np.meshgrid(x, y))
    x, y = (x * camera[0] + camera[2]) / size[0], (y * camera[1] + camera[3]) / size[1]
    return np.stack([x, y], -1).clip(0, 1).astype(np.float32)


# -- layouts


class Shot(NamedTuple):
    """A photo of a capture and what goes with it. Paths are str, for there are many."""

    photo: str
    pose: np.ndarray  # (4, 4) camera-to-world, OpenCV axes
    camera: dict  # by transforms.json's keys
    depth: str | None = None
    mask: str | None = None  # of validity: 0 and 255
    ids: str | None = None  # of segments
    packed: np.ndarray | None = None  # the photo's bytes, where it is no file


def is_rotation(R):  # (..., 3, 3)
    with np.errstate(invalid="ignore"):
        off = np.abs(R @ np.swapaxes(R, -1, -2) - np.eye(3)).max((-2, -1), initial=0)
        return (off < 1e-3) & (np.linalg.det(R) > 0)


def rigid(matrices, names):
    """Poses [N, 4, 4] of nested lists 3 x 4 or 4 x 4. ValueError: which name's is not rigid."""
    try:
        poses = np.array([m[:3] for m in matrices], np.float64).reshape(len(matrices), 3, 4)
    except (TypeError, ValueError, KeyError):
        if len(matrices) == 1:
            raise ValueError(f"transform_matrix of {names[0]} is not 4 x 4 numbers") from None
        return np.concatenate([rigid([m], [name]) for m, name in zip(matrices, names)])
    finite, turns = np.isfinite(poses).all((1, 2)), is_rotation(poses[:, :, :3])
    no_turn = "rigid: its upper left 3 x 3 is no rotation"
    for good, what in ((finite, "4 x 4 finite numbers"), (turns, no_turn)):
        if not good.all():
            raise ValueError(f"transform_matrix of {names[good.argmin()]} is not {what}")
    last = np.broadcast_to([[[0.0, 0, 0, 1]]], (len(poses), 1, 4))
    return np.concatenate([poses, last], 1)


class Beside:
    """Finds photos and labels in the folders about a capture; each folder is listed once."""

    def __init__(self, path):
        self.path, above = str(path), str(path.parent)
        self.places = [join(self.path, folder) for folder in ("", *PHOTOS)]
        self.places += [join(above, folder) for folder in PHOTOS]
        roots = [path] + [path.parent] * (path.name == "nerfstudio")  # of ScanNet++
        roots += [path.parent.parent] * (roots[-1].name == "dslr")
        self.ids_in = [f for root in roots if isdir(f := join(root, "instance_segmentation"))]
        self.listed, self.other_lens, self.no_mask = {}, 0, 0

    def first(self, candidates):
        """The first path that is there, or None."""
        for path in candidates:
            folder, name = os.path.split(path)
            if folder not in self.listed:
                self.listed[folder] = frozenset(os.listdir(folder) if isdir(folder) else ())
            if name in self.listed[folder]:
                return path

    def photo(self, name, bent):
        """The photo of that name; in ScanNet++'s folders only as bent as its camera says."""
        suffixes = ("",) if splitext(name)[1] else (".png", ".jpg", ".jpeg")
        other_lens = False
        for k, place in enumerate(self.places):
            found = self.first(join(place, name + suffix) for suffix in suffixes)
            if found and SCANNETPP.get(basename(dirname(found)), (bent,))[0] == bent:
                self.places.insert(0, self.places.pop(k))  # the next will be there too
                return found
            other_lens |= found is not None
        self.other_lens += other_lens

    def labels(self, photo, inner=None, named=None):
        """(validity mask, segment ids) of a photo. inner: its path within its folder of photos;
        named: what mask_path says."""
        folder, inner = dirname(photo), inner or basename(photo)
        names = (inner + ".png", splitext(inner)[0] + ".png")
        masks = SCANNETPP.get(basename(folder), (None, "masks"))[1]
        folders = [self.path] * bool(named) + [join(r, masks) for r in (self.path, dirname(folder))]
        mask = self.first(join(f, name) for f in folders for name in ([named] if named else names))
        self.no_mask += bool(named) and mask is None
        return mask, self.first(join(f, name) for f in self.ids_in for name in names)


class PosedFolder:
    """Posed photos, with depth, validity masks and segment ids where there are any: nerfstudio's,
    instant-ngp's and ScanNet++'s layouts.

    The folder of transforms_undistorted.json, transforms.json or transforms_train.json, of which
    the first counts whose photos are there: fl_x, fl_y, cx, cy, w, h (or camera_angle_x),
    camera_model and its k1 to k4, p1, p2, for all frames or per frame; per frame file_path,
    transform_matrix (camera-to-world, OpenGL axes), and if there are depth_file_path (16-bit PNG
    times depth_unit_scale_factor, 0.001 if not given: millimetres; or .npy in metres; 0 = unknown),
    mask_path and is_bad. Frames in test_frames are left out. Validity masks of 0 and 255 (what is
    not to be looked at is 0): mask_path, or masks/; segment ids: instance_segmentation/; both
    NAME.jpg.png or NAME.png. What the lens bent is straightened when it is read. Frames come in
    the order of their names. The file is read when something of it is asked for.

    Raises ValueError that names the file and what is wrong with it.
    """

    marks = ("transforms_undistorted.json", "transforms.json", "transforms_train.json")
    depth_unit = 0.001

    def __init__(self, path):
        self.path = Path(path)
        # In ScanNet++ the folder that says which scene this is lies above scene/dslr/nerfstudio
        parts = reversed(self.path.resolve().parts)
        self.name = next(part for part in parts if part not in ("nerfstudio", "dslr"))
        self.files = [self.path / mark for mark in self.marks if (self.path / mark).is_file()]
        if not self.files:
            raise ValueError(f"{self.path}: found none of {', '.join(self.marks)}")
        self.file = self.files[0]

    def __len__(self):
        return len(self.shots)

    @functools.cached_property
    def shots(self):
        """[Shot] in the order of their names."""
        shots = self._list()
        for what, key in (("depth", "depth"), ("a segment mask", "ids")):
            count = sum(getattr(shot, key) is not None for shot in shots)
            if 0 < count < len(shots):
                few = f"only {count} of {len(shots)} frames have {what}"
                warnings.warn(f"{self.file}: {few}; none is used")
        return shots

    @functools.cached_property
    def has_depth(self):
        return all(shot.depth is not None for shot in self.shots)

    @functools.cached_property
    def has_masks(self):
        return all(shot.ids is not None for shot in self.shots)

    @functools.cached_property
    def numbers(self):
        """The last number in each photo's name, rising; 0, 1, 2, ... where not all have one."""
        stems = [splitext(basename(shot.photo))[0] for shot in self.shots]
        found = [re.findall("[0-9]+", stem)[-1:] for stem in stems]
        numbers = np.array([int(f[0][-18:]) for f in found if f])
        rises = len(numbers) == len(found) and (np.diff(numbers) > 0).all()
        return numbers if rises else np.arange(len(found))

    def _list(self):
        for file in self.files:
            self.file, beside = file, Beside(self.path)
            with naming(file, "not a capture that can be read"):
                total, good, shots = self._read(json.loads(file.read_text()), beside)
            if shots:
                break
        else:
            why = f", and {beside.other_lens} have only photos that are not of its lens"
            why = why if beside.other_lens else ""
            raise ValueError(f"{file}: none of its {total} frames can be used{why}")
        if total > len(shots):
            bad = f"{total - good} frames marked is_bad and {good - len(shots)} without their image"
            warnings.warn(f"{file}: {bad} are left out")
        if beside.no_mask:
            warnings.warn(f"{file}: {beside.no_mask} frames lack the mask of their mask_path")
        return shots

    def _read(self, about, beside):
        """(number of frames to train on, how many are good, [Shot] of those with photos)."""
        entries = about.get("frames") if isinstance(about, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and isinstance(e.get("file_path"), str) for e in entries
        ):
            raise ValueError('it needs "frames", a list of objects that each have a "file_path"')
        unit = self.depth_unit = about.get("depth_unit_scale_factor", 0.001)
        if not isinstance(unit, (int, float)) or not 0 < unit < np.inf:
            raise ValueError(f"depth_unit_scale_factor is {unit!r}, which is no number above 0")
        tests = {e["file_path"] for e in about.get("test_frames") or []}
        entries = [e for e in entries if e["file_path"] not in tests]
        good = [e for e in entries if not e.get("is_bad")]
        shared = {k: about[k] for k in CAMERA & about.keys()}
        bent = functools.cache(lambda: lens_of(shared) is not None)
        found = []  # (entry, photo, camera)
        for entry in sorted(good, key=lambda e: natural(e["file_path"])):
            own = {k: entry[k] for k in CAMERA & entry.keys()}
            camera = shared | own if own else shared
            lens = lens_of(camera) is not None if own else bent()
            photo = beside.photo(entry["file_path"], lens)
            found += [(entry, photo, camera)] if photo else []
        return len(entries), len(good), list(self._shots(found, beside))

    def _shots(self, found, beside):
        entries = [entry for entry, _, _ in found]
        for entry in entries:
            for key in ("depth_file_path", "mask_path"):
                if not isinstance(entry.get(key, ""), (str, type(None))):
                    raise ValueError(f"{key} is {entry[key]!r}, which is no path")
            if "transform_matrix" not in entry:
                raise ValueError(f"transform_matrix of {entry['file_path']} is missing")
        names = [entry["file_path"] for entry in entries]
        poses = rigid([entry["transform_matrix"] for entry in entries], names)
        poses[:, :3, 1:3] *= -1  # OpenGL's y is up and its z backward
        for (entry, photo, camera), pose in zip(found, poses):
            depth = entry.get("depth_file_path")
            depth = join(self.path, depth) if depth else None
            labels = beside.labels(photo, named=entry.get("mask_path"))
            yield Shot(photo, pose, camera, depth, *labels)

    def point_depths(self):
        """[depths of the capture's own points that each shot sees], None where it has none."""

    def frame(self, i, height, width):
        """Frame i, scaled to cover height x width and cropped about the centre; intrinsics follow
        exactly. Where a validity mask says no, "valid" is False and the depth unknown."""
        shot = self.shots[i]
        photo = open_photo(shot, self.file)
        with naming(self.file, f"the camera of {basename(shot.photo)} cannot be used"):
            lens, camera = lens_of(shot.camera), pinhole(shot.camera, *photo.size)
            crop = Crop(photo, height, width, lens, camera)
        out = {
            "images": crop.colours(),
            "extrinsics": torch.from_numpy(shot.pose.astype(np.float32)),
            "Ks": crop.intrinsics(),
            "masks": torch.zeros(height, width, dtype=torch.int64),
            "valid": torch.ones(height, width, dtype=torch.bool),
        }
        if self.has_depth:
            out["depths"] = crop.depths(shot.depth, self.depth_unit, self.file)
        if self.has_masks:
            out["masks"] = crop.ids(shot.ids, self.file)
        if shot.mask:
            out["valid"] = crop.valid(shot.mask, self.file)
            if self.has_depth:
                out["depths"] = torch.where(out["valid"], out["depths"], 0.0)
        return out


class ColmapFolder(PosedFolder):
    """COLMAP's reconstruction of photos in images/ (or images_2/, images_4/, images_8/, copies at
    a fraction of the size): cameras, images and points3D, .bin or .txt, in sparse/0/, sparse/ or
    colmap/sparse/0/. Masks and segments as for `PosedFolder`. The unit is whatever COLMAP chose.
    """

    marks = tuple(f"{folder}/cameras.{kind}" for folder in ("sparse/0", "sparse", "colmap/sparse/0")
                  for kind in ("bin", "txt"))  # fmt: skip

    def _file(self, what):
        return self.file.with_name(what + self.file.suffix)

    def _list(self):
        folders = [join(self.path, f) for f in ("images", "images_2", "images_4", "images_8")]
        folder, beside = next(filter(isdir, folders), folders[0]), Beside(self.path)
        with naming(self.file, "not COLMAP's cameras"):
            cameras = read_cameras(self.file)
        with naming(self._file("images"), "not COLMAP's images"):
            images = sorted(read_images(self._file("images")), key=lambda image: natural(image[-1]))
            kept = [image for image in images if beside.first([join(folder, image[-1])])]
            if not kept:
                raise ValueError(f"none of its {len(images)} photos is in {folder}")
            poses = colmap_poses(np.array([image[1:8] for image in kept]))
            self.numbers_of_images = [image[0] for image in kept]
            labelled = [beside.labels(join(folder, image[-1]), image[-1]) for image in kept]
            shots = [Shot(join(folder, image[-1]), pose, cameras[image[8]], None, *labels)
                     for image, pose, labels in zip(kept, poses, labelled)]  # fmt: skip
        if len(images) > len(kept):
            warnings.warn(f"{self.file}: {len(images) - len(kept)} photos are not in {folder}")
        return shots

    def point_depths(self):
        if not self.shots or not self._file("points3D").is_file():
            return None
        with naming(self._file("points3D"), "not COLMAP's points"):
            points, tracks = read_points(self._file("points3D"))
            of = np.repeat(np.arange(len(points)), [len(track) for track in tracks])
            image = np.concatenate([np.zeros(0, int), *tracks])
            order = image.argsort(kind="stable")
            ends = np.searchsorted(image[order], self.numbers_of_images, side="right")
            starts = np.searchsorted(image[order], self.numbers_of_images)
            depths = []
            for shot, start, end in zip(self.shots, starts, ends):
                seen = points[of[order[start:end]]]
                depths.append((seen - shot.pose[:3, 3]) @ shot.pose[:3, 2])
            return depths


def text_lines(path):
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


def read_cameras(path):
    """COLMAP's cameras: {number: camera by transforms.json's keys}."""
    rows = []
    if path.suffix == ".txt":
        for number, model, *values in map(str.split, filter(str.strip, text_lines(path))):
            rows.append((int(number), model, [float(v) for v in values]))
    else:
        data, at = path.read_bytes(), 8
        for _ in range(struct.unpack_from("<Q", data)[0]):
            number, model, *size = struct.unpack_from("<iiQQ", data, at)
            model = COLMAPS[model] if 0 <= model < len(COLMAPS) else f"number {model}"
            count = len(parameters(model))
            rows.append((number, model, [*size, *struct.unpack_from(f"<{count}d", data, at + 24)]))
            at += 24 + 8 * count
    cameras = {}
    for number, model, values in rows:
        camera = zip(("w", "h", *parameters(model)), values, strict=True)
        cameras[number] = dict(camera, camera_model=model)
        lens_of(cameras[number])
    return cameras


def read_images(path):
    """COLMAP's images: [(number, quaternion w x y z, translation x y z, camera, name)], flat."""
    images = []
    if path.suffix == ".txt":
        for line in filter(str.strip, text_lines(path)[::2]):  # every second lists its points
            number, *pose, camera, name = line.split(maxsplit=9)
            images.append((int(number), *map(float, pose), int(camera), name.strip()))
        return images
    data, at = path.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        values = struct.unpack_from("<i7di", data, at)
        end = data.index(b"\0", at + 64)
        images.append((*values, data[at + 64 : end].decode()))
        at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
        if at > len(data):
            raise ValueError("it ends before its points do")
    return images


def read_points(path):
    """COLMAP's points: world [P, 3], and [the numbers of the images that see each]."""
    if path.suffix == ".txt":
        rows = [line.split() for line in text_lines(path) if line.strip()]
        points = [[float(v) for v in row[1:4]] for row in rows]
        return np.array(points).reshape(-1, 3), [np.array(row[8::2], int) for row in rows]
    data, at, points, tracks = path.read_bytes(), 8, [], []
    for _ in range(struct.unpack_from("<Q", data)[0]):
        _, *point, length = struct.unpack_from("<Q3d3x8xQ", data, at)
        points.append(point)
        tracks.append(np.frombuffer(data, "<i4", 2 * length, at + 51)[::2])
        at += 51 + 8 * length
    return np.array(points).reshape(-1, 3), tracks


def colmap_poses(values):
    """[N, 7]: world-to-camera quaternions w x y z and translations -> camera-to-world [N, 4, 4]."""
    w, x, y, z = (values[:, :4] / np.linalg.norm(values[:, :4], axis=1, keepdims=True)).T
    turn = [[1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
            [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
            [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)]]  # fmt: skip
    turn = np.array(turn).transpose(2, 0, 1)  # camera to world
    poses = np.tile(np.eye(4), (len(values), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = turn, -(turn @ values[:, 4:, None])[..., 0]
    if not np.isfinite(poses).all():
        raise ValueError("not all of its poses are finite numbers")
    return poses


class Chunks:
    """RealEstate10K as pixelSplat, MVSplat and depthsplat have it: 000000.torch and so on, lists of
    scenes, and index.json, which says where which is. chunks[i] is a scene that reads its file
    when it is asked for frames; the last few files stay mapped."""

    def __init__(self, path):
        self.file = path / "index.json"
        with naming(self.file, "not the index of RealEstate10K's files"):
            index = json.loads(self.file.read_text())
            self.index = {key: path / file for key, file in index.items()}
            self.keys = list(self.index)
            if not self.keys:
                raise ValueError("it lists no scenes")

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        return ChunkScene(self.index[self.keys[i]], self.keys[i])


class ChunkScene(PosedFolder):
    has_depth = has_masks = False

    def __init__(self, file, key):
        self.file, self.name = file, key

    def _list(self):
        scenes = load_chunk(self.file)
        with naming(self.file, f"not RealEstate10K's scene {self.name}"):
            scene = scenes[self.name]
            cameras, images = scene["cameras"].double().numpy(), scene["images"]
            if cameras.shape != (len(images), 18):
                raise ValueError(f"its cameras are {list(cameras.shape)}, its images {len(images)}")
            names = [join(self.file, self.name, f"{i}.jpg") for i in range(len(images))]
            poses = np.linalg.inv(rigid(cameras[:, 6:].reshape(-1, 3, 4).tolist(), names))
            shots = []
            for name, pose, camera, image in zip(names, poses, cameras[:, :4].tolist(), images):
                camera = dict(zip(("fl_x", "fl_y", "cx", "cy"), camera), w=1, h=1)
                shots.append(Shot(name, pose, camera, packed=image.numpy()))
            return shots


@functools.lru_cache(8)
def load_chunk(path):
    with naming(path, "not RealEstate10K's file of scenes"):
        scenes = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {scene["key"]: scene for scene in scenes}


LAYOUTS = (  # files that mark a folder, here or in these folders of it, and what they are opened as
    (PosedFolder.marks, ("", "nerfstudio", "dslr/nerfstudio"), PosedFolder),
    (ColmapFolder.marks, ("",), ColmapFolder),
    (("*.torch",), ("", "train"), Chunks),
)
