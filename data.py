"""Posed views to learn from: procedural rooms made on the fly, and views of them or of captures.

Two kinds of scene, `Room` and `PosedFolder`, share one duck-typed interface:

    len(scene)                     number of frames along the camera path
    scene.name                     str
    scene.numbers                  of the frames, rising; gaps between views are counted in them
    scene.has_depth, .has_masks    bool, for the whole scene
    scene.frame(i, height, width)  dict of tensors:
        images      [3, H, W]  float32, 0..1
        extrinsics  [4, 4]     float32, camera-to-world, OpenCV axes (x right, y down, z forward)
        Ks          [3, 3]     float32, pixels; the centre of pixel (0, 0) is at (0.5, 0.5)
        depths      [H, W]     float32, z-depth in metres, 0 = unknown; only if has_depth
        masks       [H, W]     int64 segment ids; all zeros if the scene has no masks
        valid       [H, W]     bool, False where a validity mask excludes; PosedFolder only
        normals     [3, H, W]  float32, unit, camera axes, towards the camera; Room only
        classes     [H, W]     int64, index into CLASSES; Room only

`Views` draws context views and a target from such scenes, as in Splat and Distill
(arXiv 2602.06032). A sample depends on (seed, index) alone, so a resumed run sees the same data.
"""

import colorsys
import contextlib
import functools
import io
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from os.path import basename, dirname, isdir, join, splitext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

# -------------------------------------------------------------------------------------------------
# Procedural rooms. The world is z-up, in metres; the middle of the floor is the origin.
# A solid is a unit shape, scaled, turned about z and moved. Points and rays are [3, N].

CLASSES = tuple("unlabelled floor wall ceiling door window picture rug light table chair cabinet "
                "sofa bed lamp plant box ball vase cone".split())  # fmt: skip
SPLITS = {  # seeds
    "train": range(1_000_000), "val": range(1_000_000, 1_010_000),
    "probe": range(1_010_000, 1_020_000),
}  # fmt: skip

# Looks are patterns of cells that mix a solid's two colours: see Room.paint.
#            cell (m)      shift of  joint  share of the second colour by
#            u      v      rows (u)  (m)    parity random noise
LOOKS = {
    "plain":   (99.00, 99.00, 0.00, 0.000,   0.0,   0.0,  0.30),
    "marble":  (99.00, 99.00, 0.00, 0.000,   0.0,   0.0,  1.00),
    "checker": (0.20,  0.20,  0.00, 0.000,   1.0,   0.0,  0.15),
    "stripes": (0.16,  99.00, 0.00, 0.000,   0.8,   0.0,  0.20),
    "rings":   (99.00, 0.09,  0.00, 0.000,   0.8,   0.0,  0.20),
    "tiles":   (0.40,  0.40,  0.00, 0.012,   0.0,   0.4,  0.40),
    "bricks":  (0.36,  0.13,  0.50, 0.014,   0.0,   0.6,  0.30),
    "planks":  (1.10,  0.16,  0.37, 0.006,   0.0,   0.6,  0.40),
    "books":   (0.06,  0.34,  0.00, 0.012,   0.0,   1.0,  0.00),
}  # fmt: skip
NOISE = np.float32([[3.1, 1.3, 2.2], [-2.4, 3.7, 1.1], [5.3, -4.1, 6.2], [7.9, 6.3, -9.4]])  # rad/m
LAMP = np.float32([[-0.25, -0.12, 0], [0.25, 0.12, 0]])  # points that stand for the light, m

# Paints: one of the looks, two colours from ranges of HSV, and the room's dark or light for joints.
#              looks                                  hue   saturation    value         joints
ANY, WOOD = (0, 1), (0.04, 0.11)
PAINTS = {
    "dark":    ("",                                   ANY,  (0.00, 0.40), (0.10, 0.30), ""),
    "light":   ("",                                   ANY,  (0.00, 0.20), (0.75, 0.95), ""),
    "wall":    ("plain plain stripes tiles",          ANY,  (0.08, 0.40), (0.65, 0.95), "light"),
    "accent":  ("bricks stripes plain marble",        ANY,  (0.30, 0.60), (0.50, 0.85), "light"),
    "floor":   ("planks planks tiles checker marble", ANY,  (0.05, 0.30), (0.40, 0.90), "dark"),
    "boards":  ("planks",                             WOOD, (0.35, 0.60), (0.40, 0.80), "dark"),
    "ceiling": ("plain",                              ANY,  (0.00, 0.08), (0.85, 0.97), "light"),
    "door":    ("planks",                             WOOD, (0.30, 0.60), (0.35, 0.90), "dark"),
    "window":  ("plain",                      (0.53, 0.60), (0.30, 0.50), (0.90, 1.00), "light"),
    "haze":    ("",                                   ANY,  (0.00, 0.10), (0.90, 1.00), ""),
    "picture": ("marble marble checker tiles",        ANY,  (0.40, 0.90), (0.30, 1.00), "dark"),
    "rug":     ("marble stripes checker tiles",       ANY,  (0.30, 0.80), (0.30, 0.90), "light"),
    "leaves":  ("marble",                     (0.22, 0.40), (0.50, 0.80), (0.20, 0.60), "dark"),
    "books":   ("books",                              ANY,  (0.40, 0.80), (0.20, 0.90), "dark"),
    "wood":    ("planks",                             WOOD, (0.35, 0.65), (0.30, 0.80), "dark"),
    "flat":    ("plain marble checker stripes tiles", ANY,  (0.30, 0.90), (0.35, 0.95), "light"),
    "round":   ("plain marble rings",                 ANY,  (0.30, 0.90), (0.35, 0.95), "light"),
    "trim":    ("plain",                              ANY,  (0.10, 0.60), (0.20, 0.80), "dark"),
}  # fmt: skip
FRAMES = {"door": 0.1, "window": 0.06, "picture": 0.06, "rug": 0.08}  # see Solid
GLOWS = {"window": 1.5, "light": 3.0}

# Furniture stands on z = 0 with its back towards -y. Its sizes are drawn from ranges (m) and give
# its parts: (shape, centre (m), half sizes (m), 0 for the main paint or 1 for the trim).
CORNERS = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
FURNITURE = {
    "table": ([(0.4, 0.8), (0.3, 0.45), (0.32, 0.37), (0.02, 0.04)], lambda x, y, z, r: [
        ("box", (0, 0, 2 * z + 0.025), (x, y, 0.025), 0),
        *(("cylinder", (i * (x - 0.06), j * (y - 0.06), z), (r, r, z), 1) for i, j in CORNERS)]),
    "chair": ([], lambda: [
        ("box", (0, 0, 0.46), (0.22, 0.22, 0.025), 0),
        ("box", (0, -0.2, 0.72), (0.22, 0.02, 0.24), 0),
        *(("box", (i * 0.19, j * 0.19, 0.22), (0.02, 0.02, 0.22), 1) for i, j in CORNERS)]),
    "cabinet": ([(0.35, 1.0), (0.3, 0.6), (0.17, 0.25)], lambda z, x, y: [
        ("box", (0, 0, z), (x, y, z), 0)]),
    "sofa": ([(0.7, 1.0)], lambda x: [
        ("box", (0, 0.05, 0.21), (x - 0.1, 0.35, 0.21), 0),
        ("box", (0, -0.32, 0.4), (x, 0.1, 0.4), 1),
        *(("box", (i * (x - 0.09), 0.08, 0.3), (0.09, 0.32, 0.3), 1) for i in (-1, 1))]),
    "bed": ([(0.5, 0.8)], lambda x: [
        ("box", (0, 0, 0.22), (x, 0.95, 0.22), 0),
        ("box", (0, -0.92, 0.45), (x + 0.03, 0.03, 0.45), 1),
        ("sphere", (0, -0.62, 0.47), (0.7 * x, 0.2, 0.1), 1)]),
    "lamp": ([(0.55, 0.7)], lambda z: [
        ("cylinder", (0, 0, 0.015), (0.15, 0.15, 0.015), 1),
        ("cylinder", (0, 0, z), (0.018, 0.018, z), 1),
        ("cone", (0, 0, 2 * z), (0.22, 0.22, 0.15), 0)]),
    "plant": ([(0.13, 0.2), (0.12, 0.2)], lambda r, z: [("cylinder", (0, 0, z), (r, r, z), 1)]),
    "box": ([(0.12, 0.28), (0.15, 0.3), (0.15, 0.3)], lambda z, x, y: [
        ("box", (0, 0, z), (x, y, z), 0)]),
    "ball": ([(0.1, 0.26)], lambda r: [("sphere", (0, 0, r), (r, r, r), 0)]),
    "vase": ([(0.07, 0.12), (0.12, 0.2)], lambda r, z: [
        ("cylinder", (0, 0, 1.2 * z), (0.5 * r, 0.5 * r, 1.2 * z), 1),
        ("sphere", (0, 0, z), (r, r, z), 0)]),
    "cone": ([(0.1, 0.2), (0.16, 0.3)], lambda r, z: [
        ("cylinder", (0, 0, 0.02), (r + 0.03, r + 0.03, 0.02), 1),
        ("cone", (0, 0, z + 0.03), (r, r, z), 0)]),
}  # fmt: skip
CROWNS = {  # of plants, (height over the pot, half width, half height) in metres
    "cone": ((0.15, 0.3, 0.2), (0.35, 0.25, 0.2), (0.55, 0.18, 0.2)),
    "sphere": ((0.12, 0.2, 0.2), (0.3, 0.24, 0.24), (0.5, 0.17, 0.17)),
}
PLACES = {  # what stands there; twice is twice as often
    "wall": ("cabinet", "sofa", "bed", "lamp", "plant", "cabinet"),
    "free": ("table", "chair", "box", "ball", "cone", "table", "chair"),
    "top": ("ball", "vase", "cone", "box"),
}
TOPS = {"table": (-0.5, 0.5), "cabinet": (-0.5, 0.5), "box": (0,)}  # where "top" is: x / half width
OWN_PAINTS = {  # tried in turn with these chances; all else is painted flat or round
    "plant": {"leaves": 1}, "cabinet": {"books": 0.4, "wood": 0.6},
    "table": {"wood": 0.6}, "chair": {"wood": 0.6},
}  # fmt: skip


def parts_of(kind, rng):
    """The parts of a piece of furniture of random size."""
    ranges, parts = FURNITURE[kind]
    sizes = [rng.uniform(*ends) for ends in ranges]
    if kind != "plant":
        return parts(*sizes)
    shape = "cone" if rng.uniform() < 0.5 else "sphere"
    at = np.zeros((3, 2)) if shape == "cone" else rng.uniform(-0.13, 0.13, (3, 2))
    crown = [(shape, (*xy, 2 * sizes[1] + up), (r, r, z), 0)
             for xy, (up, r, z) in zip(at, CROWNS[shape])]  # fmt: skip
    return parts(*sizes) + crown


class Solid(NamedTuple):
    """A unit shape, scaled by `half`, turned by `yaw` about z and moved to `centre`."""

    shape: str  # a key of HITS, or shell for the six inner faces of the room
    centre: tuple
    half: tuple
    yaw: float
    label: int  # index into CLASSES
    instance: int  # segment id, shared by all parts of one object
    look: tuple  # a row of LOOKS
    colours: tuple  # three in linear RGB: two to mix, one for joints and frames
    frame: float = 0.0  # width of a painted frame, m
    glow: float = 0.0  # light given off, as a multiple of the colour


def matmul(a, b):
    """a [M, 3] @ b [3, N] without a BLAS, whose threads cost more than three terms."""
    return a[:, 0, None] * b[0] + a[:, 1, None] * b[1] + a[:, 2, None] * b[2]


# Where rays o + t d enter a unit shape from outside; o [3] and d [3, N] in its own axes.
# Each function returns t [N], inf for a miss, and outward normals [3, N] of any length.


def hit_box(o, d):
    """|x|, |y|, |z| <= 1: enter the last of three slabs before leaving any."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-1 - o[:, None]) / d, (1 - o[:, None]) / d
    enter, leave = np.minimum(a, b), np.maximum(a, b)
    normal = np.where(np.arange(3)[:, None] == enter.argmax(0), -np.sign(d), 0)
    return np.where(enter.max(0) < leave.min(0), enter.max(0), np.inf), normal


def cross_ball(o, d):
    """Through the unit ball or disc: the middle t [N], half the duration [N], met at all [N]."""
    square = (d * d).sum(0) + 1e-12
    middle = -(o @ d) / square
    closest = o[:, None] + middle * d  # measured from here float32 loses nothing
    inside = 1 - (closest * closest).sum(0)
    return middle, np.sqrt(np.maximum(inside, 0) / square), inside > 0


def hit_sphere(o, d):
    """x^2 + y^2 + z^2 <= 1."""
    middle, reach, hit = cross_ball(o, d)
    t = middle - reach
    return np.where(hit, t, np.inf), o[:, None] + t * d


def hit_cylinder(o, d):
    """x^2 + y^2 <= 1, |z| <= 1: enter the later of the round wall and the slab."""
    middle, reach, near = cross_ball(o[:2], d[:2])
    dz = np.where(d[2] == 0, 1e-12, d[2])
    wall, cap = middle - reach, -o[2] / dz - np.abs(1 / dz)
    t = np.maximum(wall, cap)
    hit = near & (t < np.minimum(middle + reach, -o[2] / dz + np.abs(1 / dz)))
    x, y, zero = *(o[:2, None] + t * d[:2]), np.zeros_like(t)
    normal = np.where(wall > cap, [x, y, zero], [zero, zero, -np.sign(d[2])])
    return np.where(hit, t, np.inf), normal


def hit_cone(o, d):
    """Apex (0, 0, 1), unit base at z = -1: the nearest of its valid hits. p is o from the apex."""
    q = np.array([[1], [1], [-0.25]], o.dtype)  # on the wall q . p^2 = 0 and -2 < z < 0
    p = o[:, None] - np.array([[0], [0], [1]], o.dtype)
    a, b, c = (q * d * d).sum(0), (q * p * d).sum(0), (q * p * p).sum(0)  # a t^2 + 2 b t + c = 0
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    inside = b * b - a * c
    root = np.sqrt(np.maximum(inside, 0))
    t = np.full_like(a, np.inf)
    for wall in ((-b - root) / a, (-b + root) / a):
        z = p[2] + wall * d[2]
        t = np.where((inside > 0) & (z < 0) & (z > -2) & (wall > 0) & (wall < t), wall, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        base = (-2 - p[2]) / d[2]
        on_base = (base > 0) & (base < t) & (((p[:2] + base * d[:2]) ** 2).sum(0) < 1)
    point = p + np.where(np.isfinite(t), t, 0) * d
    normal = np.where(on_base, np.array([[0], [0], [-1]], o.dtype), q * point)
    return np.where(on_base, base, t), normal


HITS = {"box": hit_box, "sphere": hit_sphere, "cylinder": hit_cylinder, "cone": hit_cone}


class Room:
    """A furnished box room with exact ground truth, drawn by analytic ray casting.

    A pure function of `seed` (any integer >= 0): shape, furniture, paint, light and the closed
    camera path come from one numpy generator. Frame i is the same picture whatever `num_frames`.
    """

    has_depth = has_masks = True
    numbers = property(lambda self: range(self.num_frames))

    def __init__(self, seed, num_frames=120):
        self.rng = np.random.default_rng(seed)  # draws what is built here, and no frame
        self.name, self.num_frames = f"room{seed}", num_frames
        # Half the width, half the depth, the height
        self.size = np.float32(self.rng.uniform((2.2, 2.2, 2.4), (3.4, 3.4, 3.0)))
        self.fov = np.radians(self.rng.uniform(60, 75))  # vertical
        self._walk()
        self._build()
        self._furnish()
        self._stack()

    def __len__(self):
        return self.num_frames

    def _walk(self):
        """A smooth closed camera path around the middle that looks across it."""
        rng, s = self.rng, np.linspace(0, 2 * np.pi, 1441)
        wave = lambda k: np.sin(k * s + rng.uniform(0, 2 * np.pi))  # noqa: E731
        radius = (self.size[:2] - 1.0) * rng.uniform(0.55, 0.8, 2)
        angle = rng.choice([-1, 1]) * s + rng.uniform(0, 2 * np.pi)
        x = radius[0] * np.cos(angle) + 0.15 * wave(2)
        y = radius[1] * np.sin(angle) + 0.15 * wave(3)
        eye = np.stack([x, y, rng.uniform(1.2, 1.6) + 0.12 * wave(1) + 0.05 * wave(3)], 1)
        across = rng.uniform(0.3, 1.0)
        x, y = -across * x + 0.35 * wave(2), -across * y + 0.35 * wave(1)
        forward = np.stack([x, y, rng.uniform(0.4, 0.9) + 0.2 * wave(2)], 1) - eye
        forward /= np.linalg.norm(forward, axis=1, keepdims=True)
        # Frames lie equal steps apart in metres and radians added up: at most 5 cm, 3 degrees.
        step = np.linalg.norm(np.diff(eye, axis=0), axis=1) / 0.05
        step += np.linalg.norm(np.diff(forward, axis=0), axis=1) / np.radians(3)
        along = np.concatenate([[0], np.cumsum(step)])
        wanted = np.arange(self.num_frames) % along[-1]
        self.eyes = np.stack([np.interp(wanted, along, c) for c in eye.T], 1)  # [F, 3]
        self.forwards = np.stack([np.interp(wanted, along, c) for c in forward.T], 1)  # [F, 3]
        self.path = eye[::12, :2]  # [121, 2], the whole loop, which furniture keeps clear of

    def _look(self, paint):
        """One of a paint's looks. A list of one asks the generator for nothing."""
        return self.rng.choice(PAINTS[paint][0].split())

    def _colour(self, paint, hues=None):
        """A linear RGB colour in a paint's ranges."""
        _, own_hues, saturations, values, _ = PAINTS[paint]
        hue, saturation, value = self.rng.uniform(*zip(hues or own_hues, saturations, values))
        return tuple(np.power(colorsys.hsv_to_rgb(hue % 1, saturation, value), 2.2))

    def _material(self, paint, second=None, look=None):
        """(row of LOOKS, three linear RGB colours), the second perhaps of another paint."""
        look = look or self._look(paint)
        colours = self._colour(paint), self._colour(second or paint)
        return LOOKS[look], (*colours, self.joints[PAINTS[paint][-1]])

    def _place(self, name, parts, x, y, z, yaw, *materials):
        """Add an object as one segment."""
        instance, c, s = self.solids[-1].instance + 1, np.cos(yaw), np.sin(yaw)
        label, frame, glow = CLASSES.index(name), FRAMES.get(name, 0.0), GLOWS.get(name, 0.0)
        for shape, (px, py, pz), half, tone in parts:
            centre = (x + c * px - s * py, y + s * px + c * py, z + pz)
            material = (*materials[tone], frame, glow)
            self.solids.append(Solid(shape, centre, half, yaw, label, instance, *material))

    def _at_wall(self, side, along, gap):
        """(x, y) off wall 0..3: -y, +x, +y, -x. Yaw side * pi / 2 turns a thing's back to it."""
        x, y, _ = self.size
        return [(along, gap - y), (x - gap, along), (-along, y - gap), (gap - x, -along)][side]

    def _build(self):
        """The six inner faces, the ceiling light, one thing on each wall and often a rug."""
        rng, top = self.rng, self.size[2]
        self.joints = {name: self._colour(name) for name in ("dark", "light")}
        light, hue = self.joints["light"], rng.uniform()
        wall = [self._colour("wall", (hue, hue + 0.08)) for _ in range(2)]
        accent = [self._colour("accent") for _ in range(2)]
        wall_look, accent_look = self._look("wall"), self._look("accent")
        if wall_look == "stripes":  # striped wallpaper is tone on tone
            wall[1] = tuple(0.8 * np.array(wall[0]))
        floor_look = self._look("floor")
        floor = self._material("boards" if floor_look == "planks" else "floor", look=floor_look)
        faces = [("wall", LOOKS[wall_look], (*wall, light))] * 4
        faces += [("floor", *floor), ("ceiling", *self._material("ceiling"))]
        faces[rng.integers(4)] = ("wall", LOOKS[accent_look], (*accent, light))
        centre, half = (0, 0, top / 2), (*self.size[:2], top / 2)
        self.solids = [
            Solid("shell", centre, half, 0.0, CLASSES.index(name), 1 + k, look, colours)
            for k, (name, look, colours) in enumerate(faces)
        ]

        self.light = np.array([*rng.uniform(-0.4, 0.4, 2) * self.size[:2], top - 0.08])
        where = (*self.light[:2], top - 0.02)
        lamp = [("box", (0, 0, 0), (0.4, 0.25, 0.02), 0)]
        self._place("light", lamp, *where, 0.0, (LOOKS["plain"], (light,) * 3))
        self.taken = []  # of the floor: corners (low, high), (x, y) each
        for side, name in enumerate(rng.permutation(["door", "window", "picture", "picture"])):
            # Half sizes; a window's and a picture's are drawn for every wall.
            drawn = rng.uniform((0.5, 0.45, 0.3, 0.2), (0.9, 0.65, 0.6, 0.4))
            x, z = {"door": (0.42, 1.0), "window": drawn[:2], "picture": drawn[2:]}[name]
            span = self.size[side % 2] - x - 0.3
            along = rng.uniform(-span, span)
            up = z if name == "door" else rng.uniform(1.45, 1.6)
            at = self._at_wall(side, along, 0.02)
            if name == "door":  # room to open
                ends = list(zip(at, self._at_wall(side, along, 0.9)))
                self.taken.append(([min(e) - 0.3 for e in ends], [max(e) + 0.3 for e in ends]))
            material = self._material(name, "haze" if name == "window" else name)
            parts = [("box", (0, 0, 0), (x, 0.02, z), 0)]
            self._place(name, parts, *at, up, side * np.pi / 2, material)
        if rng.uniform() < 0.7:
            half = (*rng.uniform((0.7, 0.5), (1.1, 0.9)), 0.008)
            where = (*rng.uniform(-0.5, 0.5, 2), 0, rng.uniform(-0.3, 0.3))
            self._place("rug", [("box", (0, 0, 0.008), half, 0)], *where, self._material("rug"))

    def _furnish(self):
        """8 to 16 pieces of furniture. Every failed try shrinks the next ones, so the loop ends."""
        rng, placed, shrink = self.rng, 0, 1.0
        self.num_objects = rng.integers(8, 17)
        shelves = []  # tops that are still empty: (x, y, z, half size)
        while placed < self.num_objects:
            where = rng.choice(["wall", "free", "top"], p=[0.4, 0.35, 0.25])
            if where == "top" and not shelves:
                where = "free"
            kind = rng.choice(PLACES[where])
            parts = [(shape, np.multiply(centre, shrink), np.multiply(half, shrink), tone)
                     for shape, centre, half, tone in parts_of(kind, rng)]  # fmt: skip
            reach = np.max([np.abs(centre[:2]) + half[:2] for _, centre, half, _ in parts], 0)
            if where == "top":
                x, y, z, room = shelves.pop(rng.integers(len(shelves)))
                yaw, fits = rng.uniform(0, 2 * np.pi), np.hypot(*reach) <= room
            else:
                x, y, z, yaw, fits = self._on_floor(where, reach)
            if not fits:
                shrink *= 0.99
                continue
            for aside in TOPS.get(kind, ()) if where != "top" else ():
                at = (x + aside * reach[0] * np.cos(yaw), y + aside * reach[0] * np.sin(yaw))
                top = max(centre[2] + half[2] for _, centre, half, _ in parts)
                shelves.append((*at, top, min(reach[0] / len(TOPS[kind]), reach[1])))
            paint = "flat" if all(shape == "box" for shape, *_ in parts) else "round"
            for name, chance in OWN_PAINTS.get(kind, {}).items():
                if chance == 1 or rng.uniform() < chance:
                    paint = name
                    break
            self._place(kind, parts, x, y, z, yaw, self._material(paint), self._material("trim"))
            placed += 1

    def _on_floor(self, where, reach):
        """Try a place for half sizes reach [2], and take it if free: (x, y, z, yaw, free)."""
        rng, size = self.rng, self.size[:2]
        side = rng.integers(4) if where == "wall" else None
        yaw = rng.uniform(0, 2 * np.pi) if side is None else side * np.pi / 2
        c, s = abs(np.cos(yaw)), abs(np.sin(yaw))
        half = np.array([c * reach[0] + s * reach[1], s * reach[0] + c * reach[1]])
        if side is None:
            at = rng.uniform(-1, 1, 2) * (size - half - 0.1)
        else:
            span = size[side % 2] - reach[0] - 0.02
            at = np.array(self._at_wall(side, rng.uniform(-span, span), reach[1] + 0.05))
        low, high = at - half, at + half
        from_path = np.hypot(*np.maximum(np.abs(self.path - at) - half, 0).T).min()
        overlap = any((low < b).all() and (high > a).all() for a, b in self.taken)
        free = from_path >= 0.4 and not overlap
        if free:
            self.taken.append((low - 0.05, high + 0.05))
        return (*at, 0.0, yaw, free)

    def _stack(self):
        """All solids' fields as arrays with a row each, for the vectorised code below."""
        columns = [np.array(column) for column in zip(*self.solids)]
        self.all = Solid(*(np.float32(c) if c.dtype == float else c for c in columns))
        self.radius = np.linalg.norm(self.all.half, axis=1)  # [S], of bounding spheres
        c, s, zero = np.cos(self.all.yaw), np.sin(self.all.yaw), np.zeros_like(self.all.yaw)
        turn = np.stack([c, s, zero, -s, c, zero, zero, zero, zero + 1], 1)
        self.turn = turn.reshape(-1, 3, 3)  # [S, 3, 3], world to local

    def cast(self, origin, rays, t):
        """The first solid, shell apart, that rays origin + t * ray meet before t [N].

        Returns t [N], the solid [N] or -1, and normals [3, N] of any length.
        """
        t, which, normal = t.copy(), np.full(t.shape, -1), np.zeros_like(rays)
        towards = self.all.centre - origin
        # Only rays through the bounding sphere are tested; all of them if we stand inside it.
        outside = (towards * towards).sum(1) - self.radius**2
        least = np.where(outside < 0, -np.inf, np.sqrt(np.maximum(outside, 0)))
        length = np.sqrt((rays * rays).sum(0))
        for k in range(6, len(self.solids)):
            rows = np.flatnonzero(matmul(towards[k : k + 1], rays)[0] > least[k] * length)
            if not rows.size:
                continue
            to_unit = self.turn[k] / self.all.half[k][:, None]
            hit = HITS[self.all.shape[k]]
            entry, n = hit(to_unit @ -towards[k], matmul(to_unit, rays[:, rows]))
            closer = (entry > 0) & (entry < t[rows])
            rows = rows[closer]
            t[rows], which[rows] = entry[closer], k
            normal[:, rows] = matmul(to_unit.T, n[:, closer])
        return t, which, normal

    def paint(self, point, which, normal):
        """Linear colour [3, N] of solids `which` [N] at world points [3, N].

        Joints and frames have the third of a solid's colours. The rest mixes the first two by a
        cell's parity and random number and by smooth noise, each with its share in LOOKS.
        """
        c, s = self.turn[which, 0, 0], self.turn[which, 0, 1]
        own = lambda v: np.stack([c * v[0] + s * v[1], c * v[1] - s * v[0], v[2]])  # noqa: E731
        local, facing = own(point - self.all.centre.T[:, which]), np.abs(own(normal))
        flat = facing[2] > 0.7
        u = np.where(~flat & (facing[0] > facing[1]), local[1], local[0])
        v = np.where(flat, local[1], local[2])
        width, height, shift, joint, parity, chance, cloud = self.all.look.T[:, which]
        row = np.floor(v / height + 0.5)
        column = u / width + 0.5 + shift * row
        cell = np.floor(column)
        in_joint = np.abs(column - cell - 0.5) > 0.5 - joint / width / 2
        in_joint |= np.abs(v / height - row) > 0.5 - joint / height / 2
        # A frame runs along the surface's ends; the axis it faces does not count.
        to_edge = np.where(facing > 0.7, np.inf, self.all.half.T[:, which] - np.abs(local)).min(0)
        in_joint |= to_edge < self.all.frame[which]
        cells = row.astype(np.int64) * 73856093 ^ cell.astype(np.int64) * 19349663
        bits = (cells ^ which * 83492791).astype(np.uint32) * np.uint32(2654435761)
        random = (bits >> np.uint32(22)).astype(np.float32) / 1023
        # Smooth noise: four sine waves that bend each other. Planks stretch it to a grain.
        stretched = local + (1.7 * which).astype(np.float32)
        stretched[0] *= np.where(width == np.float32(1.1), np.float32(0.15), np.float32(1))
        waves = matmul(NOISE, stretched)
        waves = np.sin(waves + 1.6 * np.sin(np.roll(waves, 1, 0) * 0.7))
        noise = 0.5 + 0.3 * waves.sum(0) / 2
        mix = np.clip(parity * ((row + cell) % 2) + chance * random + cloud * noise, 0, 1)
        a, b, c = self.all.colours.transpose(1, 2, 0)[:, :, which]  # each [3, N]
        return np.where(in_joint, c, a + (b - a) * mix)

    def shade(self, origin, rays):
        """What is seen from a point along rays [3, N]: colour [3, N] in 0..1, t, solid, normal.

        Surfaces are Lambertian: a point has the same colour from everywhere.
        """
        middle, half = self.all.centre[0], self.all.half[0]  # of the room
        ends = (middle + half - origin)[:, None], (middle - half - origin)[:, None]
        with np.errstate(divide="ignore"):  # a wall parallel to the ray is infinitely far
            steps = np.abs(np.where(rays > 0, *ends) / rays)
        axis = steps.argmin(0)
        t, which, normal = self.cast(origin, rays, steps.min(0))
        # Rays that meet no solid end on the shell: walls -y, +x, +y, -x, floor, ceiling.
        ahead = np.take_along_axis(rays, axis[None], 0)[0] > 0
        face = np.array([[3, 1], [0, 2], [4, 5]])[axis, ahead.astype(int)]
        inward = np.where(np.arange(3)[:, None] == axis, -np.sign(rays), 0)
        normal = np.where(which < 0, inward, normal)
        normal /= np.linalg.norm(normal, axis=0)
        which = np.where(which < 0, face, which)
        point = origin[:, None] + t * rays
        # Corners and contacts with the walls and the floor see less of the room.
        gap = half[:, None] - np.abs(point - middle[:, None])
        occlusion = 1 - 0.4 * (1 - np.abs(normal)) * np.exp(-np.maximum(gap, 0) / 0.25)
        light = (0.42 + 0.12 * normal[2]) * occlusion.prod(0)
        for lamp in self.light.astype(np.float32) + LAMP:
            # From the lamp the point is at t = 1; what comes before casts a shadow.
            reach = point - lamp[:, None]
            shadowed = self.cast(lamp, reach, np.full_like(t, 0.998))[1] >= 0
            square = (reach * reach).sum(0)
            lambert = np.maximum(-(reach * normal).sum(0), 0) / np.sqrt(square)
            light += np.where(shadowed, 0, lambert) * (9 / len(LAMP)) / (2 + square)
        linear = self.paint(point, which, normal) * (light + self.all.glow[which])
        return np.power(1 - np.exp(-1.4 * linear), 1 / 2.2), t, which, normal

    def pose(self, i):
        """Camera-to-world matrix of frame i, OpenCV axes, float32 [4, 4]."""
        forward = self.forwards[i] / np.linalg.norm(self.forwards[i])
        right = np.cross(forward, (0, 0, 1))
        right /= np.linalg.norm(right)
        pose = np.eye(4, dtype=np.float32)
        pose[:3] = np.stack([right, np.cross(forward, right), forward, self.eyes[i]], 1)
        return pose

    def frame(self, i, height, width):
        """Frame i as the module's dict of tensors. Sizes in pixels; the vertical field of view is
        the same for all. Raises IndexError if there is no frame i.
        """
        if not 0 <= i < self.num_frames:
            raise IndexError(f"{self.name} has frames 0 to {self.num_frames - 1}, not {i}")
        pose = self.pose(i)
        eye, rotation = pose[:3, 3], pose[:3, :3]
        focal = height / 2 / np.tan(self.fov / 2)
        K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)

        def see(rows, columns):  # in pixels; rays have z = 1 in camera axes, so t is the z-depth
            x, y = (columns - width / 2) / focal, (rows - height / 2) / focal
            rays = np.stack([x, y, np.ones_like(x)]).astype(np.float32)
            return self.shade(eye, matmul(rotation, rays))

        rows, columns = np.mgrid[0:height, 0:width].reshape(2, -1) + 0.5
        image, t, which, normal = see(rows, columns)
        # Antialiasing: four rays for each pixel that differs from a neighbour.
        grid = image.reshape(3, height, width)
        below, beside = (np.abs(np.diff(grid, axis=k)).max(0) > 0.12 for k in (1, 2))
        rough = np.pad(below, ((0, 1), (0, 0))) | np.pad(below, ((1, 0), (0, 0)))
        rough |= np.pad(beside, ((0, 0), (0, 1))) | np.pad(beside, ((0, 0), (1, 0)))
        again = np.flatnonzero(rough)[:, None]
        dy, dx = CORNERS.T / 4
        finer = see((rows[again] + dy).ravel(), (columns[again] + dx).ravel())[0]
        image[:, again[:, 0]] = finer.reshape(3, -1, 4).mean(2)

        normals = matmul(rotation.T, normal.astype(np.float32))
        frame = {
            "images": image.astype(np.float32), "depths": t.astype(np.float32), "normals": normals,
            "masks": self.all.instance[which], "classes": self.all.label[which],
        }
        frame = {k: v.reshape(*v.shape[:-1], height, width) for k, v in frame.items()}
        return {k: torch.from_numpy(v) for k, v in {**frame, "extrinsics": pose, "Ks": K}.items()}


class Rooms:
    """The rooms of a split ("train", "val" or "probe"), made when asked for: rooms[i] is a Room."""

    def __init__(self, split):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        self.seeds = SPLITS[split]

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, i):
        return Room(self.seeds[i])


# ---------------------------------------------------------------------------------------------------------
# Captures as they lie on disk: nerfstudio, instant-ngp, ScanNet++, COLMAP, RealEstate10K. `open_scenes` finds them by
# `LAYOUTS`. Each layout lists its frames as `Shot`s; from there on all are alike: a photo is opened, straightened
# where a lens bent it, scaled and cropped (`Crop`), and with it its depth, validity mask and segment ids.

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


def open_rgb(path, listed_in):
    """A photo of any mode in 8-bit RGB. ValueError names the file."""
    picture = open_picture(path, "a photo", listed_in)
    with naming(path, "a photo that cannot be read"):
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


# -------------------------------------------------------------------------------------------------
# Views of scenes

VIEW_KEYS = ("images", "extrinsics", "Ks", "depths", "masks", "valid")


class NoViews(ValueError):
    """A scene lacks the frames that are to be drawn from it."""


def some(scenes):
    """At most 64 scenes, evenly spread, which are looked at in place of thousands."""
    return [scenes[i] for i in range(0, len(scenes), -(-len(scenes) // 64))]


def context_pairs(numbers, num_context, min_gap, max_gap, target):
    """What `sample_views` draws from: first and last context frames, and their gaps, [P] each.

    Raises NoViews if there are none.
    """
    count, between = len(numbers), num_context - 2 + (target == "between")  # frames needed between
    # Numbers rise by 1 or more, so a pair is at most max_gap frames apart.
    first, step = np.indices((count, min(count, max_gap + 1))).reshape(2, -1)
    last = np.minimum(first + step, count - 1)
    gaps = numbers[last] - numbers[first]
    kept = (step > between) & (first + step < count) & (gaps <= max_gap)
    if num_context < 2 or min_gap <= between or not kept.any():
        need = f"need {between + 2} frames and a gap of {between + 1} to {max_gap}"
        there = f"there are {count}, numbered {min(np.diff(numbers), default=1)} or more apart"
        raise NoViews(f"{num_context} context views and a target {target} {need}; {there}")
    kept &= gaps >= min(min_gap, gaps[kept].max())
    return first[kept], last[kept], gaps[kept]


def sample_views(numbers, rng, num_context=2, min_gap=8, max_gap=12, target="between"):
    """Draw frames to train on: num_context context frames and a target frame.

    numbers: the frames' own, rising, in which gaps are counted; an int N means 0 to N - 1.
    The first and the last context frame are min_gap to max_gap apart, or as far as possible if all
    are closer; the others lie evenly between. The target lies strictly between the first and the
    last and is no context frame. With target "any" it is any frame from the first to the last.
    Returns ([num_context indices], index). Raises NoViews if there are too few frames.
    """
    numbers = np.arange(numbers) if isinstance(numbers, int) else np.asarray(numbers)
    firsts, lasts, gaps = context_pairs(numbers, num_context, min_gap, max_gap, target)
    gap = rng.choice(np.unique(gaps))
    pair = rng.choice(np.flatnonzero(gaps == gap))
    first, last = int(firsts[pair]), int(lasts[pair])
    between, context = list(range(first + 1, last)), [first, last]
    for i in range(1, num_context - 1):
        wanted = numbers[first] + round(i * int(gap) / (num_context - 1))
        context.append(min(between, key=lambda k: abs(int(numbers[k]) - wanted)))
        between.remove(context[-1])
    targets = between if target == "between" else range(first, last + 1)
    return sorted(context), int(rng.choice(targets))


class Views(torch.utils.data.Dataset):
    """Samples of context and target views; views[index] is a function of (seed, index) alone.

    Args:
        scenes: a sequence of scenes: `open_scenes(path)` or `Rooms(split)`.
        height, width: of all images, pixels.
        num_context, min_gap, max_gap, target: see `sample_views`.
        seed, length: the sequence of samples and its length.

    A sample: {"context": {images [V, 3, H, W], extrinsics [V, 4, 4], Ks [V, 3, 3], depths [V, H, W]
    (if any of `some` scenes has depth), masks [V, H, W], valid [V, H, W] bool (of captures)},
    "target": the same without V, "has_masks": bool (), "scene": name, "frames": [V + 1]}.
    Scenes without enough frames are left out. Raises ValueError if all of `some` are.
    """

    def __init__(self, scenes, height, width, *, num_context=2, min_gap=8, max_gap=12,
                 target="between", seed=0, length):  # fmt: skip
        if not 2 <= min_gap <= max_gap:
            raise ValueError(f"2 <= min_gap <= max_gap must hold, not {min_gap} and {max_gap}")
        if target not in ("between", "any"):
            raise ValueError(f"the target is between the context views or any, not {target!r}")
        self.scenes, self.size, self.seed, self.length = scenes, (height, width), seed, length
        self.sampling = dict(num_context=num_context, min_gap=min_gap, max_gap=max_gap)
        self.sampling["target"] = target
        if isinstance(scenes, Rooms):
            absent = "valid"
        else:  # thousands of scenes in chunks are not looked at
            absent = "depths" if isinstance(scenes, Chunks) or not self._have_depth() else None
        self.keys = tuple(k for k in VIEW_KEYS if k != absent)

    def _have_depth(self):
        """Whether any of `some` scenes has depth. Warns of those that lack depth or frames."""
        scenes, failed, close = some(self.scenes), [], []
        for scene in scenes:
            try:
                gaps = context_pairs(np.asarray(scene.numbers), **self.sampling)[2]
                if gaps.max() < (least := self.sampling["min_gap"]):
                    few = f"{len(scene)} frames are too few for gaps of {least}"
                    close.append(f"{scene.name}: {few}")
            except NoViews as error:
                failed.append(f"{scene.name}: {error}")
        if len(failed) == len(scenes):
            raise ValueError(failed[0])
        deep = any(scene.has_depth for scene in scenes)
        flat = [f"{scene.name} has no depth" for scene in scenes if deep and not scene.has_depth]
        for found, effect in (
            (failed, "are left out"), (close, "take their largest gap"),
            (flat, "have unknown depth"),
        ):  # fmt: skip
            if found:
                warnings.warn(f"{found[0]} ({len(found)} of {len(scenes)} scenes {effect})")
        return deep

    def __len__(self):
        return self.length

    def _draw(self, rng):
        """A scene, its context frames and its target."""
        for _ in range(1000):
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            try:
                return scene, *sample_views(scene.numbers, rng, **self.sampling)
            except NoViews as error:  # then another: not all were looked at before
                failed = f"{scene.name}: {error}"
        raise ValueError(failed)

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        scene, context, target = self._draw(np.random.default_rng([self.seed, index]))
        unknown = {"depths": torch.zeros(self.size)}
        views = [unknown | scene.frame(i, *self.size) for i in (*context, target)]
        return {
            "context": {k: torch.stack([view[k] for view in views[:-1]]) for k in self.keys},
            "target": {k: views[-1][k] for k in self.keys},
            "has_masks": torch.tensor(scene.has_masks),
            "scene": scene.name,
            "frames": torch.tensor([*context, target]),
        }

    def point_range(self):
        """(near, far) of the captures' own points, None where they have none.

        In distances between the first and the last context camera: of the points' depths in
        context views, over 100 draws from each of up to 16 scenes, the 1st percentile times 0.8
        and the 99th times 1.25.
        """
        if isinstance(self.scenes, (Rooms, Chunks)):
            return None
        rng, found = np.random.default_rng(0), []
        for scene in self.scenes[:: -(-len(self.scenes) // 16)]:
            depths = scene.point_depths()
            for _ in range(100 if depths else 0):
                context, _ = sample_views(scene.numbers, rng, **self.sampling)
                ends = [scene.shots[i].pose[:3, 3] for i in (context[0], context[-1])]
                baseline = np.linalg.norm(ends[0] - ends[1])
                found += [depths[i] / baseline for i in context if baseline > 1e-9]
        found = np.concatenate(found or [np.zeros(0)])
        if not (found > 0).any():
            return None
        near, far = np.percentile(found[found > 0], (1, 99)) * (0.8, 1.25)
        return float(near), float(far)


# -------------------------------------------------------------------------------------------------
# Single photos, and crops of them, to pretrain a teacher with

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Photos(torch.utils.data.Dataset):
    """Single photos [3, height, width] in 0..1, of a folder or of rooms.

    Those of a folder, sub-folders included, are scaled to cover the size and cropped about the
    centre. Without a folder they are `count` views of rooms, eight of each.
    Raises ValueError if the folder holds no photo.
    """

    def __init__(self, path, height, width, count=0, split="train"):
        self.size, self.count, self.files = (height, width), count, None
        self.rooms, self.kept = Rooms(split), {}
        if path is not None:
            found = sorted(f for f in Path(path).rglob("*") if f.suffix.lower() in PHOTO_SUFFIXES)
            self.files = [f for f in found if f.is_file()]
            self.count = len(self.files)
            if not self.files:
                raise ValueError(f"{path}: no photos ({', '.join(PHOTO_SUFFIXES)}) in it or below")

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if self.files:
            photo = open_rgb(self.files[i], self.files[i].parent)
            return Crop(photo, *self.size).colours()
        if i not in self.kept:  # a view takes a tenth of a second to draw, and bytes are small
            room = self.rooms[i // 8]
            frame = int(np.random.default_rng([i, len(room)]).integers(len(room)))
            self.kept[i] = (room.frame(frame, *self.size)["images"] * 255).round().byte()
        return self.kept[i] / 255


class Crops(torch.utils.data.Dataset):
    """Two crops of one photo and their overlap; crops[index] is a function of (seed, index) alone.

    Args:
        photos: a sequence of photos [3, H, W]: `Photos`.
        size: of the crops, pixels, square.
        scales: least and most of the photo's side that a crop shows.
        warp: how else two crops differ, 0 (not at all) to 1: see `crop_window`.
        seed, length: the sequence of samples and its length.

    A sample: {"crops" [2, 3, size, size] in 0..1, "windows" [2, 2, 3], "first_to_second" [2, 3]}.
    The last two are affine maps from the crops' coordinates to the photo's and from the first
    crop's to the second's; coordinates are x, y in -1..1 from corner to corner.
    """

    def __init__(self, photos, size, scales=(0.7, 0.85), warp=0.0, seed=0, *, length):
        self.photos, self.size, self.scales, self.warp = photos, size, scales, warp
        self.seed, self.length = seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        photo = self.photos[int(rng.integers(len(self.photos)))]
        windows = np.stack([crop_window(rng, self.scales, self.warp) for _ in range(2)])
        crops = torch.stack([jitter(cut_out(photo, window, self.size), rng) for window in windows])
        first_to_second = np.linalg.inv(windows[1]) @ windows[0]
        return {
            "crops": crops, "windows": torch.from_numpy(windows[:, :2]).float(),
            "first_to_second": torch.from_numpy(first_to_second[:2]).float(),
        }  # fmt: skip


def crop_window(rng, scales, warp):
    """A window on a photo as the affine map [3, 3] from its coordinates to the photo's, both -1..1.

    It takes between scales[0] and scales[1] of the photo's sides, and lies inside the photo. With
    a warp of 0 it is upright; with 1 it is turned by up to 20 degrees, up to an eighth longer or
    shorter, and mirrored half the time.
    """
    scale, turn = rng.uniform(*scales), warp * rng.uniform(-0.35, 0.35)
    stretch, mirror = np.exp(warp * rng.uniform(-0.125, 0.125)), rng.choice([-1, 1])
    mirror = mirror if warp else 1
    c, s = np.cos(turn), np.sin(turn)
    A = scale * np.array([[c, -s], [s, c]]) * [mirror * stretch, 1 / stretch]
    reach = np.abs(A).sum(1)  # half its bounding box
    A, reach = A / max(1, reach.max()), reach / max(1, reach.max())
    window = np.eye(3)
    window[:2, :2], window[:2, 2] = A, rng.uniform(-1, 1, 2) * (1 - reach)
    return window


def cut_out(photo, window, size):
    """The part of a photo [3, H, W] that a window shows, [3, size, size]."""
    theta = torch.from_numpy(window[None, :2]).float()
    grid = torch.nn.functional.affine_grid(theta, (1, 3, size, size), align_corners=False)
    options = dict(padding_mode="border", align_corners=False)
    return torch.nn.functional.grid_sample(photo[None], grid, **options)[0]


def jitter(photo, rng):
    """Another exposure, white balance and gamma, and a little noise: nothing about the place."""
    gains = np.exp(rng.uniform(-0.15, 0.15) + rng.uniform(-0.06, 0.06, (3, 1, 1)))
    gamma = float(np.exp(rng.uniform(-0.12, 0.12)))
    photo = (photo * torch.from_numpy(gains).float()).clamp(1e-4, 1) ** gamma
    noise = torch.from_numpy(rng.standard_normal(photo.shape, np.float32))
    return (photo + 0.01 * noise).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------
# Views and labels to probe with (evaluate.py)


BINS = (0, 15, 30, 60, 180)  # degrees of viewpoint change


class Pairs(torch.utils.data.Dataset):
    """Two views each, frames i and j of a scene, with depth: pairs[n] is two dicts as of `scene.frame`."""

    def __init__(self, entries, height, width, least_overlap=0.0):
        self.entries, self.size = entries, (height, width)
        self.least_overlap = least_overlap  # share of a view that the other must show for the pair to count

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, n):
        scene, *frames = self.entries[n]
        keys = ("images", "extrinsics", "Ks", "depths")
        return tuple({k: view[k] for k in keys} for view in (scene.frame(i, *self.size) for i in frames))


def pairs(path, count, height, width, seed):
    """Pairs of views to find correspondences in: of ScanNet-1500 (a folder with test.npz) its own; of RGB-D captures
    any two frames, which count if they have 30 % in common; without a path of procedural rooms, as many from each range
    of viewpoint change, 0 to 15, 30, 60 and 180 degrees, all with 30 % in common. Where there are more than `count`,
    seed says which are taken."""
    rng = np.random.default_rng(seed)
    if path is None:
        rooms, found = Rooms("probe"), []
        while len(found) < count:
            pair = room_pair(rooms[int(rng.integers(len(rooms)))], rng, BINS[len(found) % 4 :][:2])
            found += [pair] if pair else []
        return Pairs(found, height, width)
    if (Path(path) / "test.npz").is_file() or (Path(path) / "intrinsics.npz").is_file():
        found, least_overlap = scannet_pairs(Path(path)), 0.0
    else:
        scenes, least_overlap = open_scenes(path), 0.3
        for scene in scenes:
            if not scene.has_depth:
                raise ValueError(f"{scene.file}: no depth maps, which correspondences are measured with")
        sizes = np.array([len(scene) * (len(scene) - 1) // 2 for scene in scenes])  # pairs of each scene
        chosen = range(sizes.sum()) if sizes.sum() <= count else np.sort(rng.choice(sizes.sum(), count, replace=False))
        found = []
        for k in chosen:
            scene = int(np.searchsorted(sizes.cumsum(), k, side="right"))
            k = int(k - sizes[:scene].sum())  # pairs (i, j) with i < j, counted along j
            j = int((1 + np.sqrt(1 + 8 * k)) // 2)
            found.append((scenes[scene], k - j * (j - 1) // 2, j))
    if not found:
        raise ValueError(f"{path}: no two frames to compare")
    if len(found) > count:
        found = [found[k] for k in np.sort(rng.choice(len(found), count, replace=False))]
    return Pairs(found, height, width, least_overlap)


def rotation_angle(Rt):
    """Degrees of the rotation in Rt [..., 3 or 4, 4]."""
    trace = Rt[..., 0, 0] + Rt[..., 1, 1] + Rt[..., 2, 2]
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def room_pair(room, rng, degrees, tries=20):
    """(room, i, j) of two frames whose cameras are turned by an angle in the range, or None if none is found."""
    for _ in range(tries):
        i, j = (int(k) for k in rng.integers(len(room), size=2))
        if i == j:
            continue
        pose_a, pose_b = (torch.from_numpy(room.pose(k)) for k in (i, j))
        to_b = torch.linalg.inv(pose_b) @ pose_a
        if not degrees[0] <= rotation_angle(to_b) < degrees[1]:
            continue  # before anything is drawn
        if overlap(room.frame(i, 24, 24), room.frame(j, 24, 24), to_b) > 0.3:
            return room, i, j


def camera_points(depths, K):
    """Depths [H, W] along z and K [3, 3] in pixels -> points in the camera's axes [H, W, 3]."""
    y, x = torch.meshgrid(*(torch.arange(n, device=depths.device) + 0.5 for n in depths.shape), indexing="ij")
    return torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1) * depths[..., None]


def overlap(a, b, to_b):
    """Share of frame a's pixels with depth that frame b sees too, given a's camera coordinates -> b's [4, 4]."""
    H, W = a["depths"].shape
    points = camera_points(a["depths"], a["Ks"]) @ to_b[:3, :3].T + to_b[:3, 3]
    seen = points @ b["Ks"].T
    z = seen[..., 2].clamp(min=1e-6)
    column, row = (seen[..., 0] / z).floor().long(), (seen[..., 1] / z).floor().long()
    inside = (seen[..., 2] > 0) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    there = b["depths"][row.clamp(0, H - 1), column.clamp(0, W - 1)]
    known = a["depths"] > 0
    return float((known & inside & ((z / there - 1).abs() < 0.1)).sum() / known.sum().clamp(min=1))


class ScanNetScene(PosedFolder):
    """A scene of ScanNet-1500: color/ID.jpg, depth/ID.png in millimetres, pose/ID.txt camera-to-world."""

    has_depth, has_masks, depth_unit = True, False, 0.001

    def __init__(self, path, K, ids):
        self.path = self.file = path
        self.name = path.name
        # The intrinsics are those of the depth maps, 640 x 480, whatever size the photos have
        K = [float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))]
        camera = dict(zip(("fl_x", "fl_y", "cx", "cy"), K), w=640, h=480)
        self.shots = []
        for i in ids:
            pose = path / "pose" / f"{i}.txt"
            try:
                matrix = np.loadtxt(pose)
            except (OSError, ValueError) as error:
                raise ValueError(f"{pose}: not a pose that can be read ({error})") from None
            if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
                raise ValueError(f"{pose}: not 4 x 4 finite numbers")
            if not is_rotation(matrix[:3, :3]):
                raise ValueError(f"{pose}: not rigid: its upper left 3 x 3 is no rotation")
            photo, depth = join(path, "color", f"{i}.jpg"), join(path, "depth", f"{i}.png")
            self.shots.append(Shot(photo, matrix, camera, depth))


def scannet_pairs(path):
    """The 1,500 pairs of SuperGlue's ScanNet test: test.npz "name" [pairs, 4] of scene, sequence and two frames, and
    intrinsics.npz with K [3, 3] by the name of the scene."""
    try:
        names = np.load(path / "test.npz", allow_pickle=False)["name"]
        Ks = dict(np.load(path / "intrinsics.npz", allow_pickle=False))
        if names.ndim != 2 or names.shape[1] != 4 or names.dtype.kind not in "iu":
            raise ValueError("name is not whole numbers [pairs, 4]")
        if not all(K.shape in ((3, 3), (4, 4)) and (K[[0, 1], [0, 1]] > 0).all() for K in Ks.values()):
            raise ValueError("not every K is [3, 3] with focal lengths above 0")
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: test.npz and intrinsics.npz of ScanNet-1500 were expected ({error})") from None
    scenes = [f"scene{scene:04d}_{sequence:02d}" for scene, sequence, _, _ in names]
    opened = {}
    for scene in dict.fromkeys(scenes):
        if scene not in Ks or not (path / scene).is_dir():
            raise ValueError(f"{path / scene}: the folder or its entry in intrinsics.npz is missing")
        ids = sorted({int(i) for s, row in zip(scenes, names) if s == scene for i in row[2:]})
        opened[scene] = ScanNetScene(path / scene, Ks[scene].astype(float)[:3, :3], ids), ids
    return [(opened[s][0], *(opened[s][1].index(int(i)) for i in row[2:])) for s, row in zip(scenes, names)]


class Framing(NamedTuple):
    """Which part of a photo a probe sees, and how large. Sizes are (H, W) in pixels."""

    size: tuple | None = None  # photos cover it, cropped about the centre; None: whole photos
    short: int = 0  # whole photos are scaled to this shorter side, 0: to none
    crop: tuple = ()  # window at a random place that training sees, (): all
    jitter: tuple = (1.0, 1.0)  # training photos are scaled by a factor between these
    mirror: bool = False  # training mirrors every second photo
    both: bool = False  # a test sees a photo and its mirror image
    slide: tuple = ()  # window's side and stride that a test slides, (): one window
    pad: bool = False  # windows get borders up to multiples of 14

    def scaled(self, height, width):
        """(H, W) at which a photo of that size is looked at."""
        factor = self.jitter[0]
        if self.size is None:
            if self.short:  # as mmsegmentation's (2048, 512)
                factor *= min(self.short / min(height, width), 4 * self.short / max(height, width))
            return max(1, round(factor * height)), max(1, round(factor * width))
        return tuple(max(1, round(factor * s)) for s in self.size)

    def crops(self, photo):
        """`Crop`s of a photo, and of its labels, which are not scaled where windows slide."""
        crop = Crop(photo, *self.scaled(photo.height, photo.width))
        whole = self.slide and self.size is None
        return crop, Crop(photo, photo.height, photo.width) if whole else crop


# What the public code of the probes does: see README, Probing
PUBLISHED = {
    "depth": Framing(crop=(416, 544), mirror=True, both=True, pad=True),
    "normals": Framing(size=(480, 480), pad=True),
    "segmentation": Framing(
        short=512, crop=(512, 512), jitter=(0.5, 2.0), mirror=True, slide=(512, 341), pad=True
    ),
}
# What borders are filled with: no label, and ImageNet's mean, which models see as 0
BORDER = {"depths": 0.0, "normals": 0.0, "classes": -1,
          "images": torch.tensor([0.485, 0.456, 0.406])[:, None, None]}  # fmt: skip


class Labelled(torch.utils.data.Dataset):
    """Photos and what is to be read off them, by `load(entry, framing)`.

    labelled[n] = {"images" [n, 3, P, Q] in 0..1: windows of the photo; "places" int64 [n, 7]: of
    each its top, left, height and width in the whole, 1 if it is mirrored, P and Q, where its
    height and width lie in the middle; and "depths" [H, W], "normals" [3, H, W] or "classes"
    [H, W] (-1 = none)}. In training n is 1 and the label the window's own, [P, Q]; in a test the
    label is the whole photo's. Which window training sees is a function of n alone.
    """

    def __init__(self, entries, load, framing, training, count=0, copies=1):
        if count and count < len(entries):  # evenly spread
            entries = [entries[i * len(entries) // count] for i in range(count)]
        self.entries, self.load, self.framing = entries, load, framing
        self.training, self.copies = training, copies
        self.part = "train" if training else "test"

    def __len__(self):
        return len(self.entries) * self.copies

    def __getitem__(self, n):
        entry, rng, framing = self.entries[n // self.copies], np.random.default_rng(n), self.framing
        if not self.training:
            frame = self.load(entry, framing._replace(jitter=(1.0, 1.0)))
            return frame | look(frame["images"], framing)
        scale = rng.uniform(*framing.jitter)
        frame = self.load(entry, framing._replace(jitter=(scale, scale), slide=()))
        frame = random_window(frame, framing, rng)
        images = frame.pop("images")
        label = padded(frame, *size_of_window(framing, *images.shape[-2:]))
        return label | look(images, framing._replace(slide=(), both=False))

    def kept_bytes(self, channels):
        """What a `Shelf` of all takes with features of so many channels, by the first frame."""
        frame = self[0]
        images = frame.pop("images")
        tokens = images[:, 0].numel() // 14**2 + len(images)
        return 2 * len(self) * (tokens * channels + sum(t.numel() for t in frame.values()))

    def as_tested(self, count):
        """At most `count` of the same photos, as a test sees them."""
        return Labelled(self.entries, self.load, self.framing, False, count)


def size_of_window(framing, height, width):
    step = 14 if framing.pad else 1
    return -(-height // step) * step, -(-width // step) * step


def padded(frame, height, width):
    """A frame's tensors [..., h, w] in the middle of [..., height, width]."""
    out = {}
    for key, tensor in frame.items():
        y, x = height - tensor.shape[-2], width - tensor.shape[-1]
        sides = (x // 2, x - x // 2, y // 2, y - y // 2)
        border = BORDER[key]
        out[key] = torch.nn.functional.pad(tensor - border, sides) + border if x or y else tensor
    return out


def random_window(frame, framing, rng):
    """A frame cut to a window at a random place, padded where it is too small; maybe mirrored.

    As mmsegmentation, of ten places the first that no class fills by more than three quarters.
    """
    if framing.crop:
        H, W = (max(s, c) for s, c in zip(frame["images"].shape[-2:], framing.crop))
        frame = padded(frame, H, W)
        for _ in range(10):
            top, left = (int(rng.integers(s - c + 1)) for s, c in zip((H, W), framing.crop))
            window = (..., slice(top, top + framing.crop[0]), slice(left, left + framing.crop[1]))
            cut = {k: v[window] for k, v in frame.items()}
            classes = cut.get("classes", torch.arange(2))
            counts = classes[classes >= 0].unique(return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
        frame = cut
    if framing.mirror and rng.random() < 0.5:
        frame = {k: v.flip(-1) for k, v in frame.items()}
    return frame


def look(image, framing):
    """The windows of a photo [3, H, W] and their places: see `Labelled`."""
    H, W = image.shape[-2:]
    side, stride = framing.slide or (max(H, W), 1)
    height, width = min(side, H), min(side, W)
    # The last window ends with the photo
    tops = [min(stride * i, H - height) for i in range(-(-(H - height) // stride) + 1)]
    lefts = [min(stride * i, W - width) for i in range(-(-(W - width) // stride) + 1)]
    P, Q = size_of_window(framing, height, width)
    images, places = [], []
    for top, left in itertools.product(tops, lefts):
        window = {"images": image[:, top : top + height, left : left + width]}
        window = padded(window, P, Q)["images"]
        for mirrored in range(1 + framing.both):
            images.append(window.flip(-1) if mirrored else window)
            places.append([top, left, height, width, mirrored, P, Q])
    return {"images": torch.stack(images), "places": torch.tensor(places)}


def joined(windows, places, size):
    """Windows [n, ..., P, Q] at their places (see `Labelled`) in the whole, the mean of all; then
    at the size (H, W). [..., H, W]"""
    places = places.tolist()
    H, W = (max(p[k] + p[k + 2] for p in places) for k in (0, 1))
    total, count = windows.new_zeros(*windows.shape[1:-2], H, W), windows.new_zeros(H, W)
    for window, (top, left, height, width, mirrored, P, Q) in zip(windows, places):
        window = window.flip(-1) if mirrored else window
        y, x = (P - height) // 2, (Q - width) // 2
        here = (..., slice(top, top + height), slice(left, left + width))
        total[here] += window[..., y : y + height, x : x + width]
        count[here] += 1
    return resized(total / count, size)


def resized(x, size, mode="bilinear"):
    """x [..., H, W] at another size."""
    if x.shape[-2:] == tuple(size):
        return x
    flat = x.reshape(1, -1, *x.shape[-2:]).float()
    out = torch.nn.functional.interpolate(flat, tuple(size), mode=mode)
    return out.view(*x.shape[:-2], *size).to(x.dtype)


def small(tensor):
    """A tensor in two bytes a number: half precision, or whole numbers."""
    return tensor.half() if tensor.is_floating_point() else tensor.to(torch.int16)


def full(tensor):
    """The tensor that `small` made small, at the precision that losses want."""
    return tensor.float() if tensor.is_floating_point() else tensor.long()


class Shelf:
    """Tensors in a file, a few per frame, of any shape, two bytes a number: shelf[i] is a list.

    What is read is mapped for as long as it is copied, so that the mapped file never counts as the
    process's memory. Raises ValueError where the disk is full.
    """

    def __init__(self, path):
        self.file, self.records, self.end = open(path, "wb", buffering=0), [], 0

    def append(self, *tensors):
        self.records.append([])
        for tensor in map(small, tensors):
            array = tensor.contiguous().numpy()
            self.records[-1].append((self.end, array.shape, array.dtype))
            self.end += array.nbytes
            rest = memoryview(array).cast("B")
            while rest:  # a write may be cut short
                try:
                    rest = rest[self.file.write(rest) :]
                except OSError as error:
                    why = f"cannot be written ({error.strerror})"
                    raise ValueError(f"{self.file.name}: {why}") from None

    def shapes(self, i):
        return [shape for _, shape, _ in self.records[i]]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        maps = (np.memmap(self.file.name, dtype, "r", start, shape)
                for start, shape, dtype in self.records[i])  # fmt: skip
        return [full(torch.from_numpy(np.array(m))) for m in maps]


@contextlib.contextmanager
def scratch(folder, need):
    """A new folder in `folder` (or the system's for such), which goes with all that is in it.
    ValueError if there is none to be made, or the disk has not as many bytes free as it needs."""
    try:
        made = tempfile.TemporaryDirectory(prefix="probe-", dir=folder)
    except OSError as error:
        why = f"no folder to keep features in ({error.strerror})"
        raise ValueError(f"{error.filename}: {why}") from None
    with made as path:
        free = shutil.disk_usage(path).free
        if need > 2**30:
            print(f"Features and labels take {need / 2**30:.1f} GiB of disk in {path}")
        if need > free:
            raise ValueError(
                f"{path}: features and labels take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} "
                "are free; --cache FOLDER takes another disk, --train-frames fewer"
            )
        yield Path(path)


def labelled(task, path, framing, train_count=0, test_count=0, classes=None, copies=1):
    """Labelled frames to train and to test a probe on, and the classes' names (or None).

    Args:
        task: depth, normals or segmentation.
        path: a folder in one of the layouts in README, Probing; None for procedural rooms.
        framing: a `Framing`: what of a photo is seen.
        train_count, test_count: frames, evenly spread; 0 are all (of rooms, 200).
        classes: a file of the classes' names, one a line, where the layout leaves them open.
        copies: windows of each training photo.

    Raises ValueError: which path was expected.
    """
    names = None
    if path is None:
        rooms = Rooms("probe")
        middle = len(rooms) // 2
        if max(train_count, test_count) > middle:
            raise ValueError(f"there are {middle} rooms each to train and to test a probe on, no more")
        train, test = ([(rooms, i) for i in range(first, first + (count or 200))]
                       for first, count in ((0, train_count), (middle, test_count)))
        load = functools.partial(load_room, label=LABEL_OF[task])
        names = CLASSES[1:] if task == "segmentation" else None
    elif task == "depth":
        train, test, load = depth_frames(Path(path))
    elif task == "normals":
        train, test, load = normal_frames(Path(path))
    else:
        train, test, load, names = class_frames(Path(path), classes)
    for part, entries in (("train", train), ("test", test)):
        if not entries:
            raise ValueError(f"{path}: no frames to {part} on")
    return (Labelled(train, load, framing, True, train_count, copies),
            Labelled(test, load, framing, False, test_count), names)  # fmt: skip


LABEL_OF = {"depth": "depths", "normals": "normals", "segmentation": "classes"}


def farthest(path):
    """Metres that depth is probed to: 20 on ScanNet++, as the paper's code does, else 10."""
    lists = ("splits/nvs_sem_train.txt", "scannetpp_train.txt")
    return 20.0 if path and any((Path(path) / name).is_file() for name in lists) else 10.0


def load_room(entry, framing, label):
    rooms, i = entry
    room = rooms[i]
    frame = room.frame(int(np.random.default_rng(i).integers(len(room))), *framing.scaled(480, 640))
    frame["classes"] = frame["classes"] - 1
    return {k: frame[k] for k in ("images", label)}


def posed_frames(path):
    """Entries (scene, i) of posed RGB-D folders: of every four frames in a row the last is to test on."""
    scenes = open_scenes(path)
    for scene in scenes:
        if not scene.has_depth:
            raise ValueError(f"{scene.file}: no depth maps")
    frames = [(scene, i) for scene in scenes for i in range(len(scene))]
    return [f for k, f in enumerate(frames) if k % 4 != 3], frames[3::4]


# Lists of lines "photo depth focal", to train and to test on, and where what they name lies
DEPTH_LISTS = (
    (("nyudepthv2_train_files_with_gt.txt", "sync"),  # BTS's
     ("nyudepthv2_test_files_with_gt.txt", "official_splits/test")),
    (("nyu_train.txt", ""), ("nyu_test.txt", "")),  # DINOv2's
    (("scannetpp_train.txt", ""), ("scannetpp_val.txt", "")),  # FiT3D's
)  # fmt: skip


def depth_frames(path):
    """Depth by lists, of ScanNet++'s scenes, or of posed RGB-D folders."""
    folders = [path, path / "train_test_inputs"]
    for pair in DEPTH_LISTS:
        files = [[f / name for f in folders if (f / name).is_file()] for name, _ in pair]
        if any(files):
            for (name, _), found, other in zip(pair, files, files[::-1]):
                if not found:
                    file = other[0].parent / name
                    raise ValueError(f"{file}: expected, beside the other split's file")
            splits = [listed_depth(path, f[0], below) for f, (_, below) in zip(files, pair)]
            return *splits, load_depth
    if (path / "splits").is_dir():
        return *scannetpp(path, "render_depth"), load_depth
    others = [f for folder in folders for f in sorted(folder.glob("*train*.txt"))]
    if others:  # such as KITTI's eigen_train_files_with_gt.txt
        known = ", ".join(name for ((name, _), _) in DEPTH_LISTS)
        raise ValueError(f"{others[0]}: not a list that is read here; those are {known}")
    return *posed_frames(path), load_posed_depth


def listed_depth(path, file, below):
    """Entries of a list: (photo, depth map, the list)."""
    lines = [line.split() for line in lines_of(file)]
    if not lines or any(len(line) < 2 for line in lines):
        raise ValueError(f'{file}: a line is not "photo depth focal"')
    lines = [line for line in lines if line[1] != "None"]  # photos without a depth map
    holders = [path / "nyu_depth_v2", path / "dataset" / "nyu_depth_v2"] if below else []
    roots = [path / below, *(h / below for h in holders), path]
    first = lines[0][0].lstrip("/") if lines else ""
    root = next((r for r in roots if (r / first).is_file()), roots[0])
    return [(root / line[0].lstrip("/"), root / line[1].lstrip("/"), file) for line in lines]


def scannetpp(path, kind):
    """Entries (photo, label, where it is listed) of ScanNet++'s scenes, as its toolbox writes them.

    Scenes to train and to test on are those of splits/nvs_sem_train.txt and nvs_sem_val.txt that
    have labels, data/SCENE/dslr/render_depth/NAME.png or semantics/SCENE/NAME.JPG.png.
    Labels are as distorted as dslr/resized_images/, unless undistorted/SCENE/ has their photos.
    """
    splits = []
    for name in ("nvs_sem_train.txt", "nvs_sem_val.txt"):
        file = path / "splits" / name
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        entries = []
        for scene in (line.strip() for line in lines_of(file)):
            dslr = path / "data" / scene / "dslr"
            labels = dslr / kind if kind == "render_depth" else path / kind / scene
            for label in sorted(labels.glob("*.png"), key=lambda p: natural(p.name)):
                stem = label.stem.removesuffix(".JPG")
                undistorted = path / "undistorted" / scene / f"{stem}.JPG.jpg"
                photo = dslr / "resized_images" / f"{stem}.JPG"
                if kind != "render_depth" and undistorted.is_file():
                    photo = undistorted
                entries.append((photo, label, file))
        where = "data/SCENE/dslr/render_depth" if kind == "render_depth" else f"{kind}/SCENE"
        if not entries:
            raise ValueError(f"{path}: none of the scenes in {file} has labels in {where}/")
        splits.append(entries)
    return splits


def load_posed_depth(entry, framing):
    frame = entry[0].frame(entry[1], *framing.scaled(480, 640))
    return {k: frame[k] for k in ("images", "depths")}


def load_posed_normals(entry, framing):
    frame = entry[0].frame(entry[1], *framing.scaled(480, 640))
    return {"images": frame["images"], "normals": normals_from_depth(frame["depths"], frame["Ks"])}


def load_depth(entry, framing):
    """A photo and its depth map in millimetres; of NYUv2 what the public code looks at."""
    photo, depth, listed_in = entry
    crop, labels = framing.crops(open_rgb(photo, listed_in))
    depths = labels.depths(depth, 0.001, listed_in)
    frame = {"images": crop.colours(), "depths": depths}
    if listed_in.name in (name for name, _ in DEPTH_LISTS[0][1:] + DEPTH_LISTS[1][1:]):
        # Eigen's crop, by which all report: rows 45 to 471 of 480, columns 41 to 601 of 640
        inside = np.zeros((480, 640), np.float32)
        inside[45:471, 41:601] = 1
        inside = labels(Image.fromarray(inside), Image.Resampling.NEAREST, photo)
        frame["depths"] = depths * torch.from_numpy(inside)
    elif listed_in.name.startswith("nyu") and framing.size is None:
        # NYUCrop takes off the white frame of training photos
        H, W = depths.shape
        rows, columns = (slice(45 * H // 480, 472 * H // 480), slice(43 * W // 640, 608 * W // 640))
        frame = {k: v[..., rows, columns] for k, v in frame.items()}
    return frame


def normal_frames(path):
    """Folders image/ and normal/ with the same names, of which every fifth is to test on; both in train/ and in test/
    where a split is given; or posed RGB-D folders, where normals are derived from depth."""
    if (path / "train" / "image").is_dir() or (path / "train" / "normal").is_dir():
        train, test = (with_labels(path / part / "image", path / part / "normal", (".png", ".npy"))
                       for part in ("train", "test"))
        return train, test, load_normals
    if (path / "image").is_dir() or (path / "normal").is_dir():
        photos = with_labels(path / "image", path / "normal", (".png", ".npy"))
        return [e for k, e in enumerate(photos) if k % 5 != 4], photos[4::5], load_normals
    train, test = posed_frames(path)
    warnings.warn(f"{path}: no image/ and normal/; normals are derived from depth")
    return train, test, load_posed_normals


def with_labels(photos, labels, suffixes):
    """[(photo, label)] of the files of two folders that share their names; ValueError for what is missing."""
    for folder in (photos, labels):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    found = []
    pictures = [p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for photo in sorted(pictures, key=lambda p: natural(p.name)):
        label = next((labels / (photo.stem + s) for s in suffixes if (labels / (photo.stem + s)).is_file()), None)
        if label is None:
            raise ValueError(f"{labels / (photo.stem + suffixes[0])}: no such file, which {photo.name} goes with")
        found.append((photo, label))
    return found


def load_normals(entry, framing):
    """A normal map is a picture of (n + 1) / 2, or a .npy [H, W, 3]; in whatever axes, which a probe learns. Unknown is
    what is far from a unit vector: black in a picture, or grey; zeros in an array."""
    photo, path = entry
    crop, labels = framing.crops(open_rgb(photo, photo.parent))
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError, AttributeError) as error:  # the last: of an .npz by that name
            raise ValueError(f"{path}: not an array that can be read ({error})") from None
        if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise ValueError(f"{path}: its array is {' x '.join(map(str, array.shape))}, not height x width x 3")
        channels = map(Image.fromarray, array.transpose(2, 0, 1).copy())
        normals = np.stack([labels(c, Image.Resampling.NEAREST, path) for c in channels])
    else:
        picture = open_picture(path, "a normal map", path.parent).convert("RGB")
        normals = labels(picture, Image.Resampling.NEAREST, path).astype(np.float32)
        normals = normals.transpose(2, 0, 1) / 127.5 - 1
    return {"images": crop.colours(), "normals": unit_or_zero(torch.from_numpy(np.nan_to_num(normals)))}


def unit_or_zero(normals):  # (3, H, W)
    length = normals.norm(dim=0)
    return torch.where((length - 1).abs() < 0.5, normals / length.clamp(min=1e-6), 0.0)


def normals_from_depth(depths, K):
    """Unit normals [3, H, W] towards the camera from depths [H, W] and K [3, 3]: the cross product of the differences
    to the neighbours; 0 at the border, and where a neighbour is unknown or more than 5 % nearer or farther."""
    points = camera_points(depths, K).permute(2, 0, 1)
    across, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normals = torch.linalg.cross(down, across, dim=0)
    normals = normals / normals.norm(dim=0).clamp(min=1e-12)
    z = depths[1:-1, 1:-1]
    smooth = z > 0
    for other in (depths[1:-1, 2:], depths[1:-1, :-2], depths[2:, 1:-1], depths[:-2, 1:-1]):
        smooth &= (other > 0) & ((other - z).abs() < 0.05 * z)
    return torch.nn.functional.pad(normals * smooth, (1, 1, 1, 1))


def class_frames(path, classes=None):
    """ADE20K: images/ and annotations/, each with training/ and validation/, 0 = none and 150
    classes, or those that the file `classes` names. VOC2012: JPEGImages/, SegmentationClass/ and
    ImageSets/Segmentation/train.txt and val.txt, 21 classes, 255 = none. ScanNet++: see
    `scannetpp`; the classes that the file names, from 0, 255 = none."""
    names = tuple(line.strip() for line in lines_of(Path(classes))) if classes else None
    if (path / "images").is_dir() or (path / "annotations").is_dir():
        train, test = (with_labels(path / "images" / part, path / "annotations" / part, (".png",))
                       for part in ("training", "validation"))
        names = names or tuple(f"class_{i}" for i in range(1, 151))
        return train, test, functools.partial(load_classes, first=1, count=len(names)), names
    if (path / "semantics").is_dir():
        if not names:
            what = "--classes FILE must name its classes, one a line (top100.txt)"
            raise ValueError(f"{path}: {what}")
        load = functools.partial(load_classes, first=0, count=len(names))
        return *scannetpp(path, "semantics"), load, names
    if (path / "JPEGImages").is_dir() or (path / "ImageSets").is_dir():
        parts = []
        for part in ("train", "val"):
            listed_in = path / "ImageSets" / "Segmentation" / f"{part}.txt"
            if not listed_in.is_file():
                raise ValueError(f"{listed_in}: no such file")
            stems = [line.split()[0] for line in lines_of(listed_in)]
            photos, labels = path / "JPEGImages", path / "SegmentationClass"
            parts.append([(photos / f"{stem}.jpg", labels / f"{stem}.png") for stem in stems])
        return *parts, functools.partial(load_classes, first=0, count=len(VOC)), VOC
    raise ValueError(f"{path}: expected images/ and annotations/ (ADE20K), JPEGImages/ and "
                     "ImageSets/ (VOC2012), or semantics/ and splits/ (ScanNet++)")  # fmt: skip


VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
       "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


def load_classes(entry, framing, first, count):
    """A photo and its classes; `first` is the number of the first, before which there are none."""
    photo, path, *_ = entry
    crop, labels = framing.crops(open_rgb(photo, photo.parent))
    classes = labels.ids(path, path.parent) - first
    if first == 0:
        classes[classes == 255] = -1
    if int(classes.max()) >= count:
        raise ValueError(f"{path}: class {int(classes.max()) + first}, where there are {count}")
    return {"images": crop.colours(), "classes": classes}
