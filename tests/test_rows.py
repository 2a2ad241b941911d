"""Single rows and scattered rows of the rows layout: short ways that give what the long one gives."""

import os

import numpy as np
import pytest
import torch
from tables import SETTINGS, D, correlated, fitted

import polarpack as pp
from polarpack import blocks, reading
from polarpack.entropy.packing import pack_rows, unpack_rows

ROWS = correlated(3000, D, seed=8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks of few rows."""
    monkeypatch.setattr(blocks, "ROWS_PART_BYTES", 1 << 10)


FIXED = [name for name, s in SETTINGS.items() if s.get("fine") != "trellis"]


def opened(x, name, **options):
    q = fitted(name)
    with_rows = pp.PolarQuantizer.from_bytes(q.to_bytes())
    with_rows.layout = "rows"
    return pp.open(pp.compress(x, quantizer=with_rows, **options))["x"]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_by_one_and_scattered_as_all_together(name, dtype, monkeypatch):
    monkeypatch.setattr(reading, "BLOCKS_KEPT", 2)
    monkeypatch.setattr(reading, "GATHERED_ROWS", 100)
    x = torch.from_numpy(ROWS).to(getattr(torch, dtype))
    t = opened(x, name)
    assert t.layout == "rows" and t._place(2999)[:2] > (0, 0)
    whole = t[...]
    chosen = np.random.default_rng(0).integers(-3000, 3000, 400)
    assert torch.equal(t[chosen], whole[torch.from_numpy(chosen)])
    assert torch.equal(t[700:2900], whole[700:2900])
    for i in (*chosen[:20].tolist(), 0, 2999, -1, -3000):
        assert torch.equal(t[i], whole[i]) and torch.equal(t[np.int64(i)], whole[i])
    for i in (3000, -3001):
        with pytest.raises(pp.InputError, match=f"got {i}"):
            t[i]


def test_rows_among_others_stored_exactly():
    x = ROWS.copy()
    x[::9] *= 50
    t = opened(x, "pq", max_error=0.9)
    whole = t[...]
    assert np.array_equal(whole[::9], x[::9])
    assert all(np.array_equal(t[i], whole[i]) for i in range(0, 3000, 61))
    chosen = np.arange(0, 3000, 7)[::-1]
    assert np.array_equal(t[chosen], whole[chosen])


def test_of_more_axes():
    t = opened(ROWS.reshape(300, 10, D), "pq")
    assert t[7].shape == (10, D) and np.array_equal(t[7], t[...][7])


def test_damage_is_found_before_a_row_is_given_out():
    q = fitted("pq")
    blob = bytearray(pp.compress(ROWS, quantizer=q))
    blob[len(blob) // 2] ^= 4
    t = pp.open(bytes(blob))["x"]
    with pytest.raises(pp.CorruptDataError, match="checksum"):
        for i in range(0, 3000, 10):
            t[i]
    with pytest.raises(pp.CorruptDataError, match="checksum"):
        t[np.arange(2999, 0, -3)]
    skipping = pp.open(bytes(blob), on_error="skip")["x"]
    rows = skipping[np.arange(3000)]
    assert 0 < len(skipping.damaged_rows) < 3000 and not rows[skipping.damaged_rows].any()
    assert not skipping[skipping.damaged_rows[0]].any()


def test_a_file_closed_or_cut_short_since(tmp_path):
    path = tmp_path / "t.polar"
    pp.save(path, {"x": ROWS}, quantizer=fitted("pq"))
    file = pp.open(path)
    t = file["x"]
    first, last = t[0], t[2999]
    assert np.isfinite(first).all() and np.isfinite(last).all()
    os.truncate(path, 200)
    for i in (0, 2999):
        with pytest.raises(pp.CorruptDataError):
            t[i]
    file.close()
    with pytest.raises(pp.InputError, match="closed"):
        t[0]


def test_packed_fields_of_any_width():
    rng = np.random.default_rng(3)
    for _ in range(20):
        widths = rng.integers(0, 17, rng.integers(1, 20))
        sizes = np.maximum(1, (1 << widths) - rng.integers(0, 2, len(widths)) * (widths > 1))
        codes = (rng.random((50, len(widths))) * sizes).astype(np.uint16)
        packed = pack_rows(codes, sizes)
        assert np.array_equal(unpack_rows(packed, sizes), codes)
        assert np.array_equal(unpack_rows(packed[7:8], sizes), codes[7:8])
