"""What would ten billion rows of 768 float16 take: bytes, core hours, network, money, failures?

A plan on paper: what is measured comes from ``results/ray_scaling.json``, what is assumed stands in
``ASSUMED`` below and in the result, and every other number is worked out from these two. Prices and
failure rates are round figures to be replaced by one's own (``--set spot_share=1 ...``).
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
ASSUMED = {
    "rows": 10_000_000_000,
    "d": 768,
    "bytes_per_number": 2,  # float16
    "nodes": 32,
    "cores_per_node": 16,
    "busy_share": 0.8,  # of the time that a core works: reading, waiting, stragglers take the rest
    "network_gbit_per_node": 10,
    "network_share": 0.6,  # of it that an object store's clients see
    "block_bytes": 128 << 20,  # a Ray block, and so a shard
    "blocks_in_flight_per_core": 3,
    "dollars_per_core_hour": 0.05,  # a virtual CPU with its share of memory, on demand
    "dollars_per_gb_month": 0.023,  # object storage
    "failures_per_node_hour": 0.05,  # spot machines that are taken back
    "sample_rows": 65_536,
    "rows_read_for_one_of_the_sample": 64,  # whole files, drawn at random
    "drift_share_per_month": 0.02,  # of new rows, relative to the table
}
CODECS = ("archive", "archive, 8 states", "rows of codebooks")


def plan(measured: dict[str, Any], assumed: dict[str, float], codec: str) -> list[dict[str, Any]]:
    """The lines of the plan for one codec: what, value, unit."""
    steps = {step["codec"]: step for step in measured["steps"]}
    step, parquet = steps[codec], steps["Parquet, float16"]
    pipes = {line["what"]: line["rows_per_cpu_second"] for line in measured["rows"]}
    # what Ray itself costs, in CPU seconds a row, does not depend on the codec: the dearer pipeline
    ray_seconds = max(
        1 / pipes[f"{way}, Ray, 2 workers"] - 1 / pipes[f"{way}, plain loop"]
        for way in ("column of codes", "shards")
    )
    rows, cores = assumed["rows"], assumed["nodes"] * assumed["cores_per_node"]
    raw = rows * assumed["d"] * assumed["bytes_per_number"]
    coded = rows * step["shard bytes/row"]
    read_seconds = 1 / parquet["read, rows/s"]
    encode = read_seconds + ray_seconds + 1 / step["write shard, rows/s"]
    decode = ray_seconds + 1 / step["read shard, rows/s"]
    encode_hours, decode_hours = (rows * s / 3600 for s in (encode, decode))
    hours = encode_hours / cores / assumed["busy_share"]
    node_bytes = assumed["network_gbit_per_node"] / 8 * 1e9 * assumed["network_share"]
    network_hours = (raw + coded) / (assumed["nodes"] * node_bytes) / 3600
    row_bytes = assumed["d"] * assumed["bytes_per_number"]
    block_rows = assumed["block_bytes"] / row_bytes
    sampled = assumed["sample_rows"] * assumed["rows_read_for_one_of_the_sample"] * row_bytes
    failures = assumed["failures_per_node_hour"] * assumed["nodes"] * hours
    lost = assumed["cores_per_node"] * block_rows * encode / 3600  # a block in each core's hands
    month = assumed["dollars_per_gb_month"] / 1e9
    return [
        {"what": "raw vectors", "value": raw / 1e12, "unit": "TB"},
        {"what": "shards", "value": coded / 1e12, "unit": "TB"},
        {"what": "quantizer, stored once", "value": step["quantizer_bytes"] / 1e6, "unit": "MB"},
        {"what": "encode: CPU a row", "value": 1e6 * encode, "unit": "us"},
        {"what": "of it reading Parquet", "value": 1e6 * read_seconds, "unit": "us"},
        {"what": "of it Ray", "value": 1e6 * ray_seconds, "unit": "us"},
        {"what": "encode: core hours", "value": encode_hours, "unit": "h"},
        {"what": "encode: time on all nodes", "value": hours, "unit": "h"},
        {"what": "network's bound on that time", "value": network_hours, "unit": "h"},
        {"what": "encode: cost", "value": encode_hours / assumed["busy_share"]
         * assumed["dollars_per_core_hour"], "unit": "$"},
        {"what": "decode everything: core hours", "value": decode_hours, "unit": "h"},
        {"what": "storage a month: raw", "value": raw * month, "unit": "$"},
        {"what": "storage a month: shards", "value": coded * month, "unit": "$"},
        {"what": "rows of a shard", "value": block_rows, "unit": "rows"},
        {"what": "number of shards", "value": rows / block_rows, "unit": "shards"},
        {"what": "size of a shard", "value": coded / rows * block_rows / 1e6, "unit": "MB"},
        {"what": "object store of a node", "value": assumed["cores_per_node"]
         * assumed["blocks_in_flight_per_core"] * assumed["block_bytes"] / 1e9, "unit": "GB"},
        {"what": "nodes lost during the job", "value": failures, "unit": "nodes"},
        {"what": "work lost with one: core hours", "value": lost, "unit": "h"},
        {"what": "work lost in all, of the job's", "value": 100 * failures * lost / encode_hours,
         "unit": "%"},
        {"what": "new rows a month: core hours", "value": encode_hours
         * assumed["drift_share_per_month"], "unit": "h"},
        {"what": "read for a sample of whole files", "value": sampled / 1e9, "unit": "GB"},
    ]  # fmt: skip


def main() -> None:
    """Work it out, print it, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--measured", type=Path, default=FOLDER / "ray_scaling.json")
    parser.add_argument("--out", type=Path, default=FOLDER / "scale_plan.json")
    args = parser.parse_args()
    assumed: dict[str, float] = dict(ASSUMED)
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in assumed:
            parser.error(f"expected one of {', '.join(assumed)}, got {name!r}")
        assumed[name] = float(value)
    measured = json.loads(args.measured.read_text("utf-8"))
    plans = {codec: plan(measured, assumed, codec) for codec in CODECS}
    for lines in zip(*plans.values(), strict=True):
        values = "".join(f"{line['value']:14,.4g}" for line in lines)
        print(f"{lines[0]['what']:36}{values} {lines[0]['unit']}")
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": measured["cpu"],
        "measured": {"file": "ray_scaling.json", "when": measured["when"]},
        "assumed": assumed,
        "rows": [
            {"codec": codec} | line | {"value": float(f"{line['value']:.4g}")}
            for codec, lines in plans.items()
            for line in lines
        ],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
