"""Procedural rooms, posed captures on disk, labelled photos, and samples of them.

Two kinds of scene, `Room` and `PosedFolder`, have the same interface:

    len(scene), scene.name         number of frames along the camera path; str
    scene.numbers                  the frames' increasing numbers, by which gaps are measured
    scene.has_depth, .has_masks    bool, for the whole scene
    scene.frame(i, height, width)  dict of tensors:
        images [3, H, W] in 0..1, extrinsics [4, 4] camera-to-world with OpenCV axes (x right, y
        down, z forward), Ks [3, 3] pixels (pixel (0, 0) has its centre at (0.5, 0.5)), all float32;
        masks [H, W] int64 segment ids, zeros if the scene has none;
        if has_depth: depths [H, W] float32, z-depth in metres, 0 = unknown;
        PosedFolder: valid [H, W] bool, False where a validity mask excludes a pixel;
        Room: normals [3, H, W] float32, unit, in camera axes, towards the camera,
        and classes [H, W] int64, indices into CLASSES

`Views` draws context views and a target from scenes, as in Splat and Distill (arXiv 2602.06032).
"""

import argparse
import collections
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
import time
import warnings
import zipfile
from os.path import abspath, basename, dirname, exists, isdir, join, splitext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


class Samples(torch.utils.data.Dataset):
    """The base of all data sets here: `length` samples, made by `sample(index)`."""

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return self.sample(index)


# ----------------------------------------------------------------------------- procedural rooms
# World: z up, metres, origin in the middle of the floor. Points and rays are [3, N].
# A solid is a unit shape, scaled, turned about z and moved.

CLASSES = tuple("unlabelled floor wall ceiling door window picture rug light table chair cabinet "
                "sofa bed lamp plant box ball vase cone".split())  # fmt: skip
SPLITS = {"train": range(1_000_000), "val": range(1_000_000, 1_010_000),
          "probe": range(1_010_000, 1_020_000)}  # of seeds  # fmt: skip

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

# Paints: looks to choose from, ranges of HSV for two colours, and the room's colour for joints.
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

# Furniture stands on z = 0 with its back towards -y: ranges of its sizes, and its parts by them:
# (shape, centre, half sizes, 0 for the main paint or 1 for the trim), all in metres.
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
PLACES = {  # where furniture goes, and kinds to choose from; listed twice: chosen twice as often
    "wall": "cabinet sofa bed lamp plant cabinet", "top": "ball vase cone box",
    "free": "table chair box ball cone table chair",
}  # fmt: skip
TOPS = {"table": (-0.5, 0.5), "cabinet": (-0.5, 0.5), "box": (0,)}  # places on top: x / half width
OWN_PAINTS = {  # paints to try first, with their chances; otherwise "flat" or "round"
    "plant": {"leaves": 1}, "cabinet": {"books": 0.4, "wood": 0.6},
    "table": {"wood": 0.6}, "chair": {"wood": 0.6},
}  # fmt: skip


def parts_of(kind, rng):
    """The parts of a piece of furniture of random size."""
    ranges, build = FURNITURE[kind]
    sizes = [rng.uniform(*ends) for ends in ranges]
    parts = build(*sizes)
    if kind == "plant":
        shape = "cone" if rng.uniform() < 0.5 else "sphere"
        at = np.zeros((3, 2)) if shape == "cone" else rng.uniform(-0.13, 0.13, (3, 2))
        parts += [(shape, (x, y, 2 * sizes[1] + up), (r, r, z), 0)
                  for (x, y), (up, r, z) in zip(at, CROWNS[shape])]  # fmt: skip
    return parts


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
    """a [M, 3] @ b [3, N], without BLAS: starting its threads costs more than the sum."""
    return a[:, 0, None] * b[0] + a[:, 1, None] * b[1] + a[:, 2, None] * b[2]


def hit_box(o, d):
    """Where rays o [3] + t d [3, N], in the axes of the unit box, enter it from outside: t [N], inf
    for a miss, and outward normals [3, N] of any length."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-1 - o[:, None]) / d, (1 - o[:, None]) / d
    enter, leave = np.minimum(a, b), np.maximum(a, b)
    normal = np.where(np.arange(3)[:, None] == enter.argmax(0), -np.sign(d), 0)
    return np.where(enter.max(0) < leave.min(0), enter.max(0), np.inf), normal


def cross_ball(o, d):
    """Rays through the unit ball or disc: t at the middle [N], half the chord [N] in t, hit [N]."""
    square = (d * d).sum(0) + 1e-12
    middle = -(o @ d) / square
    closest = o[:, None] + middle * d  # the radius from here keeps float32's precision
    inside = 1 - (closest * closest).sum(0)
    return middle, np.sqrt(np.maximum(inside, 0) / square), inside > 0


def hit_sphere(o, d):
    """As `hit_box`, for x^2 + y^2 + z^2 <= 1."""
    middle, reach, hit = cross_ball(o, d)
    t = middle - reach
    return np.where(hit, t, np.inf), o[:, None] + t * d


def hit_cylinder(o, d):
    """As `hit_box`, for x^2 + y^2 <= 1, |z| <= 1."""
    middle, reach, near = cross_ball(o[:2], d[:2])
    dz = np.where(d[2] == 0, 1e-12, d[2])
    wall, cap = middle - reach, -o[2] / dz - np.abs(1 / dz)
    t = np.maximum(wall, cap)
    hit = near & (t < np.minimum(middle + reach, -o[2] / dz + np.abs(1 / dz)))
    x, y, zero = *(o[:2, None] + t * d[:2]), np.zeros_like(t)
    normal = np.where(wall > cap, [x, y, zero], [zero, zero, -np.sign(d[2])])
    return np.where(hit, t, np.inf), normal


def hit_cone(o, d):
    """As `hit_box`, for a cone with its apex at (0, 0, 1) and its unit base at z = -1."""
    q = np.array([[1], [1], [-0.25]], o.dtype)  # the wall: q . p^2 = 0 and -2 < z < 0
    p = o[:, None] - np.array([[0], [0], [1]], o.dtype)  # from the apex
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
    """A furnished box room with exact ground truth, drawn by ray casting: a pure function of `seed`
    (any integer >= 0). Frame i does not depend on `num_frames`."""

    has_depth = has_masks = True

    def __init__(self, seed, num_frames=120):
        self.rng = np.random.default_rng(seed)  # used here only: frames draw nothing
        self.name, self.numbers = f"room{seed}", range(num_frames)
        low, high = (2.2, 2.2, 2.4), (3.4, 3.4, 3.0)
        self.size = np.float32(self.rng.uniform(low, high))  # half width, half depth, height
        self.fov = np.radians(self.rng.uniform(60, 75))  # vertical
        self._walk()
        self._build()
        self._furnish()
        self._stack()

    def __len__(self):
        return len(self.numbers)

    def _walk(self):
        """A smooth closed camera path around the middle of the room, looking across it."""
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
        # A step is 5 cm or 3 degrees, or a part of each; frames are one step apart
        step = np.linalg.norm(np.diff(eye, axis=0), axis=1) / 0.05
        step += np.linalg.norm(np.diff(forward, axis=0), axis=1) / np.radians(3)
        along = np.concatenate([[0], np.cumsum(step)])
        wanted = np.array(self.numbers) % along[-1]
        self.eyes = np.stack([np.interp(wanted, along, c) for c in eye.T], 1)  # [F, 3]
        self.forwards = np.stack([np.interp(wanted, along, c) for c in forward.T], 1)  # [F, 3]
        self.path = eye[::12, :2]  # [121, 2], the whole loop, which furniture keeps clear of

    def _look(self, paint):
        return self.rng.choice(PAINTS[paint][0].split())

    def _colour(self, paint, hues=None):
        """A linear RGB colour in a paint's ranges."""
        _, own_hues, saturations, values, _ = PAINTS[paint]
        hue, saturation, value = self.rng.uniform(*zip(hues or own_hues, saturations, values))
        return tuple(np.power(colorsys.hsv_to_rgb(hue % 1, saturation, value), 2.2))

    def _material(self, paint, second=None, look=None):
        """(row of LOOKS, three linear RGB colours), the second of the paint `second` if given."""
        look, joints = LOOKS[look or self._look(paint)], self.joints[PAINTS[paint][-1]]
        return look, (self._colour(paint), self._colour(second or paint), joints)

    def _place(self, name, parts, x, y, z, yaw, *materials):
        """Add an object as one segment; each part has one of the materials."""
        instance, c, s = self.solids[-1].instance + 1, np.cos(yaw), np.sin(yaw)
        label, frame, glow = CLASSES.index(name), FRAMES.get(name, 0.0), GLOWS.get(name, 0.0)
        for shape, (px, py, pz), half, tone in parts:
            centre = (x + c * px - s * py, y + s * px + c * py, z + pz)
            material = (*materials[tone], frame, glow)
            self.solids.append(Solid(shape, centre, half, yaw, label, instance, *material))

    def _at_wall(self, side, along, gap):
        """(x, y) in front of wall 0..3: -y, +x, +y, -x. Yaw side * pi / 2 turns a back to it."""
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
        shape = "shell", (0, 0, top / 2), (*self.size[:2], top / 2), 0.0
        self.solids = [Solid(*shape, CLASSES.index(name), instance, *material)
                       for instance, (name, *material) in enumerate(faces, 1)]  # fmt: skip
        self.light = np.array([*rng.uniform(-0.4, 0.4, 2) * self.size[:2], top - 0.08])
        lamp, material = [("box", (0, 0, 0), (0.4, 0.25, 0.02), 0)], (LOOKS["plain"], (light,) * 3)
        self._place("light", lamp, *self.light[:2], top - 0.02, 0.0, material)
        self.taken = []  # rectangles of the floor: corners (low, high), (x, y) each
        for side, name in enumerate(rng.permutation(["door", "window", "picture", "picture"])):
            # Half sizes. Those of windows and pictures are drawn for every wall.
            drawn = rng.uniform((0.5, 0.45, 0.3, 0.2), (0.9, 0.65, 0.6, 0.4))
            x, z = {"door": (0.42, 1.0), "window": drawn[:2], "picture": drawn[2:]}[name]
            span = self.size[side % 2] - x - 0.3
            along, up = rng.uniform(-span, span), z if name == "door" else rng.uniform(1.45, 1.6)
            at = self._at_wall(side, along, 0.02)
            if name == "door":  # keep clear what it needs to open
                ends = list(zip(at, self._at_wall(side, along, 0.9)))
                self.taken.append(([min(e) - 0.3 for e in ends], [max(e) + 0.3 for e in ends]))
            material = self._material(name, "haze" if name == "window" else name)
            part = "box", (0, 0, 0), (x, 0.02, z), 0
            self._place(name, [part], *at, up, side * np.pi / 2, material)
        if rng.uniform() < 0.7:
            half = (*rng.uniform((0.7, 0.5), (1.1, 0.9)), 0.008)
            where = (*rng.uniform(-0.5, 0.5, 2), 0, rng.uniform(-0.3, 0.3))
            self._place("rug", [("box", (0, 0, 0.008), half, 0)], *where, self._material("rug"))

    def _furnish(self):
        """8 to 16 pieces of furniture. Each failed try shrinks the next ones, so the loop ends."""
        rng, placed, shrink = self.rng, 0, 1.0
        self.num_objects = rng.integers(8, 17)
        shelves = []  # free places on top of furniture: (x, y, z, half size)
        while placed < self.num_objects:
            where = rng.choice(["wall", "free", "top"], p=[0.4, 0.35, 0.25])
            if where == "top" and not shelves:
                where = "free"
            kind = rng.choice(PLACES[where].split())
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
            own = OWN_PAINTS.get(kind, {}).items()
            paint = next((name for name, p in own if p == 1 or rng.uniform() < p), paint)
            self._place(kind, parts, x, y, z, yaw, self._material(paint), self._material("trim"))
            placed += 1

    def _on_floor(self, where, reach):
        """Try a place for half sizes reach [2], and mark it taken if free: (x, y, z, yaw, free)."""
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
        if free := from_path >= 0.4 and not overlap:
            self.taken.append((low - 0.05, high + 0.05))
        return (*at, 0.0, yaw, free)

    def _stack(self):
        """The fields of all solids as arrays, one row each, for the vectorised code below."""
        columns = [np.array(column) for column in zip(*self.solids)]
        self.all = Solid(*(np.float32(c) if c.dtype == float else c for c in columns))
        self.radius = np.linalg.norm(self.all.half, axis=1)  # [S], of bounding spheres
        c, s, zero = np.cos(self.all.yaw), np.sin(self.all.yaw), np.zeros_like(self.all.yaw)
        rows = [[c, s, zero], [-s, c, zero], [zero, zero, zero + 1]]
        self.turn = np.moveaxis(np.array(rows), 2, 0)  # [S, 3, 3], world to local

    def cast(self, origin, rays, t):
        """The first solid, not counting the shell, that origin + t * rays [3, N] meet before t [N]:
        new t [N], the solid [N] or -1, normals [3, N] of any length."""
        t, which, normal = t.copy(), np.full(t.shape, -1), np.zeros_like(rays)
        towards = self.all.centre - origin
        # Test only rays through the bounding sphere; all, from inside it
        outside = (towards * towards).sum(1) - self.radius**2
        least = np.where(outside < 0, -np.inf, np.sqrt(np.maximum(outside, 0)))
        length = np.sqrt((rays * rays).sum(0))
        for k in range(6, len(self.solids)):
            rows = np.flatnonzero(matmul(towards[k : k + 1], rays)[0] > least[k] * length)
            to_unit = self.turn[k] / self.all.half[k][:, None]
            near = matmul(to_unit, rays[:, rows])
            entry, n = HITS[self.all.shape[k]](to_unit @ -towards[k], near)
            closer = (entry > 0) & (entry < t[rows])
            rows = rows[closer]
            t[rows], which[rows] = entry[closer], k
            normal[:, rows] = matmul(to_unit.T, n[:, closer])
        return t, which, normal

    def paint(self, point, which, normal):
        """Linear RGB [3, N] of solids `which` [N] at world points [3, N]. Joints and frames take
        the third colour; elsewhere a checkerboard, a random number per cell and smooth noise,
        weighted as in LOOKS, mix the first two."""
        c, s = self.turn[which, 0, 0], self.turn[which, 0, 1]
        turn = lambda v: np.stack([c * v[0] + s * v[1], c * v[1] - s * v[0], v[2]])  # noqa: E731
        local, facing = turn(point - self.all.centre.T[:, which]), np.abs(turn(normal))
        flat = facing[2] > 0.7
        u = np.where(~flat & (facing[0] > facing[1]), local[1], local[0])
        v = np.where(flat, local[1], local[2])
        width, height, shift, joint, parity, chance, cloud = self.all.look.T[:, which]
        row = np.floor(v / height + 0.5)
        column = u / width + 0.5 + shift * row
        cell = np.floor(column)
        in_joint = np.abs(column - cell - 0.5) > 0.5 - joint / width / 2
        in_joint |= np.abs(v / height - row) > 0.5 - joint / height / 2
        # A frame runs along the edges of a face: skip the axis normal to it
        to_edge = np.where(facing > 0.7, np.inf, self.all.half.T[:, which] - np.abs(local)).min(0)
        in_joint |= to_edge < self.all.frame[which]
        cells = row.astype(np.int64) * 73856093 ^ cell.astype(np.int64) * 19349663
        bits = (cells ^ which * 83492791).astype(np.uint32) * np.uint32(2654435761)
        random = (bits >> np.uint32(22)).astype(np.float32) / 1023
        # Smooth noise: four sine waves, each bent by another; planks stretch it to a grain
        stretched = local + (1.7 * which).astype(np.float32)
        stretched[0] *= np.where(width == np.float32(1.1), np.float32(0.15), np.float32(1))
        waves = matmul(NOISE, stretched)
        waves = np.sin(waves + 1.6 * np.sin(np.roll(waves, 1, 0) * 0.7))
        noise = 0.5 + 0.3 * waves.sum(0) / 2
        mix = np.clip(parity * ((row + cell) % 2) + chance * random + cloud * noise, 0, 1)
        a, b, c = self.all.colours.transpose(1, 2, 0)[:, :, which]  # each [3, N]
        return np.where(in_joint, c, a + (b - a) * mix)

    def shade(self, origin, rays):
        """What rays [3, N] from a point see: colour [3, N] (0..1, Lambertian), t, solid, normal."""
        middle, half = self.all.centre[0], self.all.half[0]  # of the room
        ends = (middle + half - origin)[:, None], (middle - half - origin)[:, None]
        with np.errstate(divide="ignore"):  # a wall parallel to the ray is infinitely far
            steps = np.abs(np.where(rays > 0, *ends) / rays)
        axis = steps.argmin(0)
        t, which, normal = self.cast(origin, rays, steps.min(0))
        # Rays that meet no solid end on the shell: walls -y, +x, +y, -x, floor, ceiling
        ahead = np.take_along_axis(rays, axis[None], 0)[0] > 0
        face = np.array([[3, 1], [0, 2], [4, 5]])[axis, ahead.astype(int)]
        inward = np.where(np.arange(3)[:, None] == axis, -np.sign(rays), 0)
        normal = np.where(which < 0, inward, normal)
        normal /= np.linalg.norm(normal, axis=0)
        which = np.where(which < 0, face, which)
        point = origin[:, None] + t * rays
        # Ambient occlusion by the walls, the floor and the ceiling.
        gap = half[:, None] - np.abs(point - middle[:, None])
        occlusion = 1 - 0.4 * (1 - np.abs(normal)) * np.exp(-np.maximum(gap, 0) / 0.25)
        light = (0.42 + 0.12 * normal[2]) * occlusion.prod(0)
        for lamp in self.light.astype(np.float32) + LAMP:
            # The point is at t = 1 from the lamp: what comes before casts a shadow
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
        """Frame i. The vertical field of view does not depend on the size. Raises IndexError."""
        if i not in self.numbers:
            raise IndexError(f"{self.name} has frames 0 to {len(self) - 1}, not {i}")
        pose = self.pose(i)
        eye, rotation = pose[:3, 3], pose[:3, :3]
        focal = height / 2 / np.tan(self.fov / 2)
        K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)

        def see(rows, columns):  # in pixels; rays have z = 1 in camera axes, so t is z-depth
            x, y = (columns - width / 2) / focal, (rows - height / 2) / focal
            rays = np.stack([x, y, np.ones_like(x)]).astype(np.float32)
            return self.shade(eye, matmul(rotation, rays))

        rows, columns = np.mgrid[0:height, 0:width].reshape(2, -1) + 0.5
        image, t, which, normal = see(rows, columns)
        # Antialiasing: four rays for each pixel that differs from a neighbour
        grid = image.reshape(3, height, width)
        below, beside = (np.abs(np.diff(grid, axis=k)).max(0) > 0.12 for k in (1, 2))
        rough = np.pad(below, ((0, 1), (0, 0))) | np.pad(below, ((1, 0), (0, 0)))
        rough |= np.pad(beside, ((0, 0), (0, 1))) | np.pad(beside, ((0, 0), (1, 0)))
        again = np.flatnonzero(rough)[:, None]
        dy, dx = CORNERS.T / 4
        finer = see((rows[again] + dy).ravel(), (columns[again] + dx).ravel())[0]
        image[:, again[:, 0]] = finer.reshape(3, -1, 4).mean(2)
        frame = {"images": image.astype(np.float32), "depths": t.astype(np.float32),
                 "normals": matmul(rotation.T, normal.astype(np.float32)),
                 "masks": self.all.instance[which], "classes": self.all.label[which]}  # fmt: skip
        frame = {k: v.reshape(*v.shape[:-1], height, width) for k, v in frame.items()}
        return {k: torch.from_numpy(v) for k, v in {**frame, "extrinsics": pose, "Ks": K}.items()}


class Rooms(Samples):
    """The rooms of a split ("train", "val" or "probe"): rooms[i] makes a Room."""

    def __init__(self, split):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
        self.seeds, self.length = SPLITS[split], len(SPLITS[split])

    def sample(self, i):
        return Room(self.seeds[i])


# ----------------------------------------------------------------------------- photos and labels
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
SIZES = ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y")
CAMERA = {"camera_model", "is_fisheye", *SIZES, *DISTORTION}  # keys of transforms.json
BOUNDS = {k: (1e-3, 1e7) for k in ("fl_x", "fl_y", "w", "h")}  # in pixels, or shares of the photo
BOUNDS |= {k: (1e-3, 3.1) for k in ("camera_angle_x", "camera_angle_y")}  # radians
MODELS = {  # COLMAP's camera models in the order of their ids, and their parameters
    "SIMPLE_PINHOLE": "fl_x cx cy",
    "PINHOLE": "fl_x fl_y cx cy",
    "SIMPLE_RADIAL": "fl_x cx cy k1",
    "RADIAL": "fl_x cx cy k1 k2",
    "OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2",
    "OPENCV_FISHEYE": "fl_x fl_y cx cy k1 k2 k3 k4",
}


# Of pictures, whatever their names are: PIL would run Ghostscript on PostScript
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM")


class BadFile(ValueError):
    """One sentence that names a file and what is wrong with it."""


def sentence_of(error):
    """What a ValueError says, without the traceback that a loader's process puts before it."""
    return re.sub(r"^[\w.]*(BadFile|ValueError): ", "", str(error).strip().splitlines()[-1])


@contextlib.contextmanager
def naming(path, what):
    """Turns any error of json, PIL, numpy, struct or torch into a `BadFile` of this path."""
    try:
        yield
    except BadFile:  # already names the file
        raise
    except Exception as error:
        # Numpy's and torch's next sentences explain how to run pickled code
        text = " ".join(str(error).split()).partition(". ")[0][:200]
        known = (getattr(e, "strerror", None) for e in (error, error.__context__))  # torch wraps it
        reason = next(filter(None, known), text or type(error).__name__)
        reason = f"no {reason}" if isinstance(error, KeyError) else reason
        raise BadFile(f"{path}: {what} ({reason})") from None


def unpacked(path, times=1):  # .pt files are not compressed
    """The path. ValueError for a zip archive (.pt, .npz) that unpacks to over `times` its size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            grown = sum(part.file_size for part in file.infolist()) / Path(path).stat().st_size
        if grown > times:
            raise ValueError(f"it unpacks to {grown:.0f} times its size")
    return path


def natural(name):
    """Sort key that puts frame10 after frame9."""
    parts = re.split("([0-9]+)", str(name))  # odd ones are numbers, of any length
    return [(len(p.lstrip("0")), p.lstrip("0")) if i % 2 else p for i, p in enumerate(parts)]


def checked_number(value, key, least=-1e30, most=1e30):
    """A file's number as a float that float32 can hold. ValueError if it is none within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{key} is {value!r:.40}, no number from {least:g} to {most:g}")
    return float(value)


def within(root, folder, name):
    """The path folder/name. ValueError if it leads out of root; links may, as users make them."""
    path = join(folder, name)
    if not Path(abspath(path)).is_relative_to(abspath(root)):
        raise ValueError(f"{name!r:.200} lies outside {root}")
    return path


def lines_of(path):
    """The lines of a text file that are not blank."""
    if not Path(path).is_file():
        raise BadFile(f"{path}: no such file")
    with naming(path, "not a text file that can be read"):
        return [line for line in Path(path).read_text().splitlines() if line.strip()]


def has_any(folder, *names):
    return any(exists(join(folder, name)) for name in names)


class Shot(NamedTuple):
    """A photo and what belongs to it."""

    photo: str | Path  # a name alone if `packed`
    listed_in: Path  # the file or folder that names the photo
    labels: dict  # paths of its depths, normals, classes, masks, valid: see `read_label`
    pose: np.ndarray | None = None  # (4, 4) camera-to-world, OpenCV axes
    camera: dict | None = None  # by transforms.json's keys
    packed: np.ndarray | None = None  # the bytes of a photo that is no file of its own
    unit: float = 0.001  # metres, of depth maps that are pictures
    image_id: int = 0  # COLMAP's
    classes: tuple = (0, 0)  # in label maps: id of the first class, number of classes
    finish: object = None  # crops the frame last: a function of (frame, labels' Crop, framing)


class Framing(NamedTuple):
    """Which part of a photo is used, at which size. Sizes are (H, W) in pixels."""

    size: tuple | None = None  # scale photos to cover it, crop about the centre; None: whole photos
    short: int = 0  # scale whole photos to this shorter side; 0: do not
    crop: tuple = ()  # size of a random window, in training; (): all
    jitter: tuple = (1.0, 1.0)  # range of a random scale, in training
    mirror: bool = False  # mirror at random, in training
    flip_test: bool = False  # test each photo and its mirror image
    slide: tuple = ()  # side and stride of a window slid over test photos; (): one window
    pad: bool = False  # pad windows to multiples of 14

    def scaled(self, height, width, factor=1.0):
        """(H, W) that a photo of this size is scaled to."""
        if self.short and self.size is None:  # mmsegmentation's Resize to (2048, 512)
            factor *= min(self.short / min(height, width), 4 * self.short / max(height, width))
        return tuple(max(1, round(factor * s)) for s in self.size or (height, width))

    def padded(self, *size):
        """(H, W) of a window of this size with its padding."""
        return tuple(-(-s // 14) * 14 if self.pad else s for s in size)


def read_shot(shot, framing, factor=1.0):
    """{"images" [3, H, W] in 0..1, the labels, "Ks" and "extrinsics" if it has a camera}: scaled by
    `framing` and factor, cropped about the centre, undistorted."""
    photo = open_photo(shot)
    height, width = framing.scaled(photo.height, photo.width, factor)
    with naming(shot.listed_in, f"the camera of {basename(shot.photo)} cannot be used"):
        camera = (lens_of(shot.camera), pinhole(shot.camera, *photo.size)) if shot.camera else ()
        crop = crop_of(photo.size, (width, height), *camera)
    frame = {"images": crop.colours(photo)}
    if camera:
        frame["Ks"] = torch.tensor(crop.K)
        frame["extrinsics"] = torch.from_numpy(shot.pose.astype(np.float32))
    if framing.slide and framing.size is None:  # windows slide over the photo; labels stay whole
        crop = crop_of(photo.size, photo.size)
    frame |= {key: read_label(key, path, shot, crop) for key, path in shot.labels.items()}
    with naming(shot.photo, "an image that cannot be cropped"):
        return shot.finish(frame, crop, framing) if shot.finish else frame


def open_picture(path, what, listed_in, packed=None):
    """A PIL image from path, or from its bytes `packed`; the float32 array of a .npy."""
    if packed is None and not Path(path).is_file():
        raise BadFile(f"{path}: no such file ({what} in {listed_in})")
    with naming(path, f"{what} that cannot be read"):
        if str(path).endswith(".npy"):
            array = np.load(path, "r", allow_pickle=False)  # mapped: not larger than the file
            if array.dtype.kind not in "biuf":
                raise ValueError(f"it holds {array.dtype}")
            return array.astype(np.float32)
        picture = Image.open(path if packed is None else io.BytesIO(bytes(packed)), formats=FORMATS)
        picture.load()
        return picture.convert("L") if picture.mode == "1" else picture


def same_shape(size, other):
    """Whether the aspect ratios of two (width, height) agree to 2 %."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) <= 0.02


def open_photo(shot):
    """A photo of any mode as 8-bit RGB, turned by its EXIF tag if the camera's w and h say so."""
    picture = open_picture(shot.photo, "an image", shot.listed_in, shot.packed)
    with naming(shot.photo, "an image that cannot be used"):
        w, h = ((shot.camera or {}).get(k) or n for k, n in zip("wh", picture.size))
        if not same_shape(picture.size, (w, h)) and same_shape(picture.size, (h, w)):
            picture = ImageOps.exif_transpose(picture)
            if not same_shape(picture.size, (w, h)):
                found = "{} x {}".format(*picture.size)
                raise ValueError(f"it is {found} where {w:g} x {h:g} is expected")
        if picture.mode == "F":
            raise ValueError("floating point is no photo")
        if picture.mode.startswith("I"):  # 16 bit, which PIL would clip
            array = np.asarray(picture).clip(0, 65535) / 257
            picture = Image.fromarray((array + 0.5).astype(np.uint8))
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB")


def read_label(key, path, shot, crop):
    """Crop a label map, a picture or a .npy, by nearest pixels: depths [H, W] in metres, 0 unknown;
    normals [3, H, W], unit, 0 unknown; classes [H, W] int64 from 0, -1 unknown; masks [H, W] int64;
    valid [H, W] bool."""
    what = {"depths": "a depth map", "normals": "a normal map"}.get(key, "a mask")
    picture, channels = open_picture(path, what, shot.listed_in), 3 if key == "normals" else 1
    exact = isinstance(picture, np.ndarray)
    with naming(path, f"{what} that cannot be used"):
        if key == "depths" and not exact and picture.mode[0] != "I":
            raise ValueError(f"depth is a 16-bit PNG or .npy, not a picture of mode {picture.mode}")
        if channels == 3 and not exact:
            picture = picture.convert("RGB")
        bands = np.atleast_3d(picture).transpose(2, 0, 1)
        if len(bands) != channels:
            raise ValueError(f"it has {len(bands)} channels, not {channels}")
        values = np.stack([crop.nearest(Image.fromarray(band)) for band in bands])
    if key == "depths":
        depth = values[0].astype(np.float32) * np.float32(1 if exact else shot.unit)
        return torch.from_numpy(np.where(np.isfinite(depth) & (depth > 0), depth, 0))
    if key == "normals":  # unknown ones are black, grey or zeros: far from unit length
        normals = torch.from_numpy(np.nan_to_num(values.astype(np.float32)))
        normals = normals if exact else normals / 127.5 - 1
        length = normals.norm(dim=0)
        return torch.where((length - 1).abs() < 0.5, normals / length.clamp(min=1e-6), 0.0)
    ids = torch.from_numpy(values[0].astype(np.int64))
    if key == "classes":
        first, count = shot.classes
        if first == 0:
            ids[ids == 255] = -1
        if (most := int(ids.max())) >= first + count:
            raise BadFile(f"{path}: class {most}, where there are {count}")
        return ids - first
    if key == "valid":
        if len(wrong := ids[(ids != 0) & (ids != 255)]):
            what = f"a validity mask holds 0 and 255, not {wrong[0]}"
            raise BadFile(f"{path}: {what}; segment ids are looked for in instance_segmentation/")
        return ids > 0
    return ids


class Crop:
    """A photo of size `whole` (w, h), scaled to cover `size` and cropped about the centre, and the
    same part of its label maps of any size. With a camera (fx, fy, cx, cy in pixels) and a lens
    (see `lens_of`) the crop is of the undistorted photo."""

    def __init__(self, whole, size, lens=None, camera=None):
        self.whole, self.size, self.lookup = whole, size, None
        (w, h), scale = size, max(size[0] / whole[0], size[1] / whole[1])
        left, top = (whole[0] - w / scale) / 2, (whole[1] - h / scale) / 2
        ends = [left, top, left + w / scale, top + h / scale]
        self.box = np.clip(ends / np.tile(whole, 2), 0, 1)  # in shares of the photo's size
        if camera is None:
            return
        fx, fy, cx, cy = undistorted_pinhole(lens, camera, whole) if lens else camera
        x, y = cx * scale - left * scale, cy * scale - top * scale
        self.K = np.array([[fx * scale, 0, x], [0, fy * scale, y], [0, 0, 1]], np.float32)
        if lens:  # where on the photo each pixel of the crop is
            x = (left + (np.arange(w) + 0.5) / scale - cx) / fx
            y = (top + (np.arange(h) + 0.5) / scale - cy) / fy
            x, y = distort(lens, *np.meshgrid(x, y))
            x = (x * camera[0] + camera[2]) / whole[0]
            y = (y * camera[1] + camera[3]) / whole[1]
            self.lookup = np.stack([x, y], -1).clip(0, 1).astype(np.float32)  # [H, W, 2], shares

    def resize(self, picture, resample):
        box = self.box * np.tile(picture.size, 2)
        return np.array(picture.resize(self.size, resample, tuple(box)))

    def nearest(self, picture):  # [H, W]
        if not same_shape(picture.size, self.whole):
            its, photos = ("{} x {}".format(*size) for size in (picture.size, self.whole))
            raise ValueError(f"its {its} pixels do not cover what its photo of {photos} shows")
        if self.lookup is None:
            return self.resize(picture, Image.Resampling.NEAREST)
        size = np.array(picture.size)
        column, row = np.minimum((self.lookup * size).astype(int), size - 1).transpose(2, 0, 1)
        return np.array(picture)[row, column]

    def colours(self, photo):  # [3, H, W] in 0..1
        if self.lookup is None:
            image = self.resize(photo, Image.Resampling.BICUBIC)
            return torch.from_numpy(image).permute(2, 0, 1).contiguous() / 255
        # Against aliasing: first shrink the photo to the spacing of the lookups at the centre
        x, y = (n // 2 for n in self.size)
        step = np.abs(self.lookup[y, x] - self.lookup[y - 1, x - 1]).tolist()
        size = [min(n, round(1 / max(s, 1e-6))) for n, s in zip(photo.size, step)]
        photo = np.array(photo.resize(size, Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        grid = torch.from_numpy(2 * self.lookup - 1)[None]
        options = dict(mode="bicubic", padding_mode="border", align_corners=False)
        return F.grid_sample(pixels, grid, **options)[0].clamp(0, 1)


crop_of = functools.lru_cache(8)(Crop)  # a capture's frames mostly share one


def lens_of(camera):
    """(is it a fisheye, k1, k2, k3, k4, p1, p2) of a camera by transforms.json's keys, None without
    distortion. Raises ValueError for an unknown model or an impossible number."""
    given = {k: checked_number(camera[k], k, *BOUNDS.get(k, ())) for k in (*SIZES, *DISTORTION)
             if camera.get(k) is not None}  # fmt: skip
    if not {"fl_x", "camera_angle_x"} & given.keys():
        raise ValueError("no focal length: fl_x or camera_angle_x")
    model = camera.get("camera_model") or "OPENCV"
    model = "OPENCV_FISHEYE" if camera.get("is_fisheye") else model  # instant-ngp's key
    known = parameters(model) + ["k3", "k4"] * (model == "OPENCV")
    bends = {k: given[k] for k in DISTORTION if given.get(k)}
    if excess := bends.keys() - known:
        raise ValueError(f"camera model {model} has no {min(excess)}")
    if bends or model == "OPENCV_FISHEYE":
        return model == "OPENCV_FISHEYE", *(bends.get(k, 0.0) for k in DISTORTION)


def parameters(model):
    if model not in MODELS:
        raise ValueError(f"camera model {model} is none of {', '.join(MODELS)}")
    return MODELS[model].split()


def pinhole(camera, width, height):
    """fx, fy, cx, cy in pixels of a photo of this size, which need not be the camera's w and h."""
    given = {k: v for k, v in camera.items() if v is not None}
    w, h, angle = given.get("w", width), given.get("h", height), given.get("camera_angle_y")
    fx = given.get("fl_x") or 0.5 * w / np.tan(0.5 * given["camera_angle_x"])
    fy = given.get("fl_y") or (0.5 * h / np.tan(0.5 * angle) if angle else fx)
    cx, cy = given.get("cx", w / 2), given.get("cy", h / 2)
    return fx * width / w, fy * height / h, cx * width / w, cy * height / h


def distort(lens, x, y):
    """Normalised pinhole coordinates -> those on the photo, by OpenCV's (and COLMAP's) polynomials
    in the squared radius, or for a fisheye in the squared angle."""
    fisheye, k1, k2, k3, k4, p1, p2 = lens
    square = x * x + y * y
    r = np.maximum(np.sqrt(square), 1e-12)
    s = np.arctan(r) ** 2 if fisheye else square
    stretch = 1 + s * (k1 + s * (k2 + s * (k3 + s * k4)))
    if fisheye:
        stretch = stretch * np.arctan(r) / r
    return (x * stretch + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * stretch + 2 * p2 * x * y + p1 * (square + 2 * y * y))  # fmt: skip


@functools.lru_cache(256)
def undistorted_pinhole(lens, camera, size):
    """The widest pinhole (fx, fy, cx, cy), the camera's zoomed about the image centre, that the
    undistorted photo of size (w, h) fills; at most twice as wide. ValueError if none is."""
    f, c = np.array(camera).reshape(2, 2, 1)
    half = np.array(size)[:, None] / 2
    side, one = np.linspace(-1, 1, 17), np.ones(17)
    edge = np.hstack([(side, one), (side, -one), (one, side), (-one, side)]) * half / f  # (2, 68)
    out = np.linspace(0, 1, 33)[:, None, None]  # from the centre to the edge
    low, high = 0.0, 2.0  # widths relative to the camera's, bisected
    for _ in range(32):
        middle = (low + high) / 2
        x, y = np.moveaxis((half - c) / f + out * middle * edge, 1, 0)  # (33, 68)
        seen = np.stack(distort(lens, x, y)) * f[..., None] + c[..., None]
        inside = (np.abs(seen / half[..., None] - 1) <= 1 + 1e-9).all()
        # The polynomial is no lens where it turns back towards the centre
        grows = (np.diff(np.hypot(*(seen - seen[:, :1])), axis=0) > 0).all()
        low, high = (middle, high) if inside and grows else (low, middle)
    if low < 0.1:
        bends = dict(zip(DISTORTION, lens[1:]))
        raise ValueError(f"{bends} leaves nothing of a photo of {size[0]} x {size[1]}")
    return *(f[:, 0] / low).tolist(), *(half + (c - half) / low)[:, 0].tolist()


# ----------------------------------------------------------------------------- captures

INNER = ("nerfstudio", "dslr")  # folders inside a scene of ScanNet++
TRANSFORMS = ("transforms_undistorted.json", "transforms.json", "transforms_train.json")
MASKS = {  # ScanNet++'s folders of photos, and the folders of their validity masks
    "resized_images": "resized_anon_masks",
    "resized_undistorted_images": "resized_undistorted_masks",
    "undistorted_images": "undistorted_anon_masks",
}
DISTORTED = {folder: folder == "resized_images" for folder in MASKS}
PHOTOS = ("images", *MASKS, "rgb")  # folders to look for photos in


def open_scenes(path, split=None):
    """The captures in a folder: itself, or those in data/*/, scenes/*/ or */. Nothing is read yet.
    split: a text file with the names of the scenes to keep. Raises ValueError if there is none."""
    path = Path(path)
    if not path.is_dir():
        raise BadFile(f"{path}: no such folder")
    for group in ([path], *(sorted(path.glob(f)) for f in ("data/*/", "scenes/*/", "*/"))):
        if scenes := [scene for folder in group for scene in captures_of(folder)]:
            break
    else:
        what = "transforms.json (nerfstudio, ScanNet++), sparse/0/cameras.bin (COLMAP) or *.torch"
        raise BadFile(f"{path}: found no {what} (RealEstate10K) here, in data/*/, scenes/*/ or */")
    if split is None:
        return scenes
    wanted = {line.split()[0] for line in lines_of(split)}
    kept = [scene for scene in scenes if scene.name in wanted]
    if not kept:
        raise BadFile(f"{split}: none of its {len(wanted)} scenes is in {path}")
    if (lacking := len(wanted) - len(kept)) > 0:
        warnings.warn(f"{split}: {lacking} of its {len(wanted)} scenes are not in {path}")
    return kept


def captures_of(folder):
    """The captures that a folder itself holds, by the first layout that it has."""
    for inner in (folder, folder / "nerfstudio", folder / "dslr/nerfstudio"):
        if has_any(inner, *TRANSFORMS):
            return [PosedFolder(inner)]
    files = [folder / f"{f}/cameras.{kind}" for f in ("sparse/0", "sparse", "colmap/sparse/0")
             for kind in ("bin", "txt")]  # fmt: skip
    if file := next(filter(exists, files), None):
        return [PosedFolder(folder, list_colmap, file)]
    for inner in (folder, folder / "train"):
        if any(inner.glob("*.torch")):
            return open_chunks(inner)
    return []


class PosedFolder:
    """A capture: a scene with the interface at the top of this file. list_shots(scene) reads its
    list of Shots from `file` when they are first needed. Raises ValueError naming a bad file."""

    def __init__(self, path, list_shots=None, file=None, name=None):
        self.path, self.list_shots = Path(path), list_shots or list_transforms
        self.file = file or self.path
        self.name = name or next(p for p in reversed(self.path.resolve().parts) if p not in INNER)

    def __len__(self):
        return len(self.shots)

    @functools.cached_property
    def shots(self):
        """[Shot], ordered by name. Depth or masks that only some have are dropped."""
        shots = self.list_shots(self)
        for key, what in (("depths", "depth"), ("masks", "a segment mask")):
            having = [shot.labels for shot in shots if key in shot.labels]
            if 0 < len(having) < len(shots):
                few = f"only {len(having)} of {len(shots)} frames have {what}"
                warnings.warn(f"{self.file}: {few}; none is used")
                for labels in having:
                    del labels[key]
        return shots

    has_depth = property(lambda self: self._has("depths"))
    has_masks = property(lambda self: self._has("masks"))

    def _has(self, key):  # RealEstate10K has no labels: its large files need not be read for that
        return self.list_shots != list_chunk and key in self.shots[0].labels

    @functools.cached_property
    def numbers(self):
        """The last number in each photo's name if all have one and they increase, else 0, 1, ..."""
        stems = [splitext(basename(shot.photo))[0] for shot in self.shots]
        found = [re.search("([0-9]{1,18})[^0-9]*$", stem) for stem in stems]  # 18 fit in int64
        numbers = np.array([int(match[1]) for match in found if match])
        rises = len(numbers) == len(stems) and (np.diff(numbers) > 0).all()
        return numbers if rises else np.arange(len(stems))

    @property
    def points_file(self):
        """The file of COLMAP's points, if this is a reconstruction of COLMAP that has one."""
        if self.list_shots == list_colmap:
            file = self.file.with_name(f"points3D{self.file.suffix}")
            return file if file.is_file() else None

    @functools.lru_cache(2)  # scenes: all those of a large capture would fill the memory
    def points(self):
        """For each shot COLMAP's points that it sees: their numbers in the file [P] int32, and
        positions in the world [P, 3] float64. None without `points_file`."""
        if (file := self.points_file) is None:
            return None
        seen = {shot.image_id: ([], []) for shot in self.shots}
        with naming(file, "not COLMAP's points"):
            for number, row in enumerate(colmap_rows(file)):
                xyz = [float(v) for v in row[1:4]]
                for image_id in {*map(int, row[8::2])} & seen.keys():
                    seen[image_id][0].append(number)
                    seen[image_id][1].append(xyz)
            return [(np.array(numbers, np.int32), np.array(xyz, np.float64).reshape(-1, 3))
                    for numbers, xyz in seen.values()]  # fmt: skip

    def point_depths(self):
        """For each shot the depths of COLMAP's points that it sees; None without such points."""
        if (points := self.points()) is None:
            return None
        return [(p - s.pose[:3, 3]) @ s.pose[:3, 2] for (_, p), s in zip(points, self.shots)]

    def frame(self, i, height, width):
        """Frame i as the module's docstring says. Where it is not valid, depth is unknown."""
        frame = read_shot(self.shots[i], Framing((height, width)))
        frame.setdefault("masks", torch.zeros(height, width, dtype=torch.int64))
        valid = frame.setdefault("valid", torch.ones(height, width, dtype=torch.bool))
        if "depths" in frame:
            frame["depths"] = torch.where(valid, frame["depths"], 0.0)
        return frame


def rigid(matrices, names, read=np.array):
    """Poses [N, 4, 4] of matrices 3 x 4 or 4 x 4. BadFile: the name of one that is not rigid."""
    poses = np.tile(np.eye(4), (len(names), 1, 1))
    for pose, matrix, name in zip(poses, matrices, names):
        with naming(name, "not a pose that can be read"):
            pose[:3] = read(matrix)[:3]
    turns = poses[:, :3, :3]
    with np.errstate(invalid="ignore"):
        off = np.abs(turns @ turns.swapaxes(1, 2) - np.eye(3)).max((1, 2), initial=0)
        good = (off < 1e-3) & (np.linalg.det(turns) > 0) & (np.abs(poses) < 1e30).all((1, 2))
    if not good.all():
        raise BadFile(f"{names[good.argmin()]}: not rigid, a turn and a move of finite numbers")
    return poses


class Beside:
    """Finds photos and labels in the folders around a capture. Each folder is listed once."""

    def __init__(self, path):
        self.places = [path, *(above / name for above in (path, path.parent) for name in PHOTOS)]
        whole = Path(abspath(path))
        inner = itertools.takewhile(lambda p: p.name in INNER, [whole, *whole.parents])
        roots = [path, *(p.parent for p in inner)]  # up to the scene, in ScanNet++
        self.path, self.ids = path, [join(root, "instance_segmentation") for root in roots]
        self.root = roots[-1] if len(roots) > 1 else whole.parent  # photos may lie beside a scene
        self.listed = functools.cache(lambda f: frozenset(os.listdir(f) if isdir(f) else ()))

    def first(self, folders, names):
        """The first path folder/name that exists, or None."""
        paths = (join(folder, name) for folder in folders for name in names)
        return next((p for p in paths if basename(p) in self.listed(dirname(p))), None)

    def photo(self, name, bent):
        """(path of the photo, None) or (None, why there is none). bent: whether the camera has a
        lens; photos in ScanNet++'s folders have to match that."""
        names, why = [name], "without their image are left out"
        if not splitext(name)[1]:
            names = [name + suffix for suffix in (".png", ".jpg", ".jpeg")]
        for found in filter(None, (self.first([place], names) for place in self.places)):
            if DISTORTED.get(basename(dirname(found)), bent) == bent:
                return found, None
            why = "with photos of another lens alone are left out"
        return None, why

    def labels(self, photo, inner=None, named=None):
        """{"valid", "masks"} of a photo, those that exist. inner: the photo's path in its folder;
        named: the validity mask, by default masks/NAME.jpg.png or masks/NAME.png."""
        folder, inner = dirname(photo), inner or basename(photo)
        names = [inner + ".png", splitext(inner)[0] + ".png"]
        masks = MASKS.get(basename(folder), "masks")
        masks = [join(f, masks) for f in (self.path, dirname(folder))]
        valid = self.first([self.path, *masks], [named]) if named else self.first(masks, names)
        found = {"valid": valid, "masks": self.first(self.ids, names)}
        return {key: path for key, path in found.items() if path}


def list_transforms(scene):
    """nerfstudio, instant-ngp, ScanNet++ and FiT3D: the first of TRANSFORMS that has its photos.
    Frames that are marked is_bad or listed in test_frames are left out."""
    said = f"found none of {', '.join(TRANSFORMS)}"
    for file in filter(Path.is_file, (scene.path / name for name in TRANSFORMS)):
        scene.file, lost = file, collections.Counter()
        with naming(file, "not a capture that can be read"):
            shots = read_transforms(file, lost)
        said = ", ".join(f"{n} frames {why}" for why, n in lost.items()) or "it has none"
        if shots:
            break
    else:
        raise BadFile(f"{scene.file}: none of its frames can be used ({said})")
    if lost:
        warnings.warn(f"{file}: {said}")
    folder = Path(shots[0].photo).parent
    ids = [dirname(shot.labels["masks"]) for shot in shots if "masks" in shot.labels]
    if ids and folder.name in MASKS and (folder.parent / "resized_images").is_dir():
        what = "nothing tells ids of fisheye photos from those of undistorted ones"
        warnings.warn(f"{ids[0]}: {what}; they are taken for those of {folder}")
    return shots


def read_transforms(file, lost):
    """The Shots of the training frames; `lost` counts those that lack something. Poses are
    camera-to-world with OpenGL's axes; depth is a .npy in metres, or a picture in units of
    depth_unit_scale_factor (0.001) metres."""
    about, beside, shots = json.loads(file.read_text()), Beside(file.parent), []
    unit = "depth_unit_scale_factor"
    unit = checked_number(about.get(unit, 0.001), unit, 1e-9, 1e9)
    tests = {entry["file_path"] for entry in about.get("test_frames") or []}
    shared = {k: about[k] for k in CAMERA & about.keys()}
    for entry in sorted(about["frames"], key=lambda entry: natural(entry["file_path"])):
        if entry["file_path"] in tests:
            continue
        for key in ("file_path", "mask_path", "depth_file_path"):
            within(beside.root, file.parent, entry.get(key) or "")
        own = {k: entry[k] for k in CAMERA & entry.keys()}
        camera = shared | own if own else shared  # most frames share one dict
        photo, why = None, "marked is_bad are left out"
        if not entry.get("is_bad"):
            photo, why = beside.photo(entry["file_path"], lens_of(camera) is not None)
        if not photo:
            lost[why] += 1
            continue
        labels = beside.labels(photo, named=entry.get("mask_path"))
        if entry.get("mask_path") and "valid" not in labels:
            lost["lack the mask of their mask_path"] += 1
        if entry.get("depth_file_path"):
            labels["depths"] = join(file.parent, entry["depth_file_path"])
        shots.append(Shot(photo, file, labels, entry.get("transform_matrix"), camera, unit=unit))
    names = [f"{file}: transform_matrix of {shot.photo}" for shot in shots]
    poses = rigid([shot.pose for shot in shots], names)
    poses[:, :3, 1:3] *= -1  # OpenGL's y points up and its z backward
    return [shot._replace(pose=pose) for shot, pose in zip(shots, poses)]


def list_colmap(scene):
    """COLMAP's cameras and images, .bin or .txt, of photos in images/, images_2/, images_4/ or
    images_8/ (copies at a fraction of the size). The unit is arbitrary."""
    folders = [join(scene.path, f) for f in ("images", "images_2", "images_4", "images_8")]
    folder, beside = next(filter(isdir, folders), folders[0]), Beside(scene.path)
    file, cameras = scene.file.with_name(f"images{scene.file.suffix}"), {}
    with naming(scene.file, "not COLMAP's cameras"):
        for camera_id, model, *values in colmap_rows(scene.file):
            camera = zip(("w", "h", *parameters(model)), map(float, values), strict=True)
            cameras[int(camera_id)] = dict(camera, camera_model=model)
            lens_of(cameras[int(camera_id)])  # raises for numbers that cannot be
    with naming(file, "not COLMAP's images"):
        images = sorted(colmap_rows(file), key=lambda row: natural(row[-1]))
        kept = [row for row in images if beside.first([folder], [row[-1]])]
        if not kept:
            raise ValueError(f"none of its {len(images)} photos is in {folder}")
        # World to camera: the unit quaternion (w, v) rotates by 1 + 2 w [v]x + 2 [v]x [v]x, then t
        # is added. Camera to world rotates by the transpose, that of (w, -v).
        values = np.array([row[1:8] for row in kept], np.float64)
        quaternions = values[:, :4] / np.linalg.norm(values[:, :4], axis=1, keepdims=True)
        minus_v = np.cross(quaternions[:, None, 1:], np.eye(3))  # [-v]x, (N, 3, 3)
        turns = np.eye(3) + 2 * quaternions[:, :1, None] * minus_v + 2 * minus_v @ minus_v
        moves = -turns @ values[:, 4:, None]
        poses = rigid(np.concatenate([turns, moves], 2), [f"{file}: {row[-1]}" for row in kept])
        shots = []
        for (image_id, *_, camera_id, name), pose in zip(kept, poses):
            photo, camera = within(folder, folder, name), cameras[int(camera_id)]
            labels = beside.labels(photo, name)
            shots.append(Shot(photo, file, labels, pose, camera, image_id=int(image_id)))
    if len(images) > len(kept):
        warnings.warn(f"{scene.file}: {len(images) - len(kept)} photos are not in {folder}")
    return shots


def colmap_rows(path):
    """The rows of a .bin file of COLMAP, or of a .txt in the same order:
    cameras: id, model, width, height, parameters
    images: id, quaternion w x y z, translation x y z, camera id, name
    points3D: id, x y z, r g b, error, then an image's id and the index of its keypoint, repeated
    """
    if path.suffix == ".txt":
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        if path.stem == "images":  # every second line has keypoints; names may contain spaces
            rows = [line.strip().split(maxsplit=9) for line in lines[::2]]
        else:
            rows = [line.split() for line in lines]
        yield from filter(None, rows)
        return
    file = io.BytesIO(path.read_bytes())

    def take(form):  # raises struct.error at the end of the file
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))

    for _ in range(*take("Q")):
        if path.stem == "cameras":
            camera_id, model, *size = take("iiQQ")
            model = dict(enumerate(MODELS)).get(model, f"number {model}")
            yield camera_id, model, *size, *take(f"{len(parameters(model))}d")
        elif path.stem == "images":
            head, name = take("i7di"), b"".join(iter(lambda: take("c")[0], b"\0"))
            take(f"{24 * take('Q')[0]}x")  # its keypoints
            yield *head, name.decode()
        else:
            *head, length = take("Q3d3BdQ")
            yield *head, *take(f"{2 * length}i")


def open_chunks(path):
    """RealEstate10K as pixelSplat, MVSplat and depthsplat have it: 000000.torch and so on, of
    many scenes each, and index.json with the file of each scene."""
    file = path / "index.json"
    with naming(file, "not the index of RealEstate10K's files"):
        index = json.loads(file.read_text()).items()
        if not index:
            raise ValueError("it lists no scenes")
        return [PosedFolder(path, list_chunk, Path(within(path, path, name)), key)
                for key, name in index]  # fmt: skip


def list_chunk(scene):
    """A scene of RealEstate10K: rows of cameras [n, 18] are fx fy cx cy in shares of the photo's
    size, two zeros and the world-to-camera matrix [3, 4]."""
    chunk = load_chunk(scene.file)
    with naming(scene.file, f"not RealEstate10K's scene {scene.name}"):
        cameras, images = chunk[scene.name]["cameras"].double().numpy(), chunk[scene.name]["images"]
        if cameras.shape != (len(images), 18):
            raise ValueError(f"its cameras are {list(cameras.shape)}, its images {len(images)}")
        names = [join(scene.file, scene.name, f"{i}.jpg") for i in range(len(images))]
        poses = np.linalg.inv(rigid(cameras[:, 6:].reshape(-1, 3, 4), names))
        return [Shot(name, scene.file, {}, pose, dict(zip(SIZES, [*camera, 1, 1])), image.numpy())
                for name, pose, camera, image in zip(names, poses, cameras[:, :4].tolist(), images)]


@functools.lru_cache(8)
def load_chunk(path):
    with naming(path, "not RealEstate10K's file of scenes"):
        scenes = torch.load(unpacked(path), map_location="cpu", weights_only=True, mmap=True)
        return {scene["key"]: scene for scene in scenes}


# ----------------------------------------------------------------------------- views of scenes

class NoViews(ValueError):
    """A scene has no frames that fit."""


def some(scenes, most=64):
    """At most so many of the scenes, evenly spread: enough to look at where there are thousands."""
    return [scenes[i] for i in range(0, len(scenes), -(-len(scenes) // most))]


def context_pairs(numbers, num_context, min_gap, max_gap, target):
    """All first and last context frames to draw from, and their gaps: [P] each, or NoViews."""
    count, between = len(numbers), num_context - 2 + (target == "between")  # frames needed between
    # Numbers increase by at least 1, so a pair is at most max_gap frames apart
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
    """Draw frames to train on: ([num_context context frames], target frame), all indices.

    numbers: the frames' increasing numbers, or N for 0 to N - 1. The first and the last context
    frame are min_gap to max_gap apart by their numbers, or as far as possible if that is less; the
    others are spread evenly between. The target is "between" them and no context frame, or "any"
    frame from the first to the last. Raises NoViews if there are too few frames.
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


class Views(Samples):
    """Samples of context and target views; views[index] depends on (seed, index) alone, so that a
    resumed run sees the same data.

    scenes: a sequence of scenes, `open_scenes(path)` or `Rooms(split)`. height, width: of images,
    pixels. num_context, min_gap, max_gap, target: see `sample_views`.
    A sample: {"context": {images [V, 3, H, W], extrinsics [V, 4, 4], Ks [V, 3, 3], depths [V, H, W]
    (if any of `some` scenes has depth), masks [V, H, W], valid [V, H, W] bool (of captures)},
    "target": the same without V, "has_masks": bool (), "scene": name, "frames": [V + 1]}.
    Scenes without enough frames are left out. Raises ValueError if that leaves none of `some`.
    """

    def __init__(self, scenes, height, width, *, num_context=2, min_gap=8, max_gap=12,
                 target="between", seed=0, length):  # fmt: skip
        if not 2 <= min_gap <= max_gap:
            raise ValueError(f"2 <= min_gap <= max_gap must hold, not {min_gap} and {max_gap}")
        if target not in ("between", "any"):
            raise ValueError(f"the target is between the context views or any, not {target!r}")
        self.scenes, self.size, self.seed, self.length = scenes, (height, width), seed, length
        gaps = dict(min_gap=min_gap, max_gap=max_gap)
        self.sampling = dict(gaps, num_context=num_context, target=target)
        rooms = isinstance(scenes, Rooms)
        self.keys = ["images", "extrinsics", "Ks", "masks"]
        if not rooms:
            self.keys.append("valid")
        if rooms or self._any_depth():
            self.keys.append("depths")

    def _any_depth(self):
        """Whether any of `some` scenes has depth. Warns of those that lack depth or frames."""
        scenes = [scene for scene in some(self.scenes) if scene.list_shots != list_chunk]
        deep, lacks = any(scene.has_depth for scene in scenes), collections.defaultdict(list)
        for scene in scenes:
            if deep and not scene.has_depth:
                lacks["have unknown depth"].append(f"{scene.name} has no depth")
            try:
                gaps = context_pairs(np.asarray(scene.numbers), **self.sampling)[2]
                if gaps.max() < (least := self.sampling["min_gap"]):
                    few = f"{scene.name}: {len(scene)} frames are too few for gaps of {least}"
                    lacks["take their largest gap"].append(few)
            except NoViews as error:
                lacks["are left out"].append(f"{scene.name}: {error}")
        for effect, found in lacks.items():
            if effect == "are left out" and len(found) == len(scenes):
                raise ValueError(found[0])
            warnings.warn(f"{found[0]} ({len(found)} of {len(scenes)} scenes {effect})")
        return deep

    def draw(self, index):
        """A sample's scene, its context frames and its target."""
        rng = np.random.default_rng([self.seed, index])
        for _ in range(1000):
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            try:
                return scene, *sample_views(scene.numbers, rng, **self.sampling)
            except NoViews as error:  # try another scene
                failed = f"{scene.name}: {error}"
        raise ValueError(failed)

    def sample(self, index):
        scene, context, target = self.draw(index)
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
        """(near, far) by COLMAP's points, in distances between the first and the last context
        camera; None without points. Of the points' depths in context views (100 draws from each of
        up to 16 scenes) these are the 1st percentile times 0.8 and the 99th times 1.25."""
        if isinstance(self.scenes, Rooms):
            return None
        rng, found = np.random.default_rng(0), [np.zeros(0)]
        for scene in some(self.scenes, 16):
            if not (depths := scene.point_depths()):
                continue
            for _ in range(100):
                context, _ = sample_views(scene.numbers, rng, **self.sampling)
                first, last = (scene.shots[i].pose[:3, 3] for i in (context[0], context[-1]))
                baseline = np.linalg.norm(first - last)
                if baseline > 1e-9:
                    found += [depths[i] / baseline for i in context]
        found = np.concatenate(found)
        if (found > 0).any():
            near, far = np.percentile(found[found > 0], (1, 99)) * (0.8, 1.25)
            return float(near), float(far)


# ----------------------------------------------------------------------------- single photos, crops

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Photos(Samples):
    """Single photos [3, height, width] in 0..1, scaled to cover that and cropped about the centre:
    of a folder and its sub-folders, or without a folder `count` views of rooms, eight of each.
    Raises ValueError if the folder holds no photo."""

    def __init__(self, path, height, width, count=0, split="train"):
        self.size, self.length, self.files = (height, width), count, []
        self.rooms, self.kept = Rooms(split), {}
        if path is not None:
            found = sorted(f for f in Path(path).rglob("*") if f.suffix.lower() in PHOTO_SUFFIXES)
            self.files = [f for f in found if f.is_file()]
            self.length = len(self.files)
            if not self.files:
                raise ValueError(f"{path}: no photos ({', '.join(PHOTO_SUFFIXES)}) in it or below")

    def sample(self, i):
        if self.files:
            shot = Shot(self.files[i], self.files[i].parent, {})
            return read_shot(shot, Framing(self.size))["images"]
        if i not in self.kept:  # in bytes, since drawing takes a tenth of a second
            room = self.rooms[i // 8]
            frame = int(np.random.default_rng([i, len(room)]).integers(len(room)))
            self.kept[i] = (room.frame(frame, *self.size)["images"] * 255).round().byte()
        return self.kept[i] / 255


class Crops(Samples):
    """Pairs of crops of one photo; crops[index] is a function of (seed, index) alone.

    photos: a sequence of photos [3, H, W]. size: side of the square crops, pixels. scales, warp:
    see `crop_window`.
    A sample: {"crops" [2, 3, size, size] in 0..1, "windows" [2, 2, 3], "first_to_second" [2, 3]},
    the last two affine maps from the crops' coordinates to the photo's and from the first crop's
    to the second's. Coordinates are x, y in -1..1 from corner to corner.
    """

    def __init__(self, photos, size, scales=(0.7, 0.85), warp=0.0, seed=0, *, length):
        self.photos, self.size, self.scales, self.warp = photos, size, scales, warp
        self.seed, self.length = seed, length

    def sample(self, index):
        rng = np.random.default_rng([self.seed, index])
        photo = self.photos[int(rng.integers(len(self.photos)))].expand(2, -1, -1, -1)
        maps = np.stack([crop_window(rng, self.scales, self.warp) for _ in range(2)])  # [2, 3, 3]
        windows = torch.from_numpy(maps[:, :2]).float()
        size, options = (2, 3, self.size, self.size), dict(align_corners=False)
        grid = F.affine_grid(windows, size, **options)
        cut = F.grid_sample(photo, grid, padding_mode="border", **options)
        first_to_second = torch.from_numpy(np.linalg.inv(maps[1]) @ maps[0])[:2].float()
        crops = torch.stack([jitter(crop, rng) for crop in cut])
        return {"crops": crops, "windows": windows, "first_to_second": first_to_second}


def crop_window(rng, scales, warp):
    """A random window in a photo, scales[0] to scales[1] of its sides: the affine map [3, 3] from
    the window's coordinates to the photo's, both -1..1. Without warp it is upright; a warp of 1
    turns it by up to 20 degrees, stretches it by up to an eighth, mirrors half of all windows."""
    scale, turn = rng.uniform(*scales), warp * rng.uniform(-0.35, 0.35)
    stretch, mirror = np.exp(warp * rng.uniform(-0.125, 0.125)), rng.choice([-1, 1])
    c, s, mirror = np.cos(turn), np.sin(turn), mirror if warp else 1
    A = scale * np.array([[c, -s], [s, c]]) * [mirror * stretch, 1 / stretch]
    reach = np.abs(A).sum(1)  # half sizes of its bounding box
    A, reach = A / max(1, reach.max()), reach / max(1, reach.max())
    window = np.eye(3)
    window[:2, :2], window[:2, 2] = A, rng.uniform(-1, 1, 2) * (1 - reach)
    return window


def jitter(photo, rng):
    """Random exposure, white balance, gamma and a little noise: nothing that moves pixels."""
    gains = np.exp(rng.uniform(-0.15, 0.15) + rng.uniform(-0.06, 0.06, (3, 1, 1)))
    gamma = float(np.exp(rng.uniform(-0.12, 0.12)))
    photo = (photo * torch.from_numpy(gains).float()).clamp(1e-4, 1) ** gamma
    noise = torch.from_numpy(rng.standard_normal(photo.shape, np.float32))
    return (photo + 0.01 * noise).clamp(0, 1)


# ----------------------------------------------------------------------------- pairs of views

BINS = (0, 15, 30, 60, 180)  # degrees of viewpoint change


class Pairs(Samples):
    """Pairs of views from entries (scene, i, j): pairs[n] is two dicts as of `scene.frame`. Only
    pairs count whose overlap is at least `least_overlap`. Where a scene has no depth, the first
    has "points" [P, 3] too: COLMAP's points, in the world, that both photos see."""

    def __init__(self, entries, height, width, least_overlap=0.0):
        self.entries, self.size, self.least_overlap = entries, (height, width), least_overlap
        self.length = len(entries)

    def sample(self, n):
        scene, *frames = self.entries[n]
        views = tuple(scene.frame(i, *self.size) for i in frames)
        if "depths" not in views[0]:
            (first, points), (second, _) = (scene.points()[i] for i in frames)
            views[0]["points"] = torch.from_numpy(points[np.isin(first, second)]).float()
        return views


def pairs(path, count, height, width, seed):
    """At most `count` random `Pairs`: of ScanNet-1500 (a folder with test.npz) its own; of captures
    any two frames, with a least overlap of 0.3 where they have depth; of rooms (no path) the same
    number from each of BINS, all overlapping by 0.3."""
    rng, found, least = np.random.default_rng(seed), [], 0.0
    if path is None:
        rooms = Rooms("probe")
        while len(found) < count:
            room, k = rooms[int(rng.integers(len(rooms)))], len(found) % 4
            if pair := room_pair(room, rng, BINS[k : k + 2]):
                found.append(pair)
    elif has_any(path, "test.npz", "intrinsics.npz"):
        found = scannet_pairs(Path(path))
    else:
        scenes, least = scenes_with_depth(path, or_points=True), 0.3
        # Number all pairs of all scenes, and choose among the numbers
        starts = np.cumsum([0, *(len(scene) * (len(scene) - 1) // 2 for scene in scenes)])
        chosen = np.sort(rng.choice(starts[-1], min(count, starts[-1]), replace=False))
        for scene, start, end in zip(scenes, starts, starts[1:]):
            two = np.stack(np.tril_indices(len(scene), -1)[::-1], 1)  # every (i, j) with i < j
            here = chosen[(chosen >= start) & (chosen < end)] - start
            found += [(scene, *ij) for ij in two[here].tolist()]
    if not found:
        raise BadFile(f"{path}: no two frames to compare")
    if len(found) > count:
        found = [found[k] for k in np.sort(rng.choice(len(found), count, replace=False))]
    return Pairs(found, height, width, least)


def room_pair(room, rng, degrees):
    """(room, i, j) of overlapping frames turned by degrees (from, to); None if 20 tries fail."""
    for _ in range(20):
        i, j = (int(k) for k in rng.integers(len(room), size=2))
        to_b = torch.linalg.inv(torch.from_numpy(room.pose(j))) @ torch.from_numpy(room.pose(i))
        if i == j or not degrees[0] <= rotation_angle(to_b) < degrees[1]:
            continue
        if overlap(room.frame(i, 24, 24), room.frame(j, 24, 24), to_b) > 0.3:
            return room, i, j


def rotation_angle(Rt):
    """Degrees of the rotation in Rt [..., 3 or 4, 4]."""
    trace = Rt[..., 0, 0] + Rt[..., 1, 1] + Rt[..., 2, 2]
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def camera_points(depths, K):
    """Z-depths [H, W] and K [3, 3] in pixels -> points [H, W, 3] in the camera's axes."""
    rows, columns = (torch.arange(n, device=depths.device) + 0.5 for n in depths.shape)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    rays = [(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)]
    return torch.stack(rays, -1) * depths[..., None]


def normals_from_depth(depths, K):
    """Unit normals [3, H, W] towards the camera, by central differences of depths [H, W] with
    K [3, 3]; 0 at the border, and where a neighbour is unknown or differs by more than 5 %."""
    points = camera_points(depths, K).permute(2, 0, 1)
    across = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    normals = F.normalize(torch.linalg.cross(down, across, dim=0), dim=0)
    z, sides = depths[1:-1, 1:-1], (depths[1:-1, 2:], depths[1:-1, :-2])
    near = torch.stack([*sides, depths[2:, 1:-1], depths[:-2, 1:-1]])
    smooth = ((z > 0) & (near > 0) & ((near - z).abs() < 0.05 * z)).all(0)
    return F.pad(normals * smooth, (1, 1, 1, 1))


def overlap(a, b, to_b):
    """Share of frame a's pixels with depth that b sees, to 10 %. to_b [4, 4]: a's axes to b's."""
    H, W = a["depths"].shape
    points = camera_points(a["depths"], a["Ks"]) @ to_b[:3, :3].T + to_b[:3, 3]
    seen = points @ b["Ks"].T
    z = seen[..., 2].clamp(min=1e-6)
    column, row = (seen[..., 0] / z).floor().long(), (seen[..., 1] / z).floor().long()
    inside = (seen[..., 2] > 0) & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    there = b["depths"][row.clamp(0, H - 1), column.clamp(0, W - 1)]
    known = a["depths"] > 0
    return float((known & inside & ((z / there - 1).abs() < 0.1)).sum() / known.sum().clamp(min=1))


def scannet_pairs(path):
    """The 1,500 pairs of SuperGlue's ScanNet test: test.npz has "name" [pairs, 4], the scene, its
    sequence and two frames; intrinsics.npz has K [3, 3] for the name of each scene."""
    with naming(path, "test.npz and intrinsics.npz of ScanNet-1500 were expected"):
        rows = np.load(unpacked(path / "test.npz", 100), allow_pickle=False)["name"].tolist()
        listed = [(f"scene{scene:04d}_{part:02d}", i, j) for scene, part, i, j in rows]
        Ks = dict(np.load(unpacked(path / "intrinsics.npz", 100), allow_pickle=False))
        if not all(K.shape in ((3, 3), (4, 4)) and min(K[0, 0], K[1, 1]) > 0 for K in Ks.values()):
            raise ValueError("not every K is [3, 3] with focal lengths above 0")
    frames, scenes = collections.defaultdict(set), {}
    for name, i, j in listed:
        frames[name] |= {i, j}
    for name in frames:
        if name not in Ks or not (path / name).is_dir():
            raise BadFile(f"{path / name}: the folder or its entry in intrinsics.npz is missing")
        frames[name] = sorted(frames[name])
        scenes[name] = PosedFolder(path / name)
        scenes[name].shots = scannet_shots(path / name, Ks[name].astype(float), frames[name])
    return [(scenes[name], frames[name].index(i), frames[name].index(j)) for name, i, j in listed]


def scannet_shots(path, K, ids):
    """ScanNet-1500: color/ID.jpg, depth/ID.png in millimetres, pose/ID.txt camera-to-world."""
    # K is that of the depth maps, 640 x 480, whatever the size of the photos
    (fx, _, cx), (_, fy, cy) = K[:2, :3].tolist()
    camera = dict(fl_x=fx, fl_y=fy, cx=cx, cy=cy, w=640, h=480)
    files = [path / f"pose/{i}.txt" for i in ids]
    poses = rigid(files, files, np.loadtxt)
    return [Shot(join(path, f"color/{i}.jpg"), path, {"depths": join(path, f"depth/{i}.png")},
                 pose, camera) for i, pose in zip(ids, poses)]  # fmt: skip


# ----------------------------------------------------------------------------- labelled photos

# What the public code of the probes does: see README, Probing
PUBLISHED = {
    "depth": Framing(crop=(416, 544), mirror=True, flip_test=True, pad=True),
    "normals": Framing(size=(480, 480), pad=True),
    "segmentation": Framing(short=512, crop=(512, 512), jitter=(0.5, 2.0), mirror=True,
                            slide=(512, 341), pad=True),
}  # fmt: skip
# What padding holds: unknown labels, and ImageNet's mean, which is 0 once photos are normalised
PADDING = {"depths": 0.0, "normals": 0.0, "classes": -1,
           "images": torch.tensor([0.485, 0.456, 0.406])[:, None, None]}  # fmt: skip


class Labelled(Samples):
    """Photos and their labels, `key`: "depths" [H, W], "normals" [3, H, W] or "classes" [H, W]
    (-1 = unknown).

    entries: `Shot`s, (capture, frame) or (rooms, room). labelled[n] = {"images" [n, 3, P, Q] in
    0..1: windows on the photo, padded; "places" int64 [n, 7]: for each its top, left, height and
    width in the photo, 1 if it is mirrored, P and Q; and the label}. A training sample has one
    window, a function of n alone, and the label of that, [P, Q]; a test has the whole label.
    """

    def __init__(self, entries, key, framing, training, count=0, copies=1):
        if count and count < len(entries):
            entries = [entries[i * len(entries) // count] for i in range(count)]
        self.entries, self.key, self.framing, self.copies = entries, key, framing, copies
        self.part, self.length = "train" if training else "test", len(entries) * copies

    def sample(self, n):
        entry, framing = self.entries[n // self.copies], self.framing
        if self.part == "test":
            frame = self.load(entry, framing)
            return frame | cut_windows(frame["images"], framing)
        rng, framing = np.random.default_rng(n), framing._replace(slide=(), flip_test=False)
        frame = self.load(entry, framing, rng.uniform(*framing.jitter))
        frame = random_window(frame, framing, rng)
        images = frame.pop("images")
        size = framing.padded(*images.shape[-2:])
        return {k: padded(v, size, k) for k, v in frame.items()} | cut_windows(images, framing)

    def load(self, entry, framing, factor=1.0):
        """{"images", key} of an entry; of a room one random view."""
        if isinstance(entry, Shot):
            frame = read_shot(entry, framing, factor)
        else:
            scene, i = entry
            if isinstance(scene, Rooms):
                scene, rng = scene[i], np.random.default_rng(i)
                i = int(rng.integers(len(scene)))
            frame = scene.frame(i, *framing.scaled(480, 640, factor))
            if self.key == "normals" and self.key not in frame:
                frame["normals"] = normals_from_depth(frame["depths"], frame["Ks"])
            elif self.key == "classes":
                frame["classes"] = frame["classes"] - 1
        return {k: frame[k] for k in ("images", self.key)}

    def kept_bytes(self, channels):
        """Bytes of a `Shelf` of all frames with features of so many channels, by the first one."""
        frame = self[0]
        images = frame.pop("images")
        tokens = images[:, 0].numel() // 14**2 + len(images)
        return 2 * len(self) * (tokens * channels + sum(t.numel() for t in frame.values()))

    def as_tested(self, count):
        """At most `count` of the same photos, evenly spread, as a test sees them."""
        return Labelled(self.entries, self.key, self.framing, False, count)


def padded(tensor, size, key):
    """tensor [..., h, w] in the middle of [..., H, W]; key says which of PADDING is around it."""
    y, x = size[0] - tensor.shape[-2], size[1] - tensor.shape[-1]
    if not (x or y):
        return tensor
    sides, border = (x // 2, x - x // 2, y // 2, y - y // 2), PADDING[key]
    return F.pad(tensor - border, sides) + border  # F.pad fills with zeros


def random_window(frame, framing, rng):
    """A random window of a frame, padded if the frame is smaller, maybe mirrored: the first of ten
    that no class fills by more than three quarters, as in mmsegmentation."""
    if framing.crop:
        H, W = (max(s, c) for s, c in zip(frame["images"].shape[-2:], framing.crop))
        frame = {k: padded(v, (H, W), k) for k, v in frame.items()}
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


def cut_windows(image, framing):
    """{"images", "places"}: the windows of a photo [3, H, W], see `Labelled`."""
    H, W = image.shape[-2:]
    side, stride = framing.slide or (max(H, W), 1)
    height, width = min(side, H), min(side, W)
    P, Q = framing.padded(height, width)
    # The last window ends where the photo does
    tops, lefts = ([min(i, s - w) for i in range(0, s - w + stride, stride)]
                   for s, w in ((H, height), (W, width)))  # fmt: skip
    images, places = [], []
    for top, left in itertools.product(tops, lefts):
        window = image[:, top : top + height, left : left + width]
        window = padded(window, (P, Q), "images")
        for mirrored in range(1 + framing.flip_test):
            images.append(window.flip(-1) if mirrored else window)
            places.append([top, left, height, width, mirrored, P, Q])
    return {"images": torch.stack(images), "places": torch.tensor(places)}


def joined(windows, places, size):
    """The mean [..., H, W] of windows [n, ..., P, Q] at their places (see `Labelled`), resized."""
    H, W = (places[:, :2] + places[:, 2:4]).amax(0).tolist()
    total, count = windows.new_zeros(*windows.shape[1:-2], H, W), windows.new_zeros(H, W)
    for window, (top, left, height, width, mirrored, P, Q) in zip(windows, places.tolist()):
        window = window.flip(-1) if mirrored else window
        y, x = (P - height) // 2, (Q - width) // 2
        here = (..., slice(top, top + height), slice(left, left + width))
        total[here] += window[..., y : y + height, x : x + width]
        count[here] += 1
    return resized(total / count, size)


def resized(x, size, mode="bilinear"):
    """x [..., H, W] at another size (H, W)."""
    if x.shape[-2:] == tuple(size):
        return x
    flat = x.reshape(1, -1, *x.shape[-2:]).float()
    out = F.interpolate(flat, tuple(size), mode=mode)
    return out.view(*x.shape[:-2], *size).to(x.dtype)


def small(tensor):
    """A tensor in two bytes a number: float16 or int16."""
    return tensor.half() if tensor.is_floating_point() else tensor.to(torch.int16)


def full(tensor):
    """A tensor from `small` as losses want it: float32 or int64."""
    return tensor.float() if tensor.is_floating_point() else tensor.long()


class Shelf:
    """A file of tensors, two bytes a number: shelf[i] is the list of a frame's tensors. A read maps
    the file only briefly: it never counts as process memory. ValueError if the disk is full."""

    def __init__(self, path):
        self.file, self.records, self.end = open(path, "wb"), [], 0

    def append(self, *tensors):
        record, arrays = [], [small(tensor).contiguous().numpy() for tensor in tensors]
        for array in arrays:
            record.append((self.file.name, array.dtype, "r", self.end, array.shape))
            self.end += array.nbytes
        self.records.append(record)
        with naming(self.file.name, "cannot be written"):
            self.file.writelines(arrays)
            self.file.flush()

    def shapes(self, i):
        return [shape for *_, shape in self.records[i]]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        maps = (np.memmap(*about) for about in self.records[i])
        return [full(torch.from_numpy(np.array(m))) for m in maps]


@contextlib.contextmanager
def scratch(folder, need):
    """A new temporary folder in `folder`, or where the system has them. Raises ValueError if it
    cannot be made, or if the disk has less than `need` bytes free."""
    with naming(folder, "no folder to keep features in"):
        made = tempfile.TemporaryDirectory(prefix="probe-", dir=folder)
    with made as path:
        need, free = need / 2**30, shutil.disk_usage(path).free / 2**30
        if need > 1:
            print(f"Features and labels take {need:.1f} GiB of disk in {path}")
        if need > free:
            raise ValueError(f"{path}: features and labels take {need:.1f} GiB, and {free:.1f} are "
                             "free; --cache FOLDER takes another disk, --train-frames fewer")
        yield Path(path)


# ----------------------------------------------------------------------------- benchmarks


def eigen_crop(frame, crop, framing):
    """Drops test depth outside Eigen's crop: rows 45 to 471 of 480, columns 41 to 601 of 640."""
    inside = np.zeros((480, 640), np.float32)
    inside[45:471, 41:601] = 1
    inside = crop.nearest(Image.fromarray(inside))
    return frame | {"depths": frame["depths"] * torch.from_numpy(inside)}


def nyu_crop(frame, crop, framing):
    """Cuts the white border off whole training photos (the public code's NYUCrop)."""
    if framing.size is not None:
        return frame
    H, W = frame["depths"].shape
    window = (..., slice(45 * H // 480, 472 * H // 480), slice(43 * W // 640, 608 * W // 640))
    return {key: tensor[window] for key, tensor in frame.items()}


DEPTH_LISTS = (  # to train and to test on: list, folder of its files, their crop
    (("nyudepthv2_train_files_with_gt.txt", "sync", nyu_crop),  # BTS's
     ("nyudepthv2_test_files_with_gt.txt", "official_splits/test", eigen_crop)),
    (("nyu_train.txt", "", nyu_crop), ("nyu_test.txt", "", eigen_crop)),  # DINOv2's
    (("scannetpp_train.txt", "", None), ("scannetpp_val.txt", "", None)),  # FiT3D's
)  # fmt: skip
VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
       "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
       "train", "tvmonitor")  # fmt: skip


def labelled(task, path, framing, train_count=0, test_count=0, classes=None, copies=1):
    """`Labelled` frames to train and to test a probe on, and the names of classes or None.

    path: a folder for `depth_shots`, `normal_shots` or `class_shots`; for depth and normals also
    RGB-D captures; None for rooms. train_count, test_count: frames, evenly spread; 0 is all, of
    rooms 200. classes: a file of the classes' names, one a line. copies: windows of each training
    photo. Raises ValueError for a path that is none of these.
    """
    key = {"depth": "depths", "normals": "normals", "segmentation": "classes"}[task]
    parts = names = None
    if path is None:
        names = CLASSES[1:] if task == "segmentation" else None
        rooms = Rooms("probe")
        half = len(rooms) // 2
        if max(train_count, test_count) > half:
            raise ValueError(f"there are {half} rooms each to train and to test on, no more")
        parts = [[(rooms, start + i) for i in range(count or 200)]
                 for start, count in ((0, train_count), (half, test_count))]  # fmt: skip
    elif task == "segmentation":
        parts, names = class_shots(Path(path), classes)
    else:
        parts = {"depth": depth_shots, "normals": normal_shots}[task](Path(path))
    if parts is None:
        frames = [(scene, i) for scene in scenes_with_depth(path) for i in range(len(scene))]
        if task == "normals":
            warnings.warn(f"{path}: no image/ and normal/; normals are derived from depth")
        parts = hold_out(frames, 4)
    for part, entries in zip(("train", "test"), parts):
        if not entries:
            raise ValueError(f"{path}: no frames to {part} on")
    return (Labelled(parts[0], key, framing, True, train_count, copies),
            Labelled(parts[1], key, framing, False, test_count), names)  # fmt: skip


def hold_out(items, n):
    """Items to train and to test on: every n-th is to test on."""
    return [item for k, item in enumerate(items, 1) if k % n], items[n - 1 :: n]


def scenes_with_depth(path, or_points=False):
    scenes = open_scenes(path)
    for scene in scenes:
        if not (scene.has_depth or or_points and scene.points_file):
            what = "no depth maps" + " and no points of COLMAP" * or_points
            raise BadFile(f"{scene.file}: {what}")
    return scenes


def farthest(path):
    """Metres that depth is probed to: 20 on ScanNet++, as in the paper's code, else 10."""
    lists = "splits/nvs_sem_train.txt", "scannetpp_train.txt"
    return 20.0 if path and has_any(path, *lists) else 10.0


def depth_shots(path):
    """NYUv2's, ScanNet++'s or FiT3D's Shots to train and to test on; None if it is none of them."""
    folders = path, path / "train_test_inputs"
    for lists in DEPTH_LISTS:
        if any(has_any(folder, *(name for name, *_ in lists)) for folder in folders):
            return [listed_depth(path, *row) for row in lists]
    if has_any(path, "splits"):
        labels = "data/{}/dslr/render_depth"
        return [scannetpp(path, "depths", part, labels) for part in ("train", "val")]
    others = [file for folder in folders for file in sorted(folder.glob("*train*.txt"))]
    if others:  # such as KITTI's eigen_train_files_with_gt.txt
        known = ", ".join(name for lists in DEPTH_LISTS for name, *_ in lists)
        raise BadFile(f"{others[0]}: not a list that is read here; those are {known}")


def normal_shots(path):
    """Shots to train and to test on from image/ and normal/; None without such folders."""
    if has_any(path, "train/image", "train/normal"):
        return [in_folders(path, "normals", f"{part}/image", f"{part}/normal")
                for part in ("train", "test")]  # fmt: skip
    if has_any(path, "image", "normal"):
        return hold_out(in_folders(path, "normals", "image", "normal"), 5)


def class_shots(path, classes):
    """ADE20K's, ScanNet++'s or VOC2012's Shots to train and to test on, and the classes' names."""
    first, names = 0, None  # where the first class has id 0, 255 means unknown
    if has_any(path, "images", "annotations"):
        first, names = 1, tuple(f"class_{i}" for i in range(1, 151))
        parts = [in_folders(path, "classes", f"images/{part}", f"annotations/{part}")
                 for part in ("training", "validation")]  # fmt: skip
    elif has_any(path, "semantics"):
        parts = [scannetpp(path, "classes", part, "semantics/{}") for part in ("train", "val")]
    elif has_any(path, "JPEGImages", "ImageSets"):
        names, parts = VOC, [voc2012(path, part) for part in ("train", "val")]
    else:
        raise ValueError(f"{path}: expected images/ and annotations/ (ADE20K), JPEGImages/ and "
                         "ImageSets/ (VOC2012), or semantics/ and splits/ (ScanNet++)")  # fmt: skip
    if classes:
        names = tuple(map(str.strip, lines_of(classes)))
    if not names:
        raise ValueError(f"{path}: --classes FILE must name its classes, one a line (top100.txt)")
    known = first, len(names)
    return [[shot._replace(classes=known) for shot in part] for part in parts], names


def in_folders(path, key, photos, labels):
    """Photos and labels of the same names in two folders. Raises ValueError for a missing one."""
    photos, labels, shots = path / photos, path / labels, []
    for folder in (photos, labels):
        if not folder.is_dir():
            raise BadFile(f"{folder}: no such folder")
    for photo in sorted(photos.iterdir(), key=natural):
        if photo.suffix.lower() in PHOTO_SUFFIXES:
            paths = [labels / (photo.stem + suffix) for suffix in (".png", ".npy")]
            label = next(filter(Path.is_file, paths), None)
            if label is None:
                raise BadFile(f"{paths[0]}: no such file, which {photo.name} goes with")
            shots.append(Shot(photo, photos, {key: label}))
    return shots


def voc2012(path, part):
    """JPEGImages/ and SegmentationClass/, listed in ImageSets/Segmentation/; 255 is unknown."""
    file, shots = path / f"ImageSets/Segmentation/{part}.txt", []
    for stem in (line.split()[0] for line in lines_of(file)):
        label = path / f"SegmentationClass/{stem}.png"
        shots.append(Shot(path / f"JPEGImages/{stem}.jpg", file, {"classes": label}))
    return shots


def scannetpp(path, key, part, labels):
    """ScanNet++ as its toolbox writes it: the scenes of splits/nvs_sem_train.txt or ..._val.txt
    with labels, NAME.png or NAME.JPG.png in the folder `labels`. They are as distorted as the
    photos in dslr/resized_images/, unless undistorted/SCENE/ has the photos."""
    file, shots = path / f"splits/nvs_sem_{part}.txt", []
    for scene in map(str.strip, lines_of(file)):
        for label in sorted((path / labels.format(scene)).glob("*.png"), key=natural):
            stem = label.stem.removesuffix(".JPG")
            photo = path / f"undistorted/{scene}/{stem}.JPG.jpg"
            if key == "depths" or not photo.is_file():
                photo = path / f"data/{scene}/dslr/resized_images/{stem}.JPG"
            shots.append(Shot(photo, file, {key: label}))
    if not shots:
        what = f"none of the scenes in {file} has labels in {labels.format('SCENE')}/"
        raise BadFile(f"{path}: {what}")
    return shots


def listed_depth(path, name, below, finish):
    """The Shots in a list of lines "photo depth focal": see DEPTH_LISTS."""
    files = [f for f in (path / name, path / "train_test_inputs" / name) if f.is_file()]
    if not files:
        raise BadFile(f"{path / name}: expected, beside the other split's file")
    lines = [line.split() for line in lines_of(files[0])]
    if not lines or any(len(line) < 2 for line in lines):
        raise BadFile(f'{files[0]}: a line is not "photo depth focal"')
    lines = [[name.lstrip("/") for name in line[:2]] for line in lines if line[1] != "None"]
    roots = [path / f / below for f in ("", "nyu_depth_v2", "dataset/nyu_depth_v2")] + [path]
    root = next((r for r in roots if lines and (r / lines[0][0]).is_file()), roots[0])
    return [Shot(root / photo, files[0], {"depths": root / depth}, finish=finish)
            for photo, depth in lines]  # fmt: skip


# ----------------------------------------------------------------------------- python -m data


def main(arguments=None):
    from train import SIDE, plain_messages  # which imports this file

    parser = argparse.ArgumentParser(description="How fast a capture loads, for train.py --workers")
    parser.add_argument("folder", nargs="?", help="the capture; default: procedural rooms")
    for name, default in (("height", 224), ("width", 224), ("workers", 4), ("samples", 100)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    a = parser.parse_args(arguments)
    if min(a.height, a.width, a.samples) < 1 or max(a.height, a.width) > SIDE:
        raise SystemExit(f"--height and --width must be 1 to {SIDE}, --samples at least 1")
    if not 0 <= a.workers <= 256:
        raise SystemExit("--workers must be 0 to 256")
    with plain_messages():
        scenes = open_scenes(a.folder) if a.folder else Rooms("train")
        views = Views(scenes, a.height, a.width, length=a.samples)
        started, images = time.monotonic(), 0
        for sample in torch.utils.data.DataLoader(views, batch_size=None, num_workers=a.workers):
            images += len(sample["context"]["images"]) + 1
    rate = images / (time.monotonic() - started)
    print(f"{rate:.1f} images of {a.height} x {a.width} a second by {a.workers} processes")


if __name__ == "__main__":
    main()
