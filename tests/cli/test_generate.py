"""`thresher generate` and `thresher chat` as programs."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from models.opening import open_model
from tests.cli.command import ROOT, argv, assert_refused, environment, thresher
from tests.tiny import reference_model

DEMO = ROOT / "demo" / "model"
PROMPT = "def add(a, b):"


def test_greedy_is_what_transformers_writes() -> None:
    """The bundled FP8 model decoded by the tests' own reader, in transformers' generate."""
    from calibration.chat import load_tokenizer

    done = thresher(
        "generate", DEMO, "--prompt", PROMPT, "--max-tokens", 24, "--temperature", 0, "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    tokenizer = load_tokenizer(DEMO)
    reference = reference_model(DEMO, dtype=torch.bfloat16, attention="sdpa")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        out = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)
    assert said["token_ids"] == out[0, ids.shape[1] :].tolist()
    assert said["text"] == tokenizer.decode(said["token_ids"])
    assert f"{open_model(DEMO).spec.num_layers}/5 layers" in done.stderr


def test_stop_seed_and_stdin() -> None:
    arguments = ("generate", DEMO, "--prompt", "-", "--max-tokens", "20", "--temperature", "1.2")
    lines = []
    for seed, stop in ((4, ()), (4, ("--stop", "e"))):
        done = subprocess.run(
            argv(*arguments, "--seed", seed, "--quiet", *stop), cwd=ROOT, env=environment(),
            text=True, input=PROMPT, capture_output=True, check=True, timeout=120,
        )  # fmt: skip
        lines.append(done.stdout.removesuffix("\n"))
    assert lines[1] == lines[0].partition("e")[0]


def test_chat_answers_each_line() -> None:
    done = subprocess.run(
        argv("chat", DEMO, "--max-tokens", 8, "--temperature", 0, "--quiet"), cwd=ROOT,
        env=environment(), text=True, input="Write a function\nAnother one\n", check=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert len(done.stdout.strip().splitlines()) >= 2


def test_wrong_words() -> None:
    assert_refused(thresher("generate", DEMO, "--prompt", "x", "--top-p", "2"), "--top-p")
    assert_refused(thresher("generate", ROOT, "--prompt", "x"), "tokenizer")
    assert_refused(thresher("generate", DEMO, "--prompt", "caf\udce9"), "surrogate")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--stop", ""), ("--seed", 1 << 63), ("--repetition-penalty", 1e-9)],
)
def test_options_are_read_before_the_model(option: str, value: object) -> None:
    """A folder without a tokenizer is not even looked at."""
    done = thresher("generate", ROOT, "--prompt", "x", option, value)
    assert_refused(done, option.strip("-").replace("-", "_"))
