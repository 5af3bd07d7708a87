"""The same jobs by one process and by several under torchrun: are the results equal, how fast?

    python -m benchmarks.shared_job OUT [--processes 2] [--model DIR] [--layers 3] [--tokens 131072]

Without --model a random model of Qwen3-MoE's shape is written first (bfloat16, plain softmax
router). Tokens are random ids in samples of uneven length. Every file of both outputs is compared
byte by byte; where saliency differs, the largest relative difference of its sums is printed, where
a checkpoint does, the share of bytes that do. Seconds are the manifest's: from a process's first
use of the model to its last file, start-up and verification left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import cli.main
from calibration.tokens import TokenSet
from models.opening import open_model


def random_model(out: Path, layers: int, hidden: int, experts: int, inner: int) -> Path:
    """A checkpoint of Qwen3-MoE's shape, one file a layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "vocab_size": 4096, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": 4, "head_dim": 64, "num_experts": experts,
        "num_experts_per_tok": 8, "moe_intermediate_size": inner, "norm_topk_prob": True,
        "max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
    }  # fmt: skip

    def matrix(rows: int, columns: int) -> torch.Tensor:
        value = torch.randn(rows, columns, device=device) * columns**-0.5
        return value.bfloat16().cpu()

    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    files = {
        "outside": {
            "model.embed_tokens.weight": matrix(4096, hidden) * hidden**0.5,
            "lm_head.weight": matrix(4096, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    }
    widths = {"q": hidden, "k": 256, "v": 256}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors = {f"{at}self_attn.{n}_proj.weight": matrix(w, hidden) for n, w in widths.items()}
        tensors[f"{at}self_attn.o_proj.weight"] = matrix(hidden, hidden)
        tensors[f"{at}mlp.gate.weight"] = matrix(experts, hidden)
        for norm, width in (
            ("input_layernorm", hidden), ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", 64), ("self_attn.k_norm", 64),
        ):  # fmt: skip
            tensors[f"{at}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        for expert in range(experts):
            for role, shape in (
                ("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner)),
            ):  # fmt: skip
                tensors[f"{at}mlp.experts.{expert}.{role}_proj.weight"] = matrix(*shape)
        files[str(layer)] = tensors
    index = {}
    for number, tensors in enumerate(files.values(), start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, out / name)
        index |= dict.fromkeys(tensors, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return out


def random_tokens(model: Path, num_tokens: int) -> TokenSet:
    """Random ids in samples of 256 to 2,048."""
    generator = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        drawn = int(torch.randint(256, 2049, (), generator=generator))
        lengths.append(min(drawn, num_tokens - sum(lengths)))
    vocabulary = open_model(model).spec.text["vocab_size"]
    ids = torch.randint(0, vocabulary, (num_tokens,), generator=generator, dtype=torch.int32)
    return TokenSet(
        input_ids=ids,
        offsets=torch.tensor((0, *lengths)).cumsum(0),
        domain=torch.arange(len(lengths), dtype=torch.uint8) % 2,
        domains=["code", "tools"],
        mix="random",
        seed=1,
        tokenizer_sha256="0" * 64,
    )


def run(arguments: list[str], out: Path, processes: int) -> float:
    """Seconds the job took, of its own manifest. One process is this one."""
    arguments = [*arguments, "-o", str(out), "--quiet"]
    if processes == 1:
        with redirect_stdout(io.StringIO()):
            code, said = cli.main.run(arguments), ""
    else:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "cli.main", *arguments],
            env={"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        code, said = done.returncode, done.stderr[-3000:]
    if code:
        raise SystemExit(f"{' '.join(arguments[:2])} failed by {processes}: {said}")
    seconds: float = json.loads((out / "thresher.json").read_text())["timings"]["seconds"]
    return seconds


def compare(one: Path, several: Path) -> str:
    """What differs between two outputs, in words."""
    names = sorted(path.name for path in one.iterdir() if path.name != "thresher.json")
    if names != sorted(path.name for path in several.iterdir() if path.name != "thresher.json"):
        return "other files"
    unlike = [n for n in names if (one / n).read_bytes() != (several / n).read_bytes()]
    if not unlike:
        return f"all {len(names)} files equal"
    words = []
    for name in unlike:
        if name == "saliency.safetensors":
            first, second = load_file(one / name), load_file(several / name)
            worst = max(
                float(((a - second[key]).abs() / a.abs().clamp_min(1e-300)).max())
                for key, a in first.items()
            )
            words.append(f"{name}: sums within {worst:.1e}")
        else:
            ours, theirs = (
                torch.frombuffer(bytearray((folder / name).read_bytes()), dtype=torch.uint8)
                for folder in (one, several)
            )
            same = len(ours) == len(theirs)
            words.append(
                f"{name}: {float((ours != theirs).float().mean()):.1e} of the bytes"
                if same
                else f"{name}: another size"
            )
    return "; ".join(words)


def main() -> None:
    """Print one line for each command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--commands", default="score,quantize,compress")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    model = args.model or random_model(
        args.out / "model", args.layers, args.hidden, args.experts, args.inner
    )
    tokens = args.out / "tokens.safetensors"
    args.out.mkdir(exist_ok=True)
    random_tokens(model, args.tokens).save(tokens)
    keep = str(open_model(model).spec.num_experts // 2)
    options = {
        "score": [],
        "quantize": ["--scheme", "W3A16"],
        "compress": ["--scheme", "W3A16", "--keep", keep],
    }
    for command in args.commands.split(","):
        arguments = [command, str(model), "--tokens", str(tokens), *options[command]]
        folders = [args.out / f"{command}-{count}" for count in (1, args.processes)]
        alone = run(arguments, folders[0], 1)
        shared = run(arguments, folders[1], args.processes)
        print(
            f"{command} {model.name}, {args.tokens:,} tokens: {alone:.1f} s by one process, "
            f"{shared:.1f} s by {args.processes} ({alone / shared:.2f} times); "
            f"{compare(*folders)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
