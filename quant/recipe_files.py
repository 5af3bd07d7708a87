"""Recipes from YAML in llm-compressor's own form.

    quant_stage:
      quant_modifiers:
        GPTQModifier:
          targets: ["re:.*mlp.experts.*"]
          scheme: W3A16
        QuantizationModifier:
          config_groups:
            rest:
              targets: [Linear]
              weights: {num_bits: 8, type: float, strategy: channel, symmetric: true}
              input_activations: {num_bits: 8, type: float, strategy: token, dynamic: true}
          ignore: [lm_head, "re:.*mlp.experts.*"]

The stage and group levels may be left out. `scheme` is a preset's name or {preset: targets};
`config_groups` are schemes with targets, or {preset: targets}. Every field must be one that is
carried out here: a setting that would silently do nothing is an error.

Source: llm-compressor 0.14 modifiers/quantization/quantization/mixin.py and modifiers/gptq.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    is_preset_scheme,
    preset_name_to_scheme,
)
from pydantic import ValidationError

from models.errors import InputError
from quant.recipes import Method, Recipe, Rule
from quant.schemes import FP8_BLOCK_SIDE, NVFP4_GROUP, SCHEMES, Scheme, int_scheme

MODIFIERS: Mapping[str, Method] = {"QuantizationModifier": "rtn", "GPTQModifier": "gptq"}
FIELDS = frozenset({"targets", "ignore", "scheme", "config_groups"})
# settings of a method that rounding carries out
OPTIONS: Mapping[Method, frozenset[str]] = {
    "rtn": frozenset(),
    "gptq": frozenset({"dampening_frac", "block_size", "actorder"}),
}
GROUP_FIELDS = frozenset(
    {"targets", "weights", "input_activations", "output_activations", "format"}
)


class OnceLoader(yaml.SafeLoader):
    """YAML in which a key is given once: of two, the library would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. ConstructorError for a key that is there twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. InputError, naming the file and the entry, for anything not understood."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), OnceLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a YAML recipe") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML ({error}); mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no modifiers; see docs/formats.md for an example")
    rules = [
        rule
        for name, settings in _modifiers(content, path)
        for rule in _rules(name, settings, f"{path}: {name}")
    ]
    if not rules:
        raise InputError(f"{path} holds no {' or '.join(MODIFIERS)}; see docs/formats.md")
    return Recipe(tuple(rules), where=str(path))


def _modifiers(content: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in content.items():
        if not isinstance(value, dict):
            raise InputError(f"{path}: {key} holds no settings; give a modifier its fields")
        if key in MODIFIERS:
            yield key, value
        elif str(key).endswith(("_stage", "_modifiers")):
            yield from _modifiers(value, path)
        else:
            raise InputError(
                f"{path}: {key!r} is not known; use {' and '.join(MODIFIERS)}, alone or in "
                "..._stage: ..._modifiers:"
            )


def _rules(name: str, settings: Mapping[str, Any], where: str) -> Iterator[Rule]:
    method = MODIFIERS[name]
    unknown = sorted(str(key) for key in settings.keys() - FIELDS - OPTIONS[method])
    if unknown:
        known = ", ".join(sorted(FIELDS | OPTIONS[method]))
        raise InputError(f"{where}: {unknown[0]} is not carried out here; use {known}")
    ignore = _names(settings.get("ignore", []), f"{where}: ignore")
    options = {key: settings[key] for key in sorted(settings.keys() & OPTIONS[method])}
    if options.get("actorder", "static") not in ("static", "weight", None):
        raise InputError(f"{where}: actorder {options['actorder']!r}; use static, weight or null")
    for key in ("dampening_frac", "block_size"):
        value = options.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{where}: {key} is {value!r}; give a number above 0")
    if options.get("block_size", 128) != 128:
        raise InputError(f"{where}: block_size {options['block_size']}; only 128 is used here")
    for scheme, targets in _schemes(settings, where):
        if not targets:
            raise InputError(
                f"{where}: {scheme.name} has no targets; give paths, 're:' patterns or Linear"
            )
        yield Rule(scheme=scheme, targets=targets, ignore=ignore, method=method, options=options)


def _schemes(settings: Mapping[str, Any], where: str) -> Iterator[tuple[Scheme, tuple[str, ...]]]:
    targets = _names(settings.get("targets", ["Linear"]), f"{where}: targets")
    scheme, groups = settings.get("scheme"), settings.get("config_groups")
    if (scheme is None) == (groups is None):
        raise InputError(f"{where}: give either scheme or config_groups")
    if isinstance(scheme, str):
        yield preset(scheme, where), targets
        return
    if scheme is not None:
        if not isinstance(scheme, dict):
            raise InputError(f"{where}: scheme is {scheme!r}; give a name or {{name: targets}}")
        for name, own in scheme.items():
            yield preset(name, where), _names(own, f"{where}: scheme {name}")
        return
    if not isinstance(groups, dict):
        raise InputError(f"{where}: config_groups is {groups!r}; give {{group: scheme}}")
    for name, group in groups.items():
        if isinstance(group, dict):
            own = _names(group.get("targets", []), f"{where}: {name}: targets")
            yield _group(group, f"{where}: {name}"), own
        else:
            yield preset(name, where), _names(group, f"{where}: {name}")


def _names(value: object, where: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where} is {value!r}; give a list of module names or 're:' patterns")
    return tuple(names)


def preset(name: object, where: str) -> Scheme:
    """A preset of compressed-tensors by its name, where it can be written."""
    if isinstance(name, str) and name.upper() in SCHEMES:
        return SCHEMES[name.upper()]
    if not isinstance(name, str) or not is_preset_scheme(name):
        raise InputError(f"{where}: scheme {name!r} is not known; use {', '.join(SCHEMES)}")
    found = preset_name_to_scheme(name, targets=["Linear"])
    return scheme_from(found.weights, found.input_activations, f"{where}: {name}")


def _group(group: Mapping[str, Any], where: str) -> Scheme:
    unknown = sorted(str(key) for key in group.keys() - GROUP_FIELDS)
    if unknown or group.get("output_activations") is not None:
        raise InputError(
            f"{where}: {unknown[0] if unknown else 'output_activations'} is not carried out here; "
            "use targets, weights and input_activations"
        )
    scheme = validated_group(group, where)
    return scheme_from(scheme.weights, scheme.input_activations, where)


def validated_group(group: Mapping[str, Any], where: str) -> QuantizationScheme:
    """One of config_groups as compressed-tensors understands it. InputError if it does not."""
    try:
        return QuantizationScheme.model_validate({"targets": ["Linear"], **group})
    except (ValidationError, ValueError) as error:
        raise InputError(f"{where} is no scheme ({str(error).splitlines()[0]}); mend it") from error


def scheme_from(
    weights: QuantizationArgs | None, inputs: QuantizationArgs | None, where: str
) -> Scheme:
    """The scheme of these arguments. InputError when it is none that we write."""
    if weights is not None and not weights.dynamic:
        strategy, size = str(weights.strategy), weights.group_size
        if weights.type == "int" and strategy == "group" and inputs is None and size:
            return int_scheme(weights.num_bits, size, bool(weights.symmetric))
        if weights.type == "float" and weights.symmetric:
            own = (weights.num_bits, strategy, size)
            if own == (4, "tensor_group", NVFP4_GROUP):
                name = "NVFP4A16" if inputs is None else "NVFP4"
            elif own[:2] == (8, "block") and weights.block_structure == [FP8_BLOCK_SIDE] * 2:
                name = "FP8_BLOCK"
            elif own[:2] == (8, "channel"):
                name = "FP8_DYNAMIC"
            else:
                name = ""
            if name and _same_inputs(inputs, SCHEMES[name].input_activations):
                return SCHEMES[name]
    raise InputError(
        f"{where}: these weights and activations are no scheme that is written here; use "
        f"{', '.join(SCHEMES)}, or integer weights of 2 to 8 bits in groups without "
        "input_activations"
    )


def _same_inputs(one: QuantizationArgs | None, other: QuantizationArgs | None) -> bool:
    if one is None or other is None:
        return one is other
    fields = ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size")
    return all(getattr(one, name) == getattr(other, name) for name in fields)
