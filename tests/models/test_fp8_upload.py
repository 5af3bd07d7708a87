"""FP8 blocks through the pinned ring, against Source's own decoding on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import fp8_upload
from models.errors import InputError
from models.fp8_upload import ALIGNMENT, Fp8Matrix, Fp8Upload, loads, placed
from models.opening import open_model
from models.skeleton import Skeleton
from tests.tiny import tiny_model

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]


def matrices_of(path: Path, device: str) -> list[Fp8Matrix]:
    """Every FP8 matrix of a checkpoint, each with memory of its own to go to."""
    source = open_model(path).source
    found = []
    for name in source.names():
        if source.format(name) == "fp8_block" and len(source.shape(name)) == 2:
            block = source.scale_block(name)
            parts = fp8_upload.fp8_parts(source.parts(name), block)
            assert parts is not None
            out = torch.empty(source.shape(name), dtype=torch.bfloat16, device=device)
            found.append(Fp8Matrix(name, *parts, block, out))
    assert found
    return found


def test_loads_hold_one_shape_and_do_not_overlap(tmp_path: Path) -> None:
    matrices = matrices_of(tiny_model("deepseek_v3", tmp_path, fp8=True), "cpu")
    limit = 3 * max(matrix.nbytes for matrix in matrices)
    cut = list(loads(matrices, limit))
    assert sorted(m.name for load in cut for m in load) == sorted(m.name for m in matrices)
    assert len(cut) > len({m.codes.shape for m in matrices})
    for load in cut:
        assert len({(matrix.codes.shape, matrix.block) for matrix in load}) == 1
        end = 0
        for info, start in placed(load):
            assert start >= end
            assert start % ALIGNMENT == 0
            end = start + info.nbytes
        assert end <= limit


@pytest.mark.parametrize("load_bytes", [1, 1 << 12, 1 << 28])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_decoded_as_on_the_cpu(
    device: str, load_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_upload, "LOAD_BYTES", load_bytes)
    path = tiny_model("deepseek_v3", tmp_path, fp8=True)
    source = open_model(path).source
    upload = Fp8Upload(torch.device(device))
    for _ in range(2):  # the ring is used again
        matrices = matrices_of(path, device)
        upload.run(source.checkpoint, matrices)
        for matrix in matrices:
            assert torch.equal(matrix.out.cpu(), source.read(matrix.name, torch.bfloat16))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_nan_names_its_tensor(device: str, tmp_path: Path) -> None:
    path = tiny_model("deepseek_v3", tmp_path, fp8=True)
    opened = open_model(path)
    name = opened.spec.expert_name(2, 3, opened.spec.architecture.moe.experts[0])
    info = opened.checkpoint.info(name)
    with info.file.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        file.write(b"\xff")
    skeleton = Skeleton(open_model(path).source, dtype=torch.bfloat16, device=device)
    with pytest.raises(InputError, match=f"{name} .*NaN"):
        skeleton.load_layer(2)
