"""KL to the original of our quantized checkpoints and of llm-compressor's, judged alike.

    python -m benchmarks.quant_kl [--qwen DIR] [--folder DIR] [--models demo,qwen3_moe]
                                  [--schemes W3A16,W4A16,NVFP4] [--threads T]

Two models: the bundled demo model (decoded to bfloat16, its MTP layer left out) and the softmax
one that benchmarks/qwen3_moe_model.py trains (left out where --qwen is not given). Each is written
in each scheme by four methods:

    RTN, GPTQ            ours: `quantize` as the command runs it, default settings
    their RTN, GPTQ      llm-compressor's QuantizationModifier and GPTQModifier (static order, its
                         defaults otherwise); `their GPTQ, MSE` has its MSE observer for scales

on the same calibration tokens and with the same matrices quantized, which is checked. All are
judged by one path that belongs to neither side's reader: compressed-tensors decodes the files, the
weights replace those of one transformers model in float32, and its logits on held-out tokens are
compared with the original's. NVFP4 is judged twice: its weights alone, as on a GPU without FP4
arithmetic, and with inputs rounded too (each Linear's stored input scale, compressed-tensors' fake
quantization).

llm-compressor runs Qwen3-MoE without a causal mask where a batch has no padding (its trace of
`create_causal_mask` gives None). It is fed additive 4-D masks, one sample a batch, which
transformers takes as they are; the mask that reaches every layer is checked. Its observer of NVFP4
inputs fails on samples of several lengths (DeepSeek's kv_b_proj has an input of four dimensions),
so for NVFP4 the calibration samples of both sides are joined and cut into pieces of one length.

`--folder` keeps checkpoints and results and skips what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gptq_peer import OBSERVERS, machine
from calibration.tokens import TokenSet
from cli.demo import BATCH_TOKENS, part_tokens
from models.checkpoint import Checkpoint
from models.families import spec_of
from models.opening import open_model
from models.source_formats import Source
from quant.quantize import quantize
from quant.quantize_plan import QuantizeSettings
from quant.recipes import uniform
from quant.schemes import SCHEMES, Scheme

DEMO = Path(__file__).parents[1] / "demo" / "model"
SCHEME_NAMES = ("W3A16", "W4A16", "NVFP4")
IGNORE = ["lm_head", "re:.*mlp[.]gate$", "re:.*indexer.*"]  # what ours leaves by default
CALIBRATION, HELDOUT, MAX_LENGTH = 24, 24, 512  # samples of each of three domains


@dataclass(frozen=True, slots=True)
class Model:
    """A model in bfloat16 and the tokens it is rounded and judged on."""

    name: str
    root: Path
    samples: TokenSet
    heldout: TokenSet

    def calibration(self, scheme: Scheme) -> TokenSet:
        """What both sides are given for `scheme`."""
        return windows(self.samples) if scheme.has_input_scale else self.samples


def windows(tokens: TokenSet) -> TokenSet:
    """The samples, joined and cut into pieces of MAX_LENGTH tokens, the rest left out."""
    count = len(tokens.input_ids) // MAX_LENGTH
    return replace(
        tokens,
        input_ids=tokens.input_ids[: count * MAX_LENGTH],
        offsets=torch.arange(count + 1) * MAX_LENGTH,
        domain=torch.zeros(count, dtype=torch.uint8),
        mix=f"{tokens.mix}, joined and cut at {MAX_LENGTH}",
    )


def decoded_demo(out: Path) -> Path:
    """The demo model in bfloat16 without its MTP layer (FP8 with power-of-two scales: exact)."""
    if not (out / "config.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint.open(DEMO)
        spec = spec_of(checkpoint.config)
        source = Source(checkpoint, spec)
        tensors = {}
        for name in source.names():
            if spec.place(name).kind != "mtp" and f"layers.{spec.num_layers}." not in name:
                kept = source.read(name, None)
                tensors[name] = source.read(name, torch.bfloat16) if kept.ndim > 1 else kept
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for file in DEMO.glob("tokenizer*"):
            (out / file.name).write_bytes(file.read_bytes())
        config = dict(checkpoint.config, num_nextn_predict_layers=0)
        del config["quantization_config"]
        (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


# -- the two sides ---------------------------------------------------------------------------------


def write_ours(method: Any, model: Model, scheme: Scheme, out: Path) -> None:
    settings = QuantizeSettings(method=method, batch_tokens=BATCH_TOKENS)
    quantize(
        open_model(model.root), uniform(scheme), out, settings, tokens=model.calibration(scheme)
    )


def write_theirs(
    modifier: Callable[..., Any], observer: str | None, model: Model, scheme: Scheme, out: Path
) -> None:
    """llm-compressor on a transformers model with one Linear for each expert's matrices."""
    network = AutoModelForCausalLM.from_pretrained(model.root, dtype=torch.bfloat16)
    linearize_moe(network)
    weights = scheme.weights
    if observer is not None:
        weights = weights.model_copy(update={"observer": observer})
    group = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=scheme.input_activations
    )
    masks: list[Any] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        for layer in network.model.layers
    ]
    calibrated = scheme.has_input_scale or modifier is GPTQModifier
    pipeline = "sequential" if calibrated else "datafree"
    reset_session()
    oneshot(
        model=network,
        processor=AutoTokenizer.from_pretrained(model.root),
        dataset=DataLoader(list(batches(model.calibration(scheme))), batch_size=None),  # type: ignore[arg-type]
        recipe=[modifier(config_groups={"group_0": group}, ignore=IGNORE)],
        pipeline=pipeline,
    )
    for handle in handles:
        handle.remove()
    assert bool(masks) == (pipeline == "sequential"), "the masks went unseen"
    for mask in masks:
        assert mask is not None, "attention without a mask"
        assert mask.ndim == 4, "attention without a mask for each pair of positions"
        assert mask[0, 0, 0, -1] < -1e4, "attention without a causal mask"
    network.save_pretrained(out, save_compressed=True)


def batches(tokens: TokenSet) -> Iterator[dict[str, torch.Tensor]]:
    """One sample a batch, with an additive causal mask [1, 1, S, S]."""
    for begin, end in zip(tokens.offsets[:-1].tolist(), tokens.offsets[1:].tolist(), strict=True):
        length = end - begin
        mask = torch.full((length, length), torch.finfo(torch.bfloat16).min).triu(1)
        yield {
            "input_ids": tokens.input_ids[begin:end].long()[None],
            "attention_mask": mask[None, None].bfloat16(),
        }


METHODS: Mapping[str, Callable[[Model, Scheme, Path], None]] = {
    "RTN": partial(write_ours, "rtn"),
    "GPTQ": partial(write_ours, "gptq"),
    "their RTN": partial(write_theirs, QuantizationModifier, None),
    "their GPTQ": partial(write_theirs, GPTQModifier, None),
    "their GPTQ, MSE": lambda model, scheme, out: write_theirs(
        GPTQModifier, OBSERVERS[scheme.kind], model, scheme, out
    ),
}


# -- the judge -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decoded:
    """A quantized checkpoint as compressed-tensors reads it."""

    weights: dict[str, torch.Tensor]
    input_scales: dict[str, torch.Tensor]
    inputs: QuantizationArgs | None


def decode(root: Path) -> Decoded:
    """Every quantized matrix of a checkpoint, by module."""
    config = json.loads((root / "config.json").read_text())["quantization_config"]
    (settings,) = config["config_groups"].values()
    scheme = QuantizationScheme.model_validate(settings)
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config["format"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for file in root.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, role = name.rpartition(".")
            parts.setdefault(module, {})[role] = tensor
    parts = {module: own for module, own in parts.items() if "weight_packed" in own}
    inputs = {m: own["input_global_scale"] for m, own in parts.items() if scheme.input_activations}
    assert all(torch.isfinite(one).all() and (one > 0).all() for one in inputs.values())
    weights = {m: compressor.decompress(dict(own), scheme)["weight"] for m, own in parts.items()}
    return Decoded(weights, inputs, scheme.input_activations)


class Judge:
    """The original's log-probabilities on held-out tokens, and a network to put weights into."""

    def __init__(self, model: Model) -> None:
        self.batches = list(batches(model.heldout))
        self.network = AutoModelForCausalLM.from_pretrained(model.root, dtype=torch.float32).eval()
        self.expected = [one.bfloat16() for one in self.logits()]
        nll = [
            torch.nn.functional.cross_entropy(x[:-1].float(), batch["input_ids"][0, 1:])
            for x, batch in zip(self.expected, self.batches, strict=True)
        ]
        sizes = [len(x) - 1 for x in self.expected]
        mean = sum(x * size for x, size in zip(nll, sizes, strict=True)) / sum(sizes)
        self.tokens, self.perplexity = sum(sizes), float(torch.as_tensor(mean).exp())
        linearize_moe(self.network)
        own = self.kl()
        assert own < 1e-4, f"one Linear for each matrix of an expert changes the model: KL {own}"
        self.original = {
            name: module.weight.detach().clone()
            for name, module in self.network.named_modules()
            if isinstance(module, torch.nn.Linear)
        }

    @torch.no_grad()
    def logits(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            mask = batch["attention_mask"].float()
            found = self.network(batch["input_ids"], attention_mask=mask, use_cache=False)
            yield found.logits[0].log_softmax(-1)

    def kl(self) -> float:
        """Mean over the predicted tokens of KL(original || present network), in nats."""
        total = 0.0
        for expected, found in zip(self.expected, self.logits(), strict=True):
            p = expected[:-1].float().log_softmax(-1)
            total += float((p.exp() * (p - found[:-1])).sum(dtype=torch.float64))
        return total / self.tokens

    def judge(self, decoded: Decoded, *, round_inputs: bool) -> float:
        handles = []
        for name, weight in self.original.items():
            module = self.network.get_submodule(name)
            module.weight.data = decoded.weights.get(name, weight).float()
            if round_inputs and name in decoded.input_scales:
                module.input_global_scale = decoded.input_scales[name].float()
                module.quantization_status = QuantizationStatus.FROZEN
                rounded = partial(round_input, decoded.inputs)
                handles.append(module.register_forward_pre_hook(rounded))
        found = self.kl()
        for handle in handles:
            handle.remove()
        return found


def round_input(
    settings: QuantizationArgs | None, module: torch.nn.Module, args: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor]:
    assert settings is not None
    return (forward_quantize(module, args[0], "input", settings),)


# -- the table -------------------------------------------------------------------------------------


def measure(model: Model, scheme_names: list[str], methods: list[str], folder: Path) -> None:
    """Write and judge what `folder` does not have yet; a line of JSON for each."""
    judge: Judge | None = None
    for scheme_name in scheme_names:
        quantized: dict[str, set[str]] = {}
        for method in methods:
            out = folder / model.name / f"{scheme_name} {method}".replace(",", "").replace(" ", "-")
            if not (out / "kl.json").is_file():
                judge = judge or Judge(model)
                start = time.perf_counter()
                if not (out / "config.json").is_file():
                    METHODS[method](model, SCHEMES[scheme_name], out)
                seconds = time.perf_counter() - start
                decoded = decode(out)
                kl = {"": judge.judge(decoded, round_inputs=False)}
                if decoded.input_scales:
                    kl[" with inputs"] = judge.judge(decoded, round_inputs=True)
                facts = {
                    "model": model.name, "scheme": scheme_name, "method": method, "kl": kl,
                    "seconds": round(seconds, 1), "perplexity": judge.perplexity,
                    "tokens": judge.tokens, "modules": sorted(decoded.weights),
                }  # fmt: skip
                (out / "kl.json").write_text(json.dumps(facts))
            facts = json.loads((out / "kl.json").read_text())
            quantized[method] = set(facts["modules"])
            print({k: v for k, v in facts.items() if k != "modules"}, flush=True)
        first = quantized[methods[0]]
        for method, modules in quantized.items():
            assert modules == first, f"{method} quantized other matrices: {modules ^ first}"


def table(models: list[Model], scheme_names: list[str], methods: list[str], folder: Path) -> str:
    """Markdown: KL of every method, and ours over theirs."""
    ratios = "GPTQ" in methods and "their GPTQ" in methods
    lines = [
        "| model | scheme | " + " | ".join(methods) + (" | GPTQ / theirs |" if ratios else " |"),
        "|---|---|" + "--:|" * (len(methods) + ratios),
    ]
    for model, scheme_name in itertools.product(models, scheme_names):
        found = {
            facts["method"]: facts["kl"]
            for file in sorted((folder / model.name).glob(f"{scheme_name}-*/kl.json"))
            if (facts := json.loads(file.read_text()))["scheme"] == scheme_name
        }
        for what in found[methods[0]]:
            cells = [f"{found[method][what]:.4f}" for method in methods]
            if ratios:
                cells.append(f"{found['GPTQ'][what] / found['their GPTQ'][what]:.2f}")
            lines.append(f"| {model.name} | {scheme_name}{what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--qwen", type=Path, help="what benchmarks.qwen3_moe_model wrote")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--models", default="demo,qwen3_moe")
    parser.add_argument("--schemes", default=",".join(SCHEME_NAMES))
    parser.add_argument("--methods", default=";".join(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logger.disable("llmcompressor")
    schemes, methods = args.schemes.split(","), args.methods.split(";")
    print(f"{machine()}, {args.threads} thread(s), torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        roots = {"demo": decoded_demo(folder / "demo" / "bf16"), "qwen3_moe": args.qwen}
        models = [
            Model(name, root, *(part_tokens(root, part, samples, MAX_LENGTH) for part, samples in
                  (("train", CALIBRATION), ("heldout", HELDOUT))))
            for name, root in roots.items()
            if root is not None and name in args.models.split(",")
        ]  # fmt: skip
        for model in models:
            measure(model, schemes, methods, folder)
        print(table(models, schemes, methods, folder))


if __name__ == "__main__":
    main()
