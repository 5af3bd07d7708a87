"""The table of all families: the one place that knows which models there are.

The entries are in families_deepseek.py, families_softmax.py and families_sigmoid.py; to add one,
see docs/adding-a-family.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.architecture import Architecture
from models.families_deepseek import DEEPSEEK_FAMILIES
from models.families_sigmoid import SIGMOID_FAMILIES
from models.families_softmax import SOFTMAX_FAMILIES
from models.model_spec import ModelSpec, resolve

FAMILIES: tuple[Architecture, ...] = (*DEEPSEEK_FAMILIES, *SOFTMAX_FAMILIES, *SIGMOID_FAMILIES)


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The family of a config.json joined with its numbers.

    Raises InputError for an unknown or dense model and for options that are not implemented.
    """
    return resolve(config, FAMILIES)
