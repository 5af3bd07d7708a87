"""Rows of local files, in an order set by the seed. How a row becomes a sample stands in rows.py.

JSON Lines are read as lines of text and parsed here, not by the library's JSON reader: Arrow types
every nested object by the union of all rows' keys, which pads tool schemas and call arguments with
nulls and reorders them. Parquet files have been through that already, so nulls inside their nested
values are taken for padding and dropped. Nothing is written into the user's cache: the library's
working files live in a temporary folder.
"""

from __future__ import annotations

import glob
import json
import random
import tempfile
from collections.abc import Generator
from typing import TYPE_CHECKING

from calibration.hub import HubSource, whole_split
from calibration.messages import Sample, SampleError, read_json
from calibration.rows import Rejected, Row, Shape, converted, shape_of, without_nulls
from models.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

LOCAL_SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
# How the library complains of a file without a row: text, parquet.
EMPTY = ("at least one example", "corresponds to no data")


def is_local_file(source: str) -> bool:
    """Whether a source is meant as a file here (existing or not)."""
    return source.endswith(LOCAL_SUFFIXES)


# ---- rows of a source, in an order set by the seed -----------------------------------------------


def file_samples(path: str, seed: int) -> Generator[Sample | Rejected, None, None]:
    """Every row of a local file once, shuffled by the seed, as sample or rejection.

    Raises InputError when the file cannot be read, is empty, or has unknown columns.
    """
    with tempfile.TemporaryDirectory(prefix="thresher-rows-") as folder:
        rows = opened(path, folder)
        if len(rows) == 0:
            raise no_rows(path)
        order = list(range(len(rows)))
        random.Random(f"thresher rows {seed}").shuffle(order)
        if path.endswith(".parquet"):
            shape = shape_of(list(rows.column_names), path)
            for place in order:
                yield converted(shape, without_nulls(rows[place]))
            return
        if not any(line_of(row).strip() for row in rows):
            raise no_rows(path)
        shape = shape_of(first_columns(rows), path)
        for place in order:
            line = line_of(rows[place])
            if line.strip():
                yield parsed(shape, line)


def opened(path: str, folder: str) -> Dataset:
    """The file as a data set of the library, its working files under `folder`."""
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if path.endswith(".parquet") else "text"
    try:
        # the library would read [1] in a name as a pattern
        files = [glob.escape(path)]
        return datasets.load_dataset(kind, data_files=files, cache_dir=folder, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, EOFError) as problem:
        cause = problem.__cause__ or problem
        if any(words in str(cause) for words in EMPTY):
            raise no_rows(path) from problem
        reason = " ".join(str(cause).split())[:200]
        raise InputError(f"{path} cannot be read as {kind} ({reason}); check the file") from problem


def no_rows(path: str) -> InputError:
    """That a file is empty."""
    return InputError(f"{path} holds no rows; give a file that does")


def line_of(row: Row) -> str:
    """A line of a text file, without the byte order mark that some programs begin files with."""
    line: str = row["text"]
    return line.removeprefix("\ufeff")


def first_columns(rows: Dataset) -> list[str]:
    """Columns of the first line that is a JSON object; none when no line is."""
    for row in rows:
        try:
            read = read_json(line_of(row), "line is")
        except SampleError:
            continue
        if isinstance(read, dict):
            return list(read)
    return []


def parsed(shape: Shape, line: str) -> Sample | Rejected:
    """The sample of one line of JSON."""
    try:
        row = read_json(line, "line is")
    except SampleError as problem:
        return Rejected(reason=str(problem))
    if not isinstance(row, dict):
        return Rejected(reason="line is not a JSON object")
    return converted(shape, row)


def raw_rows(source: str, subset: str | None, split: str) -> list[Row]:
    """All rows of a local file or hub set as they are, in their order (for evaluation tasks).

    Raises InputError when the source cannot be read.
    """
    if not is_local_file(source):
        return whole_split(HubSource(hub_id=source, subset=subset, split=split))
    with tempfile.TemporaryDirectory(prefix="thresher-rows-") as folder:
        rows = opened(source, folder)
        if source.endswith(".parquet"):
            return [dict(row) for row in rows]
        try:
            return [json.loads(line) for line in map(line_of, rows) if line.strip()]
        except (ValueError, RecursionError) as problem:
            raise InputError(f"{source} is not JSON Lines ({problem}); check it") from problem
