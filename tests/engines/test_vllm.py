"""vLLM loads our checkpoints with its own loaders and answers as transformers does.

Run by `make test-vllm` in an environment of its own; THRESHER_VLLM names the folder that
tests/engines/checkpoints.py wrote. Each prints its largest difference.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm")

FOLDER = Path(os.environ.get("THRESHER_VLLM", ""))
QWEN = (
    *("W4A16", "W3A16", "NVFP4A16", "NVFP4", "FP8_BLOCK"),
    *("W4A16-asymmetric", "W3A16-asymmetric", "mixed", "budget"),
)
DEMO = ("FP8", "W3A16", "NVFP4A16", "FP8_BLOCK")
NAMES = (*(f"qwen3-moe-{one}" for one in QWEN), *(f"demo-{one}" for one in DEMO))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_transformers(name: str) -> None:
    check(name, "float32", within=1e-4)


@pytest.mark.parametrize("name", ["latent-W3A16", "latent-NVFP4A16"])
def test_latent_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's MLA, where q_a and kv_a are one matrix and kv_b is absorbed."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    check(name, "float32", within=1e-4)


def test_vllms_own_kernel_for_4_bits() -> None:
    """Attention in vLLM's own CPU kernel for W4A16, which computes in bfloat16."""
    check("qwen3-moe-W4A16", "bfloat16", within=0.1, tokens=False)


def check(name: str, dtype: str, within: float, tokens: bool = True) -> None:
    """Log probabilities of every prompt token and of the first new one; all greedy tokens."""
    wanted = json.loads((FOLDER / f"{name}.json").read_text())
    worst = 0.0
    for want, have in zip(wanted, generated(name, dtype, wanted), strict=True):
        new = have.outputs[0]
        followed = [*want["prompt"][1:], want["tokens"][0]]
        seen = [*have.prompt_logprobs[1:], new.logprobs[0]]  # a prompt's first token has none
        pairs = list(zip(seen, followed, strict=True))
        assert all(token in entry for entry, token in pairs), "the first new token is another"
        ours = [entry[token].logprob for entry, token in pairs]
        theirs = [*want["prompt_logprobs"], want["logprobs"][0]]
        for one, other in zip(ours, theirs, strict=True):
            worst = max(worst, abs(one - other))
        assert len(new.token_ids) == len(want["tokens"])
        if tokens:
            assert list(new.token_ids) == want["tokens"]
    sys.stdout.write(f"\n{name} in {dtype}: log probabilities within {worst:.1e}\n")
    assert worst < within


def generated(name: str, dtype: str, wanted: list[dict[str, Any]]) -> list[Any]:
    """vLLM's greedy answers with log probabilities."""
    engine = vllm.LLM(
        str(FOLDER / name), dtype=dtype, skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=128, seed=0, disable_log_stats=True,
    )  # fmt: skip
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=len(wanted[0]["tokens"]), logprobs=5, prompt_logprobs=0,
        ignore_eos=True, detokenize=False,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": one["prompt"]} for one in wanted]
    answers: list[Any] = engine.generate(prompts, sampling)
    return answers
