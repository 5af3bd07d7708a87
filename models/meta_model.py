"""transformers' model without weights, and modules sent back to that state."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from models.errors import InputError
from models.model_spec import ModelSpec


def empty(module: nn.Module) -> None:
    """Send parameters and stored buffers of a module back to the meta device."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = torch.empty_like(buffer, device="meta")


def meta_model(spec: ModelSpec, dtype: torch.dtype, attention: str | None) -> Any:
    """transformers' causal LM of this config, without weights. Remote code is never run."""
    arch = spec.architecture
    settings = {
        key: value
        for key, value in spec.text.items()
        if key not in ("quantization_config", "auto_map", "model_type", "architectures")
    }
    config_class = transformers.CONFIG_MAPPING[arch.transformers_type]
    try:
        config = config_class.from_dict(settings)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:  # config classes raise kinds of their own
        raise InputError(
            f"transformers {transformers.__version__} refuses config.json as "
            f"{arch.transformers_type}: {' '.join(str(error).split())}"
        ) from error
    return model.eval().requires_grad_(False)
