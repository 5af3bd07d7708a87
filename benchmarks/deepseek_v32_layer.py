"""DeepSeek-V3.2 on one GPU, measured on full-size layers by the real commands.

    python -m benchmarks.deepseek_v32_layer FOLDER [--parts compress nvfp4 resume disk repair]
        [--tokens 131072 262144] [--json FILE]

A checkpoint of one dense and two MoE layers (24 GB, random weights in the FP8 layout:
full_size_model.py) is written to FOLDER once and used again. Then

compress  `compress --keep 128 --scheme W3A16` at two numbers of calibration tokens, the source in
          the page cache. A layer's time is what passes between the last shard of one MoE layer and
          the last of the next; it is a line in the number of tokens, and 2,785,280 (1,360 samples
          of 2,048) are read off that line. GPU memory as nvidia-smi sees it, host memory as the
          kernel's peak of the process without the hidden states, which are counted apart. The
          check of the written files, which follows every job, is in none of the figures.
nvfp4     the same with `--keep 192 --scheme NVFP4`.
resume    `compress` killed in the middle of the second MoE layer and called again: the first
          layer's shards must be untouched and all files those of the run that was not killed.
disk      `prune` and `quantize --method rtn --scheme NVFP4A16` from and to the disk, next to its
          own rates: cold reads and flushed writes by 8 threads, and `cp`. The jobs' own time, from
          their manifests: neither the start of Python nor the check of the output is in it.

Kernels by themselves: stream_kernels.py, hessian_kernels.py and gptq_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.disk_rates import copy_rate, forget, read_rate, size, write_rate
from benchmarks.full_size_model import HIDDEN, token_file, write_model
from models.opening import open_model
from reap.repair_layer import repaired_file
from reap.stats import LayerStats, SaliencyStats

SAMPLE = 2048
TARGET_TOKENS = 1360 * SAMPLE
MOE_LAYERS = 2
THRESHER = [sys.executable, "-m", "cli.main"]


@dataclass(frozen=True, slots=True)
class Run:
    """One command: seconds, peaks in bytes, and when the last shard of each layer was there."""

    seconds: float
    gpu: int
    host: int
    layer_done: dict[int, float]

    @property
    def layer_seconds(self) -> float:
        """Of the last MoE layer."""
        return self.layer_done[MOE_LAYERS] - self.layer_done[MOE_LAYERS - 1]


class Peaks(threading.Thread):
    """Peaks of a process's resident size and of the GPU's memory in use, polled."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.gpu, self.host = pid, 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
            self.gpu = max(self.gpu, total - free)
            try:
                status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM"):
                    self.host = max(self.host, int(line.split()[1]) * 1024)


def run(arguments: Sequence[str], out: Path) -> Run:
    """A command until its manifest is there: the check of what it wrote is not waited for."""
    began = time.monotonic()
    process = subprocess.Popen([*THRESHER, *arguments, "-o", str(out), "--quiet"])
    peaks = Peaks(process.pid)
    peaks.start()
    while process.poll() is None and not (out / "thresher.json").exists():
        time.sleep(0.05)
    seconds = time.monotonic() - began
    process.kill()
    status = process.wait()
    peaks.over.set()
    if not (out / "thresher.json").exists():
        raise SystemExit(f"{' '.join(arguments[:2])} ended with status {status}")
    return Run(seconds, peaks.gpu, peaks.host, layers_done(out))


def shards_of_layers(out: Path) -> dict[int, set[str]]:
    """The files that hold tensors of each layer."""
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    found: dict[int, set[str]] = {}
    for name, file in index["weight_map"].items():
        if name.startswith("model.layers."):
            found.setdefault(int(name.split(".")[2]), set()).add(file)
    return found


def layers_done(out: Path) -> dict[int, float]:
    """When the last shard of each layer was renamed into place."""
    if not (out / "model.safetensors.index.json").exists():
        return {}
    return {
        layer: max((out / file).stat().st_ctime for file in files)
        for layer, files in shards_of_layers(out).items()
    }


def compress_command(folder: Path, tokens: int, keep: int, scheme: str) -> list[str]:
    """`compress` of the model with so many tokens."""
    path = token_file(folder, tokens)
    model = str(folder / "model")
    return [
        *("compress", model, "--keep", str(keep), "--scheme", scheme, "--tokens", str(path)),
    ]


def measure_compress(folder: Path, counts: Sequence[int], keep: int, scheme: str) -> dict[str, Any]:
    """Layer times at each number of tokens, the line through them, and peaks."""
    rows = []
    for tokens in counts:
        out = folder / f"compressed-{scheme}-{tokens}"
        shutil.rmtree(out, ignore_errors=True)
        done = run(compress_command(folder, tokens, keep, scheme), out)
        hidden = 2 * tokens * HIDDEN * 2  # two streams: scoring and rounding
        rows.append(
            {
                "tokens": tokens,
                "seconds": round(done.seconds, 1),
                "layer_seconds": round(done.layer_seconds, 2),
                "gpu_gb": round(done.gpu / 1e9, 1),
                "host_gib_beyond_hidden": round((done.host - hidden) / 2**30, 1),
            }
        )
        print(f"compress {keep} {scheme}: {rows[-1]}", flush=True)
    facts: dict[str, Any] = {"keep": keep, "scheme": scheme, "runs": rows}
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        slope = (last["layer_seconds"] - first["layer_seconds"]) / (
            last["tokens"] - first["tokens"]
        )
        fixed = first["layer_seconds"] - slope * first["tokens"]
        layer = fixed + slope * TARGET_TOKENS
        facts |= {"fixed_seconds": fixed, "seconds_per_million": slope * 1e6, "layer": layer}
        print(
            f"  a layer: {fixed:.1f} s + {slope * 1e6:.2f} s a million tokens; at "
            f"{TARGET_TOKENS:,} tokens {layer:.1f} s, 58 layers {58 * layer / 60:.0f} min"
        )
    return facts


def measure_resume(folder: Path, tokens: int) -> dict[str, Any]:
    """Kill in the second MoE layer, call again, compare with the run that was not killed."""
    whole = folder / f"compressed-W3A16-{tokens}"
    command = compress_command(folder, tokens, 128, "W3A16")
    if not (whole / "thresher.json").exists():
        run(command, whole)
    layers = shards_of_layers(whole)
    begun, ended = layers_done(whole)[MOE_LAYERS - 1], layers_done(whole)[MOE_LAYERS]
    out = folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen([*THRESHER, *command, "-o", str(out), "--quiet"])
    first = [out / file for file in layers[MOE_LAYERS - 1]]
    while not all(path.exists() for path in first):
        if process.poll() is not None:
            raise SystemExit("compress ended before its first MoE layer was written")
        time.sleep(0.1)
    time.sleep((ended - begun) / 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in first}
    done = run(command, out)
    same = hashes(out) == hashes(whole)
    untouched = all(path.stat().st_mtime_ns == was for path, was in before.items())
    facts = {"same_files": same, "first_layer_untouched": untouched, "seconds": done.seconds}
    print(f"resume: {facts}")
    return facts


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file, from the manifest."""
    files = json.loads((out / "thresher.json").read_bytes())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def write_scores(model: Path, scores: Path) -> None:
    """Random saliency: which experts go does not matter to the disk."""
    opened = open_model(str(model))
    experts, generator = opened.spec.num_experts, torch.Generator().manual_seed(0)
    layers = {layer: LayerStats.empty(experts, ("code",)) for layer in opened.spec.scored_layers}
    for stats in layers.values():
        stats.add_routed(
            torch.arange(experts),
            torch.zeros(experts, dtype=torch.uint8),
            torch.rand(experts, generator=generator),
            torch.rand(experts, generator=generator),
        )
    SaliencyStats(
        layers=layers,
        tokens={"code": experts},
        model="random",
        digests={"model": opened.checkpoint.digest()},
    ).save(scores)


def measure_disk(folder: Path) -> dict[str, Any]:
    """Rates of the disk, and of the two commands that only it should bind."""
    model, scores = folder / "model", folder / "scores"
    write_scores(model, scores)
    rates = {
        "read": read_rate(model),
        "write": write_rate(folder),
        "cp": copy_rate(model, folder / "copy"),
    }
    facts: dict[str, Any] = {"rates": rates}
    jobs = {
        "prune": ["prune", str(model), "--scores", str(scores), "--keep", "192"],
        "nvfp4": ["quantize", str(model), "--method", "rtn", "--scheme", "NVFP4A16"],
    }
    print("disk, GB/s: " + ", ".join(f"{name} {rate / 1e9:.2f}" for name, rate in rates.items()))
    for name, arguments in jobs.items():
        out = folder / name
        shutil.rmtree(out, ignore_errors=True)
        forget(model)
        run(arguments, out)
        began = time.monotonic()
        forget(out)  # what is not on the disk yet is written now
        manifest = json.loads((out / "thresher.json").read_bytes())
        seconds = manifest["timings"]["seconds"] + time.monotonic() - began
        written = size(out)
        read = written if name == "prune" else size(model)
        floor = max(read / rates["read"], written / rates["write"])
        by_cp = (read + written) / 2 / rates["cp"]
        facts[name] = {"seconds": seconds, "read": read, "written": written, "floor": floor}
        print(
            f"{name}: {seconds:.1f} s for {read / 1e9:.1f} GB read and {written / 1e9:.1f} GB "
            f"written; the slower of reading and writing alone {floor:.1f} s "
            f"({floor / seconds:.0%}), cp of as much {by_cp:.1f} s ({by_cp / seconds:.0%})",
            flush=True,
        )
        shutil.rmtree(out)
    return facts


def measure_repair(folder: Path, tokens: int) -> dict[str, Any]:
    """Seconds of a layer's repair, all kinds, and peaks."""
    model, scores, out = folder / "model", folder / "scores", folder / "repaired"
    write_scores(model, scores)
    shutil.rmtree(out, ignore_errors=True)
    kinds = ["--repair", "scales,down,up", "--repair-tokens", str(token_file(folder, tokens))]
    command = ["prune", str(model), "--scores", str(scores), "--keep", "128", *kinds]
    began = time.monotonic()
    process = subprocess.Popen([*THRESHER, *command, "-o", str(out), "--quiet"])
    peaks = Peaks(process.pid)
    peaks.start()
    there: list[float] = []
    while len(there) < MOE_LAYERS:
        if process.poll() is not None:
            raise SystemExit(f"prune --repair ended with status {process.returncode}")
        file = repaired_file(out / ".thresher", 1 + len(there))  # the dense layer comes first
        if file.exists():
            there.append(time.monotonic() - began)
            print(f"layer {1 + len(there)} of repair after {there[-1]:.1f} s", flush=True)
        time.sleep(0.05)
    process.kill()
    process.wait()
    peaks.over.set()
    facts = {
        "tokens": tokens,
        "layer_seconds": there[-1] - there[-2],
        "gpu_gb": round(peaks.gpu / 1e9, 1),
        "host_gib": round(peaks.host / 2**30, 1),
    }
    print(f"repair: {facts}", flush=True)
    return facts


def main() -> None:
    """Measure and print; --json keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--parts", nargs="+", default=["compress", "nvfp4", "resume", "disk"], metavar="PART"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[131072, 262144])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder
    if not (folder / "model" / "model.safetensors.index.json").exists():
        shutil.rmtree(folder / "model", ignore_errors=True)
        began = time.monotonic()
        write_model(folder / "model", MOE_LAYERS)
        print(f"model of {size(folder / 'model') / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
    torch.cuda.empty_cache()
    found: dict[str, Any] = {}
    for part in options.parts:
        if part == "compress":
            found[part] = measure_compress(folder, options.tokens, 128, "W3A16")
        elif part == "nvfp4":
            found[part] = measure_compress(folder, options.tokens[:1], 192, "NVFP4")
        elif part == "resume":
            found[part] = measure_resume(folder, options.tokens[0])
        elif part == "repair":
            found[part] = measure_repair(folder, options.tokens[0])
        else:
            found[part] = measure_disk(folder)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
