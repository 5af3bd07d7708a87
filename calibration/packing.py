"""Samples packed into one row, each attending to itself alone.

Samples stand one after the other without padding, positions begin anew with each, and transformers
makes a block-diagonal mask of that (its packed-sequence masks, from positions alone). What comes
out of a layer is what padded batches give, to the order of a few float additions
(tests/calibration/test_packing.py, every family).

Not every family's layers heed it: linear attention, state-space layers and convolutions carry on
over the border, and some models build their masks without the positions. Those are refused, by a
table of the families that were checked, not by a guess.

It is not the default. Batches of like lengths waste little on padding, while attention scores of a
packed row are as wide as the row: it pays for many short samples of very different lengths.
"""

from __future__ import annotations

import torch

from calibration.batches import Batch
from calibration.token_file import TokenSet
from models.errors import InputError
from models.model_spec import ModelSpec

OPEN_ROWS = 64  # rows that may still take a sample
PACKABLE = frozenset(
    """deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe glm4_moe glm4_moe_lite glm_moe_dsa
    granitemoe granitemoeshared hunyuan_v1_moe hy_v3 kimi_k2 longcat_flash mimo_v2_flash minimax_m2
    mixtral olmoe qwen2_moe qwen3_moe""".split()  # noqa: SIM905
)  # names of models.families


def check_packable(spec: ModelSpec) -> None:
    """InputError where samples in one row would see each other."""
    if spec.architecture.name not in PACKABLE:
        raise InputError(
            f"--pack: in a packed row of {spec.architecture.title} samples would see each other "
            "(not all of its layers take a mask by positions); leave --pack out"
        )


def cut_packed(tokens: TokenSet, batch_tokens: int) -> list[tuple[int, ...]]:
    """Sample indices of each packed row: at most `batch_tokens` tokens, or one longer sample.

    The longest first, each into the first of the last OPEN_ROWS rows that has room.
    """
    lengths = tokens.lengths()
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample)):
        first = max(0, len(rows) - OPEN_ROWS)
        fits = [row for row in range(first, len(rows)) if room[row] >= lengths[sample]]
        if not fits:
            rows.append([])
            room.append(batch_tokens)
            fits = [len(rows) - 1]
        rows[fits[0]].append(sample)
        room[fits[0]] -= lengths[sample]
    return [tuple(row) for row in rows]


def pack_batch(tokens: TokenSet, samples: tuple[int, ...]) -> Batch:
    """These samples one after the other in one row."""
    rows = [tokens.sample(sample).long() for sample in samples]
    lengths = tuple(len(row) for row in rows)
    labels = tokens.domain[list(samples)]
    return Batch(
        samples=samples,
        lengths=lengths,
        input_ids=torch.cat(rows)[None],
        attention_mask=None,
        domain_T=labels.repeat_interleave(torch.tensor(lengths)),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
    )
