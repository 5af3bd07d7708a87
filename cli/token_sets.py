"""The tokens of a command: a file, or a mix that is built with the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError
from models.progress import Progress, Step, silent

if TYPE_CHECKING:
    from calibration.mixes import Mix
    from calibration.tokens import Drawing, TokenSet
    from calibration.truncation import Truncation


def token_set(
    model: str,
    *,
    tokens: Path | None,
    mix: str | Mix | None,
    samples: int | None,
    max_length: int | None,
    seed: int,
    progress: Progress = silent,
    truncate: Truncation | None = None,
) -> TokenSet:
    """The token set that exactly one of `tokens` and `mix` asks for.

    A mix is built anew on every run: it is a function of its arguments, so a job that resumes
    gets the same tokens, and a changed source is noticed by the job's digest instead of being
    mixed with old tokens.
    """
    from calibration.tokens import Drawing, TokenSet

    if (tokens is None) == (mix is None):
        raise InputError("give the tokens once: with --tokens FILE, or with --mix MIX")
    if tokens is not None:
        if samples is not None or max_length is not None:
            raise InputError("--samples and --max-length belong to --mix; a token set is fixed")
        return TokenSet.load(tokens)
    assert mix is not None
    drawing = Drawing(samples=samples, max_length=max_length, seed=seed, truncate=truncate)
    return built_from_mix(model, mix, drawing, progress)[0]


def built_from_mix(
    model: str, mix: str | Mix, drawing: Drawing, progress: Progress = silent
) -> tuple[TokenSet, TokenSet | None, Any]:
    """The token set of a mix, the held-out one if it is asked for, and the model's tokenizer."""
    from calibration.chat import load_tokenizer
    from calibration.mixes import parse_mix
    from calibration.tokens import build_token_sets

    # before the tokenizer: a misspelt mix is refused at once
    parsed = parse_mix(mix) if isinstance(mix, str) else mix
    wanted = sum(rows or 0 for rows in parsed.rows(drawing.samples)) + (drawing.holdout or 0)

    def made(done: int) -> None:
        progress(Step(job="tokens", done=done, total=max(done, wanted), unit="samples"))

    tokenizer = load_tokenizer(model)
    return *build_token_sets(tokenizer, parsed, drawing, made), tokenizer


def token_facts(used: TokenSet) -> dict[str, Any]:
    """What a manifest says of a job's tokens."""
    return {
        "mix": used.mix, "seed": used.seed, "tokens": used.counts(), "report": used.report(),
    }  # fmt: skip
