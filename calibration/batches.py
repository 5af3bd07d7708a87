"""Token sets cut into padded batches.

Samples are sorted by length (then by position), so that a batch holds samples of nearly the same
length and little padding; each sample keeps its own row, so no token ever attends to another
document. The cut depends on the token set and `batch_tokens` alone: the same run gives the same
batches, which is what makes a resumed run end with the same bytes.

Samples packed into one row, with a block-diagonal mask, are in packing.py. Refused: packing with
separators alone (documents would see each other).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from calibration.tokens import TokenSet
from models.device import sent

PADDING = 255  # domain of a padding position
# Positions of a batch by device. On a CPU small batches: attention scores and expert outputs of a
# large one are fresh pages each time, which cost the kernel as much time as the arithmetic.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples as rows, padded on the right.

    `attention_mask` is None where nothing is padded. `domain_T` flattens rows (T = B * S):
    the sample's domain, or PADDING. `position_ids` is given where samples are packed into one row.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    input_ids: torch.Tensor  # int64 [B, S]
    attention_mask: torch.Tensor | None  # int64 [B, S], 1 on tokens
    domain_T: torch.Tensor  # uint8 [B * S]
    position_ids: torch.Tensor | None = None  # int64 [1, S]

    @property
    def ends(self) -> tuple[int, ...]:
        """Flat position of each sample's last token."""
        if self.position_ids is not None:
            return tuple(end - 1 for end in accumulate(self.lengths))
        width = self.input_ids.shape[1]
        return tuple(row * width + length - 1 for row, length in enumerate(self.lengths))

    @property
    def real_T(self) -> torch.Tensor:
        """bool [T], False on padding, on the CPU."""
        return self.domain_T != PADDING

    def real_on(self, device: torch.device) -> torch.Tensor:
        """`real_T` on `device`; a GPU is not waited for."""
        return sent(self.real_T, device)

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)


def cut(tokens: TokenSet, batch_tokens: int) -> list[tuple[int, ...]]:
    """Sample indices of each batch: at most `batch_tokens` positions, padding included, or one
    sample where it alone is longer."""
    lengths = tokens.lengths()
    order = sorted(range(len(lengths)), key=lambda sample: (lengths[sample], sample))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for sample in order:
        if current and (len(current) + 1) * lengths[sample] > batch_tokens:
            batches.append(tuple(current))
            current = []
        current.append(sample)
    if current:
        batches.append(tuple(current))
    return batches


def make_batch(tokens: TokenSet, samples: tuple[int, ...]) -> Batch:
    """The padded batch of these samples."""
    rows = [tokens.sample(sample) for sample in samples]
    lengths = tuple(len(row) for row in rows)
    width = max(lengths)
    input_ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    domain = torch.full((len(rows), width), PADDING, dtype=torch.uint8)
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        input_ids[i, : len(row)] = row.long()
        mask[i, : len(row)] = 1
        domain[i, : len(row)] = int(tokens.domain[sample])
    return Batch(
        samples=samples,
        lengths=lengths,
        input_ids=input_ids,
        attention_mask=None if min(lengths) == width else mask,
        domain_T=domain.reshape(-1),
    )


def make_batches(tokens: TokenSet, batch_tokens: int) -> Iterator[Batch]:
    """All batches of a token set, in order of length."""
    for samples in cut(tokens, batch_tokens):
        yield make_batch(tokens, samples)
