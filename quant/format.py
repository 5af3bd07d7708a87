"""Rounded weights to the tensors on disk and back, in compressed-tensors' layouts (>= 0.18).

    pack-quantized        row n is one stream of bits, least significant first: the code of column
                          k, q + 2^(b−1), occupies bits [k·b, (k+1)·b); 32 codes fill b int32 words
                          and may straddle two; the last word is padded with zeros. Zero points
                          are packed the same way down the columns (along N).
    nvfp4-pack-quantized  byte j of a row holds columns 2j (low nibble) and 2j+1 (high)
    float-quantized       the float8_e4m3fn codes as they are

compressed-tensors up to 0.17 put 32 // b codes into a word under the same format name
(10 three-bit codes, two bits wasted). That layout is read (models/source_formats.py) and never
written.

Our own packer works on batches of experts on any device and makes no int32 copy of the codes;
tests/quant/test_format.py holds it to compressed-tensors' compressors, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.dequantize import unpack_bits
from models.device import has_kernels
from quant.schemes import Quantized, Scheme


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., K] as dense int32 words [..., ceil(K·bits/32)]: uint8 from 0 to 2^bits − 1, or
    int8, to which 2^(bits−1) is added first."""
    assert codes.dtype in (torch.uint8, torch.int8), codes.dtype
    if has_kernels(codes):
        from quant.kernels.pack import pack_codes

        return pack_codes(codes, bits)
    if codes.dtype == torch.int8:
        codes = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # modulo 256
    columns = codes.shape[-1]
    words = -(-columns * bits // 32)
    if columns % 32:
        codes = torch.nn.functional.pad(codes, (0, -columns % 32))
    if bits in (4, 8):
        whole = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
        # flattened first: contiguous() keeps odd strides of dimensions of size 1
        flat = whole.flatten().contiguous().view(torch.int32)
        return flat.view(*codes.shape[:-1], -1)[..., :words].contiguous()
    groups = codes.unflatten(-1, (-1, 32))
    packed = torch.zeros((*groups.shape[:-1], bits), dtype=torch.int32, device=codes.device)
    for index in range(32):
        word, offset = divmod(index * bits, 32)
        value = groups[..., index].int()
        packed[..., word] |= value << offset
        if offset + bits > 32:
            packed[..., word + 1] |= value >> (32 - offset)
    return packed.flatten(-2)[..., :words].contiguous()


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles (uint8 [..., K], K even) two a byte, the even column low: uint8 [..., K/2]."""
    if has_kernels(codes) and codes.shape[-1] % 8 == 0:
        return pack_bits(codes, 4).view(torch.uint8)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def pack(
    q: Quantized, scheme: Scheme, *, input_global_scale: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """One [N, K] weight as the tensors that `Scheme.packed` lists, keyed by suffix.

    `input_global_scale` (float32 [1], 2688 / amax of the inputs) goes with schemes that store
    one, and only with them.
    """
    rows, columns = q.codes.shape
    tensors: dict[str, torch.Tensor] = {}
    if scheme.kind == "int":
        assert (q.codes.dtype == torch.int8) == (q.zero_point is None), q.codes.dtype
        tensors["weight_packed"] = pack_bits(q.codes, scheme.bits)
        tensors["weight_scale"] = q.scale
        tensors["weight_shape"] = torch.tensor([rows, columns], dtype=torch.int64)
        if q.zero_point is not None:
            by_column = pack_bits(q.zero_point.T.contiguous(), scheme.bits)
            tensors["weight_zero_point"] = by_column.T.contiguous()
    elif scheme.kind == "nvfp4":
        assert q.global_scale is not None
        tensors["weight_packed"] = pack_nibbles(q.codes)
        tensors["weight_scale"] = q.scale
        tensors["weight_global_scale"] = q.global_scale.float().reshape(1)
        if input_global_scale is not None:
            tensors["input_global_scale"] = input_global_scale.float().reshape(1)
    else:
        tensors["weight"] = q.codes
        tensors["weight_scale"] = q.scale
    expected = scheme.packed((rows, columns), q.scale.dtype)
    found = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
    assert found == expected, (scheme.name, found, expected)
    return tensors


def unpack(
    tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Quantized:
    """The inverse of `pack`: codes, scales and zero points of an [N, K] weight."""
    rows, columns = shape
    if scheme.kind == "int":
        codes = unpack_bits(tensors["weight_packed"], scheme.bits, columns)
        if scheme.symmetric:
            signed = (codes - (1 << (scheme.bits - 1))).to(torch.int8)
            return Quantized(signed, tensors["weight_scale"])
        by_column = tensors["weight_zero_point"].T.contiguous()
        zeros = unpack_bits(by_column, scheme.bits, rows).T.contiguous()
        return Quantized(
            codes.to(torch.uint8), tensors["weight_scale"], zero_point=zeros.to(torch.uint8)
        )
    if scheme.kind == "nvfp4":
        packed = tensors["weight_packed"]
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        return Quantized(
            nibbles, tensors["weight_scale"], global_scale=tensors["weight_global_scale"]
        )
    return Quantized(tensors["weight"], tensors["weight_scale"])
