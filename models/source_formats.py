"""From stored tensors to the weights a family speaks of, whatever they are stored in.

A *logical* tensor (`...up_proj.weight`) may lie on disk as several *physical* ones. Which, is read
from the names: a tensor is quantized exactly when its scale lies beside it, so
`modules_to_not_convert` needs no interpreting. [N, K] = [out, in]; w = decoded weight.

| format | stored | decoded |
|---|---|---|
| plain | X | X |
| fp8 blocks | X.weight F8_E4M3 [N,K], X.weight_scale_inv [ceil(N/bn), ceil(K/bk)] | q · scale |
| same, DeepSeek-V4 | X.weight, X.scale (F32 or F8_E8M0) | q · scale |
| fp4 blocks (V4) | X.weight I8 or F4, two E2M1 a byte (low nibble first), .scale | 1×32 blocks |
| mxfp4 (gpt-oss) | X_blocks U8 [E,N,G,16], X_scales U8 [E,N,G] | transposed: [E, 32·G, N] |
| int packed | X.weight_packed I32, weight_scale [N,K/g], weight_shape, zeros | (q−z) · scale |
| nvfp4 (CT) | X.weight_packed U8, weight_scale [N,K/16], weight_global_scale | v · scale ÷ global |
| scaled (CT) | X.weight F8_E4M3 or I8, X.weight_scale: [N,1], [1] or blocks | q · scale |
| gptq, modelopt | X.qweight, scales, qzeros; X.weight U8 with weight_scale_2 | models/exported.py |

Block and group sizes come from config.json and are checked against the shapes, never derived
from them: 576 rows with 5 scale rows are blocks of 128 with a short last one, not of 115
(transformers 5.17 divides, and fails or is silently wrong). Products are formed in float32 and
then rounded once to the type asked for.

Sources: DeepSeek-V3 repository (FP8), OCP Microscaling 1.0 (E2M1, E8M0), compressed-tensors 0.19
(packing), transformers 5.17 integrations/finegrained_fp8.py (V4's FP4) and mxfp4.py (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from models import exported
from models.checkpoint import Checkpoint, TensorInfo
from models.dequantize import (
    blocks_of,
    float_scales,
    scaled_blocks,
    unpack_bits,
    unpack_eight_bits,
    unpack_fp4,
)
from models.errors import InputError
from models.model_spec import ModelSpec
from models.stored_parts import FORMATS, Format, Stored, logical_name, split_name
from models.writer import OutputTensor, copied

__all__ = ["Source", "logical_name", "quantization_config"]

QUANT_METHODS = (None, "fp8", "mxfp4", "compressed-tensors", *exported.METHODS)
FP4_BLOCK = (1, 32)
NVFP4_BLOCK = (1, 16)


def quantization_config(spec: ModelSpec) -> Mapping[str, Any]:
    """config.json's quantization_config, wherever a wrapped model keeps it; {} without one."""
    for config in (spec.config, spec.text):
        for key in ("quantization_config", "compression_config"):
            if isinstance(config.get(key), dict):
                found: Mapping[str, Any] = config[key]
                return found
    return {}


class Source:
    """A checkpoint seen as logical tensors; reading decodes. Safe to share between threads."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Raises InputError for quantization methods and layouts not known here."""
        self.checkpoint = checkpoint
        self.spec = spec
        self.quantization = quantization_config(spec)
        method = self.quantization.get("quant_method")
        if method not in QUANT_METHODS:
            raise InputError(
                f"{checkpoint.root}/config.json: quant_method {method!r} cannot be read; use the "
                f"unquantized checkpoint, or one in {', '.join(map(str, QUANT_METHODS[1:]))}"
            )
        self.integers: exported.PackedIntegers | None = None
        if method in exported.METHODS:
            where = f"{checkpoint.root}/config.json"
            self.integers = exported.packed_integers(self.quantization, where)
        self.stored = self._join_parts()

    def _join_parts(self) -> dict[str, Stored]:
        tensors = self.checkpoint.tensors
        joined: dict[str, dict[str, TensorInfo]] = {}
        for physical, info in tensors.items():
            logical, part = split_name(physical, tensors)
            joined.setdefault(logical, {})[part] = info
        stored = {}
        for logical, parts in joined.items():
            found = FORMATS.get(frozenset(parts.keys() - {"input_scale"}))
            if found == "scaled" and parts["weight"].dtype == "U8":
                found = None  # one of ModelOpt's that are not read
            if found == "gptq" and self.integers is None:
                found = None
            if found is None:
                first = next(iter(parts.values()))
                raise InputError(
                    f"{first.file}: tensor {logical} is stored as {', '.join(sorted(parts))}, "
                    "a layout not known here; a part is missing or the format is not supported"
                )
            if found == "fp8_block" and parts["weight"].dtype in ("I8", "F4"):
                found = "fp4_block"
            stored[logical] = Stored(found, parts)
        return stored

    def names(self) -> tuple[str, ...]:
        """All logical names, in the order of their first bytes on disk."""
        return tuple(self.stored)

    def parts(self, logical: str) -> tuple[TensorInfo, ...]:
        """The physical tensors that make up a logical one."""
        return tuple(self._stored(logical).parts.values())

    def format(self, logical: str) -> Format:
        """How a logical tensor is stored."""
        return self._stored(logical).format

    def _stored(self, logical: str) -> Stored:
        if logical not in self.stored:
            raise InputError(
                f"{self.checkpoint.root} holds no tensor {logical}; the checkpoint is incomplete"
            )
        return self.stored[logical]

    def copied(self, logical: str) -> OutputTensor:
        """A plain tensor as the bytes it has on disk, for an output checkpoint."""
        (info,) = self.parts(logical)
        return copied(info, info.name)

    def shape(self, logical: str) -> tuple[int, ...]:
        """The decoded shape."""
        stored = self._stored(logical)
        if stored.format == "mxfp4":
            experts, rows, groups, half = stored.parts["blocks"].shape
            return (experts, groups * half * 2, rows)
        if stored.format == "int_packed":
            return self._packed_shape(stored)
        if stored.format == "gptq":
            return self._integers().shape(stored.parts["qweight"].shape)
        if stored.format in ("nvfp4", "modelopt"):
            rows, half = stored.parts["packed" if stored.format == "nvfp4" else "weight"].shape
            return rows, half * 2
        weight = stored.parts["weight"]
        if stored.format == "fp4_block" and weight.dtype == "I8":
            return (*weight.shape[:-1], weight.shape[-1] * 2)
        return weight.shape

    def prefetch(self, logical_names: list[str]) -> None:
        """Have the kernel read these tensors' bytes ahead; returns at once."""
        self.checkpoint.prefetch(
            [info.name for logical in logical_names for info in self.parts(logical)]
        )

    def read(
        self,
        logical: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """A whole logical tensor, decoded on `device`.

        `dtype` None keeps a plain tensor's own type and gives bfloat16 for quantized ones.
        Raises InputError when sizes and config.json disagree.
        """
        stored = self._stored(logical)
        return self._decode(logical, stored, self.read_parts(logical, device), dtype)

    def read_parts(
        self, logical: str, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """The physical tensors of a logical one by role.

        gptq and modelopt: as compressed-tensors would store them. Zero points of integers are
        numbers, `zero` [N, G].
        """
        stored = self._stored(logical)
        raw = {part: self._raw(info, None, device) for part, info in stored.parts.items()}
        if stored.format == "gptq":
            return exported.translated_integers(self._integers(), raw, logical)
        if stored.format == "modelopt":
            return exported.translated_nvfp4(raw)
        if stored.format == "int_packed" and "zero_point" in raw:
            bits, _, per_word = self.integer_layout(logical)
            rows = self._packed_shape(stored)[0]
            words = raw.pop("zero_point").T.contiguous()
            raw["zero"] = unpack_bits(words, bits, rows, per_word).T
        return raw

    def is_reordered(self, logical: str) -> bool:
        """Whether columns of packed integers are grouped out of order (act-order)."""
        stored = self._stored(logical)
        if "g_idx" not in stored.parts or stored.format != "gptq":
            return "g_idx" in stored.parts
        g_idx = self.checkpoint.read(stored.parts["g_idx"].name)
        return exported.is_reordered(self._integers(), g_idx)

    def has_zero_points(self, logical: str) -> bool:
        """Whether packed integers are asymmetric."""
        stored = self._stored(logical)
        if stored.format == "gptq":
            return not self._integers().symmetric
        return "zero_point" in stored.parts

    def _integers(self) -> exported.PackedIntegers:
        assert self.integers is not None  # or the format would not have been found
        return self.integers

    def read_expert(
        self,
        logical: str,
        expert: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Row `expert` of a tensor that stacks experts along dim 0; only its bytes are read."""
        stored = self._stored(logical)
        for info in stored.parts.values():
            if not info.shape or not 0 <= expert < info.shape[0]:
                raise InputError(
                    f"{info.file}: tensor {info.name} of shape {list(info.shape)} has no expert "
                    f"{expert}; config.json counts more experts than the file holds"
                )
        raw = {part: self._raw(info, expert, device) for part, info in stored.parts.items()}
        return self._decode(logical, stored, raw, dtype)[0]

    def _raw(
        self, info: TensorInfo, expert: int | None, device: torch.device | str
    ) -> torch.Tensor:
        if expert is None:
            return self.checkpoint.read(info.name).to(device)
        return self.checkpoint.read_rows(info.name, expert, expert + 1).to(device)

    def _decode(
        self,
        logical: str,
        stored: Stored,
        raw: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        if stored.format == "plain":
            if stored.parts["weight"].dtype.startswith(("F8_E4M3", "F8_E5M2", "F4")):
                raise self._wrong(logical, stored, "has no scale beside it")
            return raw["weight"] if dtype is None else raw["weight"].to(dtype)
        target = dtype or torch.bfloat16
        if stored.format in ("int_packed", "gptq"):
            return self._decode_packed(logical, stored, raw, target)
        if stored.format == "mxfp4":
            return self._decode_mxfp4(logical, stored, raw, target)
        if stored.format in ("nvfp4", "modelopt"):
            return self._decode_nvfp4(logical, stored, raw, target)
        weight = raw["weight"]
        if stored.format == "fp4_block":
            weight = weight.view(torch.uint8)
            unpack: Callable[[torch.Tensor], torch.Tensor] = unpack_fp4
            width = weight.shape[-1] * 2
        else:
            unpack, width = unpack_eight_bits, weight.shape[-1]
        if stored.format == "scaled":
            scale = float_scales(raw["scale"])
            block = self._scheme_block(logical, stored, (weight.shape[-2], width))
            if scale.numel() == 1 and block[0] == 1:  # one scale for the whole tensor
                scale = scale.reshape(1, 1).expand(weight.shape[0], 1)
        else:
            scale = float_scales(raw["scale_inv"])
            block = FP4_BLOCK if stored.format == "fp4_block" else self._block(logical, stored)
        shape = (*weight.shape[:-1], width)
        if scale.shape != blocks_of(shape, block):
            raise self._wrong(
                logical,
                stored,
                f"has scales of shape {list(scale.shape)} for {list(shape)} in blocks of "
                f"{block[0]}x{block[1]}",
            )
        return scaled_blocks(weight, unpack, scale, shape, block, target)

    def _decode_mxfp4(
        self, logical: str, stored: Stored, raw: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        blocks, scales = raw["blocks"], raw["scales"]
        if blocks.ndim != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:-1]:
            raise self._wrong(logical, stored, "is no MXFP4 pair [E, N, G, 16] and [E, N, G]")
        packed = blocks.flatten(2)
        shape = (*packed.shape[:-1], packed.shape[-1] * 2)
        decoded = scaled_blocks(packed, unpack_fp4, float_scales(scales), shape, FP4_BLOCK, dtype)
        return decoded.transpose(1, 2).contiguous()

    def _decode_nvfp4(
        self, logical: str, stored: Stored, raw: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        packed, scale = raw["packed"], raw["scale"]
        shape = (packed.shape[0], packed.shape[-1] * 2)
        if packed.dtype != torch.uint8 or scale.shape != blocks_of(shape, NVFP4_BLOCK):
            raise self._wrong(logical, stored, "is no NVFP4 weight [N, K/2] with scales [N, K/16]")
        divided = scale.float() / raw["global_scale"].float()
        return scaled_blocks(packed, unpack_fp4, divided, shape, NVFP4_BLOCK, dtype)

    def _wrong(self, logical: str, stored: Stored, what: str) -> InputError:
        file = next(iter(stored.parts.values())).file
        return InputError(
            f"{file}: tensor {logical} {what}; restore the checkpoint's own config.json and shards"
        )

    def _block(self, logical: str, stored: Stored) -> tuple[int, int]:
        size = self.quantization.get("weight_block_size")
        scale = stored.parts["scale_inv"]
        if size is None and not scale.shape:
            raise self._wrong(logical, stored, "has one scale, and config.json no block size")
        return checked_block(size, f"{self.checkpoint.root}/config.json: weight_block_size")

    def _schemes(self) -> list[Mapping[str, Any]]:
        groups = self.quantization.get("config_groups")
        if not isinstance(groups, dict):
            raise InputError(
                f"{self.checkpoint.root}/config.json: quantization_config has no config_groups; "
                "restore the checkpoint's own config.json"
            )
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        return [scheme for scheme in weights if isinstance(scheme, dict)]

    def _scheme_block(
        self, logical: str, stored: Stored, shape: tuple[int, int]
    ) -> tuple[int, int]:
        """Block of a compressed-tensors FP8 or INT8 weight: the one scheme that fits its scales."""
        scale = stored.parts["scale"].shape
        fitting = set()
        for scheme in self._schemes():
            strategy = scheme.get("strategy")
            if strategy == "tensor" and scale in ((), (1,)):
                fitting.add((1, shape[1]))
            if strategy == "channel" and scale == (shape[0], 1):
                fitting.add((1, shape[1]))
            if strategy == "block":
                where = f"{self.checkpoint.root}/config.json: block_structure"
                block = checked_block(scheme.get("block_structure"), where)
                if scale == blocks_of(shape, block):
                    fitting.add(block)
        if len(fitting) != 1:
            raise self._wrong(
                logical, stored, f"has scales {list(scale)} that fit no scheme of config_groups"
            )
        return fitting.pop()

    def _packed_shape(self, stored: Stored) -> tuple[int, int]:
        """(N, K) as stored in `weight_shape`, checked against N of the packed words."""
        packed, name = stored.parts["packed"], stored.parts["shape"].name
        values = self.checkpoint.read(name).tolist()
        fits = len(packed.shape) == 2 and isinstance(values, list) and len(values) == 2
        if not fits or values[0] != packed.shape[0] or not 0 < values[1] <= packed.shape[1] * 32:
            raise self._wrong(name, stored, f"says {values}, the words are {list(packed.shape)}")
        return values[0], values[1]

    def integer_layout(self, logical: str) -> tuple[int, int, int | None]:
        """(bits, group, codes a word or None for the dense layout) of packed integers.

        The one scheme of config.json that the shapes fit; InputError where none or several do.
        """
        stored = self._stored(logical)
        if stored.format == "gptq":
            return self._integers().bits, self._integers().group(self.shape(logical)[1]), None
        rows, columns = self._packed_shape(stored)
        packed, scale = stored.parts["packed"], stored.parts["scale"]
        if packed.dtype != "I32":
            raise self._wrong(logical, stored, "is packed in a format not known here")
        fitting: set[tuple[int, int, int | None]] = set()
        older: set[tuple[int, int, int | None]] = set()
        for scheme in self._schemes():
            bits, group = scheme.get("num_bits"), scheme.get("group_size")
            group = group if isinstance(group, int) and group > 0 else columns
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                continue
            if scale.shape != blocks_of((rows, columns), (1, group)):
                continue
            if packed.shape[1] == -(-columns * bits // 32):
                fitting.add((bits, group, None))
            elif packed.shape[1] == -(-columns // (32 // bits)):
                older.add((bits, group, 32 // bits))  # compressed-tensors up to 0.17
        fitting = fitting or older  # 7 bits of the older layout are as wide as 8 of the dense one
        if len(fitting) != 1:
            raise self._wrong(
                logical, stored, f"has {packed.shape[1]} words a row, which fit no scheme of config"
            )
        return fitting.pop()

    def scale_block(self, logical: str) -> tuple[int, int]:
        """(rows, columns) that share one scale of an FP8 weight. InputError where not known."""
        stored = self._stored(logical)
        if stored.format == "scaled":
            rows, columns = stored.parts["weight"].shape
            return self._scheme_block(logical, stored, (rows, columns))
        return self._block(logical, stored)

    def _decode_packed(
        self, logical: str, stored: Stored, raw: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        rows, columns = self.shape(logical)
        scale, words = float_scales(raw["scale"]), raw["packed"]
        bits, group, per_word = self.integer_layout(logical)
        zero: torch.Tensor | float = float(1 << (bits - 1))
        if "zero" in raw:
            zero = raw["zero"]
            if zero.shape != scale.shape:
                raise self._wrong(logical, stored, "has zero points unlike its scales")
        columns_of = raw["g_idx"].long() if "g_idx" in raw else None
        return scaled_blocks(
            words,
            lambda chunk: unpack_bits(chunk, bits, columns, per_word),
            scale,
            (rows, columns),
            (1, group),
            dtype,
            zero=zero,
            group_of_column=columns_of,
        )


def checked_block(value: object, where: str) -> tuple[int, int]:
    """A block size [rows, columns] from the config. InputError for anything else."""
    if isinstance(value, list) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise InputError(f"{where} is {value!r}, not two sizes; restore the original config.json")
