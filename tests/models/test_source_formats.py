"""Decoding against the decoders of those who defined the formats."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from models.checkpoint import Checkpoint
from models.errors import InputError
from models.families import spec_of
from models.source_formats import Source, logical_name

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def source_of(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict | None) -> Source:
    config = CONFIG | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    return Source(checkpoint, spec_of(config))


def random_fp8(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul(30).to(torch.float8_e4m3fn)


def packed_config(**weights: object) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_bit_equal_to_transformers_where_it_can(tmp_path, dtype, scale_dtype):
    torch.manual_seed(0)
    weight, scale = random_fp8(384, 256), (torch.rand(3, 2) * 0.01).to(scale_dtype)
    source = source_of(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale}, FP8)
    assert source.names() == ("x.weight",)
    assert source.shape("x.weight") == (384, 256)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(source.read("x.weight", dtype), expected)


def test_every_fp8_code(tmp_path):
    codes = torch.arange(256, dtype=torch.uint8)
    weight = torch.stack([codes, codes.flip(0)]).view(torch.float8_e4m3fn)
    finite = torch.where(weight.float().isnan(), torch.tensor(1.0), weight.float())
    for stored in (weight, finite.to(torch.float8_e4m3fn)):
        tensors = {"x.weight": stored, "x.weight_scale_inv": torch.full((1, 2), 0.37)}
        decoded = source_of(tmp_path, tensors, FP8).read("x.weight", torch.float32)
        expected = stored.float() * 0.37
        assert torch.equal(decoded.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("shape", [(576, 320), (1, 1), (127, 129), (128, 64), (300, 7168)])
def test_fp8_blocks_that_do_not_divide(tmp_path, shape):
    torch.manual_seed(1)
    rows, columns = shape
    weight = random_fp8(rows, columns)
    scale = torch.rand(-(-rows // 128), -(-columns // 128))
    source = source_of(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale}, FP8)
    row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    expected = weight.double() * scale.double()[row][:, column]  # element by element
    assert torch.equal(source.read("x.weight", torch.float32), expected.float())


def test_fp8_e8m0_scales_and_v4_names(tmp_path):
    torch.manual_seed(2)
    weight = random_fp8(256, 128)
    exponents = torch.randint(110, 140, (2, 1), dtype=torch.uint8)
    scale = exponents.view(torch.float8_e8m0fnu)
    source = source_of(tmp_path, {"x.weight": weight, "x.scale": scale}, FP8)
    factor = 2.0 ** (exponents.double() - 127)
    expected = weight.double() * factor.repeat_interleave(128, 0)
    assert torch.equal(source.read("x.weight", torch.float32).double(), expected)


@pytest.mark.parametrize("stored", ["I8", "F4"])
def test_v4_fp4_experts_are_bit_equal_to_transformers(tmp_path, stored):
    torch.manual_seed(3)
    packed = torch.randint(0, 256, (64, 48), dtype=torch.uint8).view(torch.int8)
    scale = torch.randint(115, 135, (64, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    weight = packed if stored == "I8" else packed.view(torch.float4_e2m1fn_x2)
    source = source_of(tmp_path, {"x.weight": weight, "x.scale": scale}, FP8)
    assert source.shape("x.weight") == (64, 96)
    expected = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    assert torch.equal(source.read("x.weight"), expected)


def test_mxfp4_is_bit_equal_to_transformers_and_by_expert(tmp_path):
    torch.manual_seed(4)
    blocks = torch.randint(0, 256, (5, 24, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (5, 24, 3), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": blocks,
        f"{name}_scales": scales,
        f"{name}_bias": torch.rand(5, 24),
    }
    source = source_of(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert set(source.names()) == {name, name + "_bias"}
    assert source.shape(name) == (5, 96, 24)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(source.read(name), expected)
    assert torch.equal(source.read_expert(name, 3), expected[3])
    assert torch.equal(source.read_expert(name + "_bias", 4), tensors[f"{name}_bias"][4])
    with pytest.raises(InputError, match="no expert 5"):
        source.read_expert(name, 5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_packed_integers_are_bit_equal_to_compressed_tensors(tmp_path, bits, symmetric, group):
    torch.manual_seed(bits)
    rows, columns = 70, 96
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    groups = columns // group if group else 1
    tensors = {
        "x.weight_packed": pack_to_int32(codes, bits),
        "x.weight_scale": torch.rand(rows, groups).to(torch.bfloat16),
        "x.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        zero = torch.randint(low, high, (rows, groups), dtype=torch.int8)
        tensors["x.weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    strategy = QuantizationStrategy.GROUP if group else QuantizationStrategy.CHANNEL
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group
    )
    source = source_of(tmp_path, tensors, packed_config(**json.loads(args.model_dump_json())))
    assert source.names() == ("x.weight",)
    assert source.shape("x.weight") == (rows, columns)
    local = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    expected = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert torch.equal(source.read("x.weight", torch.bfloat16), expected)


def test_packed_integers_with_columns_in_hessian_order(tmp_path):
    torch.manual_seed(9)
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scale, order = torch.rand(6, 2), torch.randperm(64) // 32
    tensors = {
        "x.weight_packed": pack_to_int32(codes, 4),
        "x.weight_scale": scale,
        "x.weight_shape": torch.tensor([6, 64]),
        "x.weight_g_idx": order.int(),
    }
    config = packed_config(num_bits=4, group_size=32, strategy="group", symmetric=True)
    source = source_of(tmp_path, tensors, config)
    assert torch.equal(source.read("x.weight", torch.float32), codes * scale[:, order])


def test_padded_three_bit_words_of_older_writers(tmp_path):
    torch.manual_seed(10)
    codes = torch.randint(0, 8, (5, 64))
    words = torch.zeros(5, 7, dtype=torch.int64)
    for column in range(64):  # ten values a word, two bits wasted
        words[:, column // 10] |= codes[:, column] << (column % 10 * 3)
    tensors = {
        "x.weight_packed": words.to(torch.int32),
        "x.weight_scale": torch.ones(5, 2),
        "x.weight_shape": torch.tensor([5, 64]),
    }
    config = packed_config(num_bits=3, group_size=32, strategy="group", symmetric=True)
    source = source_of(tmp_path, tensors, config)
    assert torch.equal(source.read("x.weight", torch.float32), (codes - 4).float())


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scaled_fp8_of_compressed_tensors(tmp_path, strategy, scale_dtype):
    torch.manual_seed(11)
    weight = random_fp8(256, 384)
    shapes = {"channel": (256, 1), "tensor": (1,), "block": (2, 3)}
    scale = torch.rand(shapes[strategy]).to(scale_dtype)
    block = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **block)
    config = packed_config(**json.loads(args.model_dump_json()))
    source = source_of(tmp_path, {"x.weight": weight, "x.weight_scale": scale}, config)
    expected = dequantize(weight, scale, args=args)
    assert torch.equal(source.read("x.weight", scale_dtype), expected.to(scale_dtype))


def test_plain_tensors_keep_their_type_and_odd_names_stay_themselves(tmp_path):
    tensors = {
        "a.weight": torch.randn(4, 4, dtype=torch.bfloat16),
        "a.scale": torch.randn(4),  # a parameter that is merely called so
        "b.e_score_correction_bias": torch.randn(4, dtype=torch.float32),
    }
    source = source_of(tmp_path, tensors, FP8)
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor)
        assert source.format(name) == "plain"
    assert source.read("a.weight", torch.float32).dtype == torch.float32
    assert logical_name("a.scale", source.checkpoint.tensors) == "a.scale"


def test_companions_of_a_weight_follow_it(tmp_path):
    tensors = {
        "e.weight": random_fp8(128, 128),
        "e.weight_scale": torch.rand(128, 1),
        "e.input_scale": torch.ones(1),
    }
    config = packed_config(num_bits=8, type="float", strategy="channel")
    source = source_of(tmp_path, tensors, config)
    assert source.names() == ("e.weight",)
    assert {info.name for info in source.parts("e.weight")} == set(tensors)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"x.weight": random_fp8(8, 8)}, FP8, "no scale beside it"),
        (
            {"x.weight": random_fp8(192, 128), "x.weight_scale_inv": torch.ones(3, 1)},
            FP8,
            r"scales of shape \[3, 1\]",
        ),
        (
            {"x.weight": random_fp8(128, 128), "x.weight_scale_inv": torch.ones(1, 1)},
            {"quant_method": "fp8"},
            "weight_block_size is None",
        ),
        (
            {"x.weight_packed": torch.ones(4, 4, dtype=torch.int32)},
            {"quant_method": "compressed-tensors"},
            "stored as weight|stored as packed|layout not known",
        ),
        (
            {
                "x.weight_packed": torch.ones(4, 5, dtype=torch.int32),
                "x.weight_scale": torch.ones(4, 1),
                "x.weight_shape": torch.tensor([4, 32]),
            },
            packed_config(num_bits=4, group_size=32, strategy="group", symmetric=True),
            "fit no scheme",
        ),
        (
            {
                "x.weight_packed": torch.ones(4, 4, dtype=torch.int32),
                "x.weight_scale": torch.ones(4, 1),
                "x.weight_shape": torch.tensor([4, 1 << 50]),
            },
            packed_config(num_bits=4, group_size=32, strategy="group", symmetric=True),
            "says",
        ),
        ({"x.weight": torch.ones(2)}, {"quant_method": "awq"}, "quant_method 'awq'"),
        ({}, {"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo 'FP8' is not read"),
        ({}, GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({}, GPTQ | {"bits": 5}, "bits 5"),
        ({}, GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "other bits for"),
        (
            {},
            GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            "packing_format 'auto_round:auto_awq' is not read",
        ),
        (
            {
                "x.qweight": torch.zeros(8, 32, dtype=torch.int32),
                "x.qzeros": torch.zeros(2, 4, dtype=torch.int32),
                "x.scales": torch.ones(2, 32).half(),
            },
            GPTQ,
            "qzeros are not those of symmetric weights",
        ),
        (
            {
                "x.qweight": torch.zeros(8, 32, dtype=torch.int32),
                "x.qzeros": torch.zeros(2, 4, dtype=torch.int32),
                "x.scales": torch.ones(1, 32).half(),
            },
            GPTQ,
            "do not fit 32 x 64 in groups of 32",
        ),
        (
            {"x.weight": torch.zeros(2, 8, dtype=torch.uint8), "x.weight_scale": torch.ones(2, 1)},
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "a layout not known here",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_one_line(tmp_path, tensors, quantization, message):
    with pytest.raises(InputError, match=message) as caught:
        source_of(tmp_path, tensors, quantization).read("x.weight", torch.float32)
    assert "\n" not in str(caught.value)
