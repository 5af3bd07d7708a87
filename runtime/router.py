"""A router whose choice is one kernel, in the place of transformers' own.

transformers' routers are five to twenty launches of a few microseconds, the longest part of a layer
at one token after its experts. What a router does is not tabled by family: it is asked, with random
tokens, and models/routing.py's law that answers as it does takes its place. What no law answers for
stays as it is, and so does a router whose layer lies in host memory; `Routers.describe` says which.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn

from models.model_spec import ModelSpec
from models.routing import LEAST_AGREEMENT, MOST_WEIGHT_ERROR, RoutingLaw, best_fit

ASKED = 512  # random tokens
NEAR = 0.02  # logits of about 1: bfloat16 rounds the largest by half of it
SCALE_NOISE = 3e-4
CHECKED = (1, 8, ASKED)  # tokens at once


@dataclass(frozen=True, slots=True)
class RouterLaw:
    """How a router module answers: `bias` and `logit_bias` name one of its vectors [E]."""

    law: RoutingLaw
    bias: str | None
    logit_bias: str | None
    logit_dtype: torch.dtype
    weight_dtype: torch.dtype

    @property
    def title(self) -> str:
        """For the log."""
        law = self.law
        groups = f", {law.topk_groups} of {law.num_groups} groups" if law.num_groups > 1 else ""
        return f"{law.score}, top {law.top_k}{groups}"


class FusedRouter(nn.Module):
    """Logits, ids and weights as `original` gives them, from its own tensors."""

    def __init__(self, original: nn.Module, found: RouterLaw, given: Iterable[str]) -> None:
        """`given` names the vectors that the block hands over with the tokens, in their order."""
        super().__init__()
        self.original, self.found, self.given = original, found, tuple(given)

    def vector(self, name: str | None, given: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """One of the vectors [E]; None for None."""
        if name is None:
            return None
        if name in self.given:
            return given[self.given.index(name)].flatten()
        found: torch.Tensor = attrgetter(name)(self.original)
        return found.flatten()

    def forward(
        self, hidden_states: torch.Tensor, *given: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, D] or [B, S, D] -> logits [T, E], weights [T, K], expert ids [T, K]."""
        from runtime.kernels.router import FEW, chosen, few_logits

        found, weight_ED = self.found, self.original.weight
        assert isinstance(weight_ED, torch.Tensor)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        bias_E = self.vector(found.logit_bias, given)
        if 0 < x_TD.shape[0] <= FEW:
            logits_TE = few_logits(x_TD, weight_ED, bias_E, found.logit_dtype)
        else:
            dtype = found.logit_dtype
            bias = None if bias_E is None else bias_E.to(dtype)
            logits_TE = F.linear(x_TD.to(dtype), weight_ED.to(dtype), bias)
        bias_E = self.vector(found.bias, given)
        ids_TK, weights_TK = chosen(found.law, logits_TE, bias_E, found.weight_dtype)
        return logits_TE, weights_TK, ids_TK


class Routers:
    """Puts fused routers into the layers of one model as they are loaded."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        """`dtype` is the compute type."""
        self.spec, self.dtype = spec, dtype
        self.said: Counter[str] = Counter()

    def fuse(self, index: int, layer: nn.Module) -> None:
        """Replace the router of decoder layer `index`, loaded on a GPU, if a law answers for it."""
        if index not in self.spec.scored_layers:
            return
        block = layer.get_submodule(self.spec.architecture.moe.module)
        path = router_path(block, self.spec)
        router = None if path is None else block.get_submodule(path)
        given = None if router is None else given_vectors(block, router)
        if path is None or router is None or given is None:
            self.said["transformers' own: no router of the usual form"] += 1
            return
        found = law_of(router, given, self.spec, self.dtype)
        if found is None:
            self.said["transformers' own: no law answers as it does"] += 1
            return
        fused = FusedRouter(router, found, given)
        wrong = wrong_answers(fused, given, self.dtype)
        if wrong:
            self.said[f"transformers' own: {wrong}"] += 1
            return
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, fused)
        self.said[f"one kernel ({found.title})"] += 1

    def describe(self) -> Iterable[str]:
        """One line for each way that routers run."""
        for what, count in sorted(self.said.items()):
            yield f"{count:,} routers: {what}"


def vectors_of(module: nn.Module, *, below: bool) -> dict[str, torch.Tensor]:
    """A module's tensors of one dimension above 1, flat, by path; `below`: of its children too."""
    every = (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below))
    return {
        path: tensor.flatten()
        for path, tensor in every
        if tensor.numel() > 1 and tensor.numel() == max(tensor.shape)
    }


def router_path(block: nn.Module, spec: ModelSpec) -> str | None:
    """Where a MoE block has the module with a weight [E, D] that chooses experts itself."""
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if (
            path
            and type(module) is not nn.Linear
            and isinstance(weight, torch.Tensor)
            and tuple(weight.shape) == (spec.num_experts, spec.hidden_size)
        ):
            return path
    return None


def random_tokens(weight_ED: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[ASKED, D] whose logits are about 1, as trained ones are: far from there a sigmoid is 1, and
    experts tie."""
    generator = torch.Generator(weight_ED.device).manual_seed(0)
    size = ASKED, weight_ED.shape[1]
    x_TD = torch.randn(size, generator=generator, device=weight_ED.device)
    usual = (x_TD @ weight_ED.float().T).square().mean().sqrt().clamp_min(1e-6)
    return (x_TD / usual).to(dtype)


def given_vectors(block: nn.Module, router: nn.Module) -> dict[str, torch.Tensor] | None:
    """What a router is called with besides tokens, found on its block by the parameters' names;
    None where that is something else than vectors of the block (DeepSeek-V4: token ids)."""
    parameters = inspect.signature(router.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    own = vectors_of(block, below=False)
    names = [p.name for p in needed[1:]]
    return {name: own[name] for name in names} if all(name in own for name in names) else None


def by_expert(weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """Weights [T, E], float32, 0 where not chosen."""
    out_TE = torch.zeros(len(ids_TK), experts, device=ids_TK.device)
    return out_TE.scatter_(1, ids_TK, weights_TK.float())


@torch.inference_mode()
def law_of(
    router: nn.Module, given: Mapping[str, torch.Tensor], spec: ModelSpec, dtype: torch.dtype
) -> RouterLaw | None:
    """The law by which a router module answers; None where there is none.

    `given` are the vectors [E] that its block hands over with the tokens, by name, in order.
    """
    weight_ED = router.weight
    assert isinstance(weight_ED, torch.Tensor)
    experts = len(weight_ED)
    x_TD = random_tokens(weight_ED, dtype)
    out = router(x_TD, *given.values())
    if not isinstance(out, tuple) or [t.shape for t in out] != [
        (ASKED, experts),
        (ASKED, spec.top_k),
        (ASKED, spec.top_k),
    ]:
        return None
    logits_TE, weights_TK, ids_TK = out
    own = {path: v for path, v in vectors_of(router, below=True).items() if len(v) == experts}
    vectors: dict[str | None, torch.Tensor] = {None: torch.zeros_like(logits_TE[0]).float()}
    vectors |= {name: vector.float().flatten() for name, vector in (own | dict(given)).items()}
    product_TE = x_TD.float() @ weight_ED.float().T
    off = {name: (logits_TE - product_TE - v).abs().mean() for name, v in vectors.items()}
    logit_bias = min(off, key=lambda name: float(off[name]))
    if off[logit_bias] > NEAR:
        return None
    # a bias that hardly moves the choice is to be told from none: it is tried first
    biases = [name for name in vectors if name != logit_bias and name is not None] + [None]
    inputs = [(logits_TE.float(), vectors[name]) for name in biases]
    fitted = best_fit(spec, inputs, by_expert(weights_TK, ids_TK, experts))
    if fitted is None:
        return None
    number, law = fitted
    near = round(law.scale, 3)  # weights of 16 bits tell it to some 1e-4
    if abs(near - law.scale) < SCALE_NOISE * law.scale:
        law = replace(law, scale=near)
    return RouterLaw(law, biases[number], logit_bias, logits_TE.dtype, weights_TK.dtype)


@torch.inference_mode()
def wrong_answers(fused: FusedRouter, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the kernels' answers, held to the original's; empty where nothing is."""
    weight_ED = fused.original.weight
    assert isinstance(weight_ED, torch.Tensor)
    x_TD = random_tokens(weight_ED, dtype)
    _, weights_TK, ids_TK = fused.original(x_TD, *given.values())
    wanted_TE = by_expert(weights_TK, ids_TK, len(weight_ED))
    for tokens in CHECKED:
        rows = x_TD[: min(ASKED, 64 * tokens)]
        try:
            parts = [fused(some, *given.values()) for some in rows.split(tokens)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler, a launch or a card may raise
            return f"the kernel does not run here ({type(error).__name__}: {error})".splitlines()[0]
        weights_TK, ids_TK = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        found_TE, wanted = by_expert(weights_TK, ids_TK, len(weight_ED)), wanted_TE[: len(rows)]
        same_T = ((found_TE != 0) == (wanted != 0)).all(1)
        off = (found_TE - wanted)[same_T].abs().max() / wanted.max() if same_T.any() else 1.0
        if same_T.float().mean() < LEAST_AGREEMENT or not off < MOST_WEIGHT_ERROR:
            return f"the kernel answers wrongly here ({tokens} tokens at once)"
    return ""
