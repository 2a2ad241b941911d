"""What is each link of polarpack's chain worth, in dB on held-out rows at equal code bits?

The planner's chain is fitted to a table's training rows; then one link at a time is taken out or
changed, everything else kept, and the step moved until the held-out rows take the same code bits
again (``vectors_rd.at_rate``). At most ``--train-rows`` rows to fit on and 2048 others to judge by.

| name | link |
|---|---|
| planner | what ``pp.fit`` chose |
| one KLT | no classes |
| native order | no rotation at all |
| random rotation | a rotation that knows nothing of the data |
| 4, 8, 64 states | of the trellis; the planner takes 32 |
| no rate in the search | nearest path, whatever it costs (``rate_weight=0``) |
| polar | a radius of 6 bits and a direction in place of the row |
| no walls | decoded numbers are not held where the data end |

    python benchmarks/ablation.py --data FOLDER [--tables sift,sentences] [--rates 1,2]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tables import Table, load_tables
from vectors_rd import SEED, Clock, Coded, at_rate, judged, provenance

import polarpack as pp
from polarpack import metrics

RESULTS = Path(__file__).parent / "results" / "ablation.json"
TEST_ROWS = 2048
NAMES = ("sentences", "sift", "tokens", "glove", "gaussian")


def chains(t: Table, bits: float) -> Iterator[tuple[str, Coded]]:
    """Each chain's name, and the held-out rows through it."""
    best = pp.fit(t.train, bits=bits, seed=SEED)
    yield "planner", at_rate(Clock(), best, t.train, t.test, bits)
    frame: dict[str, Any] = {"rotation": "none", "center": True}
    if getattr(best.rotation_, "common", best.rotation_).kind == "klt":
        frame = {"rotation": "klt"}
    if best.rotation_.n_classes > 1:
        frame |= {"n_classes": best.rotation_.n_classes, "n_leading": best.rotation_.n_leading}
    plain = {"fine": "trellis", "radius_bits": 0, "n_states": 32, "center": True, "seed": SEED}
    changed = {
        "one KLT": plain | {"rotation": "klt"},
        "native order": plain | {"rotation": "none"},
        "random rotation": plain | {"rotation": "random"},
        "4 states": plain | frame | {"n_states": 4},
        "8 states": plain | frame | {"n_states": 8},
        "64 states": plain | frame | {"n_states": 64},
        "no rate in the search": plain | frame | {"rate_weight": 0.0},
        "polar": plain | frame | {"radius_bits": 6},
    }
    for name, settings in changed.items():
        q = pp.PolarQuantizer(**settings, bits=bits).fit(t.train)
        yield name, at_rate(Clock(), q, t.train, t.test, bits)
    if best.low_ is not None or best.high_ is not None:
        best._walls = None, None
        best.low_ = best.high_ = None
        yield "no walls", at_rate(Clock(), best, t.train, t.test, bits)


def run(t: Table, bits: float) -> Iterator[dict[str, Any]]:
    """One line for each chain."""
    for name, coded in chains(t, bits):
        judged(t.test, coded)
        row = {"table": t.name, "rate": bits, "link": name, "setting": coded.setting}
        row["code_bits"] = round(coded.code_bits, 4)
        # 6 dB a bit for what the rate is off by
        snr = coded.quality["snr_db"] - 6.02 * (coded.code_bits - bits)
        row["snr_db"] = round(snr, 3)
        for key, digits in (("cosine", 5), ("cosine_p01", 5), ("recall10", 4)):
            row[key] = round(coded.quality[key], digits)
        print(f"{t.name:12}{bits:5g} {name:24}{snr:7.2f} dB  {row['setting']}", flush=True)
        yield row


def main() -> None:
    """Run what is not in the results yet, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--tables", type=lambda s: s.split(","), default=list(NAMES))
    parser.add_argument("--rates", type=lambda s: [float(v) for v in s.split(",")], default=[1, 2])
    parser.add_argument("--train-rows", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    env = [Path(p) for p in os.environ.get("POLARPACK_DATA", "").split(os.pathsep) if p]
    for table in load_tables(args.tables, args.data or env):
        few = np.arange(min(args.train_rows, len(table.train)))
        train = table.train[few * len(table.train) // len(few)]
        t = Table(table.name, table.x, train, table.test[:TEST_ROWS])
        for bits in args.rates:
            old = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
            if any((r["table"], r["rate"]) == (t.name, bits) for r in old["rows"]):
                continue
            bound = float(metrics.rate_distortion_bound(t.test, [bits])[0])
            rows = [*run(t, bits), {"table": t.name, "rate": bits, "link": "bound of one KLT",
                                    "snr_db": round(bound, 3)}]  # fmt: skip
            made = {"question": (__doc__ or "").splitlines()[0]} | provenance()
            made["data"] = old.get("data", {}) | {
                t.name: {"train": len(train), "test": len(t.test)}
            }
            made["rows"] = old["rows"] + rows
            args.out.parent.mkdir(exist_ok=True)
            lines = ",\n".join("  " + json.dumps(row) for row in made["rows"])
            text = json.dumps(made | {"rows": []}, indent=1)
            args.out.write_text(text.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")


if __name__ == "__main__":
    main()
