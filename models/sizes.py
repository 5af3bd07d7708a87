"""Bytes of a model in a number format: as its checkpoint stores it, or as we would.

    bytes of an [N, K] matrix = N * K * bits / 8 + scales + constants of the tensor

Formats are one literal table; how many weights there are is models/inventory.py's affair. A
checkpoint's own index or headers, where there are some, replace what is computed for the format
it is in (`storage`), never what we would write.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from models.errors import InputError
from models.inventory import Inventory, Weight, WeightKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A number format of weight matrices: bits, and the block one scale covers.

    `block` is (rows, columns) of a scale, None meaning the whole extent; `zero_bits` those of a
    zero point beside each scale; `column_bytes` are stored once a column (g_idx) and `constants`
    once a tensor (shapes, global scales), `extras` in how many tensors all of these come.
    """

    bits: int
    block: tuple[int, int | None]
    scale_bytes: int
    zero_bits: int = 0
    column_bytes: int = 0
    constants: int = 0
    extras: int = 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether whole groups cover a row; others are left in 16 bits."""
        columns = self.block[1]
        return columns is None or self.block[0] > 1 or shape[1] % columns == 0

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of one [N, K] matrix, its scales and constants."""
        rows, columns = shape
        scales = ceil(rows / self.block[0]) * ceil(columns / (self.block[1] or columns))
        packed = rows * 4 * ceil(columns * self.bits / 32) if self.bits in (3, 5, 6, 7) else 0
        return (
            (packed or ceil(rows * columns * self.bits / 8))
            + scales * self.scale_bytes
            + ceil(scales * self.zero_bits / 8)
            + columns * self.column_bytes
            + self.constants
        )


# compressed-tensors layouts (docs of the formats: weight_packed, weight_scale, weight_shape,
# weight_global_scale, input_global_scale); 3 bits are packed densely, 32 values in 3 words
SCHEMES: Mapping[str, Packing] = {
    "W3A16": Packing(bits=3, block=(1, 128), scale_bytes=2, constants=16, extras=2),
    "W4A16": Packing(bits=4, block=(1, 128), scale_bytes=2, constants=16, extras=2),
    "W8A16": Packing(bits=8, block=(1, 128), scale_bytes=2, constants=16, extras=2),
    "NVFP4": Packing(bits=4, block=(1, 16), scale_bytes=1, constants=8, extras=3),
    "NVFP4A16": Packing(bits=4, block=(1, 16), scale_bytes=1, constants=4, extras=2),
    "FP8_BLOCK": Packing(bits=8, block=(128, 128), scale_bytes=4),
    "FP8_DYNAMIC": Packing(bits=8, block=(1, None), scale_bytes=2),
}
MX_FP4 = Packing(bits=4, block=(1, 32), scale_bytes=1)  # E2M1 under E8M0 scales


@dataclass(frozen=True, slots=True)
class Storage:
    """The format a checkpoint is stored in: how each kind of weight is packed, if it is."""

    title: str
    packings: Mapping[WeightKind, Packing] = field(default_factory=dict)
    ignore: tuple[re.Pattern[str], ...] = ()  # module paths that are left as they are

    def packing_of(self, weight: Weight) -> Packing | None:
        """How `weight` is packed; None when it is stored in its own type."""
        packing = self.packings.get(weight.kind)
        if packing is None or len(weight.shape) != 2 or not packing.fits(weight.shape):
            return None
        if weight.kind == "indexer" and "weights_proj" in weight.path:
            return None  # 16 bits in every published checkpoint
        name = weight.path if weight.layer is None else f"model.layers.{weight.layer}.{weight.path}"
        return None if any(pattern.search(name) for pattern in self.ignore) else packing

    def bytes_of(self, weight: Weight) -> int:
        """Bytes of all tensors of `weight`, scales included."""
        packing = self.packing_of(weight)
        return (
            weight.plain_bytes if packing is None else packing.bytes_of(weight.shape) * weight.count
        )

    def tensors_of(self, weight: Weight) -> int:
        """How many tensors on disk hold `weight`."""
        packing = self.packing_of(weight)
        return weight.count * (1 if packing is None else 1 + packing.extras)


def quantized(scheme: str) -> Storage:
    """The format that `thresher quantize --scheme` writes: every matrix but embedding, head,
    router and indexer. Matrices whose rows are no whole number of groups stay in 16 bits."""
    return Storage(scheme, {"expert": SCHEMES[scheme], "linear": SCHEMES[scheme]})


def unfit(inventory: Inventory, scheme: str) -> Weight | None:
    """The first matrix that `thresher quantize --scheme` refuses: its rows are no whole number of
    groups."""
    columns = SCHEMES[scheme].block[1]
    for weight in inventory.main:
        matrix = weight.kind in ("expert", "linear") and len(weight.shape) == 2
        if matrix and columns is not None and weight.shape[1] % columns:
            return weight
    return None


def storage(config: Mapping[str, Any], text: Mapping[str, Any]) -> Storage:
    """The format a config.json announces. InputError when the method is not known here."""
    settings = config.get("quantization_config") or text.get("quantization_config")
    if settings and not isinstance(settings, dict):
        raise _wrong("quantization_config", settings, "an object")
    if not settings:
        return Storage(str(text.get("dtype") or text.get("torch_dtype") or "bfloat16"))
    method = settings.get("quant_method")
    if method in ("gptq", "auto-round"):
        return _packed_integers(settings, method)
    if method == "modelopt":
        return _modelopt(settings)
    ignore = _patterns(settings.get("modules_to_not_convert") or settings.get("ignore") or ())
    if method == "fp8":
        block = _block(settings.get("weight_block_size"), "weight_block_size")
        fp8 = Packing(bits=8, block=block, scale_bytes=4)
        title = f"FP8, blocks of {'x'.join(str(side) for side in block)}"
        experts = fp8
        if "fp4" in (text.get("expert_dtype"), settings.get("expert_dtype")):  # DeepSeek-V4
            experts, title = MX_FP4, f"{title}, experts FP4"
        return Storage(title, {"expert": experts, "linear": fp8, "indexer": fp8}, ignore)
    if method == "mxfp4":
        return Storage("MXFP4 experts", {"expert": MX_FP4})
    if method == "compressed-tensors":
        return _compressed_tensors(settings, ignore)
    raise InputError(
        f"config.json: quant_method {method!r} is not read here (known: fp8, mxfp4, "
        "compressed-tensors, gptq, auto-round, modelopt); start from the model's original "
        "checkpoint"
    )


def _wrong(key: str, value: object, needed: str) -> InputError:
    return InputError(
        f"config.json: {key} is {value!r}, not {needed}; restore the original config.json"
    )


def _block(value: object, key: str) -> tuple[int, int | None]:
    """Rows and columns of a scale, from the config; one scale a row where it says nothing."""
    if value is None:
        return 1, None
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise _wrong(key, value, "two sizes")


def _packed_integers(settings: Mapping[str, Any], method: str) -> Storage:
    """gptq and auto-round: words, F16 scales and zero points; gptq also the group of a column."""
    bits, group = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in (2, 3, 4, 8) or type(group) is not int:
        raise _wrong("bits, group_size", [bits, group], f"those of a {method} checkpoint")
    packing = Packing(
        bits=bits,
        block=(1, group if group > 0 else None),
        scale_bytes=2,
        zero_bits=bits,
        column_bytes=4 if method == "gptq" else 0,
        extras=3 if method == "gptq" else 2,
    )
    return Storage(f"{method} int{bits}", {"expert": packing, "linear": packing})


def _modelopt(settings: Mapping[str, Any]) -> Storage:
    """ModelOpt's NVFP4, whose `ignore` are shell patterns."""
    if settings.get("quant_algo") != "NVFP4":
        raise InputError(
            f"config.json: ModelOpt's quant_algo {settings.get('quant_algo')!r} is not read here, "
            "only NVFP4 is; start from the model's original checkpoint"
        )
    packing = SCHEMES["NVFP4"]
    ignore = tuple(
        re.compile(f"^{fnmatch.translate(entry + '.weight')}|^{fnmatch.translate(entry)}")
        for entry in _names(settings.get("ignore") or ())
    )
    return Storage("modelopt NVFP4", {"expert": packing, "linear": packing}, ignore)


def _compressed_tensors(
    settings: Mapping[str, Any], ignore: tuple[re.Pattern[str], ...]
) -> Storage:
    groups = settings.get("config_groups") or {}
    listed = list(groups.values()) if isinstance(groups, dict) else []
    first = listed[0] if listed and all(isinstance(one, dict) for one in listed) else {}
    weights = first.get("weights")
    if not isinstance(weights, dict):
        raise InputError(
            "config.json: compressed-tensors without a weights scheme in config_groups; "
            "restore the original config.json"
        )
    bits, group = weights.get("num_bits"), weights.get("group_size")
    kind = weights.get("type", "int")
    if type(bits) is not int or not 1 <= bits <= 16:
        raise _wrong("num_bits", bits, "a number of bits")
    if group is not None and type(group) is not int:
        raise _wrong("group_size", group, "a whole number")
    if weights.get("strategy") == "block":
        block = _block(weights.get("block_structure") or [128, 128], "block_structure")
        packing = Packing(bits=bits, block=block, scale_bytes=2)
    elif kind == "float" and bits == 4:
        packing = SCHEMES["NVFP4" if first.get("input_activations") else "NVFP4A16"]
    else:
        asymmetric = kind == "int" and weights.get("symmetric") is False
        packing = Packing(
            bits=bits,
            block=(1, group if group and group > 0 else None),
            scale_bytes=2,
            zero_bits=bits if asymmetric else 0,
            constants=16 if kind == "int" else 0,
            extras=2 + asymmetric if kind == "int" else 1,
        )
    packings: Mapping[WeightKind, Packing] = {"expert": packing, "linear": packing}
    return Storage(f"compressed-tensors {kind}{bits}", packings, ignore)


def _names(entries: object) -> Iterable[str]:
    """A list of names from the config. InputError for anything else."""
    if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
        raise _wrong("the list of modules that are left alone", entries, "a list of names")
    return entries


def _patterns(entries: object) -> tuple[re.Pattern[str], ...]:
    """Module names to leave alone: `re:` entries are searched, others are whole path parts."""
    try:
        return tuple(
            re.compile(entry[3:])
            if entry.startswith("re:")
            else re.compile(rf"(^|\.){re.escape(entry)}($|\.)")
            for entry in _names(entries)
        )
    except re.error as error:
        raise InputError(
            f"config.json: {error.pattern!r} among the modules that are left alone is no regular "
            f"expression ({error}); restore the original config.json"
        ) from error


def bytes_in(inventory: Inventory, form: Storage, *, mtp: bool = False) -> int:
    """Bytes of a model's tensors in `form`, with or without its MTP layers."""
    weights = inventory.weights if mtp else inventory.main
    return sum(form.bytes_of(weight) for weight in weights)


def tensors_in(inventory: Inventory, form: Storage, *, mtp: bool = False) -> int:
    """Tensors on disk in `form`, where every expert has its own."""
    weights = inventory.weights if mtp else inventory.main
    return sum(form.tensors_of(weight) for weight in weights)


def largest_layer(inventory: Inventory, form: Storage) -> int:
    """Bytes of the biggest decoder layer in `form`."""
    layers: dict[int, int] = {}
    for weight in inventory.main:
        if weight.layer is not None:
            layers[weight.layer] = layers.get(weight.layer, 0) + form.bytes_of(weight)
    return max(layers.values())
