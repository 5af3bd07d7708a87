"""Licences: which one a model has, and whether it lets a changed copy be published.

The identifiers are the hub's (`license:` of a model card). A licence that is not in the table is
not taken for permission: publishing asks for its name. This is a guard against slips, no legal
advice; gated or custom terms are the publisher's to read.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

# may be changed and passed on, under the licence's own conditions
ALLOWED = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "bigcode-openrail-m", "bigscience-openrail-m",
        "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0", "cc0-1.0", "cdla-permissive-2.0", "creativeml-openrail-m", "deepseek",
        "gemma", "gpl-3.0", "isc", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
        "llama3.3", "llama4", "mit", "mpl-2.0", "openmdw-1.0", "openrail", "openrail++",
        "unlicense",
    }
)  # fmt: skip
FORBIDDEN = {
    "cc-by-nd-4.0": "it allows no derivatives",
    "cc-by-nc-nd-4.0": "it allows no derivatives",
    "cc-by-nc-nd-3.0": "it allows no derivatives",
    "proprietary": "it allows no redistribution",
    "apple-amlr": "it is for research and forbids other redistribution",
}
CONDITIONS = {
    "cc-by-nc-4.0": "non-commercial use only",
    "cc-by-nc-sa-4.0": "non-commercial use only",
    "llama2": "keep the licence and its notice with the files",
    "llama3": "say `Built with Meta Llama 3` and begin the name with `Llama 3`",
    "llama3.1": "say `Built with Llama` and begin the name with `Llama`",
    "llama3.2": "say `Built with Llama` and begin the name with `Llama`",
    "llama3.3": "say `Built with Llama` and begin the name with `Llama`",
    "llama4": "say `Built with Llama` and begin the name with `Llama`",
    "gemma": "pass the Gemma terms on",
}
# a phrase of the text, by identifier; the first that is found wins
TEXTS: tuple[tuple[str, str], ...] = (
    ("apache-2.0", "Apache License Version 2.0"),
    ("mit", "Permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("cc-by-nc-nd-4.0", "Attribution-NonCommercial-NoDerivatives 4.0"),
    ("cc-by-nd-4.0", "Attribution-NoDerivatives 4.0"),
    ("cc-by-nc-4.0", "Attribution-NonCommercial 4.0"),
    ("cc-by-sa-4.0", "Attribution-ShareAlike 4.0"),
    ("cc-by-4.0", "Attribution 4.0 International"),
    ("gpl-3.0", "GNU GENERAL PUBLIC LICENSE Version 3"),
)
# how a text ends that says no more than its licence: conditions are often put behind it
ENDS = {
    "apache-2.0": ("limitations under the License", "END OF TERMS AND CONDITIONS"),
    "mit": ("DEALINGS IN THE SOFTWARE",),
}
CHANGED = re.compile(
    r"\bmodified[ -](apache|bsd|cc|creative|gnu|licen[cs]e|mit)\b|\bonly modification\b"
    r"|\badditional (clause|condition|restriction|requirement)s?\b",
    re.IGNORECASE,
)


def refusal(licence: str | None, name: str | None = None, link: str | None = None) -> str | None:
    """Why a model under this licence is not published; None when it may be."""
    if not licence:
        return "its licence is not known; make the card again with --license ID"
    if licence in FORBIDDEN:
        return f"its licence {licence} forbids it: {FORBIDDEN[licence]}"
    if licence == "other":
        if name and link:
            return None
        return "its licence is `other` without a name and a link; give both to `thresher card`"
    if licence not in ALLOWED:
        return (
            f"its licence {licence!r} is none that is known here; use --license other with a link"
        )
    return None


def licence_of(folder: Path) -> str | None:
    """The licence of a model folder: of its card's metadata, else recognised from LICENSE files.

    Those named for the model go before all others, one for the code is none of the weights'.
    `other`: a text that is not known word for word, or texts that do not agree.
    """
    metadata = front_matter(folder / "README.md")
    if isinstance(metadata.get("license"), str):
        return str(metadata["license"])
    named = {path.name.upper(): path for path in folder.iterdir() if path.is_file()}
    texts = {name: path for name, path in named.items() if "LICENSE" in name or "LICENCE" in name}
    of_model = [path for name, path in texts.items() if "MODEL" in name]
    found = {
        recognised(path.read_text(encoding="utf-8", errors="replace"))
        for path in of_model or [path for name, path in texts.items() if "CODE" not in name]
    }
    return found.pop() if len(found) == 1 else "other" if found else None


def recognised(text: str) -> str:
    """The licence whose text this is; `other` for an unknown or a changed one."""
    words = " ".join(text.split())
    known = next((known for known, phrase in TEXTS if phrase in words), "other")
    if CHANGED.search(words) or not words.rstrip('." =').endswith(ENDS.get(known, "")):
        return "other"
    return known


def front_matter(readme: Path) -> dict[str, object]:
    """The YAML metadata at the head of a card; empty where there is none."""
    if not readme.is_file():
        return {}
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
