"""Counter-based random numbers in plain PyTorch: the definition that every kernel's dropout repeats.

Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). Element (row, column) takes lane
``column % 4`` of the counter (column / 4, row, row >> 32, seed[1]) under the key seed[0]; equal seeds drop the same
elements on every backend, and backward regenerates the mask.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF
_LANE_BITS = 24


def draw_seed(device: torch.device) -> torch.Tensor:
    """Two int64 from torch's generator of ``device``: ``torch.manual_seed`` governs it."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def drop_scale(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep_mask(seed: torch.Tensor, rows: int | torch.Tensor, columns: int, p: float) -> torch.Tensor:
    """(*rows, columns) bool: True where dropout of probability ``p`` keeps the element. ``rows`` are the numbers of the
    rows, or how many there are."""
    row = rows if isinstance(rows, torch.Tensor) else torch.arange(rows, device=seed.device)
    group = torch.arange((columns + 3) // 4, device=seed.device)
    lanes = philox(seed, group, row[..., None])
    kept = (torch.stack(lanes, -1) >> (32 - _LANE_BITS)) >= -int(-p * 2**_LANE_BITS // 1)
    return kept.flatten(-2)[..., :columns]


def philox(seed: torch.Tensor, group: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
    """The four 32-bit lanes, held in int64, of the counters (group, row, row >> 32, seed[1])."""
    zero = torch.zeros_like(group * row)
    c = [zero + group, zero + (row & _LOW), zero + ((row >> 32) & _LOW), zero + (seed[1] & _LOW)]
    k = [seed[0] & _LOW, (seed[0] >> 32) & _LOW]
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product.
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [((b >> 32) & _LOW) ^ c[1] ^ k[0], b & _LOW, ((a >> 32) & _LOW) ^ c[3] ^ k[1], a & _LOW]
        k = [(k[0] + 0x9E3779B9) & _LOW, (k[1] + 0xBB67AE85) & _LOW]
    return c
