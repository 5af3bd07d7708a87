"""On a GPU: the packed model's words are those of the model decoded by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant.export import Layout
from runtime.load import LoadSettings, load_model
from tests.runtime.oracle import DEMO, decoded_model, quantized_demo, quantized_qwen
from tests.runtime.test_load import SCHEMES, greedy, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]
# sizes that the kernels of every format take
LARGE = {"hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512}


@pytest.mark.parametrize("scheme", ["native", *SCHEMES])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("model", ["demo", "qwen3_moe"])
def test_same_words(model: str, scheme: str, backend: str, tmp_path: Path) -> None:
    if model == "demo":
        path = DEMO if scheme == "native" else quantized_demo(scheme, tmp_path / "packed")
    elif scheme == "native":
        pytest.skip("the demo model has DeepSeek's own FP8")
    else:
        path = quantized_qwen(scheme, tmp_path, **LARGE)
    loaded = load_model(path, LoadSettings(device="cuda:0", backend=backend))
    print("\n".join(loaded.describe()))  # noqa: T201 - pytest shows it with -rA
    reference = decoded_model(path, tmp_path / "decoded").to("cuda")
    ids = prompt(loaded.spec.text["vocab_size"]).to("cuda")
    with torch.inference_mode():
        ours, theirs = loaded.model(ids).logits.float(), reference(ids).logits.float()
    error = float((ours - theirs).norm() / theirs.norm())
    words = greedy(loaded.model, ids), greedy(reference, ids)
    same = next((i for i, (a, b) in enumerate(zip(*words, strict=True)) if a != b), 64)
    assert error < 0.02
    assert same == 64, f"{same} tokens are equal, logits differ by {error:.4f}"


@pytest.mark.parametrize(("layout", "scheme"), [("gptq", "W4A16"), ("modelopt", "NVFP4")])
def test_exports_say_the_same_words(layout: Layout, scheme: str, tmp_path: Path) -> None:
    """F16 scales of GPTQ and turned global scales of ModelOpt, by the kernels chosen for them."""
    path = quantized_qwen(scheme, tmp_path, layout, **LARGE)
    loaded = load_model(path, LoadSettings(device="cuda:0"))
    reference = decoded_model(path, tmp_path / "decoded").to("cuda")
    ids = prompt(loaded.spec.text["vocab_size"]).to("cuda")
    assert greedy(loaded.model, ids) == greedy(reference, ids)


def test_gpu_and_host_share_a_model(tmp_path: Path) -> None:
    """A device map of both: what does not fit on the GPU comes over for each forward."""
    path = quantized_qwen("W4A16", tmp_path, **LARGE)
    whole = load_model(path, LoadSettings(device="cuda:0"))
    ids = prompt(60).to("cuda")
    size = whole.nbytes
    split = load_model(path, LoadSettings(memory={0: int(size * 0.7), "cpu": 1 << 30}))
    assert len(set(split.placement.values())) == 2, split.placement
    assert greedy(split.model, ids, 16) == greedy(whole.model, ids, 16)
