"""What a token set is made of: named mixes, specs and YAML files become a `Mix`.

A spec is a comma-separated list of components

    source[subset](split):rows        e.g.  offline:96   rows.jsonl.gz:200,offline[code](heldout):48

where `source` is a mix of the table MIXES (which then stands for its components), an entry of
calibration.hub.SOURCES, a hub id `owner/name`, or a file `.jsonl`, `.jsonl.gz`, `.parquet`.
`[subset]`, `(split)` and `:rows` may be left out; without `rows` a file gives all its rows.
A YAML file says the same with domain names of one's own; its paths are relative to it:

    name: mine                 # optional, the file's stem otherwise
    max_length: 4096           # optional
    balance: tokens            # optional: rows (the default), tokens, domains (tokens.py)
    truncate: middle           # optional: tail (the default), middle, cut (truncation.py)
    components:
      - source: rows.jsonl.gz  # required, as above
        domain: code           # optional
        subset: default        # optional
        split: train           # optional
        rows: 700              # optional

The domain is the unit by which saliency is kept apart: a component's own name in the tables and in
YAML, otherwise the file's stem or the data set's last name; components of one name share a domain.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from calibration.datasets import LOCAL_SUFFIXES, is_local_file
from calibration.hub import SOURCES
from calibration.offline import DOMAINS as OFFLINE_DOMAINS
from calibration.offline_modules import PARTS
from calibration.truncation import Truncation
from models.errors import InputError

Balance = Literal["rows", "tokens", "domains"]

DEFAULT_MAX_LENGTH = 2048
ALL = "all"  # stands for every domain: in reports, --weights, --protect
MAX_DOMAINS = 255  # domain is uint8 and 255 marks padding

COMPONENT = re.compile(
    r"(?P<source>[^\[\]():,]+)(?:\[(?P<subset>[^\[\]]+)\])?(?:\((?P<split>[^()]+)\))?"
    r"(?::(?P<rows>\d+))?"
)
YAML_KEYS = {"name", "max_length", "balance", "truncate", "components"}
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """Rows of one source that count as one domain; rows None means all of them."""

    domain: str
    source: str
    subset: str | None = None
    split: str | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """A name for the record, the components in order, the length its recipe cuts at, and how
    (truncation.py); what the components' numbers are shares of (tokens.py)."""

    name: str
    components: tuple[Component, ...]
    max_length: int = DEFAULT_MAX_LENGTH
    balance: Balance = "rows"
    truncate: Truncation = "tail"

    @property
    def domains(self) -> list[str]:
        """Domain names in order of first appearance."""
        return list(dict.fromkeys(component.domain for component in self.components))

    def rows(self, samples: int | None) -> list[int | None]:
        """Rows of each component, scaled to `samples` in all where given.

        Shares are kept as closely as whole rows allow, by largest remainder. Raises InputError when
        there are fewer samples than components or when only some components have a number.
        """
        own = [component.rows for component in self.components]
        if samples is None:
            return own
        if samples < len(own):
            raise InputError(
                f"{samples} samples cannot be shared among the {len(own)} components of "
                f"{self.name}; ask for at least {len(own)}"
            )
        weights = [1 if rows is None else rows for rows in own]
        if None in own and any(rows is not None for rows in own):
            raise InputError(
                f"{self.name}: some components have a number of rows and some have not; give all "
                "of them one, or none, when --samples shares them out"
            )
        return list(shared_out(samples, weights))


def shared_out(total: int, weights: list[int]) -> list[int]:
    """total in whole parts proportional to the weights, each at least 1, summing to total."""
    rest = total - len(weights)
    exact = [max(0.0, total * weight / sum(weights) - 1) for weight in weights]
    scale = rest / sum(exact) if sum(exact) else 0.0
    parts = [int(share * scale) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda k: (parts[k] - exact[k] * scale, k))
    for k in by_remainder[: rest - sum(parts)]:
        parts[k] += 1
    return [part + 1 for part in parts]


OFFLINE = Mix(
    name="offline",
    components=(
        Component(domain="code", source="offline", subset="code", rows=40),
        Component(domain="tools", source="offline", subset="tools", rows=32),
        Component(domain="swe", source="offline", subset="swe", rows=24),
    ),
)
# 700 / 330 / 330, the community recipe: 51.5 / 24.3 / 24.3 % of rows, not of tokens
CODE_TOOLS_SWE = Mix(
    name="code-tools-swe",
    components=(
        Component(domain="code", source="evol-codealpaca-v1", rows=700),
        Component(domain="tools", source="xlam-function-calling-60k", rows=330),
        Component(domain="swe", source="SWE-smith-trajectories", rows=330),
    ),
)
# 6 x 4,096 = 24,576, the recipe of the published REAP checkpoints
REAP_AGENTIC = Mix(
    name="reap-agentic",
    max_length=16_384,
    components=(
        Component(domain="code", source="evol-codealpaca-v1", rows=4096),
        Component(domain="tools", source="xlam-function-calling-60k", rows=4096),
        Component(domain="reasoning-code", source="Mixture-of-Thoughts", subset="code", rows=4096),
        Component(domain="reasoning-math", source="Mixture-of-Thoughts", subset="math", rows=4096),
        Component(
            domain="reasoning-science", source="Mixture-of-Thoughts", subset="science", rows=4096
        ),
        Component(domain="swe", source="SWE-smith-trajectories", rows=4096),
    ),
)
MIXES: dict[str, Mix] = {mix.name: mix for mix in (OFFLINE, CODE_TOOLS_SWE, REAP_AGENTIC)}


def parse_mix(spec: str) -> Mix:
    """The mix that a name, a spec or a YAML file's path means.

    Raises InputError for an empty or misspelt one, with the known names.
    """
    spec = spec.strip()
    if not spec:
        raise InputError(f"the mix is empty; give {known_names()}")
    if spec.endswith((".yaml", ".yml")):
        return mix_from_yaml(Path(spec))
    components: list[Component] = []
    lengths: list[int] = []
    for item in re.split(r",(?![^\[(]*[\])])", spec):
        match = COMPONENT.fullmatch(item.strip())
        if match is None:
            raise InputError(
                f"{item.strip()!r} is no part of a mix; write source[subset](split):rows, for "
                "example offline:96"
            )
        rows = None if match["rows"] is None else int(match["rows"])
        source = match["source"].strip()
        expanded = components_of(source, match["subset"], match["split"], rows)
        components += expanded
        lengths.append(MIXES[source].max_length if source in MIXES else DEFAULT_MAX_LENGTH)
    return checked(Mix(name=spec, components=tuple(components), max_length=max(lengths)))


def components_of(
    source: str, subset: str | None, split: str | None, rows: int | None
) -> list[Component]:
    """One item of a spec; a named mix stands for its components, scaled to `rows` in all."""
    if rows == 0:
        raise InputError(f"{source}:0 asks for no rows; leave it out or ask for some")
    if source in MIXES and subset is None:
        mix = MIXES[source]
        shares = mix.rows(rows)
        return [
            replace(component, split=split or component.split, rows=share)
            for component, share in zip(mix.components, shares, strict=True)
        ]
    if source == "offline" and subset is not None:
        return [Component(domain=subset, source=source, subset=subset, split=split, rows=rows)]
    if is_local_file(source):
        name = Path(source).name
        stem = name[: -len(next(s for s in LOCAL_SUFFIXES if name.endswith(s)))]
    else:
        stem = source.rpartition("/")[2]
    domain = f"{stem}-{subset}" if subset else stem
    return [Component(domain=domain, source=source, subset=subset, split=split, rows=rows)]


def mix_from_yaml(path: Path) -> Mix:
    """The mix that a YAML file describes (its form stands at the top of this module)."""
    import yaml

    if not path.is_file():
        raise InputError(f"there is no mix file {path}; give {known_names()}")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        reason = " ".join(str(problem).split())
        raise InputError(f"{path} is not YAML ({reason})") from problem
    items = read.get("components") if isinstance(read, dict) else None
    if not isinstance(items, list) or not items:
        raise InputError(f"{path} has no list `components`; each entry needs a `source`")
    length = read.get("max_length", DEFAULT_MAX_LENGTH)
    if not isinstance(length, int) or length < 2:
        raise InputError(f"{path}: max_length is {length!r}; it must be an integer of at least 2")
    unknown = sorted(map(str, read.keys() - YAML_KEYS))
    if unknown:
        raise InputError(f"{path}: unknown keys {unknown}; known are {sorted(YAML_KEYS)}")
    for key, known in (("balance", get_args(Balance)), ("truncate", get_args(Truncation))):
        if read.get(key, known[0]) not in known:
            raise InputError(f"{path}: {key} is {read[key]!r}; known are {', '.join(known)}")
    components = [part for item in items for part in yaml_components(item, path)]
    return checked(
        Mix(
            name=str(read.get("name", path.stem)),
            components=tuple(components),
            max_length=length,
            balance=read.get("balance", "rows"),
            truncate=read.get("truncate", "tail"),
        )
    )


def yaml_components(item: Any, path: Path) -> list[Component]:
    """One entry of a YAML file's components."""
    known = {"source", "domain", "subset", "split", "rows"}
    if not isinstance(item, dict) or not isinstance(item.get("source"), str):
        raise InputError(f"{path}: component {item!r} has no `source`")
    if item.keys() - known:
        wrong = sorted(map(str, item.keys() - known))
        raise InputError(f"{path}: unknown keys {wrong}; known are {sorted(known)}")
    rows = item.get("rows")
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
        raise InputError(f"{path}: rows is {rows!r}; it must be a positive integer")
    source = item["source"]
    if source.endswith(LOCAL_SUFFIXES):
        source = str(path.parent / source)
    parts = components_of(source, item.get("subset"), item.get("split"), rows)
    if item.get("domain"):
        parts = [replace(part, domain=str(item["domain"])) for part in parts]
    return parts


def checked(mix: Mix) -> Mix:
    """The mix, its sources known to exist as far as that can be told without the network."""
    for component in mix.components:
        check_source(component)
        if component.domain == ALL:
            raise InputError(
                f"{component.source} would be the domain {ALL!r}, which means all domains; rename "
                "the file, or give it another `domain` in a YAML mix"
            )
    if len(mix.domains) > MAX_DOMAINS:
        raise InputError(f"{len(mix.domains)} domains; at most {MAX_DOMAINS} are told apart")
    return mix


def check_source(component: Component) -> None:
    """InputError unless the component's source, subset and split can exist."""
    source = component.source
    if source == "offline":
        if component.subset not in OFFLINE_DOMAINS:
            raise InputError(
                f"offline has no subset {component.subset!r}; known are "
                + ", ".join(OFFLINE_DOMAINS)
            )
        if component.split is not None and component.split not in PARTS:
            raise InputError(
                f"offline has no split {component.split!r}; known are {', '.join(PARTS)}"
            )
    elif is_local_file(source):
        if not Path(source).is_file():
            raise InputError(f"there is no file {source}; check the path in the mix")
        if component.subset or component.split:
            raise InputError(f"{source} is a single file: it has no [subset] and no (split)")
    elif Path(source).exists() or source.endswith((".json", ".csv", ".txt", ".gz")):
        raise InputError(f"{source} is no row file; rows come from {', '.join(LOCAL_SUFFIXES)}")
    elif source not in SOURCES and not HUB_ID.fullmatch(source):
        close = difflib.get_close_matches(source, [*MIXES, *SOURCES], n=1)
        hint = f"perhaps {close[0]}, or " if close else ""
        raise InputError(f"there is no mix or source {source!r}; give {hint}{known_names()}")


def known_names() -> str:
    """What may stand in --mix, as one phrase."""
    return (
        f"one of {', '.join(MIXES)}, a source ({', '.join(SOURCES)}), a hub id owner/name, a file "
        f"({', '.join(LOCAL_SUFFIXES)}) or a YAML file"
    )
