"""With only the core installed, decoding works and the rest says what it lacks.

``python tests/no_extras_check.py``, from a folder other than the repository's, so that the
installed package is what is looked at. Not a pytest file: that environment has no pytest.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

import polarpack as pp

GOLDEN = Path(__file__).resolve().parent / "golden"
OPTIONAL = [
    "faiss", "torch", "PIL", "ray", "pyarrow", "safetensors", "sklearn", "matplotlib"
]  # fmt: skip


def check(claim: bool, message: str) -> None:
    """Stop with the message unless the claim holds."""
    if not claim:
        sys.exit(f"no_extras_check: {message}")


def check_environment() -> None:
    present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    check(not present, f"this environment is meant to lack {present}")
    installed = Path(pp.__file__).resolve()
    tree = GOLDEN.parent.parent / "polarpack"
    check(installed.parent != tree, f"expected the installed package, got {installed}")


def check_golden() -> None:
    """Every golden file decodes to the bits stored beside it."""
    files = sorted(GOLDEN.glob("*/*.polar"))
    check(bool(files), f"no golden files in {GOLDEN}")
    for path in files:
        stored = np.load(path.parent / "decoded.npz", allow_pickle=False)
        with pp.open(path) as file:
            check(sorted(file.keys()) == sorted(stored.files), f"{path}: keys {file.keys()}")
            for key in stored.files:
                decoded = np.asarray(file[key][...])
                same = (decoded.dtype, decoded.shape) == (stored[key].dtype, stored[key].shape)
                same = same and decoded.tobytes() == stored[key].tobytes()
                check(same, f"{path}: {key} decodes to other bits than when it was written")
        print(f"decoded {path.relative_to(GOLDEN)}")


def check_missing() -> None:
    """What needs an extra raises MissingDependencyError with the line that installs it."""
    x = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    calls = {
        "faiss": lambda: pp.kmeans(x, k=4),
        "torch": lambda: pp.open(GOLDEN / "raw-v1" / "file.polar", library="torch")["t"][:1],
    }
    for extra, call in calls.items():
        try:
            call()
        except pp.MissingDependencyError as error:
            check(f"polarpack[{extra}]" in str(error), f"{extra}: no install line in {error!s}")
            print(f"without {extra}: {error}")
        else:
            check(False, f"{extra}: expected MissingDependencyError")


if __name__ == "__main__":
    check_environment()
    check_golden()
    check_missing()
    print("only the core installed: ok")
