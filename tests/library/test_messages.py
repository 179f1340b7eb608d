# SPDX-License-Identifier: Apache-2.0
"""The library warns through `warnings`, and its messages are those of the logger "genperf"; only commands print."""

import ast
import logging
from pathlib import Path

from genperf._messages import log_on_stderr
from genperf.fid.image_files import image_paths

ROOT = Path(__file__).parents[2]


def test_only_commands_print():
    printing = set()
    for path in [*(ROOT / "genperf").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if {"print", "sys.stdout.write", "sys.stderr.write"} & set(calls):
            printing.add(path.relative_to(ROOT).parts[:2])
    assert printing == {("genperf", "cli"), ("genperf", "_messages.py")}


def test_messages_of_the_library_are_logged(tmp_path, caplog, capsys):
    for name in ("a.png", "b.heic"):
        (tmp_path / name).touch()
    message = f"photos in {str(tmp_path)!r} that Pillow does not read are left out: 1 .heic."
    assert image_paths(tmp_path) == [tmp_path / "a.png"]
    assert caplog.record_tuples == [("genperf", logging.WARNING, message)]
    assert capsys.readouterr().err == ""
    with log_on_stderr():
        image_paths(tmp_path)
    assert capsys.readouterr().err == f"genperf: {message}\n"
    assert not logging.getLogger("genperf").handlers
