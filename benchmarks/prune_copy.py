"""How fast `prune` moves bytes, next to `cp` on the same files in the same run.

    python benchmarks/prune_copy.py [--dir FOLDER] [--gigabytes 4] [--shard-gigabytes 0.5]
        [--layers 8] [--repeats 5]

A synthetic FP8 checkpoint in DeepSeek-V3's layout (128x128 blocks, 64 experts a layer) is written
to a temporary folder below FOLDER. Then `cp` of its shards and `prune` to all, three quarters and
half of the experts take turns; each is timed until its bytes are on the disk (fsync of every file
it wrote). The rate is bytes written by seconds; median and best of the repeats are shown with
their shares of cp's. `prune` includes opening the checkpoint, reading all headers, planning, the
sha256 of every file, journal, index and manifest; "copy alone" is the same byte plan without all
that. Nothing is dropped from the caches, for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from models.byte_copy import copy_pieces
from models.checkpoint import Checkpoint
from models.families import spec_of
from models.source_formats import Source
from models.writer import OutputTensor, Shard, plan_shards
from reap.cut import Cut
from reap.plan import PrunePlan
from reap.prune import prune_checkpoint

EXPERTS = 64
HIDDEN = 2048
CONFIG = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 0,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "hidden_size": HIDDEN,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def tensors_of(layers: int, inner: int) -> list[OutputTensor]:
    """Names, types and shapes of the synthetic checkpoint; the bytes are one random block."""
    noise = random.Random(0).randbytes(1 << 24)

    def made(name: str, dtype: str, *shape: int) -> OutputTensor:
        width = {"F8_E4M3": 1, "F32": 4, "BF16": 2}[dtype]
        size = width * shape[0] * (shape[1] if len(shape) > 1 else 1)
        return OutputTensor(name, dtype, shape, data=noise[:size])

    found = []
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp."
        found.append(made(mlp + "gate.weight", "BF16", EXPERTS, HIDDEN))
        found.append(made(mlp + "gate.e_score_correction_bias", "F32", EXPERTS))
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = (HIDDEN, inner) if name == "down_proj" else (inner, HIDDEN)
                stem = f"{mlp}experts.{expert}.{name}.weight"
                found.append(made(stem, "F8_E4M3", rows, columns))
                found.append(made(stem + "_scale_inv", "F32", -(-rows // 128), -(-columns // 128)))
    return found


def write_source(folder: Path, gigabytes: float, layers: int, shard_bytes: int) -> None:
    """The synthetic checkpoint."""
    inner = round(gigabytes * 1e9 / (layers * EXPERTS * 3 * HIDDEN) / 128) * 128
    plan = plan_shards(tensors_of(layers, inner), shard_bytes)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"num_hidden_layers": layers, "moe_intermediate_size": inner})
    )
    for shard in plan.shards:
        write_plainly(shard, folder / shard.name)
    (folder / "model.safetensors.index.json").write_bytes(plan.index())


def write_plainly(shard: Shard, path: Path) -> None:
    """One shard by the copying code alone, flushed."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    copy_pieces(list(shard.pieces()), fd, Event())
    os.fsync(fd)
    os.close(fd)


def flush(folder: Path) -> None:
    """fsync every file below a folder, and the folder."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def copy_with_cp(source: Path, out: Path) -> None:
    """cp, then fsync of what it wrote."""
    out.mkdir()
    subprocess.run(["cp", *sorted(map(str, source.glob("*.safetensors"))), str(out)], check=True)
    flush(out)


def plan_keeping(keep: int, layers: int) -> PrunePlan:
    """A random plan, the same number from each of the eight groups."""
    chance, size = random.Random(1), EXPERTS // 8
    kept = {
        layer: tuple(
            expert
            for first in range(0, EXPERTS, size)
            for expert in sorted(chance.sample(range(first, first + size), keep // 8))
        )
        for layer in range(layers)
    }
    return PrunePlan(criterion="random", num_experts=EXPERTS, keep=keep, layers=kept)


def prune(source: Path, out: Path, plan: PrunePlan, shard_bytes: int) -> None:
    """What `thresher prune` does once its modules are imported."""
    checkpoint = Checkpoint.open(source)
    opened = Source(checkpoint, spec_of(checkpoint.config))
    prune_checkpoint(opened, plan, out, max_shard_bytes=shard_bytes)


def copy_alone(source: Path, out: Path, plan: PrunePlan, shard_bytes: int) -> None:
    """The same ranges without sha256, journal, carried files or manifest."""
    checkpoint = Checkpoint.open(source)
    opened = Source(checkpoint, spec_of(checkpoint.config))
    cut = Cut(opened.spec, plan)
    out.mkdir()
    shards = plan_shards(cut.tensors(opened), shard_bytes).shards
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda shard: write_plainly(shard, out / shard.name), shards))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--shard-gigabytes", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    layers = options.layers
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        source, out = Path(temporary, "source"), Path(temporary, "out")
        source.mkdir()
        size = round(options.shard_gigabytes * 1e9)
        write_source(source, options.gigabytes, layers, size)
        ways: dict[str, Callable[[], None]] = {"cp": lambda: copy_with_cp(source, out)}
        for keep in (EXPERTS, EXPERTS * 3 // 4, EXPERTS // 2):
            plan = plan_keeping(keep, layers)
            ways[f"prune, keep {keep}"] = lambda plan=plan: prune(source, out, plan, size)
        ways[f"copy alone, keep {plan.keep}"] = lambda: copy_alone(source, out, plan, size)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        copy_with_cp(source, out)  # the first touch of every page is nobody's
        for _ in range(options.repeats):
            for name, way in ways.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                began = time.perf_counter()
                way()
                seconds = time.perf_counter() - began
                written = sum(p.stat().st_size for p in out.rglob("*.safetensors"))
                rates[name].append(written / seconds / 1e9)
        report(rates)


def report(rates: dict[str, list[float]]) -> None:
    """Medians and bests, each with its share of cp's. The best is the least disturbed run."""
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end")
    print(f"{'':24s} median GB/s  of cp   best GB/s  of cp   all repeats")
    for name, values in rates.items():
        median, best = statistics.median(values), max(values)
        shares = median / statistics.median(rates["cp"]), best / max(rates["cp"])
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:24s} {median:11.2f} {shares[0]:6.0%} {best:11.2f} {shares[1]:6.0%}   {each}")


if __name__ == "__main__":
    main()
