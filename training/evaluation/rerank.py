"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), after the ranking by the network.

Two images are alike if their lists of nearest images are. It looks at all queries and the whole
gallery at once, so its figures stand in rows of their own: a service that answers one query at a
time cannot do it.
"""

import numpy as np
import numpy.typing as npt
from scipy import sparse

AnyFloatArray = npt.NDArray[np.floating]


def k_reciprocal(
    dissimilarity: AnyFloatArray,
    n_queries: int,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> npt.NDArray[np.float64]:
    """Re-ranked distances Q×N, in [0, 1].

    dissimilarity: M×M between all M = Q + N images, the queries first: squared Euclidean
        distances, or 1 − cosine. Row i is the ranking of image i; it need not be symmetric (a
        modulated distance is not: each row has its own γ, β). An image is its own nearest,
        whatever the diagonal says.
    n_queries: Q.
    k1: size of the lists of nearest images.
    k2: images whose encodings are averaged (query expansion).
    weight: λ of the paper, the share of the original distance.
    """
    total = dissimilarity.shape[0]
    scaled = dissimilarity.astype(np.float32)
    np.fill_diagonal(scaled, 0)
    # Row by row, as the original code: each row's own scale.
    scaled /= np.maximum(scaled.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    np.fill_diagonal(scaled, -1)
    k1, k2 = min(k1, total - 1), min(k2, total)
    ranking = _nearest(scaled, max(k1 + 1, k2))  # M×k, each image first in its own row
    np.fill_diagonal(scaled, 0)

    reciprocal = _reciprocal(ranking[:, : k1 + 1])
    half = _reciprocal(ranking[:, : round(k1 / 2) + 1])
    # A candidate c in R(i) brings its own smaller list if two thirds of that are in R(i) already.
    common = (reciprocal @ half.T).multiply(reciprocal).tocoo()
    sizes = np.asarray(half.sum(axis=1)).ravel()
    brings = common.data > 2 / 3 * sizes[common.col]
    bringing = sparse.csr_array(
        (np.ones(brings.sum()), (common.row[brings], common.col[brings])), shape=common.shape
    )
    expanded = (reciprocal + bringing @ half).tocoo()
    encoding = sparse.csr_array(
        (np.exp(-scaled[expanded.row, expanded.col]), (expanded.row, expanded.col)),
        shape=expanded.shape,
    )
    encoding = sparse.diags_array(1 / np.asarray(encoding.sum(axis=1)).ravel()) @ encoding
    encoding = _membership(ranking[:, :k2]) @ encoding / k2

    jaccard = _jaccard_distance(encoding.tocsr(), n_queries)
    original = scaled[:n_queries, n_queries:]
    return np.asarray((1 - weight) * jaccard + weight * original)


def _nearest(distance: AnyFloatArray, count: int) -> npt.NDArray[np.int64]:
    """The `count` smallest columns of each row, ascending."""
    if count < distance.shape[1]:
        nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
    else:
        nearest = np.tile(np.arange(distance.shape[1]), (distance.shape[0], 1))
    order = np.argsort(np.take_along_axis(distance, nearest, axis=1), axis=1, kind="stable")
    return np.take_along_axis(nearest, order, axis=1)


def _membership(lists: npt.NDArray[np.int64]) -> sparse.csr_array:
    """M lists of images → M×M with 1 where the column's image is in the row's list."""
    total, length = lists.shape
    rows = np.repeat(np.arange(total), length)
    return sparse.csr_array((np.ones(rows.size), (rows, lists.ravel())), shape=(total, total))


def _reciprocal(lists: npt.NDArray[np.int64]) -> sparse.csr_array:
    """1 where two images are in each other's lists."""
    member = _membership(lists)
    return member.multiply(member.T).tocsr()


def _jaccard_distance(encoding: sparse.csr_array, n_queries: int) -> npt.NDArray[np.float64]:
    """1 − Σ min / Σ max between queries and gallery; every row sums to 1, so Σ max = 2 − Σ min."""
    gallery = encoding[n_queries:].tocsc()
    distance = np.empty((n_queries, gallery.shape[0]))
    for row in range(n_queries):
        span = slice(encoding.indptr[row], encoding.indptr[row + 1])
        columns = gallery[:, encoding.indices[span]]
        values = np.repeat(encoding.data[span], np.diff(columns.indptr))
        smaller = np.minimum(columns.data, values)
        shared = np.bincount(columns.indices, smaller, minlength=gallery.shape[0])
        distance[row] = 1 - shared / (2 - shared)
    return distance
