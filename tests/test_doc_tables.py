"""The figures that README and docs/ show are those of the benchmarks' results."""

from __future__ import annotations

import subprocess
import sys


def test_pages_show_the_results(root):
    command = [sys.executable, str(root / "benchmarks" / "doc_tables.py"), "--check"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
