"""Walking layer by layer gives the very logits of the whole model, for every family.

The oracle is transformers' own forward of the model loaded whole (tests/tiny.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import InputError
from models.experts import RoutedBatch
from models.layer_slot import Carry
from models.opening import compute_dtype, open_model
from models.skeleton import Skeleton
from tests.tiny import FAMILIES, FP8_BLOCKS, reference_model, tiny_model

LENGTHS = (24, 17, 9)


def ragged_batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [3, 24] and their mask: rows of 24, 17 and 9 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, vocabulary, (len(LENGTHS), LENGTHS[0]), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return ids, mask


def walk(skeleton: Skeleton, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits by one layer at a time."""
    skeleton.load_embedding()
    carry: Carry = skeleton.embed(ids, mask)
    skeleton.unload_embedding()
    for layer in range(len(skeleton.layers)):
        skeleton.load_layer(layer)
        call = skeleton.call(layer, ids, mask)
        carry = skeleton.run_layer(layer, call, carry)
        skeleton.unload_layer(layer)
    skeleton.load_head()
    logits = skeleton.logits(carry)
    skeleton.unload_head()
    return logits


def whole(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, "eager"), (torch.bfloat16, None)],
    ids=["f32-eager", "bf16-own"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_whole_models(
    family: str, dtype: torch.dtype, attention: str | None, tmp_path: Path
) -> None:
    path = tiny_model(family, tmp_path / "model")
    opened = open_model(path)
    if opened.spec.architecture.float32_only and dtype != torch.float32:
        with pytest.raises(InputError, match="use --dtype"):
            compute_dtype(opened.spec, str(dtype).removeprefix("torch."))
        return
    reference = reference_model(path, dtype=dtype, attention=attention)
    skeleton = Skeleton(opened.source, dtype=dtype, attention=attention)
    ids, mask = ragged_batch(opened.spec.text["vocab_size"])
    for this_mask in (None, mask):
        expected = whole(reference, ids, this_mask)
        got = walk(skeleton, ids, this_mask)
        real = torch.ones_like(mask).bool() if this_mask is None else mask.bool()
        assert torch.isfinite(expected[real]).all()
        assert torch.equal(got[real], expected[real])


@pytest.mark.parametrize("family", sorted(FP8_BLOCKS))
def test_ragged_fp8_source(family: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model", fp8=True)
    opened = open_model(path)
    dtype = compute_dtype(opened.spec, "auto")
    reference = reference_model(path, dtype=dtype)
    skeleton = Skeleton(opened.source, dtype=dtype, attention="eager")
    ids, mask = ragged_batch(opened.spec.text["vocab_size"])
    got, expected = walk(skeleton, ids, mask), whole(reference, ids, mask)
    assert torch.equal(got[mask.bool()], expected[mask.bool()])


def test_one_layer_is_resident(tmp_path: Path) -> None:
    opened = open_model(tiny_model("deepseek_v32", tmp_path / "model"))
    skeleton = Skeleton(opened.source, dtype=torch.float32)

    def resident() -> list[int]:
        return [
            index
            for index, layer in enumerate(skeleton.layers)
            if any(not p.is_meta for p in layer.parameters())
            or (index in skeleton.experts and skeleton.experts[index].weights is not None)
        ]

    assert resident() == []
    skeleton.load_layer(1)
    assert resident() == [1]
    skeleton.unload_layer(1)
    assert resident() == []


def test_experts_show_what_the_router_chose(tmp_path: Path) -> None:
    """Ids and weights of the record are those transformers' own router returns."""
    path = tiny_model("deepseek_v32", tmp_path / "model")
    opened = open_model(path)
    layer = opened.spec.moe_layers[0]
    reference = reference_model(path)
    ids, mask = ragged_batch(opened.spec.text["vocab_size"])
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen["index"], seen["weights"] = args[1], args[2]

    reference.model.layers[layer].mlp.experts.register_forward_pre_hook(keep)
    whole(reference, ids, mask)
    skeleton = Skeleton(opened.source, dtype=torch.float32, attention="eager")
    records: list[RoutedBatch] = []
    skeleton.load_embedding()
    carry = skeleton.embed(ids, mask)
    for index in range(layer + 1):
        skeleton.load_layer(index, records.append)
        carry = skeleton.run_layer(index, skeleton.call(index, ids, mask), carry)
    record = records[-1]
    assert record.layer == layer
    pairs = {
        (int(t), int(e)): float(w)
        for t, e, w in zip(record.token_P, record.expert_P, record.router_weights_P, strict=True)
    }
    expected = {
        (t, int(e)): float(w)
        for t in range(ids.numel())
        for e, w in zip(seen["index"][t], seen["weights"][t], strict=True)
    }
    assert pairs == expected


def test_silu_gating_is_known_from_other_activations(tmp_path: Path) -> None:
    """Families that gate by silu alone have a kernel; limits and biases are the family's code."""
    for family, plain in (("deepseek_v32", True), ("qwen3_moe", True), ("gpt_oss", False)):
        opened = open_model(tiny_model(family, tmp_path / family))
        skeleton = Skeleton(opened.source, dtype=torch.float32)
        assert {experts.gated_silu for experts in skeleton.experts.values()} == {plain}


def test_nan_weights_are_named(tmp_path: Path) -> None:
    path = tiny_model("qwen3_moe", tmp_path / "model", shards=1)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors")
    skeleton = Skeleton(open_model(path).source, dtype=torch.float32)
    with pytest.raises(InputError, match=name):
        skeleton.load_layer(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_whole_models_on_a_gpu(family: str, tmp_path: Path) -> None:
    path = tiny_model(family, tmp_path / "model")
    opened = open_model(path)
    dtype = compute_dtype(opened.spec, "auto")
    if not opened.spec.architecture.float32_only:
        dtype = torch.bfloat16
    reference = reference_model(path, dtype=dtype, attention=None).cuda()
    skeleton = Skeleton(opened.source, dtype=dtype, device="cuda")
    ids, mask = (tensor.cuda() for tensor in ragged_batch(opened.spec.text["vocab_size"]))
    for this_mask in (None, mask):
        expected = whole(reference, ids, this_mask)
        got = walk(skeleton, ids, this_mask)
        real = mask.bool() if this_mask is not None else torch.ones_like(mask).bool()
        assert torch.equal(got[real], expected[real])
