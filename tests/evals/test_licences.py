"""Licences recognised from texts; what is changed or mixed is taken for no permission."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.licences import licence_of, refusal

APACHE = (Path(__file__).parents[2] / "LICENSE").read_text()
MIT = """MIT License

Copyright (c) 2025 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files, to deal in the Software without restriction.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND. IN NO EVENT SHALL THE AUTHORS BE
LIABLE FOR ANY CLAIM ARISING FROM THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
RIDER = """
Our only modification part is that, if the Software is used for products with more than 100 million
monthly active users, you shall prominently display its name on the user interface.
"""
DEEPSEEK = "DEEPSEEK LICENSE AGREEMENT\nVersion 1.0, 23 October 2023\n"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"LICENSE": MIT}, "mit"),
        ({"LICENSE.txt": APACHE, "NOTICE": "x"}, "apache-2.0"),
        ({"LICENSE": APACHE, "LICENCE.md": APACHE}, "apache-2.0"),
        ({"LICENSE": MIT + RIDER}, "other"),
        ({"LICENSE": "Modified " + MIT}, "other"),
        ({"LICENSE": MIT + "You shall not serve it to more than 100 people."}, "other"),
        ({"LICENSE": APACHE + "You shall not serve it to more than 100 people."}, "other"),
        ({"LICENSE": MIT, "LICENSE-2": APACHE}, "other"),
        ({"LICENSE-CODE": MIT, "LICENSE-MODEL": DEEPSEEK}, "other"),
        ({"LICENSE-CODE": APACHE, "LICENSE-MODEL": MIT}, "mit"),
        ({"LICENSE": APACHE, "MODEL_LICENSE.md": MIT}, "mit"),
        ({"LICENSE-CODE": MIT}, None),
        ({"README.md": "words"}, None),
        ({"README.md": "---\nlicense: gemma\n---\n", "LICENSE": MIT}, "gemma"),
    ],
)
def test_licence_of_a_folder(tmp_path: Path, files: dict[str, str], wanted: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(tmp_path) == wanted
    if wanted in ("other", None):
        assert refusal(wanted)
