"""The command line: one group of commands, and what its failures turn into.

    0    done
    2    the user's input is wrong      one `error:` line: what, and how to mend it
    3    a verification failed          one `error:` line
    130  interrupted                    one line: how to resume
    1    anything else                  one line; THRESHER_DEBUG=1 adds the traceback

Of several processes (torchrun) that fail, one prints its line: the first to fail, or, where all
refuse their common command line, the first by number.

Commands parse, call and print; they hold no arithmetic. Everything heavy is imported inside the
function that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import click

from cli.card import card
from cli.compare import compare
from cli.compress import compress
from cli.demo import demo
from cli.eval import evaluate
from cli.generate import chat, generate
from cli.inspect import inspect
from cli.prune import prune
from cli.publish import publish
from cli.quantize import quantize
from cli.report import report
from cli.score import score
from cli.serve import serve
from cli.tokens import tokens
from cli.verify import verify
from models.errors import AnotherProcessFailed, InputError, VerificationError
from models.launch import keep_one_gpu, launched

# What the operating system says when the user's disk, rights or paths are the trouble.
USER_ERRNO = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be too large",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
}

SHARED = ("score", "quantize", "compress", "eval")  # commands that several processes can share


@click.group(
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="thresher", prog_name="thresher")
@click.pass_context
def thresher(context: click.Context) -> None:
    """Score, prune and judge huge Mixture-of-Experts models with one layer in memory.

    MODEL and CKPT are a directory with config.json and *.safetensors, or a hub id. Results go to
    stdout, progress and logs to stderr. Long jobs resume: run the same command again.
    """
    if launched()[1] > 1 and context.invoked_subcommand not in SHARED:
        raise click.UsageError(
            f"{context.invoked_subcommand} works in one process; start it without a launcher "
            f"(several can share {', '.join(SHARED)})"
        )


COMMANDS = (
    *(inspect, tokens, score, prune, quantize, compress, verify, evaluate, compare),
    *(generate, chat, serve, card, report, publish, demo),
)
for command in COMMANDS:
    thresher.add_command(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    prepare_environment()
    try:
        with thresher.make_context("thresher", list(arguments)) as context:
            thresher.invoke(context)
    except click.exceptions.Exit as ended:  # --help, --version
        return ended.exit_code
    except click.ClickException as wrong:
        return say(usage(wrong), 2) if launched()[0] == 0 else 2
    except InputError as wrong:
        return say(f"error: {one_line(wrong)}", 2)
    except VerificationError as failed:
        return say(f"error: {one_line(failed)}", 3)
    except AnotherProcessFailed as lost:
        if os.environ.get("THRESHER_DEBUG"):
            traceback.print_exception(lost)
        return say(f"error: {one_line(lost)}", 1) if str(lost) else 1
    except (KeyboardInterrupt, click.Abort):
        again = shlex.join(["thresher", *arguments])
        return say(f"interrupted; to continue, run the same command again: {again}", 130)
    except BrokenPipeError:  # the reader of stdout went away: `thresher ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return unexpected(error)
    return 0


def unexpected(error: Exception) -> int:
    """Exit 2 for what the operating system blames on disk or rights, else 1 with a short line."""
    if os.environ.get("THRESHER_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.errno in USER_ERRNO:
        where = f"{error.filename}: " if error.filename else ""
        reason = USER_ERRNO[error.errno]
        return say(f"error: {where}{reason}; mend that and run the same command again", 2)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return say("error: out of memory; lower --batch-tokens or --memory and run again", 1)
    return say(
        f"error: unexpected {type(error).__name__}: {one_line(error)} "
        "(THRESHER_DEBUG=1 shows where)",
        1,
    )


def usage(wrong: click.ClickException) -> str:
    """One line for a command line that click refuses."""
    message = one_line(wrong.format_message()).rstrip(".")
    if isinstance(wrong, click.UsageError) and wrong.ctx is not None:
        return f"error: {message}; see {wrong.ctx.command_path} --help"
    return f"error: {message}"


def one_line(message: object) -> str:
    """A message with line breaks and runs of spaces made single spaces."""
    return " ".join(str(message).split())


def say(line: str, code: int) -> int:
    """Print a line on stderr and pass the exit code on."""
    click.echo(line, err=True)
    return code


def prepare_environment() -> None:
    """What libraries read from the environment as they are imported; the user's settings win.

    They are to report errors only. Threads without work are to sleep: spinning, OpenMP's default,
    made the demo four times slower on two cores that another process used as well.

    And caches are to be small: oneDNN keeps a compiled kernel for each of the last 1,024 matrix
    shapes, and every expert of every batch is a shape of its own. That was 270 MB more after six
    layers (benchmarks/memory.py), with no gain in time.
    """
    keep_one_gpu(os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
