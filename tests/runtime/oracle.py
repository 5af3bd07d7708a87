"""Packed checkpoints for the runtime's tests, and the same models decoded by others.

`decoded_model` decompresses every quantized matrix with compressed-tensors' own compressors and
loads the result with transformers' from_pretrained: neither the runtime's decoder nor its loader
has a part in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from safetensors.torch import save_file

from quant.config_groups import ConfigGroups
from quant.export import Layout
from quant.recipes import uniform
from quant.schemes import SCHEMES, Scheme, int_scheme, scheme_with
from runtime.packed import PackedWeights
from runtime.storage import Storage
from tests.quant.checkpoints import quantized_checkpoint
from tests.tiny import read_all, reference_model, tiny_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "model"
WIDE = {"head_dim": 32, "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256}
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def scheme_named(name: str) -> Scheme:
    """A scheme of the table, or `W3A16-asymmetric-64` and the like."""
    if name in SCHEMES:
        return SCHEMES[name]
    base, kind, group = name.split("-")
    if base in SCHEMES:
        return scheme_with(base, group_size=int(group), symmetric=kind == "symmetric")
    return int_scheme(int(base[1]), int(group), kind == "symmetric")


def quantized_demo(scheme: str, out: Path, layout: Layout = "compressed-tensors") -> Path:
    """The bundled model rounded to nearest, with its tokenizer."""
    quantized_checkpoint(DEMO, out, uniform(scheme_named(scheme)), layout)
    for name in KEPT:
        shutil.copy(DEMO / name, out)
    return out


def quantized_qwen(
    scheme: str, folder: Path, layout: Layout = "compressed-tensors", **overrides: Any
) -> Path:
    """A tiny Qwen3-MoE rounded to nearest."""
    tiny_model("qwen3_moe", folder / "source", dtype="bfloat16", **(WIDE | overrides))
    recipe = uniform(scheme_named(scheme))
    return quantized_checkpoint(folder / "source", folder / "packed", recipe, layout)


def decoded(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, quantized matrices decompressed to bfloat16."""
    config = json.loads((path / "config.json").read_text())
    tensors = read_all(path)
    settings = config["quantization_config"]
    if settings["quant_method"] in ("gptq", "auto-round"):
        return decoded_integers(tensors, settings)
    if settings["quant_method"] == "modelopt":
        ends = ".weight_scale_2"
        packed = [name.removesuffix(ends) for name in tensors if name.endswith(ends)]
        tensors = ModelOptNvfp4Converter(targets=packed).process(tensors)
        for module in packed:  # one number in a row, as it is stored there: it then keeps float32
            name = f"{module}.weight_global_scale"
            tensors[name] = tensors[name].reshape(1)
        settings = {"config_groups": {"one": config_group("NVFP4")}}
    if settings.get("quant_method") == "fp8":  # DeepSeek's blocks are FP8_BLOCK by another name
        settings = {"config_groups": {"one": config_group("FP8_BLOCK")}}
        tensors = {n.replace("weight_scale_inv", "weight_scale"): t for n, t in tensors.items()}
    matched = ConfigGroups(settings)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if f"{module}.weight_scale" in tensors:
            modules.setdefault(module, {})[suffix] = tensors[name]
    for module, own in modules.items():
        for suffix in own:
            del tensors[f"{module}.{suffix}"]
        name = matched.groups_of(module)[0]
        weight = decompress(own, matched.settings[name], matched.schemes[name].format)
        tensors[f"{module}.weight"] = weight.to(torch.bfloat16)
    return tensors


def config_group(name: str) -> dict[str, Any]:
    """A scheme as compressed-tensors' config names it."""
    scheme = SCHEMES[name]
    return {
        "weights": scheme.weights.model_dump(),
        "input_activations": scheme.input_activations.model_dump(),
        "targets": ["Linear"],
        "format": scheme.format,
    }


def decoded_integers(
    tensors: dict[str, torch.Tensor], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """GPTQ's and AutoRound's layout bit by bit: (code − zero) · scale, rounded once."""
    bits, group = settings["bits"], settings["group_size"]
    plus_one = settings.get("packing_format") != "auto_round"

    def streams(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Codes that lie one after the other in the bits of every row."""
        flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        return flat.reshape(len(words), -1, bits) @ (1 << np.arange(bits))

    decoded = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            codes = streams(tensor.numpy().T)
            zeros = (streams(tensors[f"{module}.qzeros"].numpy()) + plus_one) % (1 << bits)
            scales = tensors[f"{module}.scales"].float().numpy()
            columns = np.arange(codes.shape[1]) // group
            weight = (codes - zeros.T[:, columns]).astype(np.float32) * scales.T[:, columns]
            decoded[f"{module}.weight"] = torch.from_numpy(weight).to(torch.bfloat16)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            decoded[name] = tensor
    return decoded


def decompress(tensors: dict[str, torch.Tensor], settings: Any, layout: str) -> torch.Tensor:
    """One matrix by compressed-tensors."""
    from quant.recipe_files import validated_group

    group = validated_group(settings, "config.json")
    compressor = BaseCompressor.get_value_from_registry(layout)
    weight: torch.Tensor = compressor.decompress(dict(tensors), group)["weight"]
    return weight


def decoded_model(path: Path, folder: Path) -> Any:
    """transformers' own model of a packed checkpoint, in bfloat16, written to `folder` between."""
    folder.mkdir(parents=True)
    save_file(decoded(path), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return reference_model(folder, dtype=torch.bfloat16, attention="sdpa")


def random_weights(storage: Storage, experts: int, seed: int = 0) -> PackedWeights:
    """Random codes and scales as `storage` holds them, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weights = PackedWeights(storage, experts)
    weights.allocate(torch.device("cpu"))
    for name, tensor in weights.named_parameters():
        shape = tuple(tensor.shape)
        if name == "codes" and storage.kind == "int":
            value = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator)
        elif name == "codes" and storage.kind == "nvfp4":
            value = torch.randint(0, 256, shape, generator=generator)
        elif name == "zero_point":
            value = torch.randint(0, 1 << storage.bits, shape, generator=generator)
        elif name == "global_scale":
            value = 500 + 1000 * torch.rand(shape, generator=generator)
        elif name == "scale":
            value = (0.5 + torch.rand(shape, generator=generator)) * (
                200 if storage.kind == "nvfp4" else 0.02
            )
        else:
            value = torch.randn(shape, generator=generator)
        tensor.copy_(value)
    return weights
