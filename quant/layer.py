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

import torch

from models.experts import RoutedExperts
from models.source_formats import Source
from quant.expert_linears import ExpertLinears, experts_of, widest_of
from quant.fused import fused_sets
from quant.gptq import GptqSettings, gptq
from quant.inputs import ExpertInputs, Fed, LinearInputs
from quant.layer_rounding import LayerRounding
from quant.layer_weights import LayerWeights
from quant.linears import Linear
from quant.nvfp4 import global_divisor
from quant.rounding import round_to_nearest
from quant.schemes import Quantized, Scheme, dequantize

HESSIAN_BYTES_AT_ONCE = 1 << 30
MOST_AT_ONCE = 32  # experts
# Of a GPU's memory the solver gets one part in SOLVER_SHARE. For an expert it wants four times its
# Hessian (767 MiB for 4096 x 7168), and a fifth is for weights and what is rounded.
SOLVER_HESSIANS, SOLVER_SHARE = 5, 6


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
        self.schemes, self.damping = schemes, damping
        self.scale_dtype, self.device = scale_dtype, device
        self.weights = LayerWeights(source, device)

    # -- outside the experts -------------------------------------------------------------------

    def round_linears(
        self, linears: Sequence[Linear], inputs: LinearInputs | None, result: LayerRounding
    ) -> None:
        """Attention, dense and shared-expert matrices; `inputs` None where nothing was run.

        InputError when a matrix is not finite.
        """
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
            weight = self.weights.one(linear)
            divisor = divisors.get(module)
            result.quantized[module] = self._round_one(
                module, weight, scheme, hessian if tokens else None, tokens, divisor, result
            )
        self.weights.demand_finite()

    def _divisors(self, chosen: Mapping[str, Linear]) -> dict[str, torch.Tensor]:
        """NVFP4 global scales of fused sets: of the joint largest weight."""
        divisors: dict[str, torch.Tensor] = {}
        for partners in fused_sets(chosen):
            if all(s is not None and s.kind == "nvfp4" for s in map(self.schemes.get, partners)):
                amax = torch.stack(
                    [self.weights.one(chosen[m]).abs().amax() for m in partners]
                ).amax()
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
        at_once = self._experts_at_once(widest_of(experts))
        numbers = list(experts)
        return [
            {expert: experts[expert] for expert in numbers[start : start + at_once]}
            for start in range(0, len(numbers), at_once)
        ]

    def _experts_at_once(self, widest: int) -> int:
        """As the solver needs memory; on a GPU a power of two, by what the card has in all: the
        same job gives the same sets, whoever else is on it."""
        if self.device.type != "cuda":
            return max(1, min(MOST_AT_ONCE, HESSIAN_BYTES_AT_ONCE // (4 * widest * widest)))
        whole = torch.cuda.mem_get_info(self.device)[1] // SOLVER_SHARE
        fitting = whole // (SOLVER_HESSIANS * 4 * widest * widest)
        return 1 << (max(1, min(MOST_AT_ONCE, fitting)).bit_length() - 1)

    def experts_solved(self, sets: Sequence[Mapping[int, ExpertLinears]]) -> bool:
        """True when GPTQ rounds these experts."""
        if not sets:
            return False
        first = next(iter(sets[0].values()))
        return self._solved(first.up.module) or self._solved(first.down.module)

    def _solved(self, module: str) -> bool:
        scheme = self.schemes[module]
        return module in self.damping and scheme is not None and not scheme.kind.startswith("fp8")

    def round_experts(
        self,
        sets: Sequence[Mapping[int, ExpertLinears]],
        routed: ExpertInputs | None,
        loaded: RoutedExperts | None,
        result: LayerRounding,
    ) -> None:
        """Routed experts of a layer, of `expert_sets`. What was rounded is put, decoded, into the
        experts that are `loaded`; they and `routed` are None where nothing was run."""
        for experts in sets:  # down's inputs are what all rounded gates and ups give
            up_modules = [parts.up.module for parts in experts.values()]
            scheme = self.schemes[up_modules[0]]
            assert scheme is not None
            if scheme.kind.startswith("fp8"):  # no inputs needed; blocks must not be joined
                linears = [linear for parts in experts.values() for linear in parts.ups]
                self._round_plainly(linears, scheme, result)
            else:
                self._round_ups(experts, up_modules, scheme, routed, loaded, result)
            if loaded is not None:
                self._put_in_place(experts, loaded, result, down=False)
        for experts in sets:
            down_modules = [parts.down.module for parts in experts.values()]
            scheme = self.schemes[down_modules[0]]
            assert scheme is not None
            if scheme.kind.startswith("fp8"):
                self._round_plainly([parts.down for parts in experts.values()], scheme, result)
            else:
                self._round_downs(experts, down_modules, routed, loaded, result)
            if loaded is not None:
                self._put_in_place(experts, loaded, result, down=True)

    def count_experts(
        self,
        sets: Sequence[Mapping[int, ExpertLinears]],
        routed: ExpertInputs | None,
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

    def _round_plainly(
        self, linears: Sequence[Linear], scheme: Scheme, result: LayerRounding
    ) -> None:
        for linear, weight in zip(linears, self.weights.read(linears), strict=True):
            result.quantized[linear.module] = self._round_one(
                linear.module, weight, scheme, None, 0, None, result
            )

    def _round_ups(
        self,
        experts: Mapping[int, ExpertLinears],
        up_modules: Sequence[str],
        scheme: Scheme,
        routed: ExpertInputs | None,
        loaded: RoutedExperts | None,
        result: LayerRounding,
    ) -> None:
        stacks = [parts.ups for parts in experts.values()]
        weight_BNK = self.weights.stacked(list(experts), stacks, loaded, down=False)
        fed = None
        if routed is not None:
            fed = routed.up(list(experts), self.device, solved=self._solved(up_modules[0]))
        up_q = self._round_batch(weight_BNK, up_modules, fed, result)
        for index, parts in enumerate(experts.values()):
            begin = 0
            for linear in parts.ups:
                end = begin + linear.shape[0]
                result.quantized[linear.module] = rows_of(up_q[index], begin, end, scheme)
                result.largest_input[linear.module] = 0.0 if fed is None else fed.largest_B[index]
                begin = end

    def _round_downs(
        self,
        experts: Mapping[int, ExpertLinears],
        down_modules: Sequence[str],
        routed: ExpertInputs | None,
        loaded: RoutedExperts | None,
        result: LayerRounding,
    ) -> None:
        stacks = [[parts.down] for parts in experts.values()]
        weight_BNK = self.weights.stacked(list(experts), stacks, loaded, down=True)
        fed = None
        if routed is not None:
            assert loaded is not None
            solved = self._solved(down_modules[0])
            fed = routed.down(list(experts), loaded, self.device, solved=solved)
        down_q = self._round_batch(weight_BNK, down_modules, fed, result)
        for index, module in enumerate(down_modules):
            result.quantized[module] = down_q[index]
            result.largest_input[module] = 0.0 if fed is None else fed.largest_B[index]

    def _round_batch(
        self,
        weight_BNK: torch.Tensor,
        modules: Sequence[str],
        fed: Fed | None,
        result: LayerRounding,
    ) -> Quantized:
        scheme = self.schemes[modules[0]]
        assert scheme is not None
        divisor_B = None
        if scheme.kind == "nvfp4":
            divisor_B = global_divisor(weight_BNK.abs().amax(dim=(1, 2)))
        if fed is None or fed.hessian_BKK is None:
            return round_to_nearest(
                weight_BNK, scheme, global_scale_B=divisor_B, scale_dtype=self.scale_dtype
            )
        solved = gptq(
            weight_BNK,
            fed.hessian_BKK,
            scheme,
            global_scale_B=divisor_B,
            scale_dtype=self.scale_dtype,
            settings=GptqSettings(damping=self.damping[modules[0]]),
        )
        errors, fell_back = solved.relative_error_B().tolist(), solved.fell_back_B.tolist()
        for module, error, fell in zip(modules, errors, fell_back, strict=True):
            result.errors[module] = error
            if fell:
                result.fell_back.append(module)
        return solved.quantized

    def put_in_place(
        self,
        sets: Sequence[Mapping[int, ExpertLinears]],
        loaded: RoutedExperts,
        result: LayerRounding,
    ) -> None:
        """Decoded rounded weights instead of the experts' own: of sets that others rounded."""
        for experts in sets:
            for down in (False, True):
                self._put_in_place(experts, loaded, result, down=down)

    def _put_in_place(
        self,
        experts: Mapping[int, ExpertLinears],
        loaded: RoutedExperts,
        result: LayerRounding,
        *,
        down: bool,
    ) -> None:
        """Decoded rounded weights instead of the experts' own, in their type."""
        weights = loaded.weights
        assert weights is not None
        joined = weights.down_for_mm if down else weights.up_for_mm
        for expert, parts in experts.items():
            begin = 0
            for linear in (parts.down,) if down else parts.ups:
                end = begin + linear.shape[0]
                joined[expert, :, begin:end].copy_(self.decoded(linear.module, result).T)
                begin = end

    def decoded(self, module: str, result: LayerRounding) -> torch.Tensor:
        """What a rounded matrix is worth, float32 [out, in]."""
        scheme = self.schemes[module]
        assert scheme is not None
        return dequantize(result.quantized[module], scheme)

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


def rows_of(q: Quantized, begin: int, end: int, scheme: Scheme) -> Quantized:
    """Rows of a stacked weight (FP8 blocks must not be cut)."""
    if scheme.kind == "fp8_block":
        assert begin % 128 == 0
        scale = q.scale[begin // 128 : -(-end // 128)]
    else:
        scale = q.scale[begin:end]
    zero = None if q.zero_point is None else q.zero_point[begin:end]
    return Quantized(q.codes[begin:end], scale, zero, q.global_scale)
