"""The running sums against plain Python loops, and the files they are kept in."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import InputError
from reap.stats import FACTS_FILE, FORMAT, TENSORS_FILE, SaliencyStats
from reap.sums import LayerStats

CONTRACT_FIELDS = [
    "count",
    "router_weight_sum",
    "norm_sum",
    "weighted_norm_sum",
    "norm_sq_sum",
    "weighted_norm_sq_sum",
    "norm_max",
]
DOMAINS = ("code", "tool calls.v2", "swe_2")

Pair = tuple[int, int, float, float]  # expert, domain, router weight, norm


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def loop_sums(
    pairs: list[Pair], num_experts: int, num_domains: int
) -> dict[str, list[list[float]]]:
    """The contract's seven sums by a Python loop; math.fsum, so exact to the last bit."""
    cells: dict[tuple[int, int], list[tuple[float, float]]] = {
        (d, e): [] for d in range(num_domains) for e in range(num_experts)
    }
    for expert, domain, weight, norm in pairs:
        cells[domain, expert].append((weight, norm))

    def table(of: object) -> list[list[float]]:
        assert callable(of)
        return [[of(cells[d, e]) for e in range(num_experts)] for d in range(num_domains)]

    return {
        "count": table(len),
        "router_weight_sum": table(lambda c: math.fsum(w for w, _ in c)),
        "norm_sum": table(lambda c: math.fsum(n for _, n in c)),
        "weighted_norm_sum": table(lambda c: math.fsum(w * n for w, n in c)),
        "norm_sq_sum": table(lambda c: math.fsum(n * n for _, n in c)),
        "weighted_norm_sq_sum": table(lambda c: math.fsum((w * n) ** 2 for w, n in c)),
        "norm_max": table(lambda c: max((n for _, n in c), default=0.0)),
    }


def random_pairs(seed: int, count: int, num_experts: int, num_domains: int) -> list[Pair]:
    rng = random.Random(seed)
    return [
        (
            rng.randrange(num_experts),
            rng.randrange(num_domains),
            float32(rng.random()),
            float32(rng.lognormvariate(0, 2)),
        )
        for _ in range(count)
    ]


def feed(stats: LayerStats, pairs: list[Pair]) -> None:
    stats.add_routed(
        torch.tensor([p[0] for p in pairs], dtype=torch.int64),
        torch.tensor([p[1] for p in pairs], dtype=torch.uint8),
        torch.tensor([p[2] for p in pairs], dtype=torch.float32),
        torch.tensor([p[3] for p in pairs], dtype=torch.float32),
    )


def assert_sums(stats: LayerStats, expected: dict[str, list[list[float]]]) -> None:
    for name, values_ME in stats.sums.named():
        want = torch.tensor(expected[name], dtype=torch.float64)
        exact = name in ("count", "norm_max")
        torch.testing.assert_close(values_ME, want, rtol=0 if exact else 1e-13, atol=0)


def filled(seed: int = 0, layers: tuple[int, ...] = (1, 2, 10)) -> SaliencyStats:
    """Statistics of a made-up model with 6 experts; expert 4 of layer 2 is dead."""
    table = {}
    for layer in layers:
        table[layer] = LayerStats.empty(6, DOMAINS)
        pairs = random_pairs(seed * 100 + layer, 200, 6, 3)
        feed(table[layer], [p for p in pairs if (layer, p[0]) != (2, 4)])
    return SaliencyStats(
        layers=table,
        tokens={"code": 40, "tool calls.v2": 30, "swe_2": 30},
        model="org/model",
        digests={"model": "abc", "tokens": f"t{seed}"},
        versions={"torch": "2"},
    )


@given(
    pairs=st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(0, 2),
            st.floats(0, 4, width=32),
            st.floats(0, 1e6, width=32),
        ),
        max_size=60,
    ),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_batches_of_any_size_give_the_loops_sums(pairs: list[Pair], cuts: list[int]) -> None:
    stats = LayerStats.empty(5, DOMAINS)
    edges = [0, *sorted(cuts), len(pairs)]
    for start, stop in pairwise(edges):
        feed(stats, pairs[start:stop])
    assert_sums(stats, loop_sums(pairs, 5, 3))


def test_padding_is_left_out() -> None:
    pairs = random_pairs(2, 400, 7, 3)
    stats = LayerStats.empty(7, DOMAINS)
    feed(stats, [p if n % 3 else (p[0], 255, *p[2:]) for n, p in enumerate(pairs)])
    assert_sums(stats, loop_sums([p for n, p in enumerate(pairs) if n % 3], 7, 3))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_segments_are_the_sums_too(device: str) -> None:
    """What a GPU does with the pairs (torch's CPU can do it as well)."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("wants a CUDA device")
    pairs = random_pairs(3, 2000, 9, 3)
    pairs = [p for p in pairs if p[0] != 4]  # an expert without tokens
    stats = LayerStats.empty(9, DOMAINS, device)
    for part in (pairs[:700], pairs[700:700], pairs[700:]):
        table = torch.tensor([p[:2] for p in part], dtype=torch.int64).view(-1, 2)
        values = torch.tensor([p[2:] for p in part], dtype=torch.float64).view(-1, 2)
        cells = torch.where(table[:, 1] == 255, 27, table[:, 1] * 9 + table[:, 0])
        stats._add_segments(cells.to(device), *values.to(device).unbind(1))
    assert_sums(stats.cpu(), loop_sums(pairs, 9, 3))


def test_one_expert_at_a_time_is_the_same_as_routed_pairs() -> None:
    pairs = sorted(random_pairs(1, 500, 7, 3), key=lambda p: p[0])
    by_expert, together = LayerStats.empty(7, DOMAINS), LayerStats.empty(7, DOMAINS)
    feed(together, pairs)
    for expert in range(7):
        own = [p for p in pairs if p[0] == expert]
        by_expert.add(
            expert,
            torch.tensor([p[1] for p in own], dtype=torch.uint8),
            torch.tensor([p[2] for p in own]),
            torch.tensor([p[3] for p in own]),
        )
    assert_sums(by_expert, loop_sums(pairs, 7, 3))
    for (name, a), (_, b) in zip(by_expert.sums.named(), together.sums.named(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_values_are_taken_as_they_are() -> None:
    stats = LayerStats.empty(1, ("code",))
    weights, norms = torch.tensor([0.1, 0.7]).bfloat16(), torch.tensor([3.3, 1e4]).bfloat16()
    stats.add(0, torch.zeros(2, dtype=torch.uint8), weights, norms)
    expected = sum(float(w) * float(n) for w, n in zip(weights, norms, strict=True))
    assert stats.sums.weighted_norm_sum.item() == expected


def test_an_expert_id_beyond_the_table_is_our_own_mistake() -> None:
    """Zero-computation experts (LongCat) must be left out by the caller, never wrap around."""
    stats = LayerStats.empty(4, ("code", "text"))
    with pytest.raises(AssertionError, match="expert id"):
        feed(stats, [(4, 0, 1.0, 1.0)])
    with pytest.raises(AssertionError, match="domain id"):
        feed(stats, [(0, 2, 1.0, 1.0)])


def test_pooled_is_the_sum_over_domains_and_the_maximum_of_maxima() -> None:
    pairs = random_pairs(2, 300, 5, 3)
    stats = LayerStats.empty(5, DOMAINS)
    feed(stats, pairs)
    expected = loop_sums([(e, 0, w, n) for e, _, w, n in pairs], 5, 1)
    for name, values_E in stats.pooled().named():
        assert values_E.tolist() == pytest.approx(expected[name][0], rel=1e-13), name


def test_pooled_with_weights_of_domains() -> None:
    pairs = random_pairs(3, 300, 5, 3)
    stats = LayerStats.empty(5, DOMAINS)
    feed(stats, pairs)
    pooled = stats.pooled({"code": 2.0, "swe_2": 0.5})
    parts = loop_sums(pairs, 5, 3)
    for name, values_E in pooled.named():
        code, _, swe = parts[name]
        want = [
            max(a, b) if name == "norm_max" else 2 * a + 0.5 * b
            for a, b in zip(code, swe, strict=True)
        ]
        assert values_E.tolist() == pytest.approx(want, rel=1e-13), name


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"cod": 1.0}, "no domain 'cod'.*code, tool calls.v2, swe_2"),
        ({"code": -1.0}, "not negative"),
        ({"code": math.nan}, "finite"),
        ({"code": 0.0}, "not all zero"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerStats.empty(2, DOMAINS).pooled(weights)


def test_dead_experts_are_those_no_domain_reached() -> None:
    stats = filled()
    assert stats.dead_experts() == {2: (4,)}
    only_code = LayerStats.empty(3, DOMAINS)
    feed(only_code, [(0, 0, 1.0, 1.0), (2, 1, 1.0, 1.0)])
    assert only_code.pooled().dead == (1,)
    assert only_code.pooled({"code": 1.0}).dead == (1, 2)


def test_adding_layers_adds_tokens_and_joins_domains() -> None:
    a, b = random_pairs(4, 100, 4, 2), random_pairs(5, 120, 4, 2)
    left, right = LayerStats.empty(4, ("x", "y")), LayerStats.empty(4, ("z", "y"))
    feed(left, a)
    feed(right, b)
    merged = left + right
    assert merged.domains == ("x", "y", "z")
    rename = {0: 2, 1: 1}
    assert_sums(merged, loop_sums([*a, *((e, rename[d], w, n) for e, d, w, n in b)], 4, 3))


def test_adding_runs_of_one_model() -> None:
    both = filled(0) + filled(1)
    assert both.tokens == {"code": 80, "tool calls.v2": 60, "swe_2": 60}
    assert both.digests == {"model": "abc", "tokens": "t0+t1"}
    count = filled(0).pooled(1).count + filled(1).pooled(1).count
    assert torch.equal(both.pooled(1).count, count)
    with pytest.raises(InputError, match="different layers"):
        filled() + filled(layers=(1, 2))


# ---- files


def parse_by_hand(content: bytes) -> dict[str, list[float]]:
    """A safetensors file read with struct and json alone."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    tensors = {}
    for name, info in header.items():
        assert info["dtype"] == "F64"
        start, stop = info["data_offsets"]
        tensors[name] = list(struct.unpack(f"<{info['shape'][0]}d", data[start:stop]))
    return tensors


def test_the_file_holds_the_contracts_tensors(tmp_path: Path) -> None:
    stats = filled()
    stats.save(tmp_path / "new" / "scores")
    content = (tmp_path / "new" / "scores" / TENSORS_FILE).read_bytes()
    tensors = parse_by_hand(content)
    assert set(tensors) == {
        f"layers.{layer}.{domain}.{name}"
        for layer in (1, 2, 10)
        for domain in DOMAINS
        for name in CONTRACT_FIELDS
    }
    for layer in (1, 2, 10):
        pairs = [p for p in random_pairs(layer, 200, 6, 3) if (layer, p[0]) != (2, 4)]
        expected = loop_sums(pairs, 6, 3)
        for name in CONTRACT_FIELDS:
            for row, domain in enumerate(DOMAINS):
                assert tensors[f"layers.{layer}.{domain}.{name}"] == pytest.approx(
                    expected[name][row], rel=1e-13
                )
    facts = json.loads((tmp_path / "new" / "scores" / FACTS_FILE).read_text())
    assert facts["format"] == FORMAT
    assert facts["model"] == "org/model"
    assert facts["domains"] == list(DOMAINS)
    assert facts["tokens"] == {"code": 40, "tool calls.v2": 30, "swe_2": 30}
    assert facts["dead_experts"] == {"2": [4]}
    assert facts["digests"]["saliency"] == hashlib.sha256(content).hexdigest() == stats.digest()


def test_saving_is_deterministic_and_loading_gives_the_same_bits(tmp_path: Path) -> None:
    stats = filled()
    shuffled = SaliencyStats(
        layers={layer: stats.layers[layer] for layer in (10, 1, 2)},
        tokens=stats.tokens,
        model=stats.model,
        digests=stats.digests,
        versions=stats.versions,
    )
    stats.save(tmp_path / "a")
    shuffled.save(tmp_path / "b")
    SaliencyStats.load(tmp_path / "a").save(tmp_path / "c")
    for name in (TENSORS_FILE, FACTS_FILE):
        contents = {(tmp_path / folder / name).read_bytes() for folder in "abc"}
        assert len(contents) == 1, name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [FACTS_FILE, TENSORS_FILE]
    loaded = SaliencyStats.load(tmp_path / "a")
    assert list(loaded.tokens.items()) == list(stats.tokens.items())
    for layer in stats.layers:
        for (name, a), (_, b) in zip(
            loaded.layers[layer].sums.named(), stats.layers[layer].sums.named(), strict=True
        ):
            assert torch.equal(a, b), (layer, name)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor], **facts: object) -> None:
    """Replace the tensors with a matching digest, and some facts, as another program might."""
    content = safetensors.torch.save(tensors)
    (folder / TENSORS_FILE).write_bytes(content)
    known = json.loads((folder / FACTS_FILE).read_text())
    known["digests"]["saliency"] = hashlib.sha256(content).hexdigest()
    (folder / FACTS_FILE).write_text(json.dumps(known | facts))


def one_line(error: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(error.value)


def test_a_missing_or_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"saliency\.json.*thresher score") as error:
        SaliencyStats.load(tmp_path)
    one_line(error)
    filled().save(tmp_path)
    (tmp_path / TENSORS_FILE).unlink()
    with pytest.raises(InputError, match=r"saliency\.safetensors") as error:
        SaliencyStats.load(tmp_path)
    one_line(error)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    filled().save(tmp_path)
    content = (tmp_path / TENSORS_FILE).read_bytes()
    (tmp_path / TENSORS_FILE).write_bytes(content[:cut])
    with pytest.raises(InputError, match="sha256") as error:
        SaliencyStats.load(tmp_path)
    one_line(error)


def test_tensors_that_cannot_be_sums_are_refused(tmp_path: Path) -> None:
    filled().save(tmp_path)
    good = safetensors.torch.load((tmp_path / TENSORS_FILE).read_bytes())
    key = "layers.2.code.count"
    wrong = {
        "no tensor": {k: v for k, v in good.items() if k != key},
        r"float32 \[6\]": good | {key: good[key].float()},
        r"float64 \[7\]": good | {key: torch.zeros(7, dtype=torch.float64)},
        "unexpected tensor layers.3": good | {"layers.3.code.count": good[key].clone()},
        "no counts": good | {key: good[key] + 0.5},
        "not finite": good | {key: good[key] * math.nan},
    }
    for message, tensors in wrong.items():
        rewrite(tmp_path, tensors)
        with pytest.raises(InputError, match=message) as error:
            SaliencyStats.load(tmp_path)
        one_line(error)
    rewrite(tmp_path, good)
    assert SaliencyStats.load(tmp_path).digest() == filled().digest()


@pytest.mark.parametrize(
    "facts",
    [
        {"format": "thresher.saliency/2"},
        {"layers": "all"},
        {"layers": []},
        {"layers": [1, "2"]},
        {"domains": [1, 2]},
        {"domains": ["code", "other"]},
        {"num_experts": 0},
        {"tokens": {"code": "many"}},
    ],
)
def test_wrong_facts_are_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    filled().save(tmp_path)
    rewrite(tmp_path, safetensors.torch.load((tmp_path / TENSORS_FILE).read_bytes()), **facts)
    with pytest.raises(InputError, match="score the model again") as error:
        SaliencyStats.load(tmp_path)
    one_line(error)


def test_facts_that_are_no_json_are_refused(tmp_path: Path) -> None:
    filled().save(tmp_path)
    (tmp_path / FACTS_FILE).write_bytes(b"\xff\x00{")
    with pytest.raises(InputError, match="not JSON") as error:
        SaliencyStats.load(tmp_path)
    one_line(error)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_never_saved(tmp_path: Path, bad: float) -> None:
    stats = filled()
    feed(stats.layers[10], [(5, 0, 0.5, bad)])
    with pytest.raises(InputError, match=r"layer 10: .*expert 5.*float32") as error:
        stats.save(tmp_path / "scores")
    one_line(error)
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("domains", [("a\n",), ("a", "a"), (), ("", "b")])
def test_domain_names_that_cannot_be_keys_are_refused(domains: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="domain names"):
        LayerStats.empty(2, domains)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot be written") as error:
        filled().save(tmp_path / "file" / "scores")
    one_line(error)
    assert (tmp_path / "file").read_text() == "not a folder"
