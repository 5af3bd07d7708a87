"""On a GPU: the packed model's words are those of the model decoded by others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from models.errors import InputError
from quant.export import Layout
from runtime.choice import Backend
from runtime.load import LoadSettings, load_model
from tests.runtime.oracle import DEMO, decoded_model, quantized_demo, quantized_qwen
from tests.runtime.test_load import SCHEMES, greedy, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]
# sizes that the kernels of every format take
LARGE = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512}


TEXT = 'import os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n    with open('
COUNT = 64


@pytest.mark.parametrize("scheme", ["native", *SCHEMES])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("model", ["demo", "qwen3_moe"])
def test_same_words(model: str, scheme: str, backend: Backend, tmp_path: Path) -> None:
    """Greedy tokens are the decoded bfloat16 model's, ties within its own rounding apart."""
    if model == "demo":
        path = DEMO if scheme == "native" else quantized_demo(scheme, tmp_path / "packed")
    elif scheme == "native":
        pytest.skip("the demo model has DeepSeek's own FP8")
    else:
        path = quantized_qwen(scheme, tmp_path, **LARGE)
    try:
        loaded = load_model(path, LoadSettings(device="cuda:0", backend=backend))
    except InputError as refusal:
        pytest.skip(str(refusal))
    print("\n".join(loaded.describe()))  # noqa: T201 - pytest shows it with -rA
    reference = decoded_model(path, tmp_path / "decoded").to("cuda")
    if model == "demo":
        ids = AutoTokenizer.from_pretrained(DEMO)(TEXT, return_tensors="pt").input_ids.to("cuda")
    else:
        ids = prompt(loaded.spec.text["vocab_size"]).to("cuda")
    assert_same_words(loaded.model, reference, ids)


def assert_same_words(model: Any, reference: Any, ids: torch.Tensor) -> None:
    """COUNT greedy tokens, and logits no further from float32's than the reference's own."""
    exact = copy.deepcopy(reference).float()
    with torch.inference_mode():
        ours, theirs, best = (m(ids).logits.float() for m in (model, reference, exact))
    error, noise = (float((a - best).norm() / best.norm()) for a in (ours, theirs))
    print(f"logits from float32's: ours {error:.5f}, the decoded model's {noise:.5f}")  # noqa: T201
    assert error < 1.3 * noise + 1e-3
    ties = 0
    end = ids.shape[1] + COUNT
    while ids.shape[1] < end:
        left = end - ids.shape[1]
        found, wanted = greedy(model, ids, left), greedy(reference, ids, left)
        same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), left)
        ids = torch.cat((ids, ids.new_tensor([wanted[:same]])), dim=1)
        if same == left:
            break
        ties += 1
        assert_tie(reference, exact, ids, found[same], wanted[same])
        ids = torch.cat((ids, ids.new_tensor([[wanted[same]]])), dim=1)
    assert ties <= 2, f"{ties} ties in {COUNT} tokens"


def assert_tie(reference: Any, exact: Any, ids: torch.Tensor, found: int, wanted: int) -> None:
    """Two tokens are as likely as the bfloat16 model can say, judged by itself in float32."""
    with torch.inference_mode():
        rounded, best = (m(ids).logits[0, -1].float() for m in (reference, exact))
    gap = float(best[wanted] - best[found])
    noise = float((rounded - best).abs().max())
    print(f"token {ids.shape[1]}: {found} for {wanted}, gap {gap:.4f}, rounding {noise:.4f}")  # noqa: T201
    assert abs(gap) <= 2 * noise


@pytest.mark.parametrize(("layout", "scheme"), [("gptq", "W4A16"), ("modelopt", "NVFP4")])
def test_exports_say_the_same_words(layout: Layout, scheme: str, tmp_path: Path) -> None:
    """F16 scales of GPTQ and turned global scales of ModelOpt, by the kernels chosen for them."""
    path = quantized_qwen(scheme, tmp_path, layout, **LARGE)
    loaded = load_model(path, LoadSettings(device="cuda:0"))
    reference = decoded_model(path, tmp_path / "decoded").to("cuda")
    ids = prompt(loaded.spec.text["vocab_size"]).to("cuda")
    assert_same_words(loaded.model, reference, ids)


def test_gpu_and_host_share_a_model(tmp_path: Path) -> None:
    """A device map of both: what does not fit on the GPU comes over for each forward."""
    path = quantized_qwen("W4A16", tmp_path, **LARGE)
    whole = load_model(path, LoadSettings(device="cuda:0"))
    ids = prompt(60).to("cuda")
    size = whole.nbytes
    split = load_model(path, LoadSettings(memory={0: int(size * 0.7), "cpu": 1 << 30}))
    assert len(set(split.placement.values())) == 2, split.placement
    assert greedy(split.model, ids, 16) == greedy(whole.model, ids, 16)
