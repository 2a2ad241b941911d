"""Every tutorial runs, in its fast mode, and draws its figures."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

for library in ("torch", "matplotlib", "sklearn", "faiss", "PIL"):
    pytest.importorskip(library)

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
FIGURES = {
    "vq_2d": ["vq_2d_evolution", "vq_2d_sizes"],
    "vqvae": ["vqvae_codes", "vqvae_training"],
    "rqvae": ["rqvae_levels", "rqvae_pictures"],
    "rq_kmeans": ["rq_kmeans"],
    "fsq": ["fsq"],
    "polar": ["polar", "polar_sphere"],
}


def test_the_list_is_complete():
    assert set(FIGURES) == {path.stem for path in FOLDER.glob("*.py")} - {"pictures"}
    readme = (FOLDER / "README.md").read_text("utf-8")
    for name, figures in FIGURES.items():
        assert f"({name}.py)" in readme
        for figure in figures:
            assert f"(figures/{figure}.png)" in readme
            assert (FOLDER / "figures" / f"{figure}.png").exists()


@pytest.mark.parametrize("name", FIGURES)
def test_tutorial(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--fast", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    drawn = {path.stem: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert set(drawn) == set(FIGURES[name]) and min(drawn.values()) > 5000
