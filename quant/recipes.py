"""Which part of a model gets which number format.

A recipe is a tuple of rules. A rule's targets and ignore are matched as compressed-tensors does:
`re:` patterns from the start of the module's path, other entries by the whole path, and `Linear`
for every matrix that is quantized by default (quant/linears.py). Routers, embeddings and vision
are never taken; a target that matches nothing else is an error, as is one that matches nothing,
and a rule whose ignore list leaves it nothing. Two rules that give one matrix different formats, or
round it differently, are an error too: which one wins must not depend on their order. (In
llm-compressor 0.14 the last modifier wins, but within one the first group.)

What engines demand is checked when a recipe meets a model: one scheme for all experts of a layer
(vLLM looks at expert 0 only), one for fused partners (quant/fused.py), whole groups in every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from models.errors import InputError
from quant.fused import fused_sets
from quant.linears import Linear
from quant.schemes import Scheme

Method = Literal["rtn", "gptq"]


class ModuleNames:
    """A list of targets or an ignore list: `re:` patterns and whole paths."""

    def __init__(self, entries: Iterable[str], where: str) -> None:
        """Raises InputError for a pattern that does not compile, naming `where`."""
        self.entries = tuple(entries)
        self.linear = "Linear" in self.entries
        self.patterns: dict[str, re.Pattern[str]] = {}
        for entry in self.entries:
            if entry.startswith("re:"):
                try:
                    self.patterns[entry] = re.compile(entry[3:])
                except re.error as error:
                    raise InputError(
                        f"{where}: {entry!r} is no regular expression ({error}); mend it"
                    ) from error
        self.paths = frozenset(self.entries) - self.patterns.keys() - {"Linear"}

    def match(self, linear: Linear) -> bool:
        """True when any entry matches the matrix."""
        if linear.module in self.paths or (self.linear and linear.use == "default"):
            return True
        return any(pattern.match(linear.module) for pattern in self.patterns.values())

    def unmatched(self, linears: Sequence[Linear]) -> tuple[str, ...]:
        """Entries that match none of `linears`."""
        modules = {linear.module for linear in linears}
        return (
            *sorted(self.paths - modules),
            *(
                entry
                for entry, pattern in self.patterns.items()
                if not any(pattern.match(module) for module in modules)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A scheme for the matrices that match `targets` and not `ignore`.

    `method` None leaves rounding to the command; `options` are the modifier's settings of it.
    """

    scheme: Scheme
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    method: Method | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def does(self) -> tuple[Scheme, Method | None, dict[str, Any]]:
        """What becomes of a matrix that it takes."""
        return self.scheme, self.method, dict(self.options)

    def to_json(self) -> dict[str, Any]:
        """Everything that decides about bytes, for a job's identity."""
        activations = self.scheme.input_activations
        return {
            "scheme": self.scheme.name,
            "weights": self.scheme.weights.model_dump(mode="json"),
            "input_activations": activations and activations.model_dump(mode="json"),
            "targets": list(self.targets),
            "ignore": list(self.ignore),
            "method": self.method,
            "options": dict(self.options),
        }


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules for a model; `where` names their origin in errors."""

    rules: tuple[Rule, ...]
    where: str = "recipe"

    def to_json(self) -> list[dict[str, Any]]:
        """For a job's identity and the manifest."""
        return [rule.to_json() for rule in self.rules]

    def assign(self, linears: Sequence[Linear]) -> dict[str, Rule | None]:
        """Module -> its rule, None where it stays as it is; every module is listed.

        Raises InputError for conflicts, targets that match nothing, and matrices, experts or
        fused partners that cannot be stored as asked.
        """
        assigned: dict[str, Rule | None] = {linear.module: None for linear in linears}
        for rule in self.rules:
            targets = ModuleNames(rule.targets, self.where)
            ignore = ModuleNames(rule.ignore, self.where)
            self._check_targets(targets, linears)
            taken = False
            for linear in linears:
                if linear.use == "never" or not targets.match(linear) or ignore.match(linear):
                    continue
                before = assigned[linear.module]
                if before is not None and before.does != rule.does:
                    raise InputError(
                        f"{self.where}: {linear.module} is to be both "
                        f"{told_apart(before, rule)}; name it in the ignore of one of them"
                    )
                assigned[linear.module] = before or rule
                taken = True
            if not taken:
                raise InputError(
                    f"{self.where}: ignore leaves nothing of the targets {list(rule.targets)}; "
                    "shorten one of them or remove the rule"
                )
        self._check_storable(linears, assigned)
        self._check_experts(linears, assigned)
        self._check_fused(linears, assigned)
        return assigned

    def _check_targets(self, targets: ModuleNames, linears: Sequence[Linear]) -> None:
        able = [linear for linear in linears if linear.use != "never"]
        for target in targets.unmatched(able):
            alone = ModuleNames((target,), self.where)
            for linear in linears:
                if alone.match(linear):
                    raise InputError(
                        f"{self.where}: target {target!r} matches only what is never quantized "
                        f"({linear.module}: {linear.place.kind}); remove it from the targets"
                    )
            raise InputError(
                f"{self.where}: target {target!r} matches no matrix of the model; targets are "
                "paths as in its files, 're:' patterns of them, or Linear"
            )

    def _check_storable(
        self, linears: Sequence[Linear], assigned: Mapping[str, Rule | None]
    ) -> None:
        for linear in linears:
            rule = assigned[linear.module]
            if rule is None:
                continue
            if linear.refusal is not None:
                parent = linear.module.rpartition(".")[0].rpartition(f"layers.{linear.layer}.")[2]
                raise InputError(
                    f"{linear.logical} cannot be written as {rule.scheme.name}: {linear.refusal}; "
                    f"leave the experts as they are by a recipe with ignore: ['re:.*{parent}']"
                )
            rule.scheme.check(linear.logical, linear.shape)

    def _check_experts(
        self, linears: Sequence[Linear], assigned: Mapping[str, Rule | None]
    ) -> None:
        first: dict[int | None, Linear] = {}
        for linear in linears:
            if not linear.is_expert:
                continue
            known = first.setdefault(linear.layer, linear)
            one, other = assigned[known.module], assigned[linear.module]
            if name_of(one) != name_of(other) or (one and other and one.scheme != other.scheme):
                raise InputError(
                    f"{self.where}: experts of layer {linear.layer} differ, {known.module} is "
                    f"{name_of(one)} and {linear.module} {name_of(other)}; engines need one "
                    "scheme for all experts of a layer"
                )

    def _check_fused(self, linears: Sequence[Linear], assigned: Mapping[str, Rule | None]) -> None:
        for partners in fused_sets(linear.module for linear in linears):
            one = assigned[partners[0]]
            for module in partners[1:]:
                other = assigned[module]
                if (one and one.scheme) != (other and other.scheme):
                    raise InputError(
                        f"{self.where}: {partners[0]} is {name_of(one)} and {module} "
                        f"{name_of(other)}; engines run them as one matrix, give them one scheme"
                    )


def name_of(rule: Rule | None) -> str:
    """A rule's scheme for people."""
    return "unquantized" if rule is None else rule.scheme.name


def told_apart(one: Rule, other: Rule) -> str:
    """Two rules for people: by their schemes' names if that will do."""
    if one.scheme.name != other.scheme.name:
        return f"{one.scheme.name} and {other.scheme.name}"
    return " and ".join(
        rule.scheme.name
        + (f" in groups of {rule.scheme.group_size}" if rule.scheme.group_size else "")
        + ("" if rule.scheme.symmetric else " with zero points")
        + (f" by {rule.method}" if rule.method else "")
        + "".join(f", {name} {value}" for name, value in rule.options.items())
        for rule in (one, other)
    )


def uniform(scheme: Scheme) -> Recipe:
    """The default recipe: every matrix that is quantized by default gets `scheme`."""
    return Recipe((Rule(scheme=scheme),), where=scheme.name)


def schemes_of(assigned: Mapping[str, Rule | None]) -> dict[str, Scheme | None]:
    """Module -> scheme, None where unquantized."""
    return {module: rule.scheme if rule else None for module, rule in assigned.items()}
