"""Decoding over the static cache of a graph against the growing cache, with and without CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.cache import length, new_cache, rows_join
from runtime.engine import Engine
from runtime.graph import DecodeGraph
from runtime.load import Loaded, LoadSettings, load_model
from runtime.sampling import Sampling
from tests.runtime.oracle import quantized_qwen
from tests.tiny import tiny_model

FAMILIES = ("qwen3_moe", "glm4_moe", "deepseek_v32")


def tiny(family: str, folder: Path) -> Loaded:
    # a tiny indexer's scores tie at zero, and which of equal keys it takes hangs on their places
    more: dict[str, Any] = {"index_topk": 64} if family == "deepseek_v32" else {}
    path = tiny_model(family, folder / "model", **more)
    return load_model(path, LoadSettings(dtype="float32", device="cpu"))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 60, (5 + 4 * row,), generator=generator).tolist() for row in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_lengths(family: str, tmp_path: Path) -> None:
    """Four steps of three rows in a graph of four, and the keys brought back."""
    loaded = tiny(family, tmp_path)
    caches: list[Any] = []
    alone: list[Any] = []
    with torch.inference_mode():
        for ids in prompts(3):
            for made in (caches, alone):
                made.append(new_cache(loaded.model))
                loaded.model(torch.tensor([ids]), past_key_values=made[-1], use_cache=True)
        joined = caches[0]
        for cache in caches[1:]:
            rows_join(joined, cache)
        width = length(joined)
        lengths = torch.tensor([[length(cache)] for cache in alone])
        graph = DecodeGraph(loaded, 4, 40)
        graph.load(joined, lengths)
        for step in range(4):
            newest = torch.tensor([[7 + step], [9 + step], [11 + step]])
            found = graph.run(newest)
            for row, cache in enumerate(alone):  # each row as if it were the only one
                out = loaded.model(newest[row : row + 1], past_key_values=cache, use_cache=True)
                torch.testing.assert_close(found[row], out.logits[0, -1], rtol=1e-4, atol=1e-4)
        graph.store(joined, 3, width + 4)
        for row, cache in enumerate(alone):
            for grown, single in zip(joined.layers, cache.layers, strict=True):
                own = grown.keys[row, :, width + 4 - length(cache) :]
                torch.testing.assert_close(own, single.keys[0], rtol=1e-4, atol=1e-4)


def answers(engine: Engine, wanted: list[list[int]]) -> list[list[int | None]]:
    """Tokens of requests that come one by one while others run."""
    said: list[list[int | None]] = [[] for _ in wanted]
    for row, ids in enumerate(wanted):
        engine.submit(ids, Sampling(temperature=0.0, max_tokens=6 + 5 * row), said[row].append)
        engine.step()
        engine.step()
    while not engine.idle:
        engine.step()
    return said


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_come_and_go(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says the same with graphs; places run out on the way, so graphs are made again."""
    monkeypatch.setattr("runtime.graph.LEAST", 16)
    monkeypatch.setattr("runtime.graph.ROOM", 4)
    loaded = tiny(family, tmp_path)
    plain, graphed = Engine(loaded), Engine(loaded)
    graphed.graphs.refused = None  # the same steps as in a graph, launched one by one
    made: list[tuple[int, int]] = []

    class Counted(DecodeGraph):
        def __init__(self, loaded: Any, rows: int, capacity: int) -> None:
            made.append((rows, capacity))
            super().__init__(loaded, rows, capacity)

    monkeypatch.setattr("runtime.graph.DecodeGraph", Counted)
    expected = answers(plain, prompts(4))
    assert not made
    assert answers(graphed, prompts(4)) == expected
    assert graphed.graphs.refused is None
    assert len({rows for rows, _ in made}) > 1
    assert len({capacity for _, capacity in made}) > 1


def test_a_model_that_cannot_be_captured_runs_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = tiny("qwen3_moe", tmp_path)
    engine = Engine(loaded)
    expected = answers(engine, prompts(2))

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert Engine(loaded, cuda_graphs=True).graphs.refused == "it runs on cpu"
    assert "decoding without CUDA graphs: it runs on cpu" in caplog.text
    monkeypatch.setattr("runtime.graph.DecodeGraph", fail)
    other = Engine(loaded)
    other.graphs.refused = None
    assert answers(other, prompts(2)) == expected
    assert "decoding without CUDA graphs: RuntimeError: operation not permitted" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device")
def test_a_graph_does_what_it_captured(tmp_path: Path) -> None:
    """On a GPU with packed experts: replayed or launched one by one, the same bits."""
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512}
    path = quantized_qwen("W4A16", tmp_path, **wide)
    loaded = load_model(path, LoadSettings(device="cuda:0", backend="triton"))
    engine = Engine(loaded, cuda_graphs=True)
    assert engine.graphs.refused is None
    with torch.inference_mode():
        graphs = [DecodeGraph(loaded, 2, 64) for _ in range(2)]
        assert all(graph.graph is not None for graph in graphs)
        graphs[1].graph = None
        cache = new_cache(loaded.model)
        ids = torch.tensor([prompts(3)[2]] * 2, device="cuda")
        loaded.model(ids, past_key_values=cache, use_cache=True)
        lengths = torch.full((2, 1), ids.shape[1], device="cuda")
        for graph in graphs:
            graph.load(cache, lengths)
        for step in range(5):
            newest = torch.tensor([[7 + step], [9 + step]], device="cuda")
            replayed, launched = (graph.run(newest).clone() for graph in graphs)
            assert torch.isfinite(replayed).all()
            assert torch.equal(replayed, launched)
            out = loaded.model(newest, past_key_values=cache, use_cache=True).logits[:, -1]
            error = (replayed.float() - out.float()).norm() / out.float().norm()
            assert error < 0.02, float(error)
    said = answers(engine, prompts(4))
    assert engine.graphs.refused is None
    assert [len(tokens) for tokens in said] == [7, 12, 17, 22]
