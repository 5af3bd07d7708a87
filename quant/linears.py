"""The matrices of a model that could be quantized, under the names the output gives them.

Engines read quantized experts as one 2-D tensor an expert. Where a source stacks its experts
(Qwen3.5, Llama-4), the output's names are those that vLLM and llm-compressor use for the family:

    experts.gate_up_proj [E, 2F, D] -> experts.{e}.gate_proj [F, D], experts.{e}.up_proj [F, D]
    experts.down_proj    [E, D, F]  -> experts.{e}.down_proj [D, F]     (Llama-4: transposed)

Families whose stacked experts no engine reads that way are refused with the reason instead of a
guess. Which matrices are quantized by default is decided here once:

    yes     attention, dense MLP, shared expert, routed experts, numbered MTP layers' the same
    asked   lm_head, sparse attention's indexer, eh_proj   (a recipe may name them)
    never   router, embedding, norm, vision, `mtp.` parts, one-row gates, anything not 2-D
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from models.architecture import ExpertTensor, Place
from models.errors import InputError
from models.model_spec import ModelSpec

Use = Literal["default", "asked", "never"]

DEFAULT_KINDS = frozenset({"attention", "dense_mlp", "shared_expert", "expert"})
# stacked tensor -> the modules it becomes, in the order of its rows
UNSTACKED: Mapping[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}
# families whose stacked experts cannot be written one by one, and why
REFUSED: Mapping[str, str] = {
    "gpt_oss": "its experts have biases and gate and up rows alternate",
    "granitemoe": "engines read its experts as one stacked input_linear and output_linear",
    "granitemoeshared": "engines read its experts as one stacked input_linear and output_linear",
    "granitemoehybrid": "engines read its experts as one stacked input_linear and output_linear",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One [N, K] matrix: `module` is its path in the output, `logical` the source's tensor.

    A stacked source gives row `expert` of `logical`, transposed to [out, in] if `transposed`,
    and of that `rows`; otherwise `rows` is None. `refusal` says why it cannot be written.
    """

    module: str
    logical: str
    shape: tuple[int, int]
    place: Place
    use: Use
    stacked: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None
    refusal: str | None = None

    @property
    def layer(self) -> int | None:
        """Absolute layer index, None outside the layers."""
        return self.place.layer

    @property
    def is_expert(self) -> bool:
        """True for routed experts."""
        return self.place.kind == "expert"


def find_linears(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Linear, ...]:
    """All matrices among the logical tensors `shapes`, in that order.

    Embeddings are no Linears and left out; routers and others that stay as they are are listed
    (use "never"), because configs must name them.
    """
    found: list[Linear] = []
    for logical, shape in shapes.items():
        place = spec.place(logical)
        if place.kind == "expert" and place.expert is None:
            found += _stacked(spec, logical, shape, place)
            continue
        module = logical.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if module == logical or len(shape) != 2 or place.kind == "embed" or "embed" in last:
            continue
        use = _use(place, module, shape)
        found.append(
            Linear(module=module, logical=logical, shape=(shape[0], shape[1]), place=place, use=use)
        )
    return tuple(found)


def _use(place: Place, module: str, shape: tuple[int, ...]) -> Use:
    parts = module.split(".")
    if place.kind == "head" or (place.layer is not None and parts[-1] == "eh_proj"):
        return "asked"
    if place.kind not in DEFAULT_KINDS or shape[0] == 1:
        return "never"
    return "asked" if "indexer" in parts else "default"


def _stacked(
    spec: ModelSpec, logical: str, shape: tuple[int, ...], place: Place
) -> Iterator[Linear]:
    """The experts of one stacked tensor (biases, [E, width], are no matrices)."""
    if len(shape) != 3:
        return
    tensor = _expert_tensor(spec, logical)
    refusal = REFUSED.get(spec.family)
    own = tensor.name
    if refusal is None and own not in UNSTACKED:
        refusal = f"its stacked tensor {own} has no name for one expert"
    if refusal is not None:
        module = logical.removesuffix(".weight")
        yield Linear(
            module=module,
            logical=logical,
            shape=(shape[1], shape[2]),
            place=place,
            use="default",
            stacked=True,
            refusal=refusal,
        )
        return
    rows, columns = (shape[2], shape[1]) if tensor.transposed else (shape[1], shape[2])
    parts = UNSTACKED[own]
    if rows % len(parts):
        raise InputError(f"tensor {logical} of shape {list(shape)} cannot be split into {parts}")
    height, parent = rows // len(parts), logical[: -len(own)]
    for expert in range(shape[0]):
        for index, name in enumerate(parts):
            yield Linear(
                module=f"{parent}experts.{expert}.{name}",
                logical=logical,
                shape=(height, columns),
                place=Place("expert", place.layer, expert, place.role),
                use="default",
                stacked=True,
                transposed=tensor.transposed,
                rows=(index * height, (index + 1) * height),
            )


def _expert_tensor(spec: ModelSpec, logical: str) -> ExpertTensor:
    own = spec.canonical(logical)
    assert own is not None
    return next(
        tensor
        for tensor in spec.architecture.moe.experts
        if tensor.stacked and re.search(rf"(^|\.){re.escape(tensor.name)}$", own)
    )


def head_module(spec: ModelSpec, names: Mapping[str, object]) -> str:
    """Module path of the output head on disk; engines build one even where it is tied and no
    tensor of it is stored."""
    head = spec.architecture.head
    for name in names:
        if spec.place(name).kind == "head":
            return name.removesuffix(".weight")
    for prefix, canonical in spec.architecture.wrappers:
        if head.startswith(canonical) and any(
            name.startswith(prefix) and spec.place(name).kind == "embed" for name in names
        ):
            head = prefix + head[len(canonical) :]
            break
    return head.removesuffix(".weight")
