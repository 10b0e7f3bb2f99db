"""Islands of agreement in a field of features: similarity of neighbours, the regions they form, what these follow.

Hinton 2021 (GLOM) expects locations of one part to agree on one vector; Modi & Rawat 2024 (Figure 3) show such islands
in the student's field. A student with one token as its only target holds the same trigger column at all its queries:
its field can differ between places through the position code alone. Whether regions follow the image is therefore
measured, against controls in which they could not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from apm.errors import ImageError, UsageError
from apm.settings import cosine

Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Islands:
    """Measures of one field."""

    cosine: float
    """Mean cosine of neighbours (up, down, left, right), in [-1, 1]."""
    regions: int
    """Connected regions of neighbours whose cosine reaches the threshold."""
    largest: float
    """Share of all locations in the largest region, in (0, 1]."""


def neighbour_cosines(field: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cosine of each location with its right neighbour (H, W-1) and with the one below (H-1, W).

    Args:
        field: (H, W, D), finite. A vector of length 0 agrees with none: cosine 0.
    """
    values = _field(field)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    unit = values / np.where(lengths > 0, lengths, 1)
    return (unit[:, :-1] * unit[:, 1:]).sum(-1), (unit[:-1] * unit[1:]).sum(-1)


def regions(field: ArrayLike, threshold: float, *, within: Labels | None = None) -> Labels:
    """Number (H, W) the connected regions of a field (H, W, D): neighbours with a cosine ≥ threshold are joined.

    Where `within` (H, W) is given, only those that have the same number there.
    """
    right, below = neighbour_cosines(field)
    # a cosine of equal vectors may come out one rounding below 1
    joined_right, joined_below = right >= threshold - 1e-9, below >= threshold - 1e-9
    if within is not None:
        joined_right = joined_right & (within[:, 1:] == within[:, :-1])
        joined_below = joined_below & (within[1:] == within[:-1])
    return connected(joined_right, joined_below)


def connected(right: NDArray[np.bool_], below: NDArray[np.bool_]) -> Labels:
    """Number (H, W) the connected components, from which locations are joined right (H, W-1) and below (H-1, W)."""
    height, width = below.shape[0] + 1, below.shape[1]
    number = np.arange(height * width).reshape(height, width)
    starts = np.concatenate([number[:, :-1][right], number[:-1][below]])
    ends = np.concatenate([number[:, 1:][right], number[1:][below]])
    graph = coo_matrix((np.ones(len(starts), dtype=np.int8), (starts, ends)), shape=(number.size, number.size))
    _, labels = connected_components(graph, directed=False)
    return labels.astype(np.int64).reshape(height, width)


def measure(field: ArrayLike, *, threshold: float = 0.9, centred: bool = False) -> Islands:
    """Measure the islands of a field (H, W, D).

    Args:
        field: the features; finite.
        threshold: cosine from which on two neighbours belong together, in [-1, 1].
        centred: first take out the mean over all locations. A part that all locations share (a student fitted to one
            token has little else) makes every cosine nearly 1 and hides what differs.
    """
    cosine("The threshold", threshold)
    values = _field(field)
    if centred:
        values = values - values.mean(axis=(0, 1))
    right, below = neighbour_cosines(values)
    sizes = np.bincount(regions(values, threshold).ravel())
    return Islands(
        cosine=float(np.concatenate([right.ravel(), below.ravel()]).mean()),
        regions=len(sizes),
        largest=float(sizes.max() / sizes.sum()),
    )


def clusters(field: ArrayLike, count: int, *, seed: int = 0) -> Labels:
    """Number (H, W) the k-means clusters of a field's features (H, W, D); their locations are ignored.

    Args:
        field: the features; finite. Their common mean and scale do not matter.
        count: number of clusters; fewer come out when fewer features differ.
        seed: of the first centres.
    """
    from sklearn.cluster import KMeans

    values = _field(field)
    rows = values.reshape(-1, values.shape[-1])
    rows = rows - rows.mean(axis=0)
    spread = np.sqrt((rows**2).mean())
    if spread < 1e-7 * max(float(np.abs(values).max()), 1e-30):  # the same everywhere, but for rounding
        return np.zeros(values.shape[:2], dtype=np.int64)
    rows = rows / spread  # the stopping rule knows no scale
    count = min(count, len(np.unique(rows.round(6), axis=0)))
    found = KMeans(n_clusters=count, n_init=3, random_state=seed).fit(rows).labels_
    return found.astype(np.int64).reshape(values.shape[:2])


def superpixels(square: Image.Image, grid: int, count: int) -> Labels:
    """Cut a square image into about `count` superpixels (SLIC, Achanta et al. 2012), as labels of grid × grid cells.

    Returns:
        (grid, grid): for each cell the superpixel that most of its pixels belong to.

    Raises:
        ImageError: it is the same one for all cells.
    """
    from skimage.segmentation import slic

    side = grid * 8
    pixels = np.asarray(square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    found = slic(pixels, n_segments=count, compactness=10, sigma=1, start_label=0)
    cells = found.reshape(grid, 8, grid, 8).transpose(0, 2, 1, 3).reshape(grid, grid, 64)
    parts = np.apply_along_axis(lambda cell: np.bincount(cell).argmax(), 2, cells).astype(np.int64)
    if (parts == parts[0, 0]).all():
        raise ImageError(
            f"of {count} superpixels only one is seen at {grid} × {grid} locations: nothing to compare with"
        )
    return parts


def agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Adjusted mutual information of two labellings of the same locations: 1 for the same partition, 0 for chance."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(np.asarray(first).ravel(), np.asarray(second).ravel()))


def boundary_contrast(field: ArrayLike, labels: ArrayLike) -> float:
    """How much less similar neighbours are across a given partition's boundary: in [-2, 2], 0 for no difference.

    The mean cosine of neighbours within a part less that of neighbours in different parts, the field's mean taken out
    before. Unlike `agreement`, it does not reward clusters for being merely compact, as superpixels are.

    Args:
        field: (H, W, D).
        labels: (H, W), such as superpixels.
    """
    values, parts = _field(field), np.asarray(labels)
    right, below = neighbour_cosines(values - values.mean(axis=(0, 1)))
    cosines = np.concatenate([right.ravel(), below.ravel()])
    same = np.concatenate([(parts[:, :-1] == parts[:, 1:]).ravel(), (parts[:-1] == parts[1:]).ravel()])
    if same.all() or not same.any():
        raise UsageError("The partition has no boundary between neighbours, or only boundaries: no contrast.")
    return float(cosines[same].mean() - cosines[~same].mean())


def variation(field: ArrayLike) -> tuple[float, float]:
    """How much of the variation between the locations of a field (H, W, D) is simple.

    Returns:
        The share of the variance that lies in one direction of the features, and the share that is a sum of something
        of the row and something of the column; each in [0, 1], and 0 where nothing differs.
    """
    values = _field(field)
    values = values - values.mean(axis=(0, 1))
    total = float((values**2).sum())
    if total == 0:
        return 0.0, 0.0
    strongest = float(np.linalg.norm(values.reshape(-1, values.shape[-1]), 2) ** 2)
    by_place = values.mean(axis=1, keepdims=True) + values.mean(axis=0, keepdims=True)  # (H, W, D)
    return strongest / total, float((by_place**2).sum()) / total


def random_like(target: Tensor, seed: int) -> Tensor:
    """Draw vectors of random directions and the same lengths: (…, D) → (…, D)."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(target.shape))).to(target)
    return noise * (target.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def shuffle_patches(square: Image.Image, parts: int, seed: int) -> Image.Image:
    """Cut a square image into parts × parts patches and put them back in a random order; none is turned.

    A side that `parts` does not divide is scaled to the next larger one that it does.
    """
    side = -(-square.width // parts) * parts
    pixels = np.asarray(square.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    step = side // parts
    patches = pixels.reshape(parts, step, parts, step, 3).swapaxes(1, 2).reshape(parts * parts, step, step, 3)
    order = np.random.default_rng(seed).permutation(parts * parts)
    mixed = patches[order].reshape(parts, parts, step, step, 3).swapaxes(1, 2).reshape(side, side, 3)
    return Image.fromarray(np.ascontiguousarray(mixed))


def embed(field: ArrayLike, *, seed: int = 0, perplexity: float = 30.0, numbers: int = 2) -> NDArray[np.float64]:
    """Lay the features (H, W, D) out by t-SNE (van der Maaten & Hinton 2008): (H·W, numbers), in reading order.

    In the plane, or with three numbers a place, which may be shown as a colour.

    Distances are of the features less their mean, in units of their spread; features without any spread lie in one
    point. The same seed gives the same picture.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = _field(field)
    rows = values.reshape(-1, values.shape[-1])
    rows = rows - rows.mean(axis=0)
    spread = np.sqrt((rows**2).mean())
    if spread < 1e-7 * max(float(np.abs(values).max()), 1e-30):
        return np.zeros((len(rows), numbers))
    few = min(20, *rows.shape)
    rows = PCA(few, svd_solver="full").fit_transform(rows / spread)
    settings: dict[str, Any] = {"perplexity": min(perplexity, (len(rows) - 1) / 3), "init": "pca", "random_state": seed}
    laid: NDArray[np.float64] = TSNE(numbers, **settings).fit_transform(rows).astype(np.float64)
    return laid


def _field(field: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(field, dtype=np.float64)
    if values.ndim != 3 or not values.size:
        raise UsageError(f"A field has shape (H, W, D), not {values.shape}.")
    if not np.isfinite(values).all():
        raise UsageError("The field holds values that are not finite.")
    return values
