"""A repetition penalty, told of one token at a time, is transformers' own over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from runtime.engine import Engine
from runtime.load import load_model
from runtime.sampling import Sampler, Sampling
from tests.runtime.oracle import DEMO


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_penalised_logits(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(Sampling(repetition_penalty=penalty))
    theirs: Any = RepetitionPenaltyLogitsProcessor(penalty)
    prompt = [3, 7, 3, 0]
    ids, new = list(prompt), prompt
    for token in (7, 49, 49, 1, 3):
        logits_V = torch.randn(50, generator=generator)
        expected = theirs(torch.tensor([ids]), logits_V.unsqueeze(0))
        assert torch.equal(sampler.scores(logits_V, new), expected)
        new = [token]
        ids.append(token)


def test_an_answer_with_a_penalty() -> None:
    """The engine's tokens are those of transformers' generate."""
    loaded = load_model(DEMO)
    prompt = [5, 6, 5, 9]
    engine = Engine(loaded)
    sampling = Sampling(repetition_penalty=1.4, max_tokens=24)
    request = engine.submit(prompt, sampling, lambda token: None)
    plain = engine.submit(prompt, Sampling(max_tokens=24), lambda token: None)
    while not engine.idle:
        engine.step()
    generated = loaded.model.generate(
        torch.tensor([prompt]), do_sample=False, repetition_penalty=1.4, max_new_tokens=24
    )
    assert request.tokens == generated[0, len(prompt) :].tolist()
    assert request.tokens != plain.tokens
