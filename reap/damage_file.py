"""damage.safetensors: the second-order statistics of every scored layer, beside saliency's files.

    layers.L.logits_RE, .bias_E, .weights_RE, .candidates_RC, .products (upper triangles of the
    matrices [C, C], row by row: float32 [R, C (C + 1) / 2]), .token_weight_R, .gram_EE, .norm_sq_E

and one metadata entry, "thresher": JSON with the format, the sha256 of the saliency.safetensors of
the same pass, the model's and the tokens' digests and each layer's routing law. One entry, because
the safetensors writer orders several by a random hash and a resumed job must end with the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import safe_open

from models.errors import InputError
from models.journal import write_atomically
from models.routing import law_from_json
from reap.damage import TENSORS, LayerDamage

FORMAT = "thresher.damage/1"
DAMAGE_FILE = "damage.safetensors"
PACKED = "products"


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageStats:
    """The damage statistics of all decoder layers that were scored (MTP layers have none)."""

    layers: Mapping[int, LayerDamage]
    saliency_sha256: str
    model_digest: str
    tokens_digest: str

    def save(self, directory: str | Path) -> None:
        """Write damage.safetensors: a function of the statistics alone."""
        tensors: dict[str, torch.Tensor] = {}
        for layer in sorted(self.layers):
            tensors |= to_tensors(layer, self.layers[layer])
        facts = {
            "format": FORMAT,
            "saliency": self.saliency_sha256,
            "model": self.model_digest,
            "tokens": self.tokens_digest,
            "laws": {str(layer): self.layers[layer].law.to_json() for layer in sorted(self.layers)},
        }
        write_atomically(Path(directory) / DAMAGE_FILE, _encoded(tensors, facts))

    @classmethod
    def load(cls, directory: str | Path) -> DamageStats:
        """Read what `save` wrote. InputError when it is missing or of another version."""
        path = Path(directory) / DAMAGE_FILE
        if not path.exists():
            raise InputError(
                f"{path} is missing: this criterion needs it; run thresher score with --damage"
            )
        facts, tensors = _decoded(path)
        return cls(
            layers={
                int(layer): from_tensors(tensors, int(layer), law, path)
                for layer, law in facts["laws"].items()
            },
            saliency_sha256=facts["saliency"],
            model_digest=facts["model"],
            tokens_digest=facts["tokens"],
        )


def to_tensors(layer: int, damage: LayerDamage) -> dict[str, torch.Tensor]:
    """A layer's tensors by their name in the file."""
    tensors = {f"layers.{layer}.{name}": getattr(damage, name).contiguous() for name in TENSORS}
    products_RCC = tensors.pop(f"layers.{layer}.products_RCC")
    first, second = torch.triu_indices(*products_RCC.shape[1:]).unbind()
    tensors[f"layers.{layer}.{PACKED}"] = products_RCC[:, first, second].contiguous()
    return tensors


def from_tensors(
    tensors: Mapping[str, torch.Tensor], layer: int, law: Mapping[str, Any], path: Path
) -> LayerDamage:
    """The reverse of `to_tensors`. InputError when a tensor is missing or law is not one."""
    try:
        found = {
            name: tensors[f"layers.{layer}.{name}"] for name in TENSORS if name != "products_RCC"
        }
        packed = tensors[f"layers.{layer}.{PACKED}"]
        count = found["candidates_RC"].shape[1]
        first, second = torch.triu_indices(count, count).unbind()
        products_RCC = torch.zeros(len(packed), count, count)
        products_RCC[:, first, second] = packed
        products_RCC[:, second, first] = packed
        return LayerDamage(law=law_from_json(law), products_RCC=products_RCC, **found)
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{path}: layer {layer} is not what this version writes ({error}); score again"
        ) from error


def write_layer_damage(path: Path, layer: int, damage: LayerDamage) -> None:
    """One layer's statistics, while the job runs."""
    write_atomically(path, _encoded(to_tensors(layer, damage), {"law": damage.law.to_json()}))


def read_layer_damage(path: Path, layer: int) -> LayerDamage:
    """The reverse of `write_layer_damage`."""
    facts, tensors = _decoded(path)
    return from_tensors(tensors, layer, facts["law"], path)


def _encoded(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> bytes:
    return safetensors.torch.save(tensors, {"thresher": json.dumps(facts)})


def _decoded(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(metadata.get("thresher", "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); score the model again") from error
    if facts.get("format", FORMAT) != FORMAT or not ({"law", "laws"} & set(facts)):
        raise InputError(f"{path} is not of format {FORMAT}; score the model again")
    return facts, tensors
