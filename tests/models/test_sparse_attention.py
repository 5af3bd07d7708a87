"""The indexer's stand-in gives what the whole model of transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.opening import open_model
from models.skeleton import Skeleton
from models.sparse_attention import Indexer
from tests.models.test_skeleton import ragged_batch, walk, whole
from tests.tiny import reference_model, tiny_model


def indexers(skeleton: Skeleton) -> list[Indexer]:
    return [m for layer in skeleton.layers for m in layer.modules() if isinstance(m, Indexer)]


def opened(
    family: str, folder: Path, index_topk: int
) -> tuple[Skeleton, torch.nn.Module, torch.Tensor, torch.Tensor]:
    """16 heads leave no ties between scores, of which torch.topk takes any."""
    path = tiny_model(family, folder / "model", index_n_heads=16, index_topk=index_topk)
    model = open_model(path)
    skeleton = Skeleton(model.source, dtype=torch.float32, attention="sdpa")
    ids, mask = ragged_batch(model.spec.text["vocab_size"])
    return skeleton, reference_model(path, attention="sdpa"), ids, mask


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_short_samples_are_not_scored(family: str, tmp_path: Path) -> None:
    skeleton, model, ids, mask = opened(family, tmp_path, index_topk=24)
    found = indexers(skeleton)
    assert found
    # the original is behind a tuple: whoever called it would run its forward
    ran: list[bool] = []
    for indexer in found:
        indexer._original[0].register_forward_pre_hook(lambda *_: ran.append(True))
    assert torch.equal(walk(skeleton, ids, mask), whole(model, ids, mask))
    assert not ran


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_watched_matrices_are_fed_the_same(family: str, tmp_path: Path) -> None:
    """A calibration sees what the whole model's indexers get."""
    skeleton, model, ids, mask = opened(family, tmp_path, index_topk=24)
    names = ("wq_b", "wk", "weights_proj")
    seen: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    for indexer in indexers(skeleton):
        for name in names:
            indexer.get_submodule(name).register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
    theirs = [m for m in model.modules() if type(m) is type(indexers(skeleton)[0]._original[0])]
    for indexer in theirs:
        for name in names:
            indexer.get_submodule(name).register_forward_pre_hook(
                lambda _, args: wanted.append(args[0])
            )
    assert torch.equal(walk(skeleton, ids, mask), whole(model, ids, mask))
    assert len(seen) == len(wanted) == len(names) * len(indexers(skeleton))
    real = mask.bool()
    for mine, own in zip(seen, wanted, strict=True):
        assert torch.equal(mine[real], own[real])


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("queries", [1, 5, 23])
def test_slices_of_queries_choose_the_same_keys(family: str, queries: int, tmp_path: Path) -> None:
    skeleton, model, ids, mask = opened(family, tmp_path, index_topk=8)
    for indexer in indexers(skeleton):
        indexer.scores_at_once = queries * ids.shape[0] * 16 * ids.shape[1]
    expected = whole(model, ids, mask)
    real = mask.bool()
    torch.testing.assert_close(
        walk(skeleton, ids, mask)[real], expected[real], rtol=1e-4, atol=1e-4
    )


def test_a_matrix_replaced_in_the_stand_in_is_the_one_that_runs(tmp_path: Path) -> None:
    skeleton, _, ids, mask = opened("deepseek_v32", tmp_path, index_topk=8)
    ran: list[bool] = []

    class Counted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(True)
            return super().forward(x)

    for indexer in indexers(skeleton):
        old = indexer.get_submodule("wk")
        assert isinstance(old, torch.nn.Linear)
        with torch.device("meta"):
            indexer.wk = Counted(old.in_features, old.out_features, bias=False)
    walk(skeleton, ids, mask)
    assert len(ran) == len(skeleton.layers)
