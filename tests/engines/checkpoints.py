"""Writes what test_vllm.py loads: quantized checkpoints and what transformers says of them.

    python -m tests.engines.checkpoints FOLDER

For each case: FOLDER/NAME (the checkpoint, by `thresher quantize`, which verifies it) and
FOLDER/NAME.json (prompts, and the log probability of each prompt token and of a greedy
continuation, by transformers in float32 over weights that compressed-tensors has decompressed).
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_name
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cli.main import run
from tests.tiny import read_all, tiny_model
from tests.tiny_formats import Tensors, decode
from tests.token_sets import random_token_set

DEMO = Path(__file__).parents[2] / "demo" / "model"
NEW_TOKENS = 16
# DeepSeek-V3.2 without its indexer, which reads every key of a prompt this short, is DeepSeek-V3
V32_ONLY = ("index_head_dim", "index_n_heads", "index_topk")
# groups of 128, and q, k and v of whole blocks of rows: vLLM refuses others in one fused matrix
WIDE = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 128)
# vLLM's MLA on a CPU is compiled for DeepSeek's own latent sizes only
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
MIXED = """\
quant_stage:
  quant_modifiers:
    GPTQModifier:
      config_groups:
        experts:
          targets: ["re:.*mlp.experts.*"]
          weights: {num_bits: 3, type: int, strategy: group, group_size: 128, symmetric: true}
        rest:
          targets: ["re:.*self_attn.*"]
          weights: {num_bits: 4, type: int, strategy: group, group_size: 32, symmetric: true}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint: what `quantize` is given (None: the source as it is), and the prompts."""

    name: str
    source: str
    arguments: tuple[str, ...] | None
    prompts: tuple[tuple[int, ...], ...]


QWEN_PROMPTS = (tuple(range(3, 35)), tuple(range(100, 110)), (7,))
DEMO_PROMPTS = ((0, *range(300, 340)), (17, 18, 19), (300,))
LATENT_PROMPTS = (tuple(range(3, 40)), tuple(range(100, 107)), (77,))
ZERO_POINTS = ("--asymmetric", "--group-size", "64")
CASES = (
    *(
        Case(f"qwen3-moe-{name}", "qwen3-moe", ("--scheme", name), QWEN_PROMPTS)
        for name in ("W4A16", "W3A16", "NVFP4A16", "NVFP4", "FP8_BLOCK")
    ),
    *(
        Case(f"qwen3-moe-{name}-asymmetric", "qwen3-moe", ("--scheme", name, *ZERO_POINTS),
             QWEN_PROMPTS)
        for name in ("W4A16", "W3A16")
    ),
    Case("qwen3-moe-mixed", "qwen3-moe", ("--recipe", "mixed.yaml"), QWEN_PROMPTS),
    # between 1.08 and 2.37 MB: experts of layers differ
    Case("qwen3-moe-budget", "qwen3-moe", ("--budget", "1.4MB"), QWEN_PROMPTS),
    Case("demo-FP8", "demo", None, DEMO_PROMPTS),
    *(
        Case(f"demo-{name}", "demo", ("--scheme", name, "--method", "rtn"), DEMO_PROMPTS)
        for name in ("W3A16", "NVFP4A16", "FP8_BLOCK")
    ),
    *(
        Case(f"latent-{name}", "latent", ("--scheme", name), LATENT_PROMPTS)
        for name in ("W3A16", "NVFP4A16")
    ),
)  # fmt: skip


def main(folder: Path) -> None:
    """Write every checkpoint and its expectations."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {
        "demo": DEMO,
        "qwen3-moe": tiny_model(
            "qwen3_moe", folder / "qwen3-moe", dtype="bfloat16", head_dim=32, vocab_size=512,
            mlp_only_layers=[], num_attention_heads=8, num_key_value_heads=4, **WIDE,
        ),
        "latent": tiny_model(
            "deepseek_v3", folder / "latent", dtype="bfloat16", num_nextn_predict_layers=0,
            q_lora_rank=128, **LATENT, **WIDE,
        ),
    }  # fmt: skip
    tokens = folder / "tokens.safetensors"
    random_token_set(160, (60,) * 8, (0, 1) * 4).save(tokens)
    (folder / "mixed.yaml").write_text(MIXED)
    for case in CASES:
        source, out = sources[case.source], folder / case.name
        if case.source != "demo":
            quantize(source, out, case, tokens)
        elif case.arguments is None:
            as_deepseek_v3(source, out)
        else:
            with tempfile.TemporaryDirectory() as work:
                quantize(source, Path(work) / "out", case, tokens)
                as_deepseek_v3(Path(work) / "out", out)
        expect(out, case.prompts)


def quantize(source: Path, out: Path, case: Case, tokens: Path) -> None:
    """`thresher quantize`, in this process."""
    given = list(case.arguments or ())
    given = [str(tokens.with_name(one)) if one.endswith(".yaml") else one for one in given]
    if "rtn" not in given:
        given += ["--tokens", str(tokens)]
    code = run(["quantize", str(source), *given, "-o", str(out), "--quiet"])
    if code != 0:
        sys.exit(code)


def as_deepseek_v3(source: Path, out: Path) -> None:
    """The checkpoint under DeepSeek-V3's config, without indexer and MTP layer."""
    config = json.loads((source / "config.json").read_text())
    layers = config["num_hidden_layers"]
    config = {key: value for key, value in config.items() if key not in V32_ONLY}
    config |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 0,
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config, indent=2))
    kept = {
        name: tensor
        for name, tensor in read_all(source).items()
        if ".indexer." not in name and f".layers.{layers}." not in name
    }
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def expect(folder: Path, prompts: tuple[tuple[int, ...], ...]) -> None:
    """Write NAME.json beside the checkpoint: transformers' answers to `prompts`."""
    with tempfile.TemporaryDirectory() as dense:
        decompress(folder, Path(dense))
        model = AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, attn_implementation="eager"
        )
    answers = [answer(model, prompt) for prompt in prompts]
    Path(f"{folder}.json").write_text(json.dumps(answers))


def answer(model: Any, prompt: tuple[int, ...]) -> dict[str, Any]:
    """Log probabilities of the prompt's tokens, and a greedy continuation with its own."""
    ids, chosen, logprobs = torch.tensor([prompt]), [], []
    with torch.inference_mode():
        for step in range(NEW_TOKENS):
            each = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            if step == 0:
                seen = each[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
            best = int(each[-1].argmax())
            chosen.append(best)
            logprobs.append(float(each[-1, best]))
            ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
    return {"prompt": prompt, "prompt_logprobs": seen, "tokens": chosen, "logprobs": logprobs}


def decompress(folder: Path, out: Path) -> None:
    """The checkpoint in bfloat16, by compressed-tensors; DeepSeek's FP8 by tests/tiny_formats."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    tensors = read_all(folder)
    if settings["quant_method"] == "fp8":
        dense = decode(tensors)
    else:
        groups = QuantizationConfig.model_validate(settings).config_groups
        dense = by_compressed_tensors(tensors, groups, settings["format"])
    rounded = {
        name: tensor if tensor is tensors.get(name) else tensor.to(torch.bfloat16)
        for name, tensor in dense.items()
    }
    (out / "config.json").write_text(json.dumps(config))
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})


def by_compressed_tensors(
    tensors: Tensors, groups: dict[str, QuantizationScheme], layout: str
) -> Tensors:
    """Every weight plain; what has a scale is decompressed as the group says that names it."""
    modules: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    dense: Tensors = {}
    for module, stored in modules.items():
        parts = stored
        if "weight_scale" in stored:
            group = next(
                group
                for group in groups.values()
                if any(one == "Linear" or match_name(module, one) for one in group.targets)
            )
            compressor = BaseCompressor.get_value_from_registry(group.format or layout)
            parts = {"weight": compressor.decompress(stored, group)["weight"].data}
        dense |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return dense


if __name__ == "__main__":
    main(Path(sys.argv[1]))
