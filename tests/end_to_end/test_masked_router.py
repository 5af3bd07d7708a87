"""A pruned checkpoint computes what the original computes without the dropped experts, to the bit.

score -> plan -> prune -> reload in transformers, against the intact model whole in transformers
whose routers were told of the kept experts only: the router's rows of the dropped ones are taken
out and the ids it then returns are translated back to the original experts, all of which stay.
(Giving dropped experts -inf instead is the same function, but sums of E - K more zeros round
differently; test_minus_infinity holds that form to 1e-5.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from calibration.tokens import TokenSet
from models.model_spec import ModelSpec
from models.opening import open_model
from reap.plan import PrunePlan, make_plan
from reap.prune import prune_checkpoint
from reap.quotas import valid_keeps
from reap.score import ScoreSettings, score
from tests.tiny import FAMILIES, reference_model, text_of, tiny_model
from tests.tiny_configs import CONFIGS
from tests.token_sets import random_token_set


def is_router_tensor(name: str, tensor: torch.Tensor, width: int) -> bool:
    """A weight or bias with one row (ERNIE's bias: one column) an expert, of no expert itself."""
    if name.startswith(("experts.", "shared")):
        return False
    return tensor.shape[0] == width or tuple(tensor.shape) == (1, width)


def forget_experts(block: nn.Module, spec: ModelSpec, kept: tuple[int, ...]) -> None:
    """Take the dropped experts out of a MoE block's router; the experts module keeps them all."""
    num_experts, zeros = spec.num_experts, spec.zero_experts
    width, total = num_experts + zeros, len(kept) + zeros
    rows = torch.tensor([*kept, *range(num_experts, width)])
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if is_router_tensor(name, tensor, width):
            tensor.data = tensor.data[rows] if tensor.shape[0] == width else tensor.data[:, rows]
    sizes = {num_experts: len(kept), width: total}
    for module in block.modules():
        if module is not block.experts:
            for name, value in list(vars(module).items()):
                if type(value) is int and value in sizes and "expert" in name and "tok" not in name:
                    setattr(module, name, sizes[value])
    if spec.architecture.moe.weights_input:
        _spread_inputs(block.experts, rows, num_experts)
    else:
        block.experts.register_forward_pre_hook(lambda _, args: (args[0], rows[args[1]], *args[2:]))


def _spread_inputs(experts: nn.Module, rows: torch.Tensor, num_experts: int) -> None:
    """Llama-4's experts take inputs of all experts: give the dropped ones zeros."""

    def spread(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        given = args[0].view(len(rows), -1, args[0].shape[-1])
        inputs = given.new_zeros((num_experts, *given.shape[1:]))
        inputs[rows] = given
        return (inputs.view(-1, args[0].shape[-1]),)

    def gather(_: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view(num_experts, -1, out.shape[-1])[rows].reshape(-1, out.shape[-1])

    experts.register_forward_pre_hook(spread)
    experts.register_forward_hook(gather)


def moe_blocks(model: Any, spec: ModelSpec) -> dict[int, nn.Module]:
    """The MoE blocks of a whole model's scored layers."""
    path = spec.architecture.moe.module
    return {layer: model.model.layers[layer].get_submodule(path) for layer in spec.scored_layers}


def pruned_pair(family: str, folder: Path) -> tuple[Path, ModelSpec, PrunePlan, TokenSet]:
    """A tiny checkpoint scored and pruned through our own jobs (into folder/pruned)."""
    # 16 indexer heads leave no ties among keys, which torch.topk breaks as it likes
    heads = {"index_n_heads": 16} if "index_n_heads" in text_of(CONFIGS[family]) else {}
    path = tiny_model(family, folder / "model", **heads)
    opened = open_model(path)
    spec = opened.spec
    tokens = random_token_set(spec.text["vocab_size"])
    stats = score(path, tokens, folder / "scores", ScoreSettings(dtype="float32"))
    keep = [k for k in valid_keeps(spec, "keep") if k < spec.num_experts][-2:][0]
    plan = make_plan(stats, spec, keep=keep)
    prune_checkpoint(opened.source, plan, folder / "pruned")
    assert open_model(folder / "pruned").spec.num_experts == keep
    return path, spec, plan, tokens


def logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=row[None].long(), use_cache=False).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_original_whose_router_forgot_the_dropped(
    family: str, tmp_path: Path
) -> None:
    path, spec, plan, tokens = pruned_pair(family, tmp_path)
    pruned, original = reference_model(tmp_path / "pruned"), reference_model(path)
    for model in (pruned, original):
        # the grouped form sorts pairs by id with an unstable sort: where a row lands in its GEMM,
        # and so its last bits, would depend on how experts are numbered
        for module in model.modules():
            if hasattr(module, "has_gate"):
                module.config._experts_implementation = "eager"
    for layer, block in moe_blocks(original, spec).items():
        forget_experts(block, spec, plan.layers[layer])
    for row in tokens:
        assert torch.equal(logits(pruned, row), logits(original, row))


class MaskedRouters(TorchFunctionMode):
    """Gives -inf logits to dropped experts: `dropped` maps a router weight's address to them."""

    def __init__(self, dropped: dict[int, list[int]]) -> None:
        super().__init__()
        self.dropped = dropped
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self.dropped:
            address = args[1].data_ptr()
            self.used.add(address)
            out[..., self.dropped[address]] = float("-inf")
        return out


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v32", "gpt_oss", "ernie4_5_moe"])
def test_minus_infinity(family: str, tmp_path: Path) -> None:
    path, spec, plan, tokens = pruned_pair(family, tmp_path)
    pruned, original = reference_model(tmp_path / "pruned"), reference_model(path)
    dropped: dict[int, list[int]] = {}
    for layer, block in moe_blocks(original, spec).items():
        gone = list(plan.dropped(layer))
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if is_router_tensor(name, tensor, spec.num_experts):
                if tensor.dim() == 2 and tensor.shape[0] == spec.num_experts:
                    dropped[tensor.data_ptr()] = gone
                elif "correction" in name:
                    tensor.data[..., gone] = float("-inf")
    with MaskedRouters(dropped) as mode:
        masked = [logits(original, row) for row in tokens]
    assert len(mode.used) == len(spec.scored_layers)
    for row, expected in zip(tokens, masked, strict=True):
        torch.testing.assert_close(logits(pruned, row), expected, rtol=1e-5, atol=1e-5)
