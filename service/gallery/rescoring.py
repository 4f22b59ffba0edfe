"""The features on the device: exact modulated distances of a shortlist, or of everything.

y is kept as it is stored (fp16); s(y) = Σ_i y_i⊙y_i is computed in fp32 from the *stored* y.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model import Modulation, lift, modulated_cosine_distance, part_distances, project

# Rows that are widened to fp32 at once: on a CPU they should stay in its caches.
_BLOCK_ROWS = {"cpu": 2048, "cuda": 65_536}
_SERIAL_NUMBERS = 32_767  # torch shares out element-wise work of more numbers than this


class Features:
    """N×P×D features on `device`, growing at the end. metric: the checkpoint's."""

    def __init__(self, parts: int, dim: int, metric: str, device: str) -> None:
        self.parts, self.dim, self.metric = parts, dim, metric
        self.device = torch.device(device)
        self._y = torch.empty(0, parts * dim, dtype=torch.float16, device=self.device)
        self._s = torch.empty(0, dim, dtype=torch.float32, device=self.device)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def reserve(self, count: int) -> None:
        """Make room for `count` rows, so that adding them copies nothing."""
        if count > len(self._y):
            self._y = _resized(self._y, count, self._count)
            self._s = _resized(self._s, count, self._count)

    def add(self, rows: npt.NDArray[np.float16]) -> Tensor:
        """Append N×(P·D) rows → their lifted vectors N×(P+1)D, fp32 on the CPU."""
        y = torch.from_numpy(np.ascontiguousarray(rows))
        lifted = lift(y.view(-1, self.parts, self.dim))
        end = self._count + len(y)
        if end > len(self._y):
            self.reserve(max(end, 2 * len(self._y), 1024))
        self._y[self._count : end] = y.to(self.device)
        self._s[self._count : end] = lifted[:, self.parts * self.dim :].to(self.device)
        self._count = end
        return lifted

    def stored(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """The rows at these positions, N×(P·D)."""
        rows: npt.NDArray[np.float16] = self._y[self._at(positions)].cpu().numpy()
        return rows

    @torch.inference_mode()
    def rescore(
        self, x: Tensor, modulation: Modulation, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]:
        """Exact distances of one query (P×D) to the rows at `positions`: N, and parts N×P.

        Euclidean: computed directly, so that nothing cancels; the parts are squared and sum to
        distance². Cosine: 1 − cosine in float64, where parts have no meaning (None).
        """
        x = x.to(self.device)[None]
        modulation = Modulation(*(p.to(self.device) for p in modulation))
        blocks = torch.split(self._at(positions), self._shortlist_rows())
        if self.metric == "cosine":
            modulation = Modulation(*(p.double() for p in modulation))
            cosines = [
                modulated_cosine_distance(x.double(), self._rows(rows).double(), modulation)[0]
                for rows in blocks
            ]
            return torch.cat(cosines).cpu().numpy(), None
        parts = torch.cat([part_distances(x, self._rows(rows), modulation)[0] for rows in blocks])
        return parts.double().sum(1).sqrt().cpu().numpy(), parts.cpu().numpy()

    @torch.inference_mode()
    def score_all(self, x: Tensor, modulation: Modulation) -> npt.NDArray[np.float32]:
        """One query (P×D) against every row: N numbers that rank like the distance.

        Euclidean: D² = c − ⟨w, z⟩, whose last digits cancel; `rescore` what is returned.
        """
        x = x.to(self.device)[None]
        modulation = Modulation(*(p.to(self.device) for p in modulation))
        w, c = project(x, modulation)
        split = self.parts * self.dim
        scores = torch.empty(self._count, device=self.device)
        step = _BLOCK_ROWS[self.device.type]
        for start in range(0, self._count, step):
            rows = slice(start, min(start + step, self._count))
            y = self._y[rows].float()
            if self.metric == "cosine":
                y = y.view(-1, self.parts, self.dim)
                scores[rows] = modulated_cosine_distance(x, y, modulation)[0]
            else:
                scores[rows] = c - (y @ w[0, :split] + self._s[rows] @ w[0, split:])
        return scores.cpu().numpy()

    def _shortlist_rows(self) -> int:
        """How many rows of a shortlist are rescored at once.

        On a CPU so few that torch stays on the calling thread: a shortlist is under a millisecond
        of work, and waiting for other threads took 50 on a busy machine.
        """
        if self.device.type != "cpu":
            return _BLOCK_ROWS[self.device.type]
        return max(1, _SERIAL_NUMBERS // (self.parts * self.dim))

    def _rows(self, positions: Tensor) -> Tensor:
        return self._y[positions].view(-1, self.parts, self.dim)

    def _at(self, positions: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(positions).to(self.device)


def _resized(tensor: Tensor, rows: int, used: int) -> Tensor:
    grown = tensor.new_empty(rows, tensor.shape[1])
    grown[:used] = tensor[:used]
    return grown
