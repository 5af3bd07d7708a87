"""Fused routers against transformers' own modules: the law found, and the kernels' answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.opening import open_model
from models.routing import RoutingLaw
from models.skeleton import Skeleton
from runtime.router import (
    FusedRouter,
    RouterLaw,
    Routers,
    given_vectors,
    law_of,
    random_tokens,
    router_path,
    wrong_answers,
)
from tests.kernel_device import DEVICE, MARKS
from tests.tiny import FAMILIES, tiny_model

BF16, F32 = torch.bfloat16, torch.float32
# read in transformers' modeling files: score, whether it normalises, scale, types of logits and
# weights where the model is bfloat16
SIGMOID = ("sigmoid", True)
LAWS: dict[str, tuple[str, bool, float, torch.dtype, torch.dtype]] = {
    "deepseek_v2": ("softmax", False, 16.0, F32, F32),
    "deepseek_v3": (*SIGMOID, 2.5, F32, F32),
    "deepseek_v32": (*SIGMOID, 2.5, F32, F32),
    "deepseek_v4": ("sqrt_softplus", True, 1.5, BF16, BF16),
    "kimi_k2": (*SIGMOID, 2.827, F32, F32),
    "glm4_moe": (*SIGMOID, 2.5, F32, F32),
    "mixtral": ("softmax", True, 1.0, BF16, F32),
    "qwen2_moe": ("softmax", False, 1.0, BF16, BF16),
    "qwen3_moe": ("softmax", True, 1.0, BF16, BF16),
    "olmoe": ("softmax", False, 1.0, BF16, BF16),
    "ernie4_5_moe": ("softmax", True, 1.0, F32, BF16),
    "gpt_oss": ("softmax", True, 1.0, BF16, BF16),
    "minimax_m2": (*SIGMOID, 1.0, BF16, F32),
    "hy_v3": (*SIGMOID, 2.826, F32, F32),
    "nemotron_h": (*SIGMOID, 2.5, F32, F32),
}
BIASES = {
    "ernie4_5_moe": "moe_statics.e_score_correction_bias",
    "deepseek_v2": None, "mixtral": None, "qwen2_moe": None, "qwen3_moe": None, "olmoe": None,
    "gpt_oss": None,
}  # fmt: skip
UNLIKE = {"granitemoe", "granitemoeshared", "granitemoehybrid", "llama4", "llama4_text"}
ELSEWHERE = {"hunyuan_v1_moe", "longcat_flash", "afmoe"}  # the weight is a Linear below the router


def loaded_layer(family: str, folder: Path, device: str = "cpu") -> tuple[nn.Module, Any, int]:
    """A decoder layer with a learned router, filled, in bfloat16."""
    path = tiny_model(family, folder / "model", dtype="bfloat16")
    skeleton = Skeleton(open_model(path).source, dtype=BF16, device=torch.device(device))
    index = skeleton.spec.scored_layers[-1]
    return skeleton.load_layer(index), skeleton.spec, index


def parts(layer: nn.Module, spec: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The layer's router and what its block hands over."""
    block = layer.get_submodule(spec.architecture.moe.module)
    path = router_path(block, spec)
    assert path is not None
    given = given_vectors(block, block.get_submodule(path))
    assert given is not None
    return block.get_submodule(path), given


@pytest.mark.parametrize("family", sorted(LAWS))
def test_the_law_is_found(family: str, tmp_path: Path) -> None:
    layer, spec, _ = loaded_layer(family, tmp_path)
    found = law_of(*parts(layer, spec), spec, BF16)
    assert found is not None
    law = found.law
    own = (law.score, law.normalises, law.scale, found.logit_dtype, found.weight_dtype)
    assert own == LAWS[family]
    assert found.bias == BIASES.get(family, "e_score_correction_bias")
    assert found.logit_bias == ("bias" if family == "gpt_oss" else None)
    assert (law.num_groups, law.top_k) == (spec.num_groups, spec.top_k)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_answered_or_left_alone(family: str, tmp_path: Path) -> None:
    layer, spec, _ = loaded_layer(family, tmp_path)
    if family in ELSEWHERE:
        assert router_path(layer.get_submodule(spec.architecture.moe.module), spec) is None
        return
    found = law_of(*parts(layer, spec), spec, BF16)
    assert (found is None) == (family in UNLIKE)


def test_a_router_of_another_law_is_left_alone(tmp_path: Path) -> None:
    layer, spec, index = loaded_layer("qwen3_moe", tmp_path)
    router, given = parts(layer, spec)
    own_forward = router.forward

    def squared(hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, ids = own_forward(hidden_states)
        return logits, weights.square(), ids

    router.forward = squared
    assert law_of(router, given, spec, BF16) is None
    routers = Routers(spec, BF16)
    routers.fuse(index, layer)
    assert list(routers.describe()) == ["1 routers: transformers' own: no law answers as it does"]
    assert parts(layer, spec)[0] is router


def first(out: Any) -> torch.Tensor:
    """What a block gives to the layer, float32."""
    return (out[0] if isinstance(out, tuple) else out).flatten(0, -2).float()


class TestKernels:
    """On a GPU, or by Triton's interpreter."""

    pytestmark = MARKS

    @pytest.fixture(autouse=True)
    def _triton(self) -> None:
        pytest.importorskip("triton")

    @pytest.mark.parametrize("family", sorted(LAWS))
    def test_answers_are_the_router_s_own(self, family: str, tmp_path: Path) -> None:
        layer, spec, index = loaded_layer(family, tmp_path, DEVICE)
        original, given = parts(layer, spec)
        x_TD = random_tokens(original.weight, BF16)
        block = layer.get_submodule(spec.architecture.moe.module)
        before = block(x_TD[None, :9])
        routers = Routers(spec, BF16)
        routers.fuse(index, layer)
        assert "one kernel" in next(iter(routers.describe()))
        fused = next(m for m in block.modules() if isinstance(m, FusedRouter))
        assert fused.original is original
        # the block calls it as it called the original
        apart = first(block(x_TD[None, :9])) - first(before)
        assert (apart.norm(dim=-1) / first(before).norm(dim=-1)).median() < 0.02
        rows = [1, 2, 7, 8, 9, 33]
        for some in x_TD[: sum(rows)].split(rows):
            wanted, found = (router(some, *given.values()) for router in (original, fused))
            assert [t.dtype for t in found] == [t.dtype for t in wanted]
            assert [t.shape for t in found] == [t.shape for t in wanted]
            torch.testing.assert_close(found[0], wanted[0], rtol=0.01, atol=0.01)
            for row in range(len(some)):
                own = dict(zip(wanted[2][row].tolist(), wanted[1][row].tolist(), strict=True))
                ours = dict(zip(found[2][row].tolist(), found[1][row].tolist(), strict=True))
                if own.keys() != ours.keys():  # a tie of rounded logits
                    a, b = (set(x) - set(y) for x, y in ((own, ours), (ours, own)))
                    apart = wanted[0][row, list(a)] - wanted[0][row, list(b)]
                    assert len(a) == 1
                    assert apart.abs() < 0.02
                    continue
                assert ours == pytest.approx(own, rel=0.03 if BF16 in LAWS[family] else 1e-4)
        empty = fused(x_TD[:0], *given.values())
        assert empty[2].shape == (0, spec.top_k)

    @pytest.mark.parametrize(
        ("experts", "groups", "kept", "group_top", "top_k"),
        [(192, 8, 4, 2, 8), (21, 1, 1, 2, 5), (12, 3, 2, 1, 4), (256, 8, 4, 2, 8), (6, 6, 3, 1, 3)],
    )
    @pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
    def test_choice_of_odd_groups(
        self, experts: int, groups: int, kept: int, group_top: int, top_k: int, score: Any
    ) -> None:
        """Against the sorted scores of one token after the other, in float64."""
        from runtime.kernels.router import chosen

        law = RoutingLaw(
            score=score, normalises=True, scale=2.5, top_k=top_k, num_groups=groups,
            topk_groups=kept, group_top=group_top,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(experts)
        logits_TE = torch.randn(11, experts, generator=generator)
        bias_E = 0.3 * torch.randn(experts, generator=generator)
        ids_TK, weights_TK = chosen(law, logits_TE.to(DEVICE), bias_E.to(DEVICE), F32)
        for z, ids, weights in zip(logits_TE.double(), ids_TK.cpu(), weights_TK.cpu(), strict=True):
            p = {
                "softmax": z.exp() / z.exp().sum(),
                "sigmoid": 1 / (1 + (-z).exp()),
                "sqrt_softplus": (1 + z.exp()).log().sqrt(),
            }[score]
            choice = (p + bias_E).tolist()
            each = experts // groups
            of_group = [choice[g * each : (g + 1) * each] for g in range(groups)]
            best = sorted(
                range(groups), key=lambda g: -sum(sorted(of_group[g], reverse=True)[:group_top])
            )[:kept]
            usable = [e for e in range(experts) if groups == 1 or e // each in best]
            wanted = sorted(usable, key=lambda e: -choice[e])[:top_k]
            assert ids.tolist() == wanted
            share = p[wanted] / p[wanted].sum() * 2.5
            torch.testing.assert_close(weights.double(), share, rtol=1e-5, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    def test_ties_go_to_the_lower_number_and_nan_to_an_expert(self) -> None:
        from runtime.kernels.router import chosen

        law = RoutingLaw(score="softmax", normalises=True, scale=1.0, top_k=3)
        logits_TE = torch.zeros(2, 5, device=DEVICE)
        logits_TE[0, 3] = 1.0
        ids_TK, _ = chosen(law, logits_TE, None, F32)
        assert ids_TK.tolist() == [[3, 0, 1], [0, 1, 2]]
        ids_TK, _ = chosen(law, torch.full_like(logits_TE, torch.nan), None, F32)
        assert ((ids_TK >= 0) & (ids_TK < 5)).all()

    def test_a_kernel_that_answers_wrongly_is_seen(self, tmp_path: Path) -> None:
        layer, spec, _ = loaded_layer("qwen3_moe", tmp_path, DEVICE)
        router, given = parts(layer, spec)
        found = law_of(router, given, spec, BF16)
        assert found is not None
        assert wrong_answers(FusedRouter(router, found, given), given, BF16) == ""
        law = RoutingLaw(score="softmax", normalises=False, scale=1.0, top_k=spec.top_k)
        other = RouterLaw(law, None, None, found.logit_dtype, found.weight_dtype)
        said = wrong_answers(FusedRouter(router, other, given), given, BF16)
        assert said == "the kernel answers wrongly here (1 tokens at once)"
