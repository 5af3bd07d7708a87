"""Peak resident memory while a packed checkpoint is loaded on a CPU.

The bundled model, and a synthetic W3A16 checkpoint of 2 GB (24 layers of 64 experts, bfloat16
embedding and head), each loaded in processes of their own. Counted is the growth of the peak over
what the process has after its imports; to be compared with the checkpoint plus one layer.

transformers imports the model's code when it builds it, and modules and their tables take some
memory whatever the weights. So the model is also built without its weights, in a process that then
loads it: what the first costs is printed, and the growth over it.

    python benchmarks/load_memory.py [--folder DIR]

Needs 2 GB of disk and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.architecture import ModelSpec
from models.checkpoint import Checkpoint
from models.opening import open_model
from quant.config import quantization_config, with_quantization
from quant.linears import find_linears
from quant.schemes import SCHEMES

DEMO = Path(__file__).parents[1] / "demo" / "model"
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32768,
    "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "num_hidden_layers": 22,
}  # fmt: skip

LOAD = """
import sys
from pathlib import Path
import torch
from models.opening import open_model
from models.skeleton import Skeleton
from runtime.load import load_model
def peak():
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024
def start():
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    return peak()
torch.set_num_threads(1)
before = start()
if sys.argv[2] == "built":
    source = open_model(sys.argv[1]).source
    built = Skeleton(source, dtype=torch.bfloat16, device=torch.device("cpu"), attention=None)
first = peak() - before
before = start()
loaded = load_model(sys.argv[1])
print(peak() - before, first, loaded.nbytes)
"""


def write_synthetic(folder: Path) -> Path:
    """Random codes and scales in the layout of W3A16, one shard a layer."""
    folder.mkdir()
    scheme, hidden, inner = SCHEMES["W3A16"], CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    weight_map: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def packed(tensors: dict[str, torch.Tensor], module: str, rows: int, columns: int) -> None:
        for suffix, (dtype, shape) in scheme.packed((rows, columns), torch.bfloat16).items():
            if suffix == "weight_packed":
                value = torch.randint(-(2**31), 2**31 - 1, shape).to(dtype)
            elif suffix == "weight_shape":
                value = torch.tensor([rows, columns])
            else:
                value = (0.01 * (0.5 + torch.rand(shape))).to(dtype)
            tensors[f"{module}.{suffix}"] = value
        shapes[f"{module}.weight"] = (rows, columns)

    def plain(tensors: dict[str, torch.Tensor], name: str, *shape: int) -> None:
        tensors[name] = torch.randn(shape).bfloat16()
        shapes[name] = shape

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(int(str(CONFIG["num_hidden_layers"]))):
        tensors: dict[str, torch.Tensor] = {}
        base = f"model.layers.{layer}."
        for name, rows, columns in (
            ("q_proj", 2048, hidden), ("k_proj", 512, hidden), ("v_proj", 512, hidden),
            ("o_proj", hidden, 2048),
        ):  # fmt: skip
            packed(tensors, f"{base}self_attn.{name}", rows, columns)
        for expert in range(64):
            for name in ("gate_proj", "up_proj"):
                packed(tensors, f"{base}mlp.experts.{expert}.{name}", inner, hidden)
            packed(tensors, f"{base}mlp.experts.{expert}.down_proj", hidden, inner)
        plain(tensors, f"{base}mlp.gate.weight", 64, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain(tensors, f"{base}{name}.weight", hidden)
        for name in ("q_norm", "k_norm"):
            plain(tensors, f"{base}self_attn.{name}.weight", 128)
        write(f"layer-{layer:02}.safetensors", tensors)
    ends: dict[str, torch.Tensor] = {}
    plain(ends, "model.embed_tokens.weight", 32768, hidden)
    plain(ends, "lm_head.weight", 32768, hidden)
    plain(ends, "model.norm.weight", hidden)
    write("ends.safetensors", ends)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = open_model_spec(folder)
    linears = find_linears(spec, shapes)
    schemes = {
        one.module: scheme if f"{one.module}.weight_packed" in weight_map else None
        for one in linears
    }
    config = with_quantization(CONFIG, quantization_config(linears, schemes, "lm_head"), None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_model_spec(folder: Path) -> ModelSpec:
    """The family of the folder's config."""
    from models.checkpoint import load_config
    from models.families import spec_of

    return spec_of(load_config(folder))


def largest_layer(path: Path) -> int:
    """Bytes of the largest decoder layer on disk."""
    opened = open_model(path)
    sizes: dict[int, int] = {}
    for logical in opened.source.names():
        layer = opened.spec.place(logical).layer
        if layer is not None and layer < opened.spec.num_layers:
            own = sum(info.nbytes for info in opened.source.parts(logical))
            sizes[layer] = sizes.get(layer, 0) + own
    return max(sizes.values())


def measured(path: Path, how: str) -> list[int]:
    """What LOAD prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), how], capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


def main() -> None:
    """Print one row a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for name, path in (("demo", DEMO), ("W3A16", write_synthetic(Path(temporary) / "w3"))):
            peak, _, held = measured(path, "fresh")
            above, built, _ = measured(path, "built")
            size = sum(info.nbytes for info in Checkpoint.open(path).tensors.values())
            layer = largest_layer(path)
            print(
                f"{name}: checkpoint {size / 1e6:,.1f} MB, largest layer {layer / 1e6:,.1f} MB; "
                f"held {held / 1e6:,.1f} MB, peak {peak / 1e6:,.1f} MB = "
                f"{peak / (size + layer):.3f} of checkpoint plus layer; built without weights "
                f"{built / 1e6:,.1f} MB, growth over that {above / 1e6:,.1f} MB = "
                f"{above / (held + layer):.3f} of what is held plus layer"
            )


if __name__ == "__main__":
    main()
