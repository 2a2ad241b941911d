"""What PSNR and MS-SSIM does each codec reach at equal bytes on the Kodak photographs?

    polarpack-image download-data kodak
    python benchmarks/kodak.py kodak

writes ``results/kodak.json``, two plots and ``kodak.html``, a page with zoomable curves and crops.
Pillow's and imagecodecs' codecs run here, on the same bytes; curves of others are those of
``polarpack_image/published.json``, each with its source. Seconds are of CPU, one thread. With
names of codecs only these run, and the others' figures stay as they were.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARPACK_THREADS", "1")

from polarpack_image import report

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python benchmarks/kodak.py FOLDER [CODEC...]")
    results = Path(__file__).parent / "results"
    print(
        report.run(
            Path(sys.argv[1]),
            results,
            only=sys.argv[2:],
            doing=lambda text: print(text, file=sys.stderr),
        )
    )
