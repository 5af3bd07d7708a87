"""Trains the small softmax-router model of uneven load behind docs/results-criteria.md.

    python -m benchmarks.uneven_model OUT [--optimizer adam] [--steps 750]
    python -m benchmarks.uneven_model OUT --optimizer muon --steps 1500

Qwen3-MoE's shape: 6 layers, 32 experts of which 4 answer, 27M parameters; transformers' own modules
in bfloat16 and *no* balancing loss, so that busy and idle experts arise as they like. The optimizer
matters: by Adam, which nearly every published model was trained with, the experts' outputs differ
several times in size and rare experts are among the largest; Muon, whose steps move every direction
of a matrix alike, leaves them nearer to each other. It reads the bundled demo model's tokens and
learns from the standard library's source and the `train` part of the offline mix. Wants a GPU
(81 s of an H200, text included); the 54 MB are not committed.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sysconfig
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from calibration.offline import Domain, samples
from demo.train.corpus import encode, python_source
from demo.train.optimizer import Optimizer
from demo.train.rows import Row, render

TOKENIZER = Path(__file__).parents[1] / "demo" / "model"
SHARES = {"swe": 0.35, "py": 0.2, "code": 0.2, "tools": 0.25}
SAMPLES: dict[Domain, int] = {"swe": 350, "code": 700, "tools": 700}  # of each of 8 seeds
CONFIG = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 160, "norm_topk_prob": True, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
LENGTH, BATCH = 1024, 32
DECAY, LARGEST_GRADIENT = 0.1, 1.0
RATES = {"adam": 1e-3, "muon": 4e-3}


def offline_stream(task: tuple[Domain, int, int]) -> tuple[Domain, np.ndarray]:
    """Tokens of up to `count` training samples of (domain, count, seed)."""
    domain, count, seed = task
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    rows: list[Row] = [
        {"text": one.text}
        if one.text
        else {"messages": list(one.messages), "tools": list(one.tools)}
        for one in itertools.islice(samples("train", domain, seed), count)
    ]
    return domain, encode([render(row, tokenizer) for row in rows], tokenizer)[0]


def streams() -> dict[str, torch.Tensor]:
    """Training tokens by source."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    tasks = [(d, count, 100 + seed) for seed in range(8) for d, count in SAMPLES.items()]
    source = python_source(
        [Path(sysconfig.get_path("stdlib"))], tokenizer.bos_token, tokenizer.eos_token
    )
    found = {"py": [encode(source.train, tokenizer)[0]]}
    with Pool(16) as pool:
        for domain, stream in pool.map(offline_stream, tasks, 1):
            found.setdefault(domain, []).append(stream)
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


class Adam:
    """AdamW for all matrices, gradients clipped; float32 masters of parameters in any dtype."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": DECAY},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.rule = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> None:
        """One update at a learning rate; gradients are dropped afterwards."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, LARGEST_GRADIENT)
        for group in self.rule.param_groups:
            group["lr"] = rate
        self.rule.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimizer", choices=list(RATES), default="adam")
    parser.add_argument("--steps", type=int, default=750)
    args = parser.parse_args()
    text = {name: ids.cuda().long() for name, ids in streams().items()}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**CONFIG)
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config).cuda()
    if args.optimizer == "adam":
        update = Adam(model).step
    else:
        update = partial(Optimizer(model, decay=DECAY).step, fp8=False)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    random = np.random.default_rng(0)
    for step in range(args.steps):
        rows = []
        for name in random.choice(list(SHARES), BATCH, p=list(SHARES.values())):
            first = random.integers(0, len(text[name]) - LENGTH)
            rows.append(text[name][first : first + LENGTH])
        batch = torch.stack(rows)
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        rate = min(1, (step + 1) / 100) * max(0.01, min(1, 2 - 2 * step / args.steps))
        update(RATES[args.optimizer] * rate)
        if (step + 1) % 50 == 0:
            print(step + 1, loss.item(), flush=True)
    model.cpu().save_pretrained(args.out, max_shard_size="14MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, args.out / name)


if __name__ == "__main__":
    main()
