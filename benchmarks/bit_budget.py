"""Bits by damage against uniform schemes and a hand-made mix of one size: docs/results-budget.md.

    python -m benchmarks.bit_budget OUT MODEL[:GROUP_SIZE] ...

For each model: damage of every part under W3A16, W4A16 and W8A16 (evals/part_damage.py) on some
8,192 tokens of the offline mix's training part, then checkpoints, each by RTN and by GPTQ
(calibrated on 10 samples of each domain of up to 512 tokens):

    W3, W4           uniform
    DQ3              experts W4 in the first two MoE layers and every fourth, else W3; all other
                     matrices W4 (the rule of DQ3_K_M, arXiv 2505.02390, in our schemes)
    attention W8     everything but the routed experts W8, these W3
    budget of X      `--budget` with exactly the bytes of X
    budget +10 %     ... of uniform W3 and 10 %; +25 % the same

KL in nats a token to the original on 10 held-out samples of each domain, in the checkpoint's own
type. `predicted` is the sum of the chosen parts' damages; `there` is the KL of RTN's checkpoint on
the very tokens that damage was measured on, so their ratio says how far damages add up. Every step
resumes by itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gptq_peer import machine
from calibration.tokens import TokenSet
from cli.demo import part_tokens
from evals.fidelity import EvalSettings, evaluate_all
from evals.part_damage import Damage, part_damage, some_samples
from models.opening import OpenModel, open_model
from quant.budget import Menu, Part, menu_of, recipe_text, share_out
from quant.quantize import quantize
from quant.quantize_plan import Method, QuantizeSettings
from quant.recipe_files import load_recipe
from quant.schemes import scheme_with

SCHEMES = ("W3A16", "W4A16", "W8A16")
W3, W4, W8 = range(3)
METHODS: tuple[Method, ...] = ("rtn", "gptq")
BATCH_TOKENS = 512
CALIBRATION, HELDOUT, MAX_LENGTH, DAMAGE_TOKENS = 10, 10, 512, 8192

Choice = dict[Part, int]


def by_rule(menu: Menu, rule: Callable[[Part], int]) -> Choice:
    return {part: rule(part) if part in menu.measured else W3 for part in menu.parts}


def choices(menu: Menu, damage: Damage) -> dict[str, Choice]:
    """Everything that is compared, by name."""
    moe = [part.layer for part in menu.measured if part.kind == "expert"]
    raised = {layer for place, layer in enumerate(moe) if place < 2 or place % 4 == 3}
    made = {
        "W3": by_rule(menu, lambda part: W3),
        "DQ3": by_rule(
            menu, lambda part: W4 if part.kind != "expert" or part.layer in raised else W3
        ),
        "attention W8": by_rule(menu, lambda part: W3 if part.kind == "expert" else W8),
        "W4": by_rule(menu, lambda part: W4),
    }
    sizes = {f"budget of {name}": menu.size(made[name]) for name in ("DQ3", "attention W8", "W4")}
    sizes |= {f"budget +{share} %": menu.smallest * (100 + share) // 100 for share in (10, 25)}
    for name, size in sizes.items():
        made[name] = share_out(menu, damage, size)
        assert menu.size(made[name]) <= size
    return dict(sorted(made.items(), key=lambda item: (menu.size(item[1]), item[0])))


def written(
    opened: OpenModel, menu: Menu, chosen: Choice, method: Method, tokens: TokenSet, out: Path
) -> Path:
    """The checkpoint of a choice; its size is what was planned."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.with_suffix(".yaml")
    recipe.write_text(recipe_text(menu, chosen, method))
    settings = QuantizeSettings(method=method, batch_tokens=BATCH_TOKENS)
    manifest = quantize(opened, load_recipe(recipe), out, settings, tokens=tokens)
    assert manifest["total_size"] == menu.size(chosen)
    return out


def measure(root: Path, group_size: int | None, out: Path) -> list[dict[str, Any]]:
    """One row for every choice, sizes ascending."""
    opened = open_model(root)
    schemes = [scheme_with(name, group_size=group_size) for name in SCHEMES]
    menu = menu_of(opened, schemes, QuantizeSettings())
    there = some_samples(part_tokens(root, "train", 32, MAX_LENGTH), DAMAGE_TOKENS)
    damage = part_damage(
        opened,
        menu,
        there,
        EvalSettings(batch_tokens=BATCH_TOKENS),
        out / "damage",
    )
    for part, values in damage.items():
        print(part, [round(value, 5) for value in values], flush=True)
    tokens = part_tokens(root, "train", CALIBRATION, MAX_LENGTH)
    heldout = part_tokens(root, "heldout", HELDOUT, MAX_LENGTH)
    made = choices(menu, damage)
    paths = {
        method: {
            name: written(opened, menu, chosen, method, tokens, out / method / name)
            for name, chosen in made.items()
        }
        for method in METHODS
    }
    kl = {
        "rtn": judge(root, paths["rtn"], heldout, out / "judged-rtn"),
        "gptq": judge(root, paths["gptq"], heldout, out / "judged-gptq"),
        "there": judge(root, paths["rtn"], there, out / "judged-there"),
    }
    return [
        {
            "choice": name,
            "bytes": menu.size(chosen),
            "over": menu.size(chosen) / menu.smallest - 1,
            "predicted": sum(damage[part][chosen[part]] for part in menu.measured),
            **{judged: own[name]["kl"] for judged, own in kl.items()},
            "chosen": {str(part): schemes[index].bits for part, index in chosen.items()},
        }
        for name, chosen in made.items()
    ]


def judge(
    root: Path, paths: dict[str, Path], tokens: TokenSet, out: Path
) -> dict[str, dict[str, Any]]:
    """KL of every checkpoint to the original."""
    settings = EvalSettings(batch_tokens=BATCH_TOKENS)
    return evaluate_all(paths, tokens, settings, reference=root, out=out)


def table(model: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"\n**{model}**\n",
        "| choice | MB | over W3 | predicted | there | ratio | KL, RTN | KL, GPTQ |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        size = f"{row['bytes'] / 1e6:.2f} | {row['over']:.1%}"
        added = (
            f"{row['predicted']:.4f} | {row['there']:.4f} | {row['there'] / row['predicted']:.2f}"
        )
        lines.append(
            f"| {row['choice']} | {size} | {added} | {row['rtn']:.4f} | {row['gptq']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}, {args.threads} thread(s), torch {torch.__version__}")
    for model in args.models:
        path, _, size = model.partition(":")
        root = Path(path)
        out = args.out / root.name
        rows = measure(root, int(size) if size else None, out)
        (out / "rows.json").write_text(json.dumps(rows, indent=1))
        print(table(root.name, rows), flush=True)


if __name__ == "__main__":
    main()
