"""Meshes over lattices of points: all of one person's are lit and projected in one go, then drawn by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .head import Array, Real, View
from .light import Light
from .raster import Points, Raster, argb

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Lattice:
    """A lattice: rows run down, columns follow growing longitude; `ring` joins the last column to the first."""

    rows: int
    columns: int
    ring: bool

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Mesh:
    """A lattice of N points in row-major order, and what it looks like.

    points: (3, N) in head coordinates. tint: (3, N) colours before the light; gloss: (N,) or one for all.
    sheen: (3, N) what shows in the band of light on hair; fade: (N,), how much of all light comes back; opacity: (N,).
    hang: (N,) head units straight down, whichever way the head is turned. two_sided: its back is drawn, too.
    """

    lattice: Lattice
    points: Array
    tint: Array
    gloss: Array | float = 0.0
    sheen: Array | None = None
    fade: Array | None = None
    opacity: Array | None = None
    hang: Array | None = None
    two_sided: bool = False


@dataclass(frozen=True)
class _Topology:
    """Of lattices in a row, as indices of their points: neighbours (N,), corners of triangles (T, 3).

    `ends` is `corners` as (3, T): triangles are picked fast from the one, and measured fast by the other.
    Triangles 2k and 2k + 1 fill cell k, cells in row-major order; the cells of a lattice's last column are those
    that close the ring, if it is one. parts: each lattice's points and triangles.
    """

    left: Index
    right: Index
    above: Index
    below: Index
    corners: Index
    ends: Index
    parts: list[tuple[slice, slice]]


@functools.cache
def _topology(lattices: tuple[Lattice, ...]) -> _Topology:
    neighbours, corners, parts = [], [], []
    points = triangles = 0
    for lattice in lattices:
        index = np.arange(points, points + lattice.size).reshape(lattice.rows, lattice.columns)
        first, last = (index[:, -1:], index[:, :1]) if lattice.ring else (index[:, :1], index[:, -1:])
        left, right = np.concatenate([first, index[:, :-1]], 1), np.concatenate([index[:, 1:], last], 1)
        above, below = np.concatenate([index[:1], index[:-1]]), np.concatenate([index[1:], index[-1:]])
        neighbours.append(np.stack([left, right, above, below]).reshape(4, -1))
        a, b, c, d = index[:-1], right[:-1], index[1:], right[1:]
        cells = np.stack([np.stack([a, b, c]), np.stack([b, d, c])], -1)[:, :, : None if lattice.ring else -1]
        corners.append(cells.reshape(3, -1))
        parts.append((slice(points, points + lattice.size), slice(triangles, triangles + corners[-1].shape[1])))
        points, triangles = parts[-1][0].stop, parts[-1][1].stop
    left, right, above, below = np.concatenate(neighbours, 1)
    ends = np.concatenate(corners, 1)
    return _Topology(left, right, above, below, np.ascontiguousarray(ends.T), ends, parts)


_vertices = Points()


class ProjectedMeshes:
    """The meshes of one person as seen in the picture.

    front: (T,) whether a triangle is seen from outside; parts: each mesh's points and triangles, by its name.
    What is asked for by triangle must be among those that are drawn: the ones seen from outside, all of a two-sided
    mesh. (`take` and `compress` are what indexing with numbers and truth values is, at a fifth of the time.)
    """

    def __init__(self, meshes: dict[str, Mesh], view: View, light: Light):
        topology = _topology(tuple(mesh.lattice for mesh in meshes.values()))
        self.parts = dict(zip(meshes, topology.parts))
        rotated = view.rotate(np.concatenate([mesh.points for mesh in meshes.values()], 1))
        for mesh, (points, _) in zip(meshes.values(), topology.parts):
            if mesh.hang is not None:
                rotated[1, points] += mesh.hang
        flat = view.project(rotated)
        (ax, bx, cx), (ay, by, cy) = flat[0][topology.ends], flat[1][topology.ends]
        self.front = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) > 0
        # Most points of a head are out of sight: what is handed to skia is handed over one by one, so only the others.
        drawn = self.front.copy()
        for mesh, (_, triangles) in zip(meshes.values(), topology.parts):
            drawn[triangles] |= mesh.two_sided
        used = np.zeros(flat.shape[1], bool)
        used[topology.corners.compress(drawn, 0).ravel()] = True
        self._corners = (used.cumsum(dtype=np.int32) - 1)[topology.corners]
        across = rotated.take(topology.right, 1) - rotated.take(topology.left, 1)
        down = rotated.take(topology.below, 1) - rotated.take(topology.above, 1)
        self._colours = self._illuminated(list(meshes.values()), unit_cross(across, down), light).compress(used, 1)
        self._argb = argb(self._colours)
        self._flat = flat.compress(used, 1)
        self._pixels = self._flat.tolist()

    def _illuminated(self, meshes: list[Mesh], normals: Array, light: Light) -> Array:
        """Colours (4, N) of all points."""
        gloss = np.empty(normals.shape[1], Real)
        colours = np.ones((4, normals.shape[1]), Real)
        for mesh, (points, _) in zip(meshes, self.parts.values()):
            gloss[points] = mesh.gloss
        colours[:3] = light.illuminate(np.concatenate([mesh.tint for mesh in meshes], 1), normals, gloss)
        for mesh, (points, _) in zip(meshes, self.parts.values()):
            if mesh.sheen is not None:
                colours[:3, points] += light.hair_highlight(mesh.sheen, normals[:, points])
            if mesh.fade is not None:
                colours[:3, points] = np.minimum(colours[:3, points], 1.0) * mesh.fade
            if mesh.opacity is not None:
                colours[3, points] = mesh.opacity
        return colours

    def front_of(self, name: str) -> NDArray[np.bool_]:
        """Which triangles (T,) of a mesh are seen from outside."""
        return self.front[self.parts[name][1]]

    def bounds(self, name: str, chosen: NDArray[np.bool_]) -> Array:
        """(4,) pixels x0, y0, x1, y1 around the `chosen` (T,) of a mesh's triangles."""
        triangles = self.parts[name][1]
        x, y = self._flat.take(self._corners[triangles].compress(chosen, 0).ravel(), 1)
        return np.array([x.min(), y.min(), x.max(), y.max()])

    def draw(
        self,
        raster: Raster,
        name: str,
        label: int | None = None,
        chosen: NDArray[np.bool_] | None = None,
        factor: float = 1.0,
    ) -> None:
        """Draw the `chosen` (T,) of a mesh's triangles (None: those seen from outside), lighter by `factor`."""
        triangles = self.parts[name][1]
        corners = self._corners[triangles].compress(self.front[triangles] if chosen is None else chosen, 0).ravel()
        if not corners.size:
            return
        window = slice(int(corners.min()), int(corners.max()) + 1)
        colours = self._argb[window]
        if factor != 1:
            colours = argb(self._colours[:, window] * np.array([[factor], [factor], [factor], [1]], Real))
        points = _vertices.fill(*self._pixels, owner=self)
        raster.triangles(points[window], colours, (corners - window.start).tolist(), label)


def unit_cross(one: Array, other: Array) -> Array:
    """Unit vectors (3, N) at right angles to both (3, N)."""
    (a1, a2, a3), (b1, b2, b3) = one, other
    normal = np.array([a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1])
    return normal / np.maximum(np.sqrt((normal * normal).sum(0)), 1e-9)
