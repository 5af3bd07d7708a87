"""config_groups, ignore and format of a quantization_config, read as engines do.

The format at the top is the one of all groups, or "mixed-precision" over several, each group then
with its own: compressed-tensors writes it so (quant_config.py), and vLLM takes a group's own format
and only without one that at the top, which chooses the kernel and whether activations are rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from compressed_tensors.utils.match import match_name

from models.errors import InputError
from quant.export import Layout
from quant.recipe_files import GROUP_FIELDS, scheme_from, validated_group
from quant.schemes import Scheme

MIXED = "mixed-precision"


def names_in(settings: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of module names and `re:` patterns. InputError for anything else."""
    entries = settings.get(key) or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise InputError(f"{where}: {key} is {entries!r}, not a list of names")
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise InputError(f"{where}: {key} has {entry!r}, no regular expression") from error
    return entries


class ConfigGroups:
    """config_groups and ignore of a quantization_config, matched as engines do."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """InputError for groups that are no scheme known here."""
        self.schemes: dict[str, Scheme] = {}
        self.targets: dict[str, list[str]] = {}
        self.settings: dict[str, Mapping[str, Any]] = {}
        config_groups = settings.get("config_groups") or {}
        if not isinstance(config_groups, dict):
            raise InputError(f"config.json: config_groups is {config_groups!r}, not an object")
        for name, group in config_groups.items():
            where = f"config.json: {name}"
            if not isinstance(group, dict):
                raise InputError(f"{where} is {group!r}, not a scheme with targets")
            targets = names_in(group, "targets", where)
            known = {key: group[key] for key in GROUP_FIELDS & group.keys()}
            try:
                parsed = validated_group(known, where)
            except NotImplementedError as error:  # compressed-tensors, of floats of odd widths
                raise InputError(f"{where} is no scheme ({error})") from error
            scheme = scheme_from(parsed.weights, parsed.input_activations, where)
            unpacked = {"naive-quantized"} if scheme.kind.startswith("fp8") else set()
            if parsed.format not in {None, scheme.format} | unpacked:
                raise InputError(
                    f"{where} has the format {parsed.format}, {scheme.name} is {scheme.format}"
                )
            self.schemes[name] = scheme
            self.targets[name] = targets
            self.settings[name] = known
        self.ignore = names_in(settings, "ignore", "config.json")
        self.ignored_paths = {entry for entry in self.ignore if not entry.startswith("re:")}
        self.ignore_patterns = [entry for entry in self.ignore if entry.startswith("re:")]

    layout: Layout = "compressed-tensors"

    def translate(
        self, module: str, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tensors of `module` in compressed-tensors' words, which they are in here."""
        return dict(tensors)

    def ignored(self, module: str) -> bool:
        """Whether an entry of ignore matches."""
        return module in self.ignored_paths or any(
            match_name(module, pattern) for pattern in self.ignore_patterns
        )

    def groups_of(self, module: str) -> list[str]:
        """Names of all groups that target a Linear of this path."""
        return [
            name
            for name, targets in self.targets.items()
            if any(target == "Linear" or match_name(module, target) for target in targets)
        ]


def check_format(settings: Mapping[str, Any], groups: ConfigGroups, *, ours: bool) -> Iterator[str]:
    """The format at the top against those of the groups.

    Others may leave it at mixed-precision, or out, where every group has its own, and name FP8
    naive-quantized; `ours` may not.
    """
    if not groups.schemes:
        return
    said = settings.get("format")
    own = {name: group.get("format") for name, group in groups.settings.items()}
    formats = {own[name] or scheme.format for name, scheme in groups.schemes.items()}
    needed = MIXED if len(formats) > 1 else next(iter(formats))
    harmless = said in (None, MIXED) and None not in own.values()
    harmless |= said == "naive-quantized" and formats == {"float-quantized"}
    if said != needed and (ours or not harmless):
        yield f"config.json: the format is {said!r}, that of its groups is {needed}"
    elif needed == MIXED:
        for name, form in own.items():
            if form is None:
                yield f"config.json: {name} has no format, and {MIXED} at the top says none"
