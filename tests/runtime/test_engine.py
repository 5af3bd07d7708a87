"""One request's end, however it comes, is its own: nobody waits for ever and nobody else fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engine import Engine, QueueFullError, Request
from runtime.load import Loaded, default_sampling, load_model
from runtime.sampling import Sampler, Sampling
from tests.runtime.oracle import DEMO

Said = list[int | None]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model(DEMO)


def submit(engine: Engine, **options: Any) -> tuple[Request, Said]:
    said: Said = []
    return engine.submit([5, 6], Sampling(**{"max_tokens": 9, **options}), said.append), said


def test_a_failure_between_queue_and_batch_ends_the_request(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a row joins the batch it stands in neither list of those that run."""

    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    engine = Engine(loaded)
    submit(engine)
    engine.step()
    joining, said = submit(engine)
    monkeypatch.setattr("runtime.engine.rows_join", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    engine.fail_all("out of memory")
    assert (joining.reason, joining.error, said[-1]) == ("error", "out of memory", None)
    assert engine.idle


@pytest.mark.parametrize("after", [0, 3])
def test_a_draw_that_fails_ends_one_request(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """At its first token as at a later one; the others write what they would have written."""
    real = Sampler.choose

    def choose(self: Sampler, logits_V: torch.Tensor, new: list[int]) -> int:
        left = getattr(self, "left", None)
        if left == 0:
            raise RuntimeError("probability tensor contains nan")
        if left is not None:
            self.left = left - 1  # type: ignore[attr-defined]
        return real(self, logits_V, new)

    monkeypatch.setattr(Sampler, "choose", choose)
    engine = Engine(loaded)
    alone, _ = submit(engine)
    while not engine.idle:
        engine.step()
    other, _ = submit(engine)
    engine.step()
    bad, said = submit(engine, temperature=1.0)
    bad.sampler.left = after  # type: ignore[union-attr]
    while not engine.idle:
        engine.step()
    assert (bad.reason, len(bad.tokens), said[-1]) == ("error", after, None)
    assert "nan" in bad.error
    assert other.tokens == alone.tokens


def test_those_who_left_the_queue_free_their_places(loaded: Loaded) -> None:
    """Also behind others, and while the batch is full."""
    engine = Engine(loaded, max_batch=1, queue=2)
    submit(engine)
    engine.step()
    waiting = [submit(engine) for _ in range(2)]
    with pytest.raises(QueueFullError):
        submit(engine)
    engine.cancel(waiting[1][0])
    engine.step()
    assert [request.reason for request, _ in waiting] == [None, "cancelled"]
    assert waiting[1][1] == [None]
    submit(engine)


def copy_of_demo(folder: Path, generation: dict[str, Any], **config: Any) -> Path:
    """The bundled model with another generation_config.json and more in config.json."""
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    own = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(own))
    return folder


def test_where_answers_end(tmp_path: Path) -> None:
    """generation_config.json first, config.json where it says nothing, the tokenizer always."""
    silent = load_model(copy_of_demo(tmp_path / "silent", {}, eos_token_id=[4, 7]))
    assert Engine(silent).eos == {4, 7}
    assert Engine(silent, eos=1).eos == {1, 4, 7}
    said = load_model(copy_of_demo(tmp_path / "said", {"eos_token_id": 9}, eos_token_id=4))
    assert Engine(said).eos == {9}


def test_the_checkpoint_s_top_k(tmp_path: Path) -> None:
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 20}
    defaults = default_sampling(load_model(copy_of_demo(tmp_path / "model", asked)))
    assert (defaults.temperature, defaults.top_k) == (0.6, 20)
