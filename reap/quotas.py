"""How many experts can stay, and in which layers: what config.json alone decides.

Group-limited routers (DeepSeek-V3 line) cut the experts into n_group consecutive equal slices,
keep the topk_group best slices for a token (a slice's score is the sum of its `group_top` best
experts) and choose top_k experts inside them. After dropping experts the slices are formed anew
over the renumbered ones, so there are two honest ways:

    keep     the same number from every group, in order: each new slice is what is left of the
             old one, and the routing law does not change
    flatten  n_group = topk_group = 1: the experts are chosen without regard to groups, and so
             are those of a token afterwards (another routing law, valid in every engine)

A free choice with n_group left as it is loads too, and groups experts that never belonged
together; it is not offered. Numbers that cannot be routed are refused by `check_keep` from the
config alone, before anything is read.

Nothing here needs torch or a checkpoint: the command line asks before any work is done.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, get_args

from models.errors import InputError
from models.model_spec import ModelSpec

GroupMode = Literal["keep", "flatten"]
MTPMode = Literal["drop", "prune"]


def quota_groups(spec: ModelSpec, groups: GroupMode) -> int:
    """How many slices get an equal quota; 1 when the choice is free."""
    if groups not in get_args(GroupMode):
        raise InputError(f"--groups {groups} is unknown; choose keep or flatten")
    return spec.num_groups if groups == "keep" else 1


def valid_keeps(spec: ModelSpec, groups: GroupMode = "keep") -> range:
    """Every number of experts a layer that the router can still choose top_k from, ascending.

    Zero-computation experts (LongCat) stay and can be chosen, so they count for top_k.
    """
    num_groups = quota_groups(spec, groups)
    if num_groups == 1:
        least = max(1, spec.top_k - spec.zero_experts)
    else:
        reachable = -(-spec.top_k // spec.topk_groups)  # of each chosen group, rounded up
        least = num_groups * max(spec.architecture.moe.group_top, reachable)
    return range(least, spec.num_experts + 1, num_groups)


def check_keep(spec: ModelSpec, keep: int, groups: GroupMode = "keep") -> None:
    """InputError, naming the nearest possible numbers, unless `keep` experts can be routed."""
    valid = valid_keeps(spec, groups)
    if keep in valid:
        return
    num_groups = quota_groups(spec, groups)
    if keep > spec.num_experts:
        reason = f"the model has {spec.num_experts} experts a layer"
    elif keep < 1:
        reason = "at least one expert must stay"
    elif keep % num_groups:
        reason = f"the router's {num_groups} groups must stay of equal size"
    elif num_groups > 1 and keep // num_groups < spec.architecture.moe.group_top:
        reason = (
            f"a group's score needs {spec.architecture.moe.group_top} experts, "
            f"{keep // num_groups} would be left"
        )
    elif num_groups > 1:
        reason = (
            f"a token reaches {spec.topk_groups} groups of {keep // num_groups}, "
            f"too few to choose {spec.top_k} experts from"
        )
    else:
        reason = f"the router chooses {spec.top_k} experts for every token"
    raise InputError(
        f"cannot keep {keep} of {spec.num_experts} experts: {reason}; {_hint(spec, keep, groups)}"
    )


def resolve_keep(
    spec: ModelSpec,
    *,
    keep: int | None = None,
    ratio: float | None = None,
    groups: GroupMode = "keep",
) -> int:
    """The number kept in every layer, from exactly one of `keep` and `ratio`.

    `ratio` is the share removed, 0 <= ratio < 1: E * (1 - ratio) is rounded to the nearest
    possible number (a multiple of the groups), a tie to the larger. It is never raised to the
    least possible number from further away than half a step: that is refused, as an impossible
    `keep` is.
    """
    if (keep is None) == (ratio is None):
        raise InputError("give exactly one of --keep N and --ratio R")
    if keep is not None:
        check_keep(spec, keep, groups)
        return keep
    assert ratio is not None
    if not 0 <= ratio < 1:
        raise InputError(f"--ratio {ratio} is not a share to remove; give a number such as 0.5")
    valid = valid_keeps(spec, groups)
    wanted = spec.num_experts * (1 - Fraction(str(ratio)))
    step = valid.step
    nearest = int((wanted + Fraction(step, 2)) // step) * step
    if nearest not in valid:
        most = 1 - valid[0] / spec.num_experts if valid else 0
        raise InputError(
            f"--ratio {ratio} would keep {float(wanted):g} of {spec.num_experts} experts; "
            f"{_hint(spec, nearest, groups)} (--ratio at most {most:g})"
        )
    return nearest


def planned_layers(spec: ModelSpec, mtp: MTPMode) -> tuple[int, ...]:
    """The layers a plan must hold: all scored ones, and MTP layers if they are pruned."""
    if mtp not in get_args(MTPMode):
        raise InputError(f"--mtp {mtp} is unknown; choose drop or prune")
    if mtp == "drop":
        return spec.scored_layers
    if not spec.mtp_layers:
        reason = (
            "stores its MTP layers outside the layer numbering, where they can only be dropped"
            if spec.num_mtp_layers
            else "has no MTP layer"
        )
        raise InputError(f"this {spec.architecture.title} model {reason}; use --mtp drop")
    return (*spec.scored_layers, *spec.mtp_layers)


def _hint(spec: ModelSpec, keep: int, groups: GroupMode) -> str:
    """What to ask for instead of `keep`: the nearest numbers, and the whole choice."""
    valid = valid_keeps(spec, groups)
    if not valid:
        return "no number is possible: config.json's top_k and groups contradict each other"
    below = [k for k in valid if k < keep][-1:]
    above = [k for k in valid if k > keep][:1]
    choice = f"possible are {valid[0]} to {valid[-1]}"
    if valid.step > 1:
        choice += f" in steps of {valid.step}"
        if groups == "keep":
            choice += ", or --groups flatten"
    return f"nearest: {' or '.join(map(str, below + above))} ({choice})"
