"""`--budget`: damage measured, bits shared out, and the recipe written beside the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError

if TYPE_CHECKING:
    from calibration.tokens import TokenSet
    from evals.fidelity import EvalSettings
    from models.opening import OpenModel
    from models.processes import Processes
    from models.progress import Progress
    from quant.budget import Menu, Part
    from quant.quantize_plan import QuantizeSettings
    from quant.recipes import Recipe
    from quant.schemes import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What `--budget` and the options beside it ask. `folder` None: OUT.damage."""

    nbytes: int
    schemes: tuple[Scheme, ...]
    folder: Path | None
    tokens: int


def budget_of(
    nbytes: int,
    schemes: str,
    folder: Path | None,
    tokens: int,
    group_size: int | None,
    asymmetric: bool,
) -> Budget:
    """The options as types. --group-size and --asymmetric go to the integer schemes."""
    from quant.schemes import scheme_with

    found = []
    for name in schemes.split(","):
        plain = scheme_with(name.strip())
        found.append(
            scheme_with(plain.name, group_size=group_size, symmetric=False if asymmetric else None)
            if plain.kind == "int"
            else plain
        )
    return Budget(nbytes=nbytes, schemes=tuple(found), folder=folder, tokens=tokens)


def checked_menu(
    opened: OpenModel, budget: Budget, settings: QuantizeSettings, processes: Processes
) -> Menu:
    """What can be chosen for `opened`. InputError when nothing fits, before any long work."""
    from quant.budget import check_budget, menu_of

    if processes.size > 1:
        raise InputError(
            "--budget measures in one process; run it alone (quantize has --dry-run), "
            "then share the job with --recipe"
        )
    menu = menu_of(opened, budget.schemes, settings)
    check_budget(menu, budget.nbytes)
    return menu


def budget_recipe(
    budget: Budget,
    menu: Menu,
    intact: OpenModel,
    tokens: TokenSet | None,
    out: Path,
    settings: QuantizeSettings,
    force: bool,
    progress: Progress,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, read back from OUT.yaml where it is written, and what was decided.

    `menu` is of the model that will be written; damage is measured on `intact`, which may have
    more experts. Nothing is measured where the budget holds the widest scheme everywhere.
    """
    from evals.part_damage import part_damage, some_samples
    from models.journal import FOLDER, MANIFEST, write_atomically
    from quant.budget import menu_of, recipe_text, share_out
    from quant.recipe_files import load_recipe

    damage = None
    chosen = menu.widest()
    if budget.nbytes < menu.largest:
        if tokens is None:
            raise InputError("--budget measures damage on tokens; give --mix or --tokens")
        damage = part_damage(
            intact,
            menu_of(intact, budget.schemes, settings),
            some_samples(tokens, budget.tokens),
            eval_settings(settings),
            budget.folder or out.with_name(f"{out.name}.damage"),
            force=force,
            progress=progress,
        )
        chosen = share_out(menu, damage, budget.nbytes)
    file = out.with_name(f"{out.name}.yaml")
    text = recipe_text(menu, chosen, settings.method).encode()
    begun = (out / FOLDER).is_dir() or (out / MANIFEST).is_file()
    if begun and not force and file.is_file() and file.read_bytes() != text:
        raise InputError(
            f"{out} was begun with the recipe {file}, this budget wants another; choose another "
            "output folder, or use --force to start over"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    facts = {
        "budget": budget.nbytes,
        "bytes": menu.size(chosen),
        "smallest": menu.smallest,
        "largest": menu.largest,
        "damage": damage and sum(damage[part][chosen[part]] for part in menu.measured),
        "recipe": str(file),
        "schemes": layers_by_scheme(menu, chosen),
    }
    return load_recipe(file), facts


def eval_settings(settings: QuantizeSettings) -> EvalSettings:
    """Where and in what type damage is measured: as the rounding."""
    from evals.fidelity import EvalSettings

    return EvalSettings(
        device=settings.device,
        dtype=settings.dtype,
        memory=settings.memory,
        batch_tokens=settings.batch_tokens,
    )


def layers_by_scheme(menu: Menu, chosen: Mapping[Part, int]) -> dict[str, dict[str, list[int]]]:
    """{kind: {scheme: layers}}."""
    found: dict[str, dict[str, list[int]]] = {}
    for part, index in sorted(chosen.items(), key=lambda item: (item[0].kind, -item[1], item[0])):
        own = found.setdefault(part.kind, {})
        own.setdefault(menu.schemes[index].name, []).append(part.layer)
    return found


def budget_lines(facts: Mapping[str, Any]) -> list[str]:
    """The decision as text."""
    left = facts["budget"] - facts["bytes"]
    text = [
        f"budget {facts['budget'] / 1e9:,.3f} GB: {facts['bytes']:,} bytes used, {left:,} not "
        f"({left / facts['budget']:.2%})"
    ]
    if facts["damage"] is None:
        text.append("the budget holds the widest scheme everywhere; nothing was measured")
    else:
        text.append(f"summed damage of the parts: KL {facts['damage']:.4f} (rounded to nearest)")
    for kind, own in facts["schemes"].items():
        shares = "; ".join(f"{name} in layers {ranges(layers)}" for name, layers in own.items())
        text.append(f"{kind.replace('_', ' '):<14}{shares}")
    if len(facts["schemes"].get("expert", ())) > 1:
        text.append(
            "experts of layers differ: for vLLM and thresher serve; transformers 5.17 decodes "
            "all experts as the first scheme's and fails or answers garbage"
        )
    return [*text, f"recipe: {facts['recipe']}"]


def ranges(numbers: list[int]) -> str:
    """0-3, 7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
