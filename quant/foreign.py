"""Exported checkpoints (quant/export.py) in the words of compressed-tensors, for verification.

The config of each layout is read as its own readers do, and the tensors are translated by the
identities between the formats, so that both decoders can be asked:

    weight_packed = qweight transposed; scales transposed; zero points stored as z or z − 1
    global scales of ModelOpt are the reciprocals
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any

import torch

from models.errors import InputError, VerificationError
from quant.config_groups import ConfigGroups
from quant.export import GPTQ_BITS, Layout
from quant.format import pack_bits
from quant.schemes import SCHEMES, Scheme, int_scheme
from quant.spec_decoder import bit_codes

LAYOUT_OF: Mapping[str, Layout] = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "auto-round": "auto-round",
    "modelopt": "modelopt",
}
GROUP = "the one scheme"


class ExportedGroups(ConfigGroups):
    """The one scheme of a gptq, auto-round or modelopt config, and what it leaves alone."""

    def __init__(self, layout: Layout, config: Mapping[str, Any]) -> None:
        """InputError for settings that are none of ours."""
        super().__init__({})
        self.layout, self.config = layout, config
        self.schemes = {GROUP: self._scheme()}
        scheme = self.schemes[GROUP]
        self.settings = {
            GROUP: {
                "weights": scheme.weights,
                "input_activations": scheme.input_activations,
                "format": scheme.format,
            }
        }
        # readers of z − 1 add one; only AutoRound's own packing stores z
        self.stores_z = layout == "auto-round" and config.get("packing_format") == "auto_round"

    def _scheme(self) -> Scheme:
        config = self.config
        if self.layout == "modelopt":
            if config.get("quant_algo") != "NVFP4":
                raise InputError(
                    f"config.json: quant_algo {config.get('quant_algo')!r} is not read"
                )
            return SCHEMES["NVFP4"]
        bits, size, symmetric = (config.get(key) for key in ("bits", "group_size", "sym"))
        if bits not in GPTQ_BITS or type(size) is not int or type(symmetric) is not bool:
            raise InputError(
                f"config.json: bits {bits!r}, group_size {size!r}, sym {symmetric!r} is not read"
            )
        if config.get("desc_act") or config.get("checkpoint_format", "gptq") != "gptq":
            raise InputError("config.json: desc_act and other checkpoint_formats are not read")
        return int_scheme(bits, size, symmetric)

    def groups_of(self, module: str) -> list[str]:
        """Every matrix is a target unless it is left alone."""
        return [GROUP]

    def ignored(self, module: str) -> bool:
        """Whether the layout's readers leave the module alone."""
        config = self.config
        if self.layout == "modelopt":
            return any(fnmatch.fnmatch(module, pattern) for pattern in config.get("ignore") or ())
        if self.layout == "gptq":
            left = [p[2:] for p in config.get("dynamic") or () if p.startswith("-:")]
            head = module.rpartition(".")[2] in ("lm_head", "head") and not config.get("lm_head")
            return head or any(re.match(pattern, module) for pattern in left)
        blocks = str(config.get("block_name_to_quantize")).split(",")
        if not any(module.startswith(block + ".") for block in blocks):
            return True
        plain = [k for k, own in (config.get("extra_config") or {}).items() if own["bits"] >= 16]
        return any(module == key or re.fullmatch(key, module) for key in plain)

    def translate(
        self, module: str, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One matrix as compressed-tensors would store it.

        VerificationError when symmetric weights have zero points off the middle: then they were
        stored by the other convention, and every weight would be one step off.
        """
        if self.layout == "modelopt":
            return {
                "weight_packed": tensors["weight"],
                "weight_scale": tensors["weight_scale"],
                "weight_global_scale": (1.0 / tensors["weight_scale_2"]).reshape(1),
                "input_global_scale": (1.0 / tensors["input_scale"]).reshape(1),
            }
        scheme = self.schemes[GROUP]
        assert scheme.group_size is not None
        groups, rows = tensors["scales"].shape
        columns = groups * scheme.group_size
        zeros = torch.from_numpy(bit_codes(tensors["qzeros"].numpy(), scheme.bits, rows)).int()
        zeros = (zeros + (0 if self.stores_z else 1)) & ((1 << scheme.bits) - 1)
        translated = {
            "weight_packed": tensors["qweight"].T.contiguous(),
            "weight_scale": tensors["scales"].T.contiguous(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if scheme.symmetric:
            if bool((zeros != 1 << (scheme.bits - 1)).any()):
                raise VerificationError(f"{module}.qzeros are not those of symmetric weights")
            return translated
        packed = pack_bits(zeros.to(torch.uint8), scheme.bits)
        return {**translated, "weight_zero_point": packed.T.contiguous()}
