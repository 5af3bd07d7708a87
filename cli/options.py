"""Options that several commands share, parsed into types at the edge.

Only click is imported here: `--help` must answer at once, so torch and transformers are imported
inside the commands that compute.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


class Size(click.ParamType):
    """An amount of memory: 24GB, 16GiB, 1.5TB or a plain number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least one."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", str(value).upper())
        size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
        if size < 1:
            self.fail(f"{value!r} is not an amount of memory such as 24GB or 16GiB", param, ctx)
        return size


class Device(click.ParamType):
    """auto, cpu, cuda or cuda:0."""

    name = "auto|cpu|cuda[:i]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as given; whether the device exists is asked when it is used."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...", param, ctx)
        return str(value)


class ByDomain(click.ParamType):
    """Numbers by domain: code=2,tools=1 (or with `:` as the sign)."""

    def __init__(self, sign: str) -> None:
        self.sign = sign
        self.name = f"domain{sign}number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        """The numbers by name, at least one; a name may hold the sign itself."""
        if isinstance(value, dict):
            return value
        found: dict[str, float] = {}
        for item in str(value).split(","):
            name, sign, number = item.strip().rpartition(self.sign)
            if not sign or not name or name in found or not NUMBER.fullmatch(number):
                self.fail(
                    f"{item.strip()!r} is not a domain and its number, such as code{self.sign}2; "
                    "name each domain once", param, ctx,
                )  # fmt: skip
            found[name] = float(number)
        return found


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, listed by --help in the order given."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_argument = click.argument("model", metavar="MODEL")

compute_options = together(
    click.option("--device", type=Device(), default="auto", show_default=True,
                 help="Where to compute."),
    click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto",
                 show_default=True,
                 help="Type to compute in; auto is the checkpoint's own, bfloat16 if quantized."),
    click.option("--memory", type=Size(), default=None, metavar="SIZE",
                 help="Host memory for hidden states (24GB, 16GiB); the rest goes to disk."),
    click.option("--batch-tokens", type=click.IntRange(min=1), default=None, metavar="N",
                 help="Tokens of a batch; the default depends on the device."),
)  # fmt: skip

token_options = together(
    click.option("--mix", default=None, metavar="MIX",
                 help="Calibration mix: a name, source[subset](split):N,..., or a YAML file."),
    click.option("--samples", type=click.IntRange(min=1), default=None, metavar="N",
                 help="Samples in all, shared out as the mix says."),
    click.option("--max-length", type=click.IntRange(min=2), default=None, metavar="T",
                 help="Tokens of a sample at most."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="S",
                 help="Seed of the choice of rows."),
)  # fmt: skip

tokens_option = click.option(
    "--tokens", type=click.Path(path_type=Path), metavar="FILE",
    help="A token set made before, instead of --mix.",
)  # fmt: skip

recipe_options = together(
    click.option("--scheme", metavar="S", help="W3A16 W4A16 W8A16 NVFP4 NVFP4A16 FP8_BLOCK ..."),
    click.option("--recipe", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                 help="YAML in llm-compressor's form: parts of the model with schemes of their "
                 "own."),
)  # fmt: skip

budget_options = together(
    click.option("--budget", type=Size(), metavar="SIZE",
                 help="Instead of a scheme: parts of layers get those of --schemes that together "
                 "damage least and fit SIZE (138GB)."),
    click.option("--schemes", default="W3A16,W4A16,W8A16", show_default=True, metavar="S,S,...",
                 help="What --budget chooses from."),
    click.option("--damage", "damage_folder", metavar="DIR",
                 type=click.Path(file_okay=False, path_type=Path),
                 help="Where --budget measures; another budget reuses it. [default: OUT.damage]"),
    click.option("--damage-tokens", type=click.IntRange(min=2), default=4096, show_default=True,
                 metavar="N", help="Calibration tokens to measure on."),
)  # fmt: skip

storage_options = together(
    click.option("--format", "layout",
                 type=click.Choice(["compressed-tensors", "auto-round", "gptq", "modelopt"]),
                 default="compressed-tensors", show_default=True,
                 help="The same bits as other tools store them."),
    click.option("--group-size", type=click.IntRange(min=8), metavar="G",
                 help="Of W3/W4/W8: 128."),
    click.option("--asymmetric", is_flag=True, help="Zero points for W3/W4/W8."),
)  # fmt: skip

json_option = click.option("--json", "as_json", is_flag=True,
                           help="Print one JSON object on stdout and nothing else.")  # fmt: skip
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
force_option = click.option("--force", is_flag=True,
                            help="Replace what another job left in the output folder.")  # fmt: skip


def out_option(what: str, *, file: bool = False) -> Callable[[Command], Command]:
    """`-o`: where the result goes."""
    kind = click.Path(dir_okay=not file, file_okay=file, path_type=Path)
    metavar = "FILE" if file else "DIR"
    return click.option("-o", "--out", type=kind, required=True, metavar=metavar, help=what)


@contextmanager
def stdout_kept() -> Iterator[None]:
    """While computing, what libraries print goes to stderr: stdout is for results alone."""
    with redirect_stdout(sys.stderr):
        yield
