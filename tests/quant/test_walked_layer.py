"""Passes of a layer for its inputs alone, against passes that run the experts too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.batches import Batch
from calibration.hidden_states import HiddenStates
from calibration.stream import LayerWalk
from models.opening import open_model
from models.skeleton import Skeleton
from quant.inputs import LinearInputs, RoutedInputs, watched
from tests.tiny import FAMILIES, tiny_model
from tests.token_sets import random_token_set


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_experts_give_changes_no_input_of_their_layer(family: str, tmp_path: Path) -> None:
    """`walk_layer` leaves the experts out where their output is not wanted. That is right as long
    as nothing behind them in the same layer is fed by it, in every family that does not say so."""
    tiny_model(family, tmp_path / "model")
    source = open_model(str(tmp_path / "model")).source
    tokens = random_token_set(100, (9, 9, 4), (0, 1, 0))
    skeleton = Skeleton(source, dtype=torch.float32)
    feeds = skeleton.spec.architecture.moe.feeds_linears
    walk = LayerWalk(skeleton, tokens, HiddenStates(tmp_path / "hidden", None), 24)
    walk.embed()
    current: list[Batch] = []
    routed: list[RoutedInputs] = []
    for layer in range(walk.num_layers):
        linear: list[LinearInputs] = []
        module = skeleton.load_layer(layer, lambda record: routed[-1].add(record, current[0]))
        modules = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        experts = skeleton.experts.get(layer)
        for inputs_only in (True, False):
            if experts is not None:
                experts.inputs_only = inputs_only
            linear.append(LinearInputs(True, walk.num_tokens))
            routed.append(RoutedInputs(skeleton.spec.num_experts))
            with watched(modules, linear[-1], current):
                walk.pass_through(
                    layer, current, keep_output=not inputs_only, last_pass=not inputs_only
                )
        differ = []
        for name in modules:
            (hessian, count, largest), (whole, *same) = (one.sums_of(name) for one in linear)
            assert (hessian is None) == (whole is None)
            equal = hessian is None or torch.equal(hessian, whole)
            if [count, largest] != same or not equal:
                differ.append(name)
        assert not differ or feeds, (layer, differ)
        only, whole_run = routed[-2:]
        assert torch.equal(only.count_E, whole_run.count_E)
        for expert in range(skeleton.spec.num_experts):
            if only.inputs:
                assert torch.equal(only.of(expert), whole_run.of(expert)), (layer, expert)
        skeleton.unload_layer(layer)
    assert any(experts.weights is None for experts in skeleton.experts.values())
