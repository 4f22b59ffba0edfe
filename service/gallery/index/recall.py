"""The first stage: a shortlist in modulated space, of full length whatever is filtered out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from service.gallery.index.chunks import Mask
from service.gallery.index.features import Features
from service.gallery.index.inner_products import Best, merged, scan, sharing, shortlist
from service.gallery.index.recall_index import RecallIndex
from service.kit.memory import is_out_of_memory

# Below this share of the gallery, what a filter leaves is scanned: an inverted file's or graph's
# neighbourhoods hold too few allowed rows, and the scan skips the others.
_SELECTIVE = 0.1
_SHORTLISTS = 8  # or fewer rows than this many shortlists


def recall(
    features: Features, index: RecallIndex | None, w: Tensor, count: int, allowed: Sequence[Mask]
) -> list[Best]:
    """`count` candidates of each of Q queries, best first; all rows where fewer are allowed.

    A few more in no order where they are `coarse`.

    w: Q×(P+1)D float64, on the CPU. allowed: one mask per query. index: of the first rows; the
    later ones are scanned. None: all are, in their codes where there are any.
    """
    if index is None:
        return shortlist(features, w, count, allowed)
    best: dict[int, Best] = {}
    for members in sharing(allowed):
        found = _by_index(features, index, w[members], count, allowed[members[0]])
        best.update(zip(members, found, strict=True))
    return [best[query] for query in range(len(w))]


def _by_index(
    features: Features, index: RecallIndex, w: Tensor, count: int, mask: Mask
) -> list[Best]:
    indexed = min(len(index), len(mask))
    total = int(np.count_nonzero(mask))
    if total < max(_SELECTIVE * len(mask), _SHORTLISTS * count):
        return scan(features, w, count, [mask] * len(w))
    try:
        scores, positions = index.search_batch(w.float().numpy(), count, mask[:indexed])
    except Exception as error:  # an index on a GPU needs some of its memory for a search
        if not is_out_of_memory(error):
            raise
        return scan(features, w, count, [mask] * len(w))
    found = [Best(*pair) for pair in zip(positions, scores, strict=True)]
    if indexed < len(mask):
        late = mask.copy()
        late[:indexed] = False
        rest = scan(features, w, count, [late] * len(w))
        found = [merged(pair, count) for pair in zip(found, rest, strict=True)]
    else:
        found = [merged([one], count) for one in found]
    short = [query for query, one in enumerate(found) if len(one.positions) < min(count, total)]
    if short:
        whole = scan(features, w[short], count, [mask] * len(short))
        for query, one in zip(short, whole, strict=True):
            found[query] = one
    return found
