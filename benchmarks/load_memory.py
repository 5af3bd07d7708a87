"""Peak resident memory while a packed checkpoint is loaded on a CPU.

The bundled model, and a synthetic W3A16 checkpoint of 2 GB (22 layers of 64 experts, bfloat16
embedding and head), each loaded in processes of their own, and the growth of the peak resident size
compared with the checkpoint plus one layer. It is counted from two beginnings, both after the
imports of runtime.load, so that both hold the family's code, which transformers imports when it
builds the model:

    as it is                  the first use of torch's functions also brings *their* code into
                              memory, as pages of its files (which the system can drop, and all
                              processes share)
    with all library pages    every file that the process maps was read into memory before, so that
                              what grows is what the loading itself allocates

    python benchmarks/load_memory.py [--folder DIR]

Needs 2 GB of disk and 4 GB of memory, and Linux 5.14.
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

from models.checkpoint import Checkpoint
from models.model_spec import ModelSpec
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
import ctypes, gc, sys
from pathlib import Path
import torch
from models.memory import release_freed_memory
from runtime.load import load_model
POPULATE_READ = 22  # madvise(2): fault pages in now
def resident(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024
def read_library_pages():
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, _, inode = line.split()[:5]
        if inode == "0" or not mode.startswith("r"):
            continue
        start, end = (int(place, 16) for place in span.split("-"))
        failed = libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), POPULATE_READ)
        if failed:
            raise OSError(ctypes.get_errno(), f"madvise of {line}")
torch.set_num_threads(1)
if sys.argv[2] == "read":
    read_library_pages()
gc.collect()
release_freed_memory()  # nor may it take memory that the imports had freed and not given back
Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
peak, files = resident("VmHWM"), resident("RssFile")
loaded = load_model(sys.argv[1])
print(resident("VmHWM") - peak, resident("RssFile") - files, loaded.nbytes)
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
            peak, files, held = measured(path, "as it is")
            own, _, _ = measured(path, "read")
            size = sum(info.nbytes for info in Checkpoint.open(path).tensors.values())
            layer = largest_layer(path)
            print(
                f"{name}: checkpoint {size / 1e6:,.1f} MB, held {held / 1e6:,.1f} MB, largest "
                f"layer {layer / 1e6:,.1f} MB\n"
                f"  as it is: {peak / 1e6:,.1f} MB, {files / 1e6:,.1f} of it pages of libraries' "
                f"files; {peak / (size + layer):.3f} of checkpoint plus layer\n"
                f"  with all library pages in memory before: {own / 1e6:,.1f} MB; "
                f"{own / (size + layer):.3f} of checkpoint plus layer"
            )


if __name__ == "__main__":
    main()
