"""Packing against compressed-tensors' own compressors, bit for bit, odd shapes included."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from quant.format import pack, pack_bits, unpack
from quant.schemes import SCHEMES, Quantized, Scheme, dequantize, int_scheme


def decompressed(tensors: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """compressed-tensors' decompression of what we packed."""
    theirs = QuantizationScheme(
        targets=["Linear"], weights=scheme.weights, input_activations=scheme.input_activations
    )
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(dict(tensors), theirs)["weight"]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    bits=st.integers(2, 8),
    seed=st.integers(0, 999),
)
def test_words_are_compressed_tensors(rows: int, columns: int, bits: int, seed: int) -> None:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    ours = pack_bits((codes.int() + half).to(torch.uint8), bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(pack_bits(codes, bits), ours)
    assert ours.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(ours, theirs)
    assert torch.equal(unpack_from_int32(ours, bits, torch.Size((rows, columns))), codes)


def test_batches_pack_as_single_matrices() -> None:
    codes = torch.randint(0, 8, (3, 5, 96)).to(torch.uint8)
    packed = pack_bits(codes, 3)
    assert packed.shape == (3, 5, 9)
    for batch, one in zip(packed, codes, strict=True):
        assert torch.equal(batch, pack_bits(one, 3))


@given(
    rows=st.integers(1, 50),
    groups=st.integers(1, 6),
    size=st.sampled_from((8, 16, 24, 32, 64, 128)),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    seed=st.integers(0, 999),
)
def test_integers_decode_to_our_codes_and_scales(
    rows: int, groups: int, size: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    scheme = int_scheme(bits, size, symmetric)
    generator = torch.Generator().manual_seed(seed)
    columns, half = groups * size, 1 << (bits - 1)
    codes = torch.randint(0, 2 * half, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2 * half, (rows, groups), generator=generator)
    scale = torch.rand(rows, groups, generator=generator).add(0.01).to(dtype)
    if symmetric:
        quantized = Quantized((codes - half).to(torch.int8), scale)
    else:
        quantized = Quantized(codes.to(torch.uint8), scale, zero_point=zeros.to(torch.uint8))
    tensors = pack(quantized, scheme)
    assert tensors["weight_shape"].tolist() == [rows, columns]
    unpacked = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((rows, columns)))
    assert torch.equal(unpacked.int() + half, codes.int())
    assert torch.equal(tensors["weight_scale"], scale)
    assert torch.equal(decompressed(tensors, scheme), dequantize(quantized, scheme).to(dtype))
    again = unpack(tensors, scheme, (rows, columns))
    assert torch.equal(again.codes, quantized.codes)
    if not symmetric:
        assert again.zero_point is not None
        assert torch.equal(again.zero_point.int(), zeros.int())


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    name=st.sampled_from(("NVFP4", "NVFP4A16")),
    seed=st.integers(0, 999),
)
def test_nvfp4_decodes_to_our_codes(rows: int, groups: int, name: str, seed: int) -> None:
    scheme, columns = SCHEMES[name], groups * 16
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 448).to(torch.float8_e4m3fn)
    divisor = torch.rand(1, generator=generator) * 3000 + 1
    quantized = Quantized(codes, scale, global_scale=divisor)
    inputs = torch.tensor([321.0]) if scheme.has_input_scale else None
    tensors = pack(quantized, scheme, input_global_scale=inputs)
    assert ("input_global_scale" in tensors) == (name == "NVFP4")
    values = decompressed(tensors, scheme)
    assert torch.equal(values, dequantize(quantized, scheme).to(torch.bfloat16))
    assert torch.equal(unpack(tensors, scheme, (rows, columns)).codes, codes)


@given(rows=st.integers(1, 300), blocks=st.integers(1, 3), seed=st.integers(0, 999))
def test_fp8_decodes(rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, blocks * 128, generator=generator).to(torch.float8_e4m3fn)
    block, channel = SCHEMES["FP8_BLOCK"], SCHEMES["FP8_DYNAMIC"]
    of_blocks = Quantized(codes, torch.rand(-(-rows // 128), blocks, generator=generator))
    assert torch.equal(decompressed(pack(of_blocks, block), block), dequantize(of_blocks, block))
    of_rows = Quantized(codes, torch.rand(rows, 1, generator=generator).to(torch.bfloat16))
    expected = dequantize(of_rows, channel).to(torch.bfloat16)
    assert torch.equal(decompressed(pack(of_rows, channel), channel), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_group_with_zero_points(bits: int) -> None:
    """K = g: the zero points are one column, whose transpose has odd strides."""
    codes = torch.randint(0, 1 << bits, (64, 32)).to(torch.uint8)
    zeros = torch.randint(0, 1 << bits, (64, 1)).to(torch.uint8)
    scheme = int_scheme(bits, 32, False)
    tensors = pack(Quantized(codes, torch.ones(64, 1), zero_point=zeros), scheme)
    expected = (codes.int() - zeros.int()).float()
    assert torch.equal(decompressed(tensors, scheme), expected)


def test_three_bits_are_dense() -> None:
    """10-per-word packing (compressed-tensors <= 0.17) would take 26 words for 256 columns."""
    codes = torch.zeros(4, 256, dtype=torch.int8)
    tensors = pack(Quantized(codes, torch.ones(4, 2, dtype=torch.bfloat16)), SCHEMES["W3A16"])
    assert tensors["weight_packed"].shape == (4, 24)


def test_what_is_missing_is_not_written() -> None:
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    scale = torch.ones(4, 2).to(torch.float8_e4m3fn)
    with pytest.raises(AssertionError):  # our own mistake, not the user's
        pack(Quantized(codes, scale, global_scale=torch.ones(1)), SCHEMES["NVFP4"])
