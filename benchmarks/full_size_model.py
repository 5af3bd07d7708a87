"""DeepSeek-V3.2 at its full width with a few layers: random weights in the real FP8 layout.

    python -m benchmarks.full_size_model FOLDER [--moe-layers 2] [--experts 256]

One dense layer comes first; a MoE layer of 256 experts is 11.5 GB. Only the vocabulary is small
(4,096), to save disk. Codes are normal values times 100 rounded to E4M3, so all exponents occur;
scales differ from block to block. Made on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from calibration.tokens import TokenSet

HIDDEN, INNER, DENSE, HEADS, VOCABULARY = 7168, 2048, 18432, 128, 4096
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (HEADS * 192, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (HEADS * 256, 512),
    "o_proj": (HIDDEN, HEADS * 128),
    "indexer.wq_b": (64 * 128, 1536),
    "indexer.wk": (128, HIDDEN),
}
NORMS = {
    "input_layernorm": HIDDEN,
    "post_attention_layernorm": HIDDEN,
    "self_attn.q_a_layernorm": 1536,
    "self_attn.kv_a_layernorm": 512,
    "self_attn.indexer.k_norm": 128,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain(*shape: int) -> torch.Tensor:
    """Normal bf16 weights that keep the size of what they are applied to."""
    return (torch.randn(shape, device=DEVICE) * shape[-1] ** -0.5).bfloat16().cpu()


def fp8(name: str, rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A matrix of E4M3 codes and the float32 scales of its 128 x 128 blocks."""
    codes = (torch.randn(rows, columns, device=DEVICE) * 100).clamp_(-448, 448)
    scale = (0.5 + torch.rand(-(-rows // 128), -(-columns // 128), device=DEVICE)) / 100
    yield f"{name}.weight", codes.to(torch.float8_e4m3fn).cpu()
    yield f"{name}.weight_scale_inv", (scale * columns**-0.5).cpu()


def mlp(name: str, inner: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate, up and down."""
    yield from fp8(f"{name}.gate_proj", inner, HIDDEN)
    yield from fp8(f"{name}.up_proj", inner, HIDDEN)
    yield from fp8(f"{name}.down_proj", HIDDEN, inner)


def decoder_layer(layer: int, experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a layer; `experts` 0 for the dense one."""
    base = f"model.layers.{layer}."
    for name, (rows, columns) in ATTENTION.items():
        yield from fp8(f"{base}self_attn.{name}", rows, columns)
    yield f"{base}self_attn.indexer.weights_proj.weight", plain(64, HIDDEN)
    yield f"{base}self_attn.indexer.k_norm.bias", torch.zeros(128)
    for name, size in NORMS.items():
        dtype = torch.float32 if name.endswith("k_norm") else torch.bfloat16
        yield f"{base}{name}.weight", torch.ones(size, dtype=dtype)
    if not experts:
        yield from mlp(f"{base}mlp", DENSE)
        return
    yield f"{base}mlp.gate.weight", plain(experts, HIDDEN)
    bias = 0.02 * torch.randn(experts, device=DEVICE)
    yield f"{base}mlp.gate.e_score_correction_bias", bias.cpu()
    yield from mlp(f"{base}mlp.shared_experts", INNER)
    for expert in range(experts):
        yield from mlp(f"{base}mlp.experts.{expert}", INNER)


def write_model(folder: Path, moe_layers: int, experts: int = 256) -> None:
    """The checkpoint, in shards of about 4 GB."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = CONFIG | {"num_hidden_layers": 1 + moe_layers, "n_routed_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    filled = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for layer in range(1 + moe_layers):
        for name, tensor in decoder_layer(layer, experts if layer else 0):
            pending[name] = tensor
            filled += tensor.nbytes
            if filled > 4e9:
                flush()
                filled = 0
    pending["model.embed_tokens.weight"] = plain(VOCABULARY, HIDDEN)
    pending["lm_head.weight"] = plain(VOCABULARY, HIDDEN)
    pending["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    flush()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokens(path: Path, samples: int, length: int = 2048) -> None:
    """A token set of random ids."""
    generator = torch.Generator().manual_seed(1)
    TokenSet(
        input_ids=torch.randint(0, VOCABULARY, (samples * length,), generator=generator).int(),
        offsets=torch.arange(samples + 1) * length,
        domain=(torch.arange(samples) % 3).to(torch.uint8),
        domains=["code", "tools", "swe"],
        mix="random",
        seed=1,
        tokenizer_sha256="0" * 64,
    ).save(path)


def token_file(folder: Path, tokens: int, length: int = 2048) -> Path:
    """The token set of so many tokens in `folder`, written where it is not there yet."""
    path = folder / f"tokens-{tokens}.safetensors"
    if not path.exists():
        write_tokens(path, tokens // length, length)
    return path


def main() -> None:
    """Write a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    options = parser.parse_args()
    write_model(options.folder, options.moe_layers, options.experts)


if __name__ == "__main__":
    main()
