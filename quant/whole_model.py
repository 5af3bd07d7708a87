"""AWQ and AutoRound, by llm-compressor, for models that fit in memory as a whole.

Both are well kept there, so they are called and not written again: the model is loaded by
transformers, llm-compressor's `oneshot` runs its modifiers over it, and what it saves is moved into
the output. None of it is streamed, and a killed run starts again. The verification at the end
is the same as for our own rounding; AWQ moves factors between norms and matrices, so only
AutoRound's result can be compared with the source tensor by tensor.

Each sample gets one padded position behind it: without any, transformers leaves the causal mask
out where llm-compressor traces the model, and eager attention would look ahead
(llm-compressor 0.14, Qwen3-MoE, Mixtral and their like).

Refused before anything is loaded: AWQ without an accelerator (its cache pins memory), AutoRound on
matrices with a side that 32 does not divide (it would leave those rounded to nearest, untold).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from calibration.tokens import TokenSet
from models.errors import InputError
from models.journal import Journal, refuse_overlap
from models.manifest import read_manifest, versions, write_manifest
from models.opening import OpenModel, compute_dtype
from models.source_formats import quantization_config as stored_quantization
from models.writer import carry_files, unit_of
from quant.config import quantization_config
from quant.linears import Linear, find_linears, head_module
from quant.recipes import Recipe, schemes_of

WholeMethod = Literal["awq", "autoround"]
WHOLE_METHODS: tuple[WholeMethod, ...] = ("awq", "autoround")
COPIES = 3  # of the model: its weights, what is cached and tuned beside them, and what is saved
AUTOROUND_STEPS = 200  # AutoRound's own default


def quantize_whole(
    opened: OpenModel,
    recipe: Recipe,
    out: Path,
    method: WholeMethod,
    *,
    tokens: TokenSet | None,
    inputs: Mapping[str, Any] | None = None,
    force: bool = False,
    steps: int = AUTOROUND_STEPS,
) -> dict[str, Any]:
    """Write `opened` quantized by llm-compressor's `method` to `out` and return the manifest.

    InputError for a quantized source, a model too large for this machine's memory, a recipe with
    methods of its own, and a missing token set.
    """
    started = time.monotonic()
    refuse_overlap(opened.checkpoint.root, out)
    groups, ignore, chosen = chosen_groups(opened, recipe)
    check_fits(opened, method, chosen)
    if tokens is None:
        raise InputError(f"--method {method} needs calibration tokens; give --mix or --tokens")
    job = {
        "command": "quantize",
        "source": opened.checkpoint.digest(),
        "recipe": recipe.to_json(),
        "method": method,
        "steps": steps,
        "tokens": tokens.digest(),
        "versions": versions(),
    }
    with Journal.open(out, job, force) as journal:
        if journal.complete:
            return read_manifest(out)
        folder = journal.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        modifiers = modifiers_of(method, groups, ignore, steps)
        run_oneshot(opened, modifiers, tokens, folder)
        move_files(folder, journal)
        saved = {path.name for path in out.iterdir()}
        root = opened.checkpoint.root
        others = [path for path in opened.checkpoint.other_files() if path.name not in saved]
        carry_files(root, others, journal)
        total = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        facts = {
            "source": {"path": str(opened.checkpoint.root.resolve()), "digest": job["source"]},
            "family": opened.spec.family,
            "inputs": dict(inputs or {}),
            "recipe": recipe.to_json(),
            "total_size": total,
            "rounding": {
                "model": {
                    "matrices": len(chosen),
                    "without_tokens": 0,
                    "few_tokens": 0,
                    "fell_back": [],
                }
            },
        }
        return write_manifest(journal, started, facts)


def chosen_groups(
    opened: OpenModel, recipe: Recipe
) -> tuple[dict[str, Any], list[str], list[Linear]]:
    """config_groups and ignore list for llm-compressor, and the matrices they take."""
    source = opened.source
    names = sorted(source.names())
    linears = find_linears(opened.spec, {name: source.shape(name) for name in names})
    rules = recipe.assign(linears)
    if any(rule is not None and rule.method is not None for rule in rules.values()):
        raise InputError(
            f"{recipe.where} says how to round; with --method awq or autoround give --scheme, or "
            "use QuantizationModifier in the recipe"
        )
    schemes = schemes_of(rules)
    head = head_module(opened.spec, {name: None for name in names})
    whole = quantization_config(linears, schemes, head)
    groups = {
        name: {key: value for key, value in group.items() if key != "format"}
        for name, group in whole["config_groups"].items()
    }
    return groups, whole["ignore"], [one for one in linears if schemes[one.module] is not None]


def check_fits(opened: OpenModel, method: WholeMethod, chosen: Sequence[Linear]) -> None:
    """InputError unless llm-compressor can run the method on this model on this machine."""
    if method == "awq" and not torch.accelerator.is_available():
        raise InputError("llm-compressor's AWQ needs a GPU; use --method gptq or autoround")
    uneven = [one for one in chosen if any(side % 32 for side in one.shape)]
    if method == "autoround" and uneven:
        raise InputError(
            f"AutoRound does not tune {uneven[0].module} {list(uneven[0].shape)}: 32 does "
            "not divide both sides; use --method gptq"
        )
    if stored_quantization(opened.spec):
        raise InputError(
            f"--method {method} runs llm-compressor, which needs a model in 16 or 32 bits, and "
            f"{opened.checkpoint.root} is quantized; use --method gptq"
        )
    if opened.spec.mtp_layers:
        held = any(opened.spec.place(name).kind == "mtp" for name in opened.source.names())
        if held:
            raise InputError(
                f"--method {method} runs llm-compressor, which cannot carry the MTP layers of "
                f"{opened.checkpoint.root}; prune them off, or use --method gptq"
            )
    needed = COPIES * sum(info.nbytes for info in opened.checkpoint.tensors.values())
    if needed > (free := psutil.virtual_memory().available):
        raise InputError(
            f"--method {method} holds the whole model in memory: about {needed / 1e9:,.1f} GB, "
            f"and {free / 1e9:,.1f} GB are free; use --method gptq, which streams it"
        )


def modifiers_of(
    method: WholeMethod, groups: dict[str, Any], ignore: list[str], steps: int
) -> list[Any]:
    """llm-compressor's modifiers."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method == "autoround":
        return [
            AutoRoundModifier(
                config_groups=groups, ignore=ignore, iters=steps, enable_torch_compile=False
            )
        ]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=ignore)]


def run_oneshot(opened: OpenModel, modifiers: list[Any], tokens: TokenSet, folder: Path) -> None:
    """Load, run and save the whole model."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        opened.checkpoint.root, dtype=compute_dtype(opened.spec, "auto")
    )
    length = max(len(tokens.sample(number)) for number in range(len(tokens))) + 1
    rows = []
    for number in range(len(tokens)):
        ids = tokens.sample(number).tolist()
        padding = [0] * (length - len(ids))
        rows.append(
            {"input_ids": ids + padding, "attention_mask": [1] * len(ids) + [0] * len(padding)}
        )
    try:
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifiers,
            max_seq_length=length,
            num_calibration_samples=len(rows),
            moe_calibrate_all_experts=False,
        )
    except ValueError as error:  # how it refuses architectures that its mappings do not fit
        raise InputError(
            f"llm-compressor refuses {opened.checkpoint.root}: {str(error).splitlines()[0]}; use "
            "--method gptq"
        ) from error
    model.save_pretrained(folder, save_compressed=True)


def move_files(folder: Path, journal: Journal) -> None:
    """What llm-compressor saved becomes the output, config.json last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name in ("recipe.yaml", "generation_config.json"):
            continue
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while piece := handle.read(1 << 24):
                digest.update(piece)
            os.fsync(handle.fileno())
        size = path.stat().st_size
        path.replace(journal.out / path.name)
        journal.record(unit_of(path.name), file=path.name, bytes=size, sha256=digest.hexdigest())
