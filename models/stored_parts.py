"""Which physical tensors make up a logical one, told from their names.

`X.weight` with its scales is one weight; a scale is only taken for one when the tensor beside it
is of a narrow type, so a parameter that merely is called `scale` stays itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.shards import TensorInfo

Format = Literal[
    "plain", "fp8_block", "fp4_block", "mxfp4", "nvfp4", "int_packed", "scaled", "gptq", "modelopt"
]
NARROW = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "F4"})

# (end of the physical name, what replaces it in the logical one, part); longest ends first.
PARTS: tuple[tuple[str, str, str], ...] = (
    (".weight_global_scale", ".weight", "global_scale"),
    (".input_global_scale", ".weight", "input_scale"),
    (".weight_zero_point", ".weight", "zero_point"),
    (".weight_scale_inv", ".weight", "scale_inv"),
    (".activation_scale", ".weight", "input_scale"),
    (".weight_packed", ".weight", "packed"),
    (".weight_scale", ".weight", "scale"),
    (".weight_shape", ".weight", "shape"),
    (".weight_scale_2", ".weight", "scale_2"),
    (".weight_g_idx", ".weight", "g_idx"),
    (".input_scale", ".weight", "input_scale"),
    (".qweight", ".weight", "qweight"),
    (".qzeros", ".weight", "qzeros"),
    (".scales", ".weight", "group_scales"),
    (".g_idx", ".weight", "g_idx"),
    ("_scale_inv", "", "scale_inv"),
    ("_blocks", "", "blocks"),
    ("_scales", "", "scales"),
    (".scale", ".weight", "scale_inv"),
)
# parts of a logical tensor -> its format (input scales, which only runtimes use, left out)
FORMATS: Mapping[frozenset[str], Format] = {
    frozenset({"weight"}): "plain",
    frozenset({"weight", "scale_inv"}): "fp8_block",
    frozenset({"blocks", "scales"}): "mxfp4",
    frozenset({"packed", "scale", "shape"}): "int_packed",
    frozenset({"packed", "scale", "shape", "zero_point"}): "int_packed",
    frozenset({"packed", "scale", "shape", "g_idx"}): "int_packed",
    frozenset({"packed", "scale", "shape", "zero_point", "g_idx"}): "int_packed",
    frozenset({"packed", "scale", "global_scale"}): "nvfp4",
    frozenset({"weight", "scale"}): "scaled",
    frozenset({"qweight", "qzeros", "group_scales"}): "gptq",
    frozenset({"qweight", "qzeros", "group_scales", "g_idx"}): "gptq",
    frozenset({"weight", "scale", "scale_2"}): "modelopt",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """How one logical tensor lies on disk: its format and its physical parts by role."""

    format: Format
    parts: Mapping[str, TensorInfo]


def split_name(physical: str, names: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """(logical name, part) of a physical tensor; `names` are all of the checkpoint's."""
    for end, replacement, part in PARTS:
        if physical.endswith(end):
            logical = physical[: -len(end)] + replacement
            if part in ("blocks", "scales"):
                belongs = logical + "_blocks" in names and logical + "_scales" in names
            elif end in (".qweight", ".qzeros", ".scales", ".g_idx"):
                belongs = physical[: -len(end)] + ".qweight" in names
            elif logical in names:
                belongs = names[logical].dtype in NARROW
            else:
                belongs = logical + "_packed" in names
            if belongs:
                return logical, part
    return physical, "weight"


def logical_name(physical: str, names: Mapping[str, TensorInfo]) -> str:
    """The logical tensor that a physical one is (a part of)."""
    return split_name(physical, names)[0]
