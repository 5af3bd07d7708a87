"""One tensor of a written checkpoint, read, decoded twice and judged.

The bounds on the relative error to the source are some four times what rounding gives on Gaussian
weights (W3A16 0.2, W4A16 0.11; NVFP4 0.1 and FP8 0.026: two times and a half). GPTQ minimises the
output's error and may move weights far where inputs have few directions (0.67 was seen at W3A16 on
the demo model, in a matrix whose output was fine), so those of few bits are wide. Codes of another
tensor, or a scale of the wrong group, give errors above 1; a zero point of the other convention, an
error that leans to one side; and one broken row shows by itself (quant/matrix_errors.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor

from models.checkpoint import Checkpoint, TensorInfo
from models.errors import VerificationError
from quant.comparison import Comparison
from quant.config_groups import ConfigGroups
from quant.matrix_errors import MatrixErrors, matrix_errors
from quant.recipe_files import validated_group
from quant.schemes import FP8_BLOCK_SIDE, Scheme
from quant.spec_decoder import Array, decode_fp8, decode_integers, decode_nvfp4, float_array
from quant.stored import StoredMatrix

# largest relative error of one matrix, by bits of integers and by kind of the others
INTEGER_BOUNDS: Mapping[int, float] = {2: 0.95, 3: 0.9, 4: 0.5, 5: 0.25, 6: 0.12, 7: 0.06, 8: 0.03}
FLOAT_BOUNDS: Mapping[str, float] = {"nvfp4": 0.25, "fp8_block": 0.06, "fp8_channel": 0.06}
LEAN = 0.5  # mean by root mean square of a matrix's errors
CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Judged:
    """One tensor: what is wrong with it, and its error to the source where one was given."""

    name: str
    scheme: str
    findings: tuple[str, ...]
    error: float | None = None
    divisor: float | None = None


def bound(scheme: Scheme) -> float:
    """The largest relative error that verification accepts."""
    return INTEGER_BOUNDS[scheme.bits] if scheme.kind == "int" else FLOAT_BOUNDS[scheme.kind]


def judge_matrix(
    checkpoint: Checkpoint,
    matrix: StoredMatrix,
    scheme: Scheme,
    groups: ConfigGroups,
    comparison: Comparison | None,
    device: torch.device,
) -> Judged:
    """Decode a quantized matrix both ways, as its group of config.json says; by
    compressed-tensors, which takes the longest, on `device`."""
    settings = groups.settings[groups.groups_of(matrix.module)[0]]
    try:
        tensors = groups.translate(matrix.module, matrix.read(checkpoint))
    except VerificationError as wrong:
        return Judged(matrix.module, scheme.name, (str(wrong),))
    findings = list(check_scales(matrix.module, tensors, scheme))
    decoded = decode(tensors, scheme)
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    theirs = decompress(on_device, scheme, settings)
    mine = torch.from_numpy(np.ascontiguousarray(decoded)).to(device).to(theirs.dtype)
    if not torch.equal(mine.nan_to_num(nan=1e9), theirs.nan_to_num(nan=1e9)):
        findings.append(f"{matrix.module}: compressed-tensors decodes it to other values")
    if not np.isfinite(decoded).all():
        findings.append(f"{matrix.module} decodes to NaN or infinite values")
    zero = not decoded.any()
    if zero and comparison is None:
        findings.append(f"{matrix.module} is all zero")
    divisor = tensors.get("weight_global_scale")
    global_scale = None if divisor is None else float(divisor)
    error = None
    if comparison is not None and not findings:
        weight = comparison.weight(matrix.module)
        if weight is None:
            findings.append(f"{matrix.module} has no counterpart in the source")
        else:
            errors = matrix_errors(weight, decoded)
            error = float("inf") if errors is None else errors.relative
            if zero and error > 0:  # unless the source is zero too
                findings.append(f"{matrix.module} is all zero")
            else:
                findings += error_findings(matrix.module, errors, scheme, global_scale)
    return Judged(matrix.module, scheme.name, tuple(findings), error, global_scale)


def error_findings(
    module: str, errors: MatrixErrors | None, scheme: Scheme, global_scale: float | None
) -> Iterator[str]:
    """The one thing to say of a matrix whose errors are not those of rounding to `scheme`."""
    stays = f"{scheme.name} stays below {bound(scheme):g}"
    if errors is None:
        yield f"{module}: relative error inf to the source, {stays}"
        return
    said = []
    if not errors.relative <= bound(scheme):
        said.append(f"relative error {errors.relative:.3g} to the source, {stays}")
    if rows := errors.broken_rows(scheme, global_scale):
        more = f" and {len(rows) - 1} more rows are" if len(rows) > 1 else " is"
        said.append(
            f"row {rows[0]}{more} not the source's (relative error {errors.of_row(rows[0]):.3g})"
        )
    if not said and errors.lean > LEAN and scheme.kind == "int":
        said.append(
            f"its errors lean to one side ({errors.lean:.2f} of their size), "
            "as with zero points of another convention"
        )
    if said:
        yield f"{module}: {'; '.join(said)}"


def decode(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Array:
    """float32 [N, K] by the decoder written from the formats' descriptions."""
    if scheme.kind == "int":
        assert scheme.group_size is not None
        return decode_integers(tensors, scheme.bits, scheme.group_size)
    if scheme.kind == "nvfp4":
        return decode_nvfp4(tensors)
    block = (FP8_BLOCK_SIDE, FP8_BLOCK_SIDE) if scheme.kind == "fp8_block" else None
    return decode_fp8(tensors, block)


def decompress(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, settings: Mapping[str, Any]
) -> torch.Tensor:
    """The weight by compressed-tensors, from the group as config.json has it."""
    group = validated_group(settings, "config.json")
    compressor = BaseCompressor.get_value_from_registry(group.format or scheme.format)
    weight: torch.Tensor = compressor.decompress(dict(tensors), group)["weight"]
    return weight


def check_scales(module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Iterator[str]:
    """Scales finite and positive (an NVFP4 block of zeros may have 0), global ones too.

    Symmetric integer grids have one value more below zero than above, and the sign of their
    scale says on which side of the weights it lies (quant/grid.py): there only zero is wrong.
    """
    scale = float_array(tensors["weight_scale"])
    if not np.isfinite(scale).all():
        yield f"{module}.weight_scale holds NaN or infinite values"
    elif scheme.kind == "nvfp4":
        packed = tensors["weight_packed"].numpy()
        used = ((packed & 0x77) != 0).reshape(*scale.shape, -1).any(axis=-1)
        if (scale < 0).any() or (used & (scale == 0)).any():
            yield f"{module}.weight_scale holds scales that are not positive"
    elif scheme.kind == "int" and scheme.symmetric:
        if (scale == 0).any():
            yield f"{module}.weight_scale holds zeros"
    elif (scale <= 0).any():
        yield f"{module}.weight_scale holds scales that are not positive"
    for suffix in ("weight_global_scale", "input_global_scale"):
        if suffix in tensors:
            value = float(tensors[suffix].float())
            if not (np.isfinite(value) and value > 0):
                yield f"{module}.{suffix} is {value}, not a finite positive number"


def judge_plain(checkpoint: Checkpoint, info: TensorInfo, comparison: Comparison | None) -> Judged:
    """An unquantized tensor: finite, and what the source has."""
    findings = []
    if not is_finite(checkpoint, info):
        findings.append(f"{info.name} holds NaN or infinite values")
    error = None
    if comparison is not None and not findings:
        found = comparison.plain_error(info)
        if found is None:
            findings.append(f"{info.name} has no counterpart in the source")
        else:
            error, most = found
            if not error <= most:
                findings.append(f"{info.name} is not the source's (relative error {error:.3g})")
    return Judged(info.name, info.dtype, tuple(findings), error)


def is_finite(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor holds neither NaN nor infinity, read in pieces."""
    if not info.dtype.startswith(("F", "BF")) or info.dtype in ("F8_E8M0", "F4"):
        return True
    if not info.shape or info.nbytes <= CHUNK_BYTES:
        return bool(np.isfinite(float_array(checkpoint.read(info.name))).all())
    step = max(1, CHUNK_BYTES // (info.nbytes // info.shape[0]))
    return all(
        np.isfinite(
            float_array(checkpoint.read_rows(info.name, start, min(start + step, info.shape[0])))
        ).all()
        for start in range(0, info.shape[0], step)
    )
