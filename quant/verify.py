"""Is a written checkpoint what it says it is? Every tensor is read and decoded twice.

Quantized matrices are decoded by compressed-tensors' own decompression and by a decoder written
from the formats' descriptions (quant/spec_decoder.py); the two must agree to the last bit of the
type compressed-tensors decodes to. Neither is our packer. Then: no NaN, no infinity, no matrix of
zeros, scales positive, global scales shared by fused partners, input scales finite; headers,
experts, groups and config by quant/structure.py; digests of the manifest; with a source, the
relative error of each tensor, and of each row of a matrix, under a bound by scheme
(quant/judgement.py, quant/matrix_errors.py, quant/comparison.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from models import tensor_parallel
from models.checkpoint import Checkpoint
from models.errors import InputError, VerificationError
from models.families import FAMILIES, spec_of
from models.journal import MANIFEST
from models.location import download_snapshot, local_directory
from models.opening import compute_device, open_model
from models.progress import Progress, Step, silent
from models.source_formats import Source, quantization_config
from quant.comparison import Comparison
from quant.config_groups import ConfigGroups, check_format
from quant.foreign import LAYOUT_OF, ExportedGroups
from quant.fused import fused_sets
from quant.judgement import Judged, judge_matrix, judge_plain
from quant.schemes import Scheme
from quant.stored import StoredMatrix, StoredModel, sort_tensors
from quant.structure import (
    check_config,
    check_experts,
    check_files,
    check_formats,
    check_layers,
    check_layout,
    check_partners,
    check_routing,
    check_settings,
    check_shapes,
    logical_shapes,
)

WORKERS = min(16, os.cpu_count() or 1)  # each holds a few copies of one matrix
Task = Callable[[], Judged]


@dataclass(slots=True)
class Report:
    """What verification saw. `worst` are the ten largest errors: (name, scheme, error)."""

    checkpoint: str
    family: str = ""
    tensors: int = 0
    nbytes: int = 0
    quantized: dict[str, int] = field(default_factory=dict)
    files_hashed: int = 0
    compared: int = 0
    findings: list[str] = field(default_factory=list)
    worst: list[tuple[str, str, float]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The report as one JSON object."""
        return {
            "checkpoint": self.checkpoint,
            "ok": self.ok,
            "family": self.family,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "quantized": self.quantized,
            "files_hashed": self.files_hashed,
            "compared": self.compared,
            "findings": self.findings,
            "worst": [{"name": n, "scheme": s, "error": e} for n, s, e in self.worst],
        }

    def demand(self) -> None:
        """VerificationError, naming the first finding, unless all is well."""
        if self.findings:
            more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
            raise VerificationError(f"{self.checkpoint}: {self.findings[0]}{more}")


def verify_checkpoint(
    path: str | Path,
    source: str | Path | None = None,
    progress: Progress = silent,
    tp: int | None = None,
    device: str = "auto",
) -> Report:
    """Read and judge every tensor of the checkpoint `path` (folder or hub id).

    `source` is what it was made of, `tp` the number of GPUs that are to share every layer. A GPU
    only makes it faster: the decoder from the formats' descriptions stays on the CPU. Raises
    InputError for what is no checkpoint, no model known here or no source; all else is in the
    report.
    """
    report, decoding = Report(str(path)), compute_device(device)
    folder = local_directory(path) or download_snapshot(str(path))
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give a checkpoint's folder")
    try:
        checkpoint = Checkpoint.open(folder)
    except InputError as error:
        report.findings.append(str(error))
        return report
    try:
        spec = spec_of(checkpoint.config)
    except InputError as error:
        if not is_known(checkpoint.config):
            raise
        report.findings.append(str(error))
        return report
    settings = quantization_config(spec)
    layout = LAYOUT_OF.get(str(settings.get("quant_method")))
    stored = StoredModel({}, checkpoint.tensors)
    if layout is not None:
        stored = sort_tensors(checkpoint.tensors, layout)
    report.family, report.tensors = spec.family, len(checkpoint.tensors)
    report.nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    found = report.findings
    found += [*check_files(checkpoint), *check_manifest(checkpoint.root, report)]
    found += check_routing(spec)
    wrong = list(check_settings(spec))
    if wrong:
        found += wrong
        return report
    tasks: list[Task] = []
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, int]] = {}
    groups: ConfigGroups | None = None
    if layout is not None:
        try:
            ours = layout == "compressed-tensors"
            groups = ConfigGroups(settings) if ours else ExportedGroups(layout, settings)
            bits = settings.get("bits", 4)
            shapes = {m: shape_of(own, checkpoint, bits) for m, own in stored.matrices.items()}
        except InputError as error:
            found.append(str(error))
            return report
        here = is_quantized_here(folder)
        if ours:
            found += check_format(settings, groups, ours=here)
        found += check_config(spec, stored, shapes, groups, ours=here)
        schemes = {m: groups.schemes[g[0]] for m in stored.matrices if (g := groups.groups_of(m))}
        found += check_partners(spec, matrices_of(stored), schemes)
        for module, scheme in schemes.items():
            found += check_layout(stored.matrices[module], scheme, shapes[module], layout)
    logical = logical_shapes(stored, shapes)
    try:
        reader = Source(checkpoint, spec)
        if layout is None:
            logical = {name: reader.shape(name) for name in reader.names()}
    except InputError as error:
        if layout is None or not found:
            found.append(str(error))
        return report
    found += check_formats(reader)
    for check in (check_experts, check_layers, check_shapes):
        found += check(spec, logical)
    if tp is not None and not found:
        found += tensor_parallel.findings(spec, tp, tensor_parallel.group_of(settings))
    if found:
        return report  # what is not even laid out rightly is not worth decoding
    comparison = None if source is None else Comparison(checkpoint, spec, open_model(source))
    for module, scheme in schemes.items():
        assert groups is not None
        matrix = stored.matrices[module]
        tasks.append(
            partial(judge_matrix, checkpoint, matrix, scheme, groups, comparison, decoding)
        )
    tasks += [partial(judge_plain, checkpoint, i, comparison) for i in stored.plain.values()]
    judged: list[Judged] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for one in pool.map(lambda task: task(), tasks):
            judged.append(one)
            if len(judged) % 100 == 0 or len(judged) == len(tasks):
                done = len(judged)
                progress(Step(job="verify", done=done, total=len(tasks), unit="tensors"))
    conclude(report, judged, stored, schemes, comparison)
    return report


def conclude(
    report: Report,
    judged: Sequence[Judged],
    stored: StoredModel,
    schemes: Mapping[str, Scheme],
    comparison: Comparison | None,
) -> None:
    """Fill in what follows from all tensors together."""
    for one in judged:
        report.findings += one.findings
    for scheme in schemes.values():
        report.quantized[scheme.name] = report.quantized.get(scheme.name, 0) + 1
    divisors = {one.name: one.divisor for one in judged if one.divisor is not None}
    report.findings += check_divisors(stored, divisors)
    errors = [(one.name, one.scheme, one.error) for one in judged if one.error is not None]
    report.compared = len(errors)
    report.worst = sorted(errors, key=lambda entry: -entry[2])[:10]
    if comparison is not None:
        report.findings += [f"{name} of the source is missing" for name in comparison.missing()]


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the model type is one of our families: then a wrong config is a finding."""
    return any(config.get("model_type") in family.model_types for family in FAMILIES)


def is_quantized_here(folder: Path) -> bool:
    """Whether the manifest says that one of our quantizing jobs wrote the checkpoint."""
    try:
        command = json.loads((folder / MANIFEST).read_bytes()).get("command")
    except (OSError, ValueError, AttributeError):
        return False
    return command in ("quantize", "compress")


def check_divisors(stored: StoredModel, divisors: Mapping[str, float]) -> Iterator[str]:
    """One NVFP4 global scale for fused partners."""
    for partners in fused_sets(stored.matrices):
        own = {divisors[module] for module in partners if module in divisors}
        if len(own) > 1:
            yield f"{' and '.join(partners)} have the global scales {sorted(own)}, one is needed"


def matrices_of(stored: StoredModel) -> list[str]:
    """Module paths of everything that could be a matrix, quantized or not."""
    plain = [
        name.removesuffix(".weight")
        for name, info in stored.plain.items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    return [*stored.matrices, *plain]


def shape_of(matrix: StoredMatrix, checkpoint: Checkpoint, bits: int) -> tuple[int, int]:
    """[N, K] of a quantized matrix. InputError when its tensors do not tell."""
    words = matrix.parts.get("qweight")
    if words is not None and len(words.shape) == 2:
        return words.shape[1], words.shape[0] * 32 // bits
    shape = matrix.parts.get("weight_shape")
    if shape is not None:
        values = checkpoint.read(shape.name).flatten().tolist()
        if len(values) == 2 and all(isinstance(v, int) and 0 < v < 1 << 31 for v in values):
            return values[0], values[1]
        raise InputError(f"{shape.name} is {values}, not the two sizes of a matrix")
    packed = matrix.parts.get("weight_packed") or matrix.parts.get("weight")
    if packed is None or len(packed.shape) != 2:
        raise InputError(f"{matrix.module} has no 2-D weight; the checkpoint is incomplete")
    columns = packed.shape[1] * (2 if packed.dtype == "U8" else 1)
    return packed.shape[0], columns


def check_manifest(root: Path, report: Report) -> Iterator[str]:
    """sha256 and size of every file that thresher.json lists; nothing where there is none."""
    path = root / MANIFEST
    if not path.is_file():
        return
    try:
        files = json.loads(path.read_bytes())["files"]
        entries = [
            (str(name), str(own["sha256"]), int(own["bytes"])) for name, own in files.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{MANIFEST} cannot be read ({error})"
        return
    for name, digest, size in entries:
        file = root / name
        if not file.is_file():
            yield f"{name} is missing, {MANIFEST} lists it"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {size}"
        else:
            with file.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    yield f"{name} is not what was written: its sha256 differs from {MANIFEST}"
        report.files_hashed += 1
