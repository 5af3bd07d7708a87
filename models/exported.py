"""The layouts of GPTQ, AutoRound and ModelOpt, read in the words of compressed-tensors.

    gptq, auto-round   qweight I32 [K·b/32, N], scales F16 [K/g, N], qzeros I32 [K/g, N·b/32],
                       gptq also g_idx [K]: w = (code − zero) · scale. Transposed, qweight holds
                       the very words of weight_packed; qzeros are packed along N and store
                       zero − 1 in GPTQ's first format, zero in its second and in AutoRound's own
    modelopt           NVFP4: weight U8 and weight_scale as weight_packed and weight_scale,
                       weight_scale_2 = 1 / weight_global_scale

What config.json says beyond one scheme for all matrices (`dynamic` overrides, AWQ's packing, other
bits for some layers) is refused before a weight is read. Sources: docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.dequantize import unpack_bits
from models.errors import InputError

METHODS = ("gptq", "auto-round", "modelopt")
GPTQ_BITS = (2, 3, 4, 8)
# where a checkpoint says how zero points are stored, and whether as z rather than z - 1
STORES_ZERO: Mapping[str, Mapping[str, bool]] = {
    "gptq": {"gptq": False, "gptq_v2": True},
    "auto-round": {"auto_round": True, "auto_round:auto_gptq": False, "auto_round:gptq": False},
}
CONVENTION = {"gptq": "checkpoint_format", "auto-round": "packing_format"}
MEND = "use a compressed-tensors export, or the unquantized checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers:
    """The one scheme of a gptq or auto-round checkpoint."""

    bits: int
    group_size: int | None  # None: all columns of a row
    symmetric: bool
    stores_zero: bool

    def shape(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """(N, K) of a matrix, from that of its words."""
        return qweight[1], qweight[0] * 32 // self.bits

    def group(self, columns: int) -> int:
        """Columns that share a scale."""
        return self.group_size or columns


def packed_integers(settings: Mapping[str, Any], where: str) -> PackedIntegers | None:
    """What a quantization_config of one of METHODS says of integers; None for ModelOpt's NVFP4.

    InputError, naming the file `where`, for what is not read.
    """
    method = settings["quant_method"]
    if method == "modelopt":
        if settings.get("quant_algo") != "NVFP4":
            raise InputError(
                f"{where}: ModelOpt's quant_algo {settings.get('quant_algo')!r} is not read, only "
                f"NVFP4 is; {MEND}"
            )
        return None
    bits, size, symmetric = (settings.get(key) for key in ("bits", "group_size", "sym"))
    if bits not in GPTQ_BITS or type(size) is not int or type(symmetric) is not bool:
        raise InputError(
            f"{where}: {method} with bits {bits!r}, group_size {size!r}, sym {symmetric!r} is not "
            f"read; {MEND}"
        )
    told = settings.get(CONVENTION[method], "gptq" if method == "gptq" else None)
    if told not in STORES_ZERO[method]:
        raise InputError(f"{where}: {CONVENTION[method]} {told!r} is not read; {MEND}")
    others = [
        *(settings.get("dynamic") or {}).items(),
        *(settings.get("extra_config") or {}).items(),
    ]
    for name, own in others:
        if own and not name.startswith("-:") and own.get("bits", bits) not in (bits, 16, 32):
            raise InputError(f"{where}: other bits for {name} are not read; {MEND}")
    return PackedIntegers(
        bits=bits,
        group_size=size if size > 0 else None,
        symmetric=symmetric,
        stores_zero=STORES_ZERO[method][told],
    )


def translated_integers(
    scheme: PackedIntegers, raw: Mapping[str, torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """`packed` [N, words], `scale` [N, G] and, for asymmetric weights, `zero` [N, G] as numbers.

    With g_idx where columns are out of order. InputError when the parts do not fit each other, or
    symmetric weights have zero points off the middle: then they were stored by the other
    convention, and every weight would be one step off.
    """
    rows, columns = scheme.shape(tuple(raw["qweight"].shape))
    groups = -(-columns // scheme.group(columns))
    expected = (groups, rows), (groups, rows * scheme.bits // 32)
    if (tuple(raw["group_scales"].shape), tuple(raw["qzeros"].shape)) != expected:
        raise InputError(
            f"tensor {name}: scales {list(raw['group_scales'].shape)} and qzeros "
            f"{list(raw['qzeros'].shape)} do not fit {rows} x {columns} in groups of "
            f"{scheme.group(columns)}; restore the checkpoint's own config.json and shards"
        )
    zero = unpack_bits(raw["qzeros"], scheme.bits, rows).T
    if not scheme.stores_zero:
        zero = (zero + 1) % (1 << scheme.bits)
    parts = {
        "packed": raw["qweight"].T.contiguous(),
        "scale": raw["group_scales"].T.contiguous(),
    }
    if not scheme.symmetric:
        parts["zero"] = zero
    elif bool((zero != 1 << (scheme.bits - 1)).any()):
        raise InputError(
            f"tensor {name}: qzeros are not those of symmetric weights; config.json's sym or "
            f"{' or '.join(CONVENTION.values())} is wrong"
        )
    if "g_idx" in raw and is_reordered(scheme, raw["g_idx"]):
        parts["g_idx"] = raw["g_idx"]
    return parts


def is_reordered(scheme: PackedIntegers, g_idx: torch.Tensor) -> bool:
    """Whether a column's group is another than its place says (act-order)."""
    columns = torch.arange(len(g_idx), device=g_idx.device)
    return not torch.equal(g_idx.long(), columns // scheme.group(len(g_idx)))


def translated_nvfp4(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`packed`, `scale` and `global_scale`, a divisor."""
    return {
        "packed": raw["weight"],
        "scale": raw["scale"],
        "global_scale": (1.0 / raw["scale_2"].float()).reshape(1),
    }
