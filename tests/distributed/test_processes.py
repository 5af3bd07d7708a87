"""Several gloo processes share a job and end with the bytes of one process alone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.launch import keep_one_gpu
from models.opening import open_model
from models.processes import labels_of, packed, unpacked
from quant import walked_layer
from tests.distributed.runs import Ended, Run, run_all
from tests.kills import files
from tests.tiny import tiny_model
from tests.token_sets import random_token_set

SMALL = ["--batch-tokens", "64", "--quiet"]


def model_and_tokens(folder: Path, family: str, **settings: object) -> list[str]:
    """MODEL --tokens FILE of a tiny model and seven batches of tokens, uneven and padded."""
    folder.mkdir(exist_ok=True)
    model = tiny_model(family, folder / "model", **settings)
    vocabulary = open_model(model).spec.text["vocab_size"]
    lengths = (60, 33, 31, 2, 50, 41, 20, 17, 60, 9)
    tokens = random_token_set(vocabulary, lengths, (0, 1) * 5)
    tokens.save(folder / "tokens.safetensors")
    return [str(model), "--tokens", str(folder / "tokens.safetensors")]


def assert_all_wrote_the_same(folder: Path, *names: str) -> None:
    wanted = files(folder / names[0])
    for name in names[1:]:
        found = files(folder / name)
        assert found.keys() == wanted.keys()
        for file in wanted:
            assert found[file] == wanted[file], f"{name}/{file}"


CASES: dict[str, tuple[str, dict[str, object], list[str]]] = {
    # spilled hidden states, an MTP layer
    "score-damage": ("deepseek_v32", {}, ["score", "--damage", "--memory", "20KB"]),
    "score-weighted-inputs": ("llama4", {}, ["score"]),
    # more experts than are rounded together
    "quantize-many-experts": (
        "qwen3_moe",
        {"num_experts": 80, "dtype": "bfloat16"},
        ["quantize", "--scheme", "W3A16", "--group-size", "8"],
    ),
    "quantize-weighted-inputs": (
        "llama4",
        {},
        ["quantize", "--scheme", "W4A16", "--group-size", "8"],
    ),
    "quantize-nvfp4": (
        "qwen3_moe",
        {},
        ["quantize", "--scheme", "NVFP4", "--propagate", "original"],
    ),
    "quantize-rtn": (
        "qwen3_moe",
        {"num_experts": 80},
        ["quantize", "--scheme", "FP8_DYNAMIC", "--method", "rtn"],
    ),
    "compress": (
        "deepseek_v32",
        {"fp8": True, "n_routed_experts": 96},
        ["compress", "--keep", "72", "--scheme", "W3A16", "--group-size", "8"],
    ),
    "eval": ("qwen3_moe", {}, ["eval", "--memory", "20KB"]),
    "compress-output-error": (
        "qwen3_moe",
        {},
        ["compress", "--keep", "4", "--criterion", "output-error", "--scheme", "FP8_DYNAMIC"],
    ),
}


def sizes_of(case: str) -> tuple[int, ...]:
    """In how many processes a case is run."""
    return (1, 2, 3) if case in ("score-damage", "quantize-many-experts", "compress") else (1, 2)


@pytest.fixture(scope="module")
def shared_jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    """Every case in one and two processes, some in three: its folder and how they ended."""
    folder = tmp_path_factory.mktemp("shared")
    runs = []
    for case, (family, settings, command) in CASES.items():
        given = model_and_tokens(folder / case, family, **settings)
        if case == "eval":
            other = tiny_model(family, folder / case / "reference", seed=1)
            command = [*command, "--reference", str(other)]
        arguments = [command[0], *given, *command[1:], *SMALL]
        runs += [
            Run(size=size, arguments=[*arguments, "-o", str(folder / case / f"by{size}")])
            for size in sizes_of(case)
        ]
    ended = iter(run_all(*runs))
    return folder, {case: [next(ended) for _ in sizes_of(case)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_several_processes_write_what_one_writes(
    case: str, shared_jobs: tuple[Path, dict[str, list[Ended]]]
) -> None:
    folder, by_case = shared_jobs
    for size, ended in zip(sizes_of(case), by_case[case], strict=True):
        assert ended.codes == [0] * size, ended.stderr
        assert ended.stderr == [""] * size
        assert ended.stdout[0]
        assert ended.stdout[1:] == [""] * (size - 1)
    assert_all_wrote_the_same(folder / case, *(f"by{size}" for size in sizes_of(case)))


def job(folder: Path, command: str, *options: str) -> list[str]:
    """A command line on a model of six layers, so that a kill falls among them; -o is missing."""
    given = model_and_tokens(folder, "qwen3_moe", num_hidden_layers=6)
    return [command, *given, *options, *SMALL]


def assert_one_line(ended: Ended, code: int, *words: str) -> None:
    """One process ended with `code` and one `error:` line, the others with 1 and none; soon."""
    lines = "".join(ended.stderr).splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(ended.codes, reverse=True) == sorted((code, *[1] * (len(ended.codes) - 1)))[::-1]
    assert "".join(ended.stdout) == ""
    assert ended.seconds < 30


@pytest.mark.parametrize(
    ("units", "sizes", "command"),
    [
        (1, ((2, 2), (2, 3), (3, 1)), ("score", "--memory", "20KB")),
        (6, ((2, 3), (1, 2)), ("quantize", "--scheme", "W4A16", "--group-size", "16")),
    ],
    ids=["score", "quantize"],
)
def test_killed_and_resumed_by_any_number_of_processes(
    units: int, sizes: tuple[tuple[int, int], ...], command: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = job(tmp_path, *command)
    names = {f"{before}then{after}": (before, after) for before, after in sizes}
    runs = [Run(size=1, arguments=[*arguments, "-o", str(tmp_path / "whole")])]
    for name, (before, after) in names.items():
        to = [*arguments, "-o", str(tmp_path / name)]
        runs.append(Run(size=before, arguments=to, kill=list(range(before)), units=units))
        runs.append(Run(size=after, arguments=to))
    for run, ended in zip(runs, run_all(*runs), strict=True):
        assert ended.codes == [-signal.SIGKILL if run.kill else 0] * run.size, ended.stderr
    assert_all_wrote_the_same(tmp_path, "whole", *names)


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    arguments = [*job(tmp_path, "score"), "-o", str(tmp_path / "out")]
    (ended,) = run_all(Run(size=3, arguments=arguments, kill=[1]))
    assert ended.codes[1] == -signal.SIGKILL
    rest = Ended(
        codes=[ended.codes[0], ended.codes[2]],
        stdout=ended.stdout,
        stderr=ended.stderr,
        seconds=ended.seconds,
    )
    assert_one_line(rest, 1, "another process", "run the same command again")


def test_an_error_of_one_process_ends_all_with_its_line(tmp_path: Path) -> None:
    """The second process's hidden states are bent on the disk; only it can notice."""
    out = tmp_path / "out"
    arguments = [*job(tmp_path, "score", "--memory", "1KB"), "-o", str(out)]
    run_all(Run(size=2, arguments=arguments, kill=[0, 1]))
    for path in (out / ".thresher" / "hidden").glob("layer_*/batch_00001.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    (ended,) = run_all(Run(size=2, arguments=arguments))
    assert_one_line(ended, 2, "batch_00001.safetensors", "is not what this job wrote", "--force")
    assert ended.codes == [1, 2]


def test_processes_with_different_jobs_are_refused(tmp_path: Path) -> None:
    arguments = [*job(tmp_path, "score"), "-o", str(tmp_path / "out")]
    wrong = Run(size=2, arguments=arguments, more={"1": ["--dtype", "bfloat16"]})
    unfit = Run(size=2, arguments=[*arguments, "--device", "cuda:1"])
    other = Run(size=2, arguments=["verify", str(tmp_path / "model"), "-o", "x"])
    different, device, command = run_all(wrong, unfit, other)
    assert_one_line(different, 2, "process 1", "another dtype", "process 0")
    assert_one_line(device, 2, "--device cuda:1")
    assert not (tmp_path / "out").exists()
    assert command.codes == [2, 2]
    assert "".join(command.stderr).startswith("error: verify works in one process")


def sum_hessians(rank: int) -> None:
    """Take the flow of a GPU."""
    walked_layer.SUMMED_ON = ("cpu",)
    walked_layer.free_bytes = lambda device: 1 << 40


def sum_hessians_one_by_one(rank: int) -> None:
    """The same with room for one set of experts' Hessians in the first process."""
    sum_hessians(rank)
    if rank == 0:
        walked_layer.free_bytes = lambda device: 2


@pytest.mark.parametrize("before", [sum_hessians, sum_hessians_one_by_one])
def test_hessians_summed_as_on_gpus(before: Callable[[int], None], tmp_path: Path) -> None:
    """Three sets of experts. Where a process has room for one, it runs the layer again, and all
    with it; then the pooled Hessian is summed in another order, and a tie may fall otherwise."""
    given = model_and_tokens(tmp_path, "qwen3_moe", num_experts=80, dtype="bfloat16")
    arguments = ["quantize", *given, "--scheme", "W4A16", "--group-size", "8", *SMALL]
    runs = [
        Run(
            size=size,
            arguments=[*arguments, "-o", str(tmp_path / f"by{size}")],
            before=f"{__name__}:{before.__name__}",
        )
        for size in (1, 2, 3)
    ]
    for run, ended in zip(runs, run_all(*runs), strict=True):
        assert ended.codes == [0] * run.size, ended.stderr
    if before is sum_hessians:
        assert_all_wrote_the_same(tmp_path, "by1", "by2", "by3")
    alone, *shared = (files(tmp_path / f"by{run.size}") for run in runs)
    first_layer = "model-00002-of-00004.safetensors"  # those behind it see other hidden states
    for found in shared:
        pairs = zip(alone[first_layer], found[first_layer], strict=True)
        assert sum(a != b for a, b in pairs) < len(alone[first_layer]) / 500
        for unit, facts in alone["thresher.json"]["rounding"].items():
            other = found["thresher.json"]["rounding"][unit]
            assert other["matrices"] == facts["matrices"]
            assert other["mean_error"] == pytest.approx(facts["mean_error"], rel=0.01)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "3"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "2,5"}, "5"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "2,5"}, ""),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "7"}, "7"),
    ],
)
def test_each_process_sees_its_own_gpu(given: dict[str, str], kept: str | None) -> None:
    keep_one_gpu(given)
    assert given.get("CUDA_VISIBLE_DEVICES") == kept


def test_parcels_keep_types_shapes_and_bits() -> None:
    parcel = {
        "empty": torch.empty(0, 7),
        "number": torch.tensor(5),
        "odd": torch.randn(3, 5).bfloat16(),
        "float8": torch.randn(9).to(torch.float8_e4m3fn),
        "view": torch.randn(6, 4).double().T,
        "flags": torch.tensor([True, False, True]),
    }
    device = torch.device("cpu")
    found = unpacked(packed(parcel, device), labels_of(parcel))
    for name, tensor in parcel.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].float().equal(tensor.float())
