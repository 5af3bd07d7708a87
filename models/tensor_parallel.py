"""Whether a model can be cut over the GPUs of a tensor-parallel group.

Engines give each of `tp` GPUs 1/tp of every head and of every expert's inner width, and a group or
block of a quantized weight must not be cut:

    heads                  num_attention_heads % tp == 0
    key and value heads    num_key_value_heads % tp == 0 or tp % num_key_value_heads == 0; MLA has
                           one latent for all, which every GPU holds whole
    experts, dense MLPs    width % (tp · group) == 0 where down's columns are grouped

Source: docs/formats.md, "What each runtime accepts": vLLM 0.32 demands moe_intermediate / TP % g
== 0 and Marlin kernels multiples of 64 besides; DeepSeek's 2048 goes to TP 16 at groups of 128.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from models.model_spec import ModelSpec

# columns that share a scale, by the scheme's name; channels have none
GROUPS: Mapping[str, int] = {
    "W3A16": 128, "W4A16": 128, "W8A16": 128, "NVFP4": 16, "NVFP4A16": 16, "FP8_BLOCK": 128,
}  # fmt: skip


def group_of(quantization: Mapping[str, Any]) -> int:
    """The largest group or block width along K that a quantization_config has; 1 without one."""
    widths = [1]
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and block:
        widths.append(int(block[-1]))
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        block = weights.get("block_structure")
        if isinstance(block, list) and block:
            widths.append(int(block[-1]))
        if (weights.get("group_size") or 0) > 0:
            widths.append(int(weights["group_size"]))
    if "config_groups" not in quantization and (quantization.get("group_size") or 0) > 0:
        widths.append(int(quantization["group_size"]))
    return max(widths)


def findings(spec: ModelSpec, tp: int, group: int) -> Iterator[str]:
    """Why the model cannot be cut over `tp` GPUs, one line each; nothing when it can.

    `group`: columns of a weight that share a scale (1: none do).
    """
    text = spec.text
    heads = text.get("num_attention_heads")
    if isinstance(heads, int) and heads % tp:
        yield f"{heads} attention heads cannot be shared out to {tp} GPUs"
    kv_heads = text.get("num_key_value_heads")
    latent = text.get("kv_lora_rank") is not None
    if isinstance(kv_heads, int) and not latent and kv_heads % tp and tp % kv_heads:
        yield f"{kv_heads} key and value heads cannot be shared out to {tp} GPUs"
    widths = {"routed experts": spec.expert_intermediate}
    dense = text.get("intermediate_size")
    if isinstance(dense, int) and len(spec.moe_layers) < spec.num_layers:
        widths["dense MLPs"] = dense
    for what, width in widths.items():
        if width % tp:
            yield f"the {what}' width of {width} cannot be shared out to {tp} GPUs"
        elif group > 1 and (width // tp) % group:
            yield (
                f"the {what}' width of {width} over {tp} GPUs is {width // tp}, which cuts groups "
                f"of {group}; use {largest(width, group)} GPUs or fewer, or expert parallelism"
            )


def largest(width: int, group: int) -> int:
    """The largest power of two that cuts `width` into whole groups."""
    tp = 1
    while width % (2 * tp * group) == 0:
        tp *= 2
    return tp
