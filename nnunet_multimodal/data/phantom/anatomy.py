"""One subject's abdomen as maps of tissue and organ: irregular, different in everybody, left and right as in a patient.

World coordinates are RAS+ in mm: x to the patient's right, y to the front, z to the head; the origin lies in the middle
of the body, at the height of the right kidney's upper pole. Solids are drawn in coordinates that a smooth random field
has bent, their radii vary, and their surfaces are uneven, so that no two subjects and no two organs have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nnunet_multimodal.data.phantom.shapes import Vector, ellipsoid, rotation, spline_field, texture, union, without
from nnunet_multimodal.data.phantom.tissues import CODE

ORGANS: dict[str, int] = {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
EXTRA_ORGANS: tuple[str, ...] = ("stomach", "gallbladder", "pancreas", "aorta", "lesion")
_NUMBER = {**ORGANS, **{name: 5 + i for i, name in enumerate(EXTRA_ORGANS)}}

MARGIN = 26.0  # mm around a solid that its bent and uneven surface may reach


@dataclass
class Anatomy:
    """A subject.

    Attributes:
        tissue: uint8 [X, Y, Z], codes of ``tissues.NAMES``.
        organ: uint8 [X, Y, Z], number of the organ (``ORGANS``, then ``EXTRA_ORGANS``), 0 elsewhere.
        texture: float32 [X, Y, Z], about N(0, 1): what makes a tissue uneven.
        origin, spacing: of voxel (0, 0, 0)'s centre and between voxels, mm.
    """

    tissue: np.ndarray
    organ: np.ndarray
    texture: np.ndarray
    origin: np.ndarray
    spacing: np.ndarray


def make_anatomy(rng: np.random.Generator, extent: Vector, spacing: Vector, lesion: bool = False) -> Anatomy:
    """Draw a subject.

    Args:
        rng: same state, same subject.
        extent: mm along x, y, z that the map covers, centred at the origin.
        spacing: mm of its voxels.
        lesion: put one or two round lesions into the liver.
    """
    subject = _Subject(rng, extent, spacing)
    # one after the other, each over what is there: as an illustrator would
    _body(subject)
    _lungs(subject)
    _bones(subject)
    _bowel(subject)
    _stomach(subject)
    _pancreas(subject)
    _great_vessels(subject)
    _liver(subject, lesion)
    _gallbladder(subject)
    _spleen(subject)
    for side in ("right", "left"):
        _kidney(subject, side)
    spacing_ = np.asarray(spacing, float)
    uneven = 0.8 * texture(rng, subject.shape, spacing_, 9.0) + 0.6 * texture(rng, subject.shape, spacing_, 30.0)
    return Anatomy(subject.tissue, subject.organ, uneven, subject.origin, spacing_)


@dataclass
class _Subject:
    """The maps while they are drawn, with the subject's bent coordinates and size."""

    rng: np.random.Generator
    extent: Vector
    spacing: Vector
    shape: tuple[int, ...] = field(init=False)
    spine: np.ndarray = field(init=False)  # x, y of the vertebral bodies

    def __post_init__(self) -> None:
        rng, spacing = self.rng, np.asarray(self.spacing, float)
        self.shape = tuple(max(1, round(e / s)) for e, s in zip(self.extent, spacing))
        self.origin = -(np.asarray(self.shape) - 1) * spacing / 2
        self.axes = [(o + s * np.arange(n)).astype(np.float32) for o, s, n in zip(self.origin, spacing, self.shape)]
        self.girth = rng.uniform(0.9, 1.1)
        self.scale = rng.uniform(0.94, 1.06)
        self.fat = rng.uniform(0.6, 1.5)
        grid = np.meshgrid(*self.axes, indexing="ij", sparse=True)
        self.points = [
            g / self.scale
            + 3.0 * spline_field(rng, self.shape, (3, 3, 3))
            + 1.2 * spline_field(rng, self.shape, (9, 7, 6))
            for g in grid
        ]
        self.tissue = np.zeros(self.shape, np.uint8)
        self.organ = np.zeros(self.shape, np.uint8)
        self.cavity = np.zeros(self.shape, np.float32)  # below 0 inside the peritoneal cavity

    def vary(self, value: float, share: float = 0.08) -> float:
        """Somebody's size of something."""
        return value * float(self.rng.normal(1, share))

    def place(self, *centre: float, sd: float = 3.0) -> np.ndarray:
        """Somebody's position of something, mm."""
        return np.asarray(centre) + self.rng.normal(0, sd, 3)

    def box(self, centre: Vector, reach: Vector) -> tuple[slice, ...] | None:
        """The part of the maps around a solid, or None where it lies outside of them."""
        cut = []
        for axis, c, r in zip(self.axes, centre, reach):
            low, high = np.searchsorted(axis, (c * self.scale - r - MARGIN, c * self.scale + r + MARGIN))
            if low >= high:
                return None
            cut.append(slice(int(low), int(high)))
        return tuple(cut)

    def rough(self, box: tuple[slice, ...], height: float, width: float) -> np.ndarray:
        """Unevenness of a surface: mm up and down, structures of ``width`` mm."""
        size = [len(range(*cut.indices(n))) for cut, n in zip(box, self.shape)]
        return height * texture(self.rng, size, self.spacing, width)

    def paint(self, box: tuple[slice, ...], inside: np.ndarray, tissue: str, organ: str | None = None) -> None:
        """Fill; ``organ`` names it, and what was another organ there no longer is."""
        self.tissue[box][inside] = CODE[tissue]
        self.organ[box][inside] = _NUMBER[organ] if organ else 0

    def at(self, box: tuple[slice, ...]) -> list[np.ndarray]:
        """The bent coordinates in a box."""
        return [p[box] for p in self.points]


Everywhere = (slice(None), slice(None), slice(None))


def _body(s: _Subject) -> None:
    """Skin, fat below it (thicker in front and at the flanks), muscle wall, visceral fat; muscles beside the spine."""
    x, y, z = s.points
    a, b = 158 * s.girth, 108 * s.girth * s.vary(1, 0.04)
    waist = 1 - 0.05 * np.exp(-(((z + 20) / 55) ** 2))
    radius = (np.abs(x / (a * waist)) ** 2.3 + np.abs(y / (b * waist)) ** 2.3) ** (1 / 2.3)
    depth = (1 - radius) * np.float32((a + b) / 2.2)  # about mm below the skin
    furrow = 9 * np.exp(-((x / 16) ** 2)) * (y < 0)  # the back's midline lies deeper
    depth = depth - furrow
    layer = s.fat * (9 + 7 * np.clip(y / b, -0.6, 1) + 5 * np.abs(x / a)) + s.rough(Everywhere, 1.2, 40)
    s.paint(Everywhere, depth > 0, "skin")
    s.paint(Everywhere, depth > 2, "fat")
    wall = depth - np.maximum(layer, 4)
    s.paint(Everywhere, wall > 0, "muscle")
    thickness = 11 + 4 * np.abs(np.sin(3 * x / a)) - 4 * (np.abs(x) < 10)
    s.cavity = (thickness - wall).astype(np.float32)
    s.paint(Everywhere, s.cavity < 0, "fat")
    spine_y = -0.42 * b
    s.spine = np.array([0.0, spine_y])
    for side in (-1, 1):
        erector = ellipsoid(s.points, (side * 33, spine_y - 33, 0), (27, 19, 1e3)) + s.rough(Everywhere, 1.5, 18)
        s.paint(Everywhere, (erector < 0) & (depth > 5), "muscle")
        lumborum = ellipsoid(s.points, (side * 66, spine_y - 18, -60), (20, 13, 70))
        s.paint(Everywhere, (lumborum < 0) & (depth > 8), "muscle")
        psoas = ellipsoid(s.points, (side * (30 + 0.05), spine_y + 2, -75), (17, 19, 75)) + s.rough(Everywhere, 1.0, 15)
        s.paint(Everywhere, psoas < 0, "muscle")


def _lungs(s: _Subject) -> None:
    """Their bases, hanging down behind the domes of the diaphragm."""
    x, y, z = s.points
    for side, dome in ((1, 78.0), (-1, 72.0)):
        floor = dome - 0.012 * ((x - side * 70) ** 2 * 0.5 + (y - 15) ** 2 * np.where(y < 15, 1.0, 0.35))
        floor = np.maximum(floor, s.vary(22, 0.2))
        middle = (
            16 + 14 * np.exp(-(((y - 12) / 32) ** 2)) - 6 * np.exp(-(((y + 40) / 20) ** 2))
        )  # the heart's fat, spine
        aside = side * x - middle
        s.paint(Everywhere, (z > floor - 4) & (s.cavity < 0) & (aside > -3), "muscle")
        s.paint(Everywhere, (z > floor) & (s.cavity < 0) & (aside > 0), "lung")


def _bones(s: _Subject) -> None:
    """Vertebrae with discs, canal and processes; ribs sloping down to the front."""
    x, y, z = s.points
    spine_y = s.spine[1]
    body = ellipsoid(s.points, (0, spine_y, 0), (22, 17, 1e3)) + s.rough(Everywhere, 0.8, 12)
    phase = ((z + s.rng.uniform(0, 32)) / 32) % 1
    disc = phase < 0.24
    s.paint(Everywhere, body < 0, "cortical_bone")
    s.paint(Everywhere, body < -2, "marrow")
    s.paint(Everywhere, (body < 0) & disc, "disc")
    arch = ellipsoid(s.points, (0, spine_y - 25, 0), (17, 13, 1e3))
    s.paint(Everywhere, arch < 0, "cortical_bone")
    s.paint(Everywhere, (arch < -2.5) & (arch > -5), "marrow")
    spinous = (np.abs(x) < 4) & (y < spine_y - 30) & (y > spine_y - 52) & (phase > 0.35) & (phase < 0.8)
    s.paint(Everywhere, spinous, "cortical_bone")
    transverse = (np.abs(y - spine_y + 22) < 5) & (np.abs(x) < 40) & (np.abs(phase - 0.6) < 0.12)
    s.paint(Everywhere, transverse, "cortical_bone")
    s.paint(Everywhere, transverse & (np.abs(y - spine_y + 22) < 2.5), "marrow")
    canal = ellipsoid(s.points, (0, spine_y - 24, 0), (11, 8.5, 1e3))
    s.paint(Everywhere, canal < 0, "fluid")
    s.paint(Everywhere, ellipsoid(s.points, (0, spine_y - 24, 0), (5.5, 4.5, 1e3)) < 0, "spinal_cord")
    start = s.rng.uniform(0, 27)
    height = z + 0.55 * (y - spine_y)  # along a rib it stays the same
    ring = np.abs(s.cavity - 5)  # inside the wall
    rib = ((((height + start) / 27) % 1) - 0.5) * 27
    shell = np.sqrt(rib**2 / 2.2 + ring**2)
    open_front = (y < 70) & (height > -35)  # no ribs below the arch
    away = np.abs(x) > 30
    s.paint(Everywhere, (shell < 5) & open_front & away, "cortical_bone")
    s.paint(Everywhere, (shell < 3) & open_front & away, "marrow")


def _tube(s: _Subject, path: np.ndarray, radii: np.ndarray, draw: Callable[[tuple, np.ndarray], None]) -> None:
    """Call ``draw(box, distance to the surface)`` for balls strung along a path, [N, 3] mm."""
    for centre, radius in zip(path, radii):
        low = [np.searchsorted(axis, c * s.scale - radius - 14) for axis, c in zip(s.axes, centre)]
        high = [np.searchsorted(axis, c * s.scale + radius + 14) for axis, c in zip(s.axes, centre)]
        if all(a < b for a, b in zip(low, high)):
            box = tuple(slice(int(a), int(b)) for a, b in zip(low, high))
            draw(box, np.sqrt(sum((p - c) ** 2 for p, c in zip(s.at(box), centre))) - radius)


def _bowel(s: _Subject) -> None:
    """Small-bowel loops as random walks in front and below, the colon at both flanks: what organs are confused with."""
    rng = s.rng
    contents = ("fluid", "bowel_content", "bowel_wall", "air")

    def draw(content: str, level: float) -> Callable[[tuple, np.ndarray], None]:
        def paint(box: tuple, distance: np.ndarray) -> None:
            free = s.cavity[box] < -1
            tissue = s.tissue[box]
            wall = (distance < 0) & free & (tissue != CODE["lung"])
            lumen = (distance < -2.5) & free & (tissue != CODE["lung"])
            inner = CODE["bowel_wall"]
            tissue[wall & ~np.isin(tissue, _CONTENT_CODES)] = inner
            tissue[lumen] = CODE[content]
            if content == "air":  # gas rises, the rest is fluid
                below = lumen & (s.points[1][box] < level)
                tissue[below] = CODE["fluid"]

        return paint

    for _ in range(rng.integers(26, 36)):
        at = np.array([rng.uniform(-85, 85), rng.uniform(-10, 70), rng.uniform(-105, 5)])
        heading = rng.standard_normal(3)
        path = []
        for _ in range(rng.integers(8, 18)):
            heading = 0.7 * heading / np.linalg.norm(heading) + 0.5 * rng.standard_normal(3)
            at = np.clip(at + 6 * heading / np.linalg.norm(heading), (-95, -18, -115), (95, 85, 18))
            path.append(at)
        content = rng.choice(contents, p=(0.3, 0.3, 0.25, 0.15))
        radius = rng.uniform(8, 14)
        _tube(s, np.array(path), np.full(len(path), radius), draw(str(content), path[0][1]))
    for side, top in ((1, -25.0), (-1, 25.0)):
        z = np.arange(-110, top, 5.0)
        x = side * (98 + 5 * np.sin(z / 17 + rng.uniform(0, 6))) * s.girth * 0.92
        y = -5 + 8 * np.sin(z / 29 + rng.uniform(0, 6))
        haustra = 15 + 3 * np.sin(z / 7 + rng.uniform(0, 6))
        content = rng.choice(("bowel_content", "air"), p=(0.7, 0.3))
        _tube(s, np.stack([x, y, z], 1), haustra, draw(str(content), 0.0))
    x = np.arange(-85, 86, 5.0)  # transverse colon, hanging in front
    y = 62 * s.girth + 4 * np.sin(x / 23 + rng.uniform(0, 6))
    z = -38 + 14 * (x / 85) ** 2 + rng.normal(0, 5) - 0.1 * x
    content = rng.choice(("bowel_content", "air"), p=(0.5, 0.5))
    _tube(s, np.stack([x, y, z], 1), 13 + 2.5 * np.sin(x / 6), draw(str(content), 62.0 * s.girth))


_CONTENT_CODES = [CODE[name] for name in ("fluid", "bowel_content", "air")]


def _stomach(s: _Subject) -> None:
    """Fundus under the left dome and body towards the front; food, fluid, and a bubble of gas on top."""
    fundus, body, antrum = s.place(-58, 12, 48), s.place(-52, 48, 14), s.place(-8, 56, -6)
    box = s.box((-45, 35, 20), (75, 60, 70))
    if box is None:
        return
    points = s.at(box)
    solid = ellipsoid(points, fundus, (s.vary(34), s.vary(36), s.vary(30)))
    solid = union(solid, ellipsoid(points, body, (s.vary(30), s.vary(27), s.vary(38))), 18)
    solid = union(solid, ellipsoid(points, antrum, (s.vary(36), s.vary(15), s.vary(16))), 14)
    solid = solid + s.rough(box, 2.0, 22)
    free = (s.cavity[box] < -2) & (s.tissue[box] != CODE["lung"])
    s.paint(box, (solid < 0) & free, "bowel_wall", "stomach")
    lumen = (solid < -4) & free
    s.paint(box, lumen, "fluid", "stomach")
    food = s.rough(box, 1.0, 16) > s.rng.uniform(-0.8, 1.2)
    s.paint(box, lumen & food, "bowel_content", "stomach")
    s.paint(box, lumen & (points[1] > body[1] + s.rng.uniform(2, 16)), "air", "stomach")


def _pancreas(s: _Subject) -> None:
    """Head at the duodenum, tail towards the spleen; lobulated."""
    knots = np.array([s.place(34, 10, -16), s.place(22, 24, -2), s.place(-12, 20, 10), s.place(-48, -6, 20)])
    t = np.linspace(0, 3, 26)
    path = np.stack([np.interp(t, range(4), knots[:, k]) for k in range(3)], 1)
    path = (path + np.roll(path, 1, 0) + np.roll(path, -1, 0))[1:-1] / 3
    radii = np.interp(np.linspace(0, 1, len(path)), (0, 0.3, 1), (14, 9, 10)) * s.vary(1)

    def draw(box: tuple, distance: np.ndarray) -> None:
        lobules = 1.8 * np.sin(_lobules(s, box))
        s.paint(box, (distance + lobules < 0) & (s.cavity[box] < 0), "pancreas", "pancreas")

    _tube(s, path, radii, draw)


def _lobules(s: _Subject, box: tuple[slice, ...]) -> np.ndarray:
    """A phase that makes lobules about 8 mm wide."""
    x, y, z = s.at(box)
    return (x + 0.7 * y) / 1.9 + z / 2.3


def _great_vessels(s: _Subject) -> None:
    """Aorta left, vena cava right of the spine."""
    z = np.arange(-120, 121, 5.0)
    front = s.spine[1] + 17
    for x, y, radius, organ in ((-9, front + 13, 10.5, "aorta"), (17, front + 12, 11.0, None)):
        sway = s.rng.uniform(0, 6)
        path = np.stack([x + 2.5 * np.sin(z / 40 + sway), y + 2 * np.cos(z / 50 + sway), z], 1)

        def draw(box: tuple, distance: np.ndarray, organ: str | None = organ) -> None:
            s.paint(box, distance < 0, "blood", organ)

        _tube(s, path, np.full(len(z), s.vary(radius)), draw)


def _liver(s: _Subject, lesion: bool) -> None:
    """Right lobe under the right dome, left lobe across the midline, a hollow underside, vessels, maybe lesions."""
    box = s.box((35, 10, 25), (130, 110, 105))
    if box is None:
        return
    points = s.at(box)
    right = ellipsoid(points, s.place(72, 2, 32), (s.vary(70), s.vary(76), s.vary(64)))
    tail = ellipsoid(points, s.place(92, 0, -18), (s.vary(36), s.vary(44), s.vary(58)))
    left = ellipsoid(points, s.place(4, 48, 36), (s.vary(62, 0.12), s.vary(32), s.vary(30)), rotation((0, 8, -12)))
    solid = union(union(right, tail, 25), left, 22)
    hollow = ellipsoid(points, s.place(22, 12, -48), (58, 60, 62))
    solid = without(solid, hollow, 14)
    fissure = ellipsoid(points, s.place(14, 28, -2), (5, 40, 30), rotation((0, 0, 14)))
    solid = without(solid, fissure, 6)
    solid = solid + s.rough(box, 2.6, 34)
    tissue = s.tissue[box]
    free = (s.cavity[box] < -0.5) & ~np.isin(tissue, [CODE[n] for n in ("lung", "marrow", "cortical_bone", "disc")])
    inside = (solid < 0) & free
    s.paint(box, inside, "liver", "liver")
    for path, radii in _vessel_tree(s):
        _tube(s, path, radii, lambda where, distance: _into_liver(s, where, distance))
    if lesion:
        rng = s.rng.spawn(1)[0]  # its own, so that everything else stays as it is without lesions
        for _ in range(rng.integers(1, 3)):
            centre, radius = rng.normal((75, 5, 30), 20), rng.uniform(7, 16)
            where = s.box(centre, (radius,) * 3)
            if where is None:
                continue
            ball = ellipsoid(s.at(where), centre, (radius, radius * 0.9, radius * 1.1))
            s.paint(where, (ball < 0) & (s.organ[where] == ORGANS["liver"]), "lesion", "lesion")


def _into_liver(s: _Subject, box: tuple[slice, ...], distance: np.ndarray) -> None:
    s.paint(box, (distance < 0) & (s.organ[box] == ORGANS["liver"]), "liver_vessel", "liver")


def _vessel_tree(s: _Subject) -> list[tuple[np.ndarray, np.ndarray]]:
    """Branches from the porta and from the vena cava: (points [N, 3], radii [N]) each; thinner at every fork."""
    rng, branches = s.rng, []
    roots = [
        (np.array([28.0, 18, 2]), np.array([1.0, 0.1, 0.5]), 6.0),
        (np.array([24.0, 20, 8]), np.array([-0.5, 0.9, 0.8]), 4.5),
        (np.array([20.0, -20, 66]), np.array([1.0, 0.5, -0.6]), 5.5),
        (np.array([18.0, -18, 66]), np.array([0.3, 1.0, -0.4]), 4.5),
    ]
    while roots:
        at, heading, radius = roots.pop()
        length = int(rng.integers(6, 11))
        path = []
        for _ in range(length):
            heading = heading / np.linalg.norm(heading) + 0.22 * rng.standard_normal(3)
            at = at + 4.0 * heading / np.linalg.norm(heading)
            path.append(at)
        branches.append((np.array(path), np.linspace(radius, 0.8 * radius, length)))
        if radius > 2.2:
            for _ in range(2):
                roots.append((at, heading / np.linalg.norm(heading) + 0.75 * rng.standard_normal(3), 0.72 * radius))
    return branches


def _gallbladder(s: _Subject) -> None:
    """A pear below the liver."""
    centre = s.place(46, 44, -16, sd=5)
    box = s.box(centre, (30, 30, 35))
    if box is None:
        return
    turn = rotation(s.rng.normal((20, -15, 0), 8))
    solid = ellipsoid(s.at(box), centre, (s.vary(12), s.vary(14), s.vary(25)), turn) + s.rough(box, 0.8, 14)
    free = s.cavity[box] < -2
    s.paint(box, (solid < 2) & free, "bowel_wall")
    s.paint(box, (solid < 0) & free, "bile", "gallbladder")


def _spleen(s: _Subject) -> None:
    """A bowl against the ribs of the left back."""
    centre = s.place(-102, -28, 34, sd=5) * np.array([s.girth**0.5, 1, 1])
    box = s.box(centre, (60, 70, 70))
    if box is None:
        return
    points = s.at(box)
    size = s.vary(1, 0.1)
    solid = ellipsoid(points, centre, (size * 36, size * 46, size * 50), rotation((0, 0, -25)))
    hilum = ellipsoid(points, centre + np.array([44, 22, s.rng.normal(0, 6)]), (size * 36, size * 42, size * 48))
    solid = without(solid, hilum, 10) + s.rough(box, 2.0, 22)
    lung = s.tissue[box] == CODE["lung"]
    s.paint(box, (solid < 0) & (s.cavity[box] < -0.5) & ~lung, "spleen", "spleen")


def _kidney(s: _Subject, side: str) -> None:
    """A bean in its fat: cortex, pyramids of medulla; fat and pelvis at the hilum, which looks to the middle."""
    sign = 1 if side == "right" else -1
    lower = -42 if side == "right" else -30
    centre = s.place(sign * 64 * s.girth**0.5, s.spine[1] + 16, lower, sd=4)
    box = s.box(centre, (45, 45, 75))
    if box is None:
        return
    points = s.at(box)
    turn = rotation((s.rng.normal(-12, 4), sign * s.rng.normal(-12, 4), sign * s.rng.normal(25, 6)))
    size = s.vary(1, 0.07)
    radii = np.array([s.vary(26, 0.05), s.vary(24, 0.05), s.vary(51, 0.05)]) * size
    local = [p - c for p, c in zip(points, centre)]
    local = [sum(turn[i, j] * local[j] for j in range(3)) for i in range(3)]
    bean = ellipsoid(local, (0, 0, 0), radii)
    hilum = np.array([-sign * radii[0] * 1.05, radii[1] * 0.25, 0])
    notch = ellipsoid(local, hilum, (radii[0] * 0.62, radii[1] * 0.5, radii[2] * 0.34))
    bean = without(bean, notch, 8) + s.rough(box, 1.1, 14)
    free = (s.cavity[box] < 0) & (s.tissue[box] != CODE["lung"])
    s.paint(box, (bean < 4 + 3 * s.fat) & free, "fat")
    organ = f"{side}_kidney"
    inside = (bean < 0) & free
    s.paint(box, inside, "renal_cortex", organ)
    angle = np.arctan2(local[1], local[0] + sign * radii[0] * 0.3)
    pyramids = np.cos(angle * 4 + s.rng.uniform(0, 6)) * np.cos(local[2] / radii[2] * 8 + s.rng.uniform(0, 6)) > -0.35
    s.paint(box, (bean < -6.5) & free & pyramids, "renal_medulla", organ)
    sinus = ellipsoid(local, hilum * 0.45, (radii[0] * 0.5, radii[1] * 0.34, radii[2] * 0.5))
    s.paint(box, (sinus < 0) & inside, "fat")  # no part of the label
    pelvis = ellipsoid(local, hilum * 0.5, (radii[0] * 0.42, radii[1] * 0.16, radii[2] * 0.24))
    s.paint(box, (pelvis < 0) & free, "fluid")
