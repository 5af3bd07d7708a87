"""Rounding the matrices of one layer, with or without what its Linears were fed.

Weights are read from the source in float32, a few experts at a time; Hessians are per token and
of routed tokens only. Gate and up of an expert are one stacked matrix with one Hessian; down's
Hessian is of what the *rounded* gate and up give, because that is what it will be fed.

Experts that saw few tokens are drawn toward the layer's pooled Hessian (quant/gptq.py), those
that saw none are rounded by it alone; both are counted in the report.

Legend: B experts rounded together, N tokens of one expert, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from models.source_formats import Source
from quant.fused import fused_sets
from quant.gptq import GptqSettings, gptq, isotropic, shrink_hessian
from quant.inputs import LinearInputs, RoutedInputs
from quant.linears import Linear
from quant.nvfp4 import global_divisor
from quant.rounding import round_to_nearest
from quant.schemes import Quantized, Scheme, dequantize

HESSIAN_BYTES_AT_ONCE = 1 << 30


@dataclass(slots=True)
class LayerRounding:
    """What rounding a layer gave. `quantized` and `largest_input` are by module."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    largest_input: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    without_tokens: int = 0  # experts
    few_tokens: int = 0
    fell_back: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ExpertLinears:
    """The matrices of one routed expert; `gate` None where experts have none."""

    gate: Linear | None
    up: Linear
    down: Linear


def experts_of(linears: Sequence[Linear]) -> dict[int, ExpertLinears]:
    """The routed experts among a layer's matrices."""
    found: dict[int, dict[str, Linear]] = {}
    for linear in linears:
        if linear.is_expert and linear.place.expert is not None:
            role = str(linear.place.role)
            if role == "gate_up":
                role = "gate" if linear.rows is not None and linear.rows[0] == 0 else "up"
            found.setdefault(linear.place.expert, {})[role] = linear
    return {
        expert: ExpertLinears(parts.get("gate"), parts["up"], parts["down"])
        for expert, parts in sorted(found.items())
    }


class LayerRounder:
    """Rounds the matrices of layers of one source.

    `damping` names the modules rounded by GPTQ and the relative damping of each; all others are
    rounded to nearest.
    """

    def __init__(
        self,
        source: Source,
        schemes: Mapping[str, Scheme | None],
        *,
        damping: Mapping[str, float],
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source, self.schemes, self.damping = source, schemes, damping
        self.scale_dtype, self.device = scale_dtype, device

    def weight(self, linear: Linear) -> torch.Tensor:
        """A matrix in float32, [out, in]."""
        if not linear.stacked:
            return self.source.read(linear.logical, torch.float32, self.device)
        assert linear.place.expert is not None
        value = self.source.read_expert(
            linear.logical, linear.place.expert, torch.float32, self.device
        )
        value = value.T if linear.transposed else value
        return value if linear.rows is None else value[slice(*linear.rows)].contiguous()

    # -- outside the experts -------------------------------------------------------------------

    def round_linears(
        self, linears: Sequence[Linear], inputs: LinearInputs | None, result: LayerRounding
    ) -> None:
        """Attention, dense and shared-expert matrices; `inputs` None where nothing was run."""
        chosen = {
            linear.module: linear
            for linear in linears
            if not linear.is_expert and self.schemes[linear.module] is not None
        }
        divisors = self._divisors(chosen)
        for module, linear in chosen.items():
            scheme = self.schemes[module]
            assert scheme is not None
            hessian, tokens, largest = (
                inputs.sums_of(module) if inputs is not None else (None, 0, 0.0)
            )
            result.largest_input[module] = largest
            weight = self.weight(linear)
            divisor = divisors.get(module)
            result.quantized[module] = self._round_one(
                module, weight, scheme, hessian if tokens else None, tokens, divisor, result
            )

    def _divisors(self, chosen: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
        """NVFP4 global scales of fused sets: of the joint largest weight."""
        divisors: dict[str, torch.Tensor] = {}
        for partners in fused_sets(chosen):
            if all(s is not None and s.kind == "nvfp4" for s in map(self.schemes.get, partners)):
                amax = torch.stack([self.weight(chosen[m]).abs().amax() for m in partners]).amax()
                divisors.update(dict.fromkeys(partners, global_divisor(amax)))
        return divisors

    def _round_one(
        self,
        module: str,
        weight: torch.Tensor,
        scheme: Scheme,
        hessian: torch.Tensor | None,
        tokens: int,
        divisor: torch.Tensor | None,
        result: LayerRounding,
    ) -> Quantized:
        divisor_B = None if divisor is None else divisor.reshape(1)
        if hessian is None or module not in self.damping or scheme.kind.startswith("fp8"):
            importance = None if hessian is None else hessian.diagonal()[None] / tokens
            return round_to_nearest(
                weight[None],
                scheme,
                importance_BK=importance,
                global_scale_B=divisor_B,
                scale_dtype=self.scale_dtype,
            )[0]
        solved = gptq(
            weight[None],
            hessian[None] / tokens,
            scheme,
            global_scale_B=divisor_B,
            scale_dtype=self.scale_dtype,
            settings=GptqSettings(damping=self.damping[module]),
        )
        result.errors[module] = float(solved.relative_error_B()[0])
        if bool(solved.fell_back_B[0]):
            result.fell_back.append(module)
        return solved.quantized[0]

    # -- routed experts ------------------------------------------------------------------------

    def expert_sets(self, linears: Sequence[Linear]) -> list[dict[int, ExpertLinears]]:
        """The layer's experts that get a scheme, as they are rounded together."""
        experts = {
            expert: parts
            for expert, parts in experts_of(linears).items()
            if self.schemes[parts.up.module] is not None
        }
        if not experts:
            return []
        widest = widest_of(experts)
        at_once = max(1, min(32, HESSIAN_BYTES_AT_ONCE // (4 * widest * widest)))
        numbers = list(experts)
        return [
            {expert: experts[expert] for expert in numbers[start : start + at_once]}
            for start in range(0, len(numbers), at_once)
        ]

    def round_experts(
        self,
        sets: Sequence[Mapping[int, ExpertLinears]],
        routed: RoutedInputs | None,
        activate: Callable[[torch.Tensor], torch.Tensor] | None,
        result: LayerRounding,
    ) -> None:
        """Routed experts of a layer, of `expert_sets`. `activate` is the family's activation on
        joined gate and up ([N, 2F] -> [N, F]); it and `routed` are None where nothing was run."""
        if not sets:
            return
        first = next(iter(sets[0].values()))
        solved = first.up.module in self.damping or first.down.module in self.damping
        pooled = routed.pooled(self.device) if routed is not None and solved else None
        for experts in sets:
            self._round_experts_at_once(experts, routed, activate, pooled, result)

    def count_experts(
        self,
        sets: Sequence[Mapping[int, ExpertLinears]],
        routed: RoutedInputs | None,
        result: LayerRounding,
    ) -> None:
        """After all experts are rounded: how many saw no token or few, and input ranges of the
        former."""
        experts = {expert: parts for one in sets for expert, parts in one.items()}
        if routed is not None and experts:
            counts = routed.count_E[list(experts)]
            result.without_tokens = int((counts == 0).sum())
            result.few_tokens = int(((counts > 0) & (counts < widest_of(experts))).sum())
            self._fill_largest(experts, result)

    def _round_experts_at_once(
        self,
        experts: Mapping[int, ExpertLinears],
        routed: RoutedInputs | None,
        activate: Callable[[torch.Tensor], torch.Tensor] | None,
        pooled: torch.Tensor | None,
        result: LayerRounding,
    ) -> None:
        any_up = self.schemes[next(iter(experts.values())).up.module]
        assert any_up is not None
        if any_up.kind.startswith("fp8"):  # no inputs needed, and blocks must not be joined
            for parts in experts.values():
                for linear in (parts.gate, parts.up, parts.down):
                    if linear is not None:
                        weight = self.weight(linear)
                        result.quantized[linear.module] = self._round_one(
                            linear.module, weight, any_up, None, 0, None, result
                        )
            return
        ups, downs, heights = [], [], []
        for parts in experts.values():
            stack = [parts.gate, parts.up] if parts.gate is not None else [parts.up]
            ups.append(torch.cat([self.weight(linear) for linear in stack]))
            downs.append(self.weight(parts.down))
            heights.append([(linear.module, linear.shape[0]) for linear in stack])
        up_modules = [parts.up.module for parts in experts.values()]
        inputs = None if routed is None else [routed.of(e).to(self.device) for e in experts]
        up_q = self._round_batch(
            torch.stack(ups), up_modules, inputs, pooled, result, pooled_is_shared=True
        )
        up_scheme = self.schemes[up_modules[0]]
        assert up_scheme is not None
        middle = None
        if inputs is not None:
            assert activate is not None
            dtype = inputs[0].dtype
            decoded = dequantize(up_q, up_scheme).to(dtype)
            middle = [
                activate(torch.nn.functional.linear(x, w))
                for x, w in zip(inputs, decoded, strict=True)
            ]
        down_modules = [parts.down.module for parts in experts.values()]
        down_q = self._round_batch(
            torch.stack(downs), down_modules, middle, pooled, result, pooled_is_shared=False
        )
        for index, rows in enumerate(heights):
            begin = 0
            for module, height in rows:
                result.quantized[module] = rows_of(up_q[index], begin, begin + height, up_scheme)
                result.largest_input[module] = _largest(inputs, index)
                begin += height
            result.quantized[down_modules[index]] = down_q[index]
            result.largest_input[down_modules[index]] = _largest(middle, index)

    def _round_batch(
        self,
        weight_BNK: torch.Tensor,
        modules: Sequence[str],
        inputs: Sequence[torch.Tensor] | None,
        pooled: torch.Tensor | None,
        result: LayerRounding,
        *,
        pooled_is_shared: bool,
    ) -> Quantized:
        scheme = self.schemes[modules[0]]
        assert scheme is not None
        divisor_B = None
        if scheme.kind == "nvfp4":
            divisor_B = global_divisor(weight_BNK.abs().amax(dim=(1, 2)))
        solved_by_gptq = modules[0] in self.damping and not scheme.kind.startswith("fp8")
        if inputs is None or pooled is None or not solved_by_gptq:
            return round_to_nearest(
                weight_BNK, scheme, global_scale_B=divisor_B, scale_dtype=self.scale_dtype
            )
        hessian_BKK = torch.stack([_per_token_hessian(x) for x in inputs])
        tokens_B = torch.tensor([len(x) for x in inputs])
        if pooled_is_shared:
            toward = pooled
        else:  # channels of down's inputs mean something else in every expert
            seen = hessian_BKK[tokens_B > 0]
            size = hessian_BKK.shape[-1]
            toward = isotropic(seen.mean(0)) if len(seen) else torch.eye(size, device=self.device)
        solved = gptq(
            weight_BNK,
            shrink_hessian(hessian_BKK, tokens_B, toward),
            scheme,
            global_scale_B=divisor_B,
            scale_dtype=self.scale_dtype,
            settings=GptqSettings(damping=self.damping[modules[0]]),
        )
        for index, module in enumerate(modules):
            result.errors[module] = float(solved.relative_error_B()[index])
            if bool(solved.fell_back_B[index]):
                result.fell_back.append(module)
        return solved.quantized

    def _fill_largest(self, experts: Mapping[int, ExpertLinears], result: LayerRounding) -> None:
        """Experts that saw no token take the largest input of their layer's others."""
        roles: tuple[Callable[[ExpertLinears], Linear | None], ...] = (
            lambda parts: parts.gate,
            lambda parts: parts.up,
            lambda parts: parts.down,
        )
        for role in roles:
            modules = [one.module for parts in experts.values() if (one := role(parts)) is not None]
            largest = max((result.largest_input[module] for module in modules), default=0.0)
            for module in modules:
                result.largest_input[module] = result.largest_input[module] or largest


def widest_of(experts: Mapping[int, ExpertLinears]) -> int:
    """Inputs of the widest matrix of an expert."""
    first = next(iter(experts.values()))
    return max(first.up.shape[1], first.down.shape[1])


def rows_of(q: Quantized, begin: int, end: int, scheme: Scheme) -> Quantized:
    """Rows of a stacked weight (FP8 blocks must not be cut)."""
    if scheme.kind == "fp8_block":
        assert begin % 128 == 0
        scale = q.scale[begin // 128 : -(-end // 128)]
    else:
        scale = q.scale[begin:end]
    zero = None if q.zero_point is None else q.zero_point[begin:end]
    return Quantized(q.codes[begin:end], scale, zero, q.global_scale)


def _per_token_hessian(x_NK: torch.Tensor) -> torch.Tensor:
    x = x_NK.float()
    return x.T @ x / max(1, len(x))


def _largest(inputs: Sequence[torch.Tensor] | None, index: int) -> float:
    if inputs is None or len(inputs[index]) == 0:
        return 0.0
    return float(inputs[index].abs().amax())
