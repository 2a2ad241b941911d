"""The fuzz target at work: a few hundred inputs, other ones on a machine with POLARPACK_FUZZ_SEED."""

import os
import random

import fuzz_polar
import pytest
from forging import pack, unpack

N_INPUTS = 400


def test_no_finding():
    outcomes = fuzz_polar.run(N_INPUTS, int(os.environ.get("POLARPACK_FUZZ_SEED", "0")))
    assert sum(outcomes.values()) == N_INPUTS
    assert outcomes["CorruptDataError"] > N_INPUTS / 4  # lies reach the readers
    assert outcomes["read"] > N_INPUTS / 20  # and are not all so gross that nothing is left to read


def test_a_finding_is_reported(monkeypatch, tmp_path):
    """The harness can fail: a reader that crashes, one that dawdles, one that swells."""
    blob = fuzz_polar.seeds()[0]
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_polar, "read", lambda data, **options: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            fuzz_polar.check(blob)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_polar, "SECONDS", 0.0)
        with pytest.raises(AssertionError, match="took .* s"):
            fuzz_polar.check(blob)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_polar, "CAP", -(1 << 40))
        with pytest.raises(AssertionError, match="MiB"):
            fuzz_polar.check(blob, memory=True)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_polar, "edited", lambda data, rng: data)
        patch.setattr(fuzz_polar, "mutate", lambda data, rng, others: data)
        patch.setattr(
            fuzz_polar, "check", lambda data, memory=False: {}[len(data)] if memory else "read"
        )
        outcomes = fuzz_polar.run(1, 0, tmp_path)
    assert outcomes == {"finding: KeyError": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_files_survive_being_taken_apart():
    rng = random.Random(0)
    for blob in fuzz_polar.seeds():
        assert pack(unpack(blob)) == blob
        for kind, _, _, parts in unpack(blob):
            assert isinstance(fuzz_polar.changed_part(kind, parts[0], rng), bytes)
