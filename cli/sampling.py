"""Options of the commands that run a checkpoint: where, and how tokens are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.options import Device, Size, together

if TYPE_CHECKING:
    from models.progress import Progress
    from runtime.load import Loaded
    from runtime.sampling import Sampling

BACKENDS = ("auto", "humming", "triton", "int4", "torch")

run_options = together(
    click.option("--device", type=Device(), default="auto", show_default=True,
                 help="Where to compute; auto takes all GPUs."),
    click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto",
                 show_default=True, help="Type to compute in."),
    click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
                 help="Kernels for packed weights; auto takes the fastest that fit."),
    click.option("--gpu-memory", type=Size(), default=None, metavar="SIZE",
                 help="Of each GPU, for weights; what does not fit stays in host memory."),
    click.option("--cuda-graphs", is_flag=True,
                 help="Decode by CUDA graphs, where the model can be captured."),
)  # fmt: skip

sampling_options = together(
    click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True,
                 metavar="N", help="Tokens to write at most."),
    click.option("--temperature", type=click.FloatRange(min=0), default=None, metavar="X",
                 help="0 is greedy; the default is the checkpoint's own."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=None, metavar="X",
                 help="Smallest set of tokens with this much probability."),
    click.option("--top-k", type=click.IntRange(min=0), default=None, metavar="N",
                 help="Only the N most probable tokens; 0 takes all."),
    click.option("--min-p", type=click.FloatRange(0, 1, max_open=True), default=None, metavar="X",
                 help="Tokens at least this probable, relative to the most probable."),
    click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=None,
                 metavar="X", help="Above 1 discourages tokens that were there before."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Text to stop at; may be repeated."),
    click.option("--seed", type=click.IntRange(min=0), default=None, metavar="S",
                 help="Of the draws; the default is another one each time."),
)  # fmt: skip


def said_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """What `sampling_options` say. InputError for values out of range, before a model is loaded."""
    from runtime.sampling import Sampling

    said = {name: value for name, value in options.items() if value not in (None, ())}
    Sampling(**said)
    return said


def chosen_sampling(loaded: Loaded, said: dict[str, Any]) -> Sampling:
    """The sampling that was said, the checkpoint's own where nothing was."""
    from dataclasses import replace

    from runtime.load import default_sampling

    return replace(default_sampling(loaded), **said)


def load(
    ckpt: str, device: str, dtype: str, backend: Any, gpu_memory: int | None, progress: Progress
) -> Loaded:
    """Load a checkpoint to run it, and say on stderr what is where and by which kernels."""
    from runtime.load import LoadSettings, load_model

    memory: dict[int | str, int] | None = None
    if gpu_memory is not None:
        import torch

        memory = dict.fromkeys(range(torch.cuda.device_count()), gpu_memory)
    settings = LoadSettings(device=device, dtype=dtype, backend=backend, memory=memory)
    loaded = load_model(ckpt, settings, progress=progress)
    for line in loaded.describe():
        click.echo(line, err=True)
    return loaded
