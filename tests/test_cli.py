"""The command line: what it prints, where, with which exit code, and what it leaves on the disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import polarpack as pp
from polarpack import cli, comparison, demo, inspection, metrics
from polarpack.integrations import files

# Shells let their background jobs ignore interrupts, and children inherit that.
PROGRAM = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from polarpack.cli import main; main()",
]
PNG = b"\x89PNG\r\n\x1a\n"


def table(n=600, d=12, seed=0):
    """Rows whose components are correlated."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) * np.linspace(1.0, 0.1, d)
    return (rng.standard_normal((n, d)) @ mix).astype(np.float32)


def run(*words, code=0, data=None):
    """A command in this process; checks the exit code and that errors are single lines."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words], input=data)
    crash = result.exception if not isinstance(result.exception, SystemExit) else None
    assert result.exit_code == code, f"{result.exit_code}: {result.stderr}{crash!r}"
    if code not in (0, 2):
        lines = result.stderr.strip().splitlines()
        assert lines
        assert all(line.startswith("polarpack: ") for line in lines)
        assert "polarpack: error: " in result.stderr
    return result


def start(*words, **options):
    """A command in a process of its own."""
    command = [*PROGRAM, *map(str, words)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.fixture
def x():
    return table()


@pytest.fixture
def npy(x, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, x)
    return path


@pytest.fixture
def polar(x, tmp_path):
    """A file of two tensors, one of them in several blocks."""
    path = tmp_path / "two.polar"
    q = pp.preset("int8_rows", layout="rows").fit(x)
    pp.save(path, {"a": x, "b": x[:20].astype(np.float16)}, quantizer=q)
    return path


# -- the program -----------------------------------------------------------------------------------
def test_version():
    assert run("--version").stdout == f"polarpack {pp.__version__}\n"


def test_help_is_light_and_states_the_exit_codes():
    script = (
        "import sys, time; started = time.perf_counter(); from polarpack.cli import main\n"
        "sys.argv = ['polarpack', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ['numpy', 'numba', 'torch', 'faiss', 'matplotlib', 'pyarrow', 'safetensors']\n"
        "print(time.perf_counter() - started, *[m for m in heavy if m in sys.modules])\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *text, last = child.stdout.splitlines()
    seconds, *loaded = last.split()
    assert not loaded
    assert float(seconds) < 1.0
    for code in range(6):
        assert re.search(rf"\b{code}: ", "\n".join(text))


def test_wrong_command_lines():
    for words in (["frob"], ["compress"], ["compress", "a.npy", "b.polar", "--bits", "two"]):
        assert "Error" in run(*words, code=2).stderr


# -- compress and decompress -----------------------------------------------------------------------
def test_round_trip(x, npy, tmp_path):
    polar, back = tmp_path / "x.polar", tmp_path / "y.npy"
    result = run("compress", npy, polar, "--bits", 4)
    assert not result.stdout
    assert "bits per float" in result.stderr
    assert polar.stat().st_size <= 4 * x.size / 8
    run("decompress", polar, back)
    y = np.load(back)
    assert y.dtype == x.dtype
    assert f"SNR {metrics.snr_db(x, y):.2f} dB" in result.stderr
    assert np.array_equal(y, pp.open(polar)["x"][...])


@pytest.mark.parametrize(
    ("option", "value"),
    [("size-bytes", 4000), ("snr-db", 15), ("cosine", 0.98), ("recall", 0.8), ("max-error", 0.1)],
)
def test_targets(x, npy, tmp_path, option, value):
    polar = tmp_path / "x.polar"
    facts = json.loads(run("compress", npy, polar, f"--{option}", value, "--json").stdout)
    assert facts["file_bytes"] == polar.stat().st_size
    assert facts["raw_bytes"] == x.nbytes
    assert facts["bits_per_float"] == pytest.approx(8 * facts["file_bytes"] / x.size)
    y = pp.open(polar)["x"][...]
    tensor = facts["tensors"]["x"]
    assert (tensor["shape"], tensor["dtype"]) == ([600, 12], "float32")
    assert tensor["snr_db"] == pytest.approx(metrics.snr_db(x, y))
    assert tensor["mean_cosine"] == pytest.approx(metrics.cosine(x, y).mean())
    assert tensor["max_relative_error"] == metrics.relative_error(x, y).max()
    met = {
        "size-bytes": facts["file_bytes"] <= value,
        "snr-db": tensor["snr_db"] >= value,
        "cosine": tensor["mean_cosine"] >= value,
        "recall": metrics.recall_at_k(x, y) >= value - 0.05,  # judged on rows sampled otherwise
        "max-error": tensor["max_relative_error"] <= value,
    }
    assert met[option]


def test_one_target_no_less_no_more(npy, tmp_path):
    for words in ([], ["--bits", 2, "--cosine", 0.9]):
        result = run("compress", npy, tmp_path / "x.polar", *words, code=2)
        assert result.stderr.startswith("polarpack: error: expected exactly one of --bits, ")
    assert not (tmp_path / "x.polar").exists()


def test_impossible_targets(npy, tmp_path):
    for words in (["--size-bytes", 5], ["--bits", -1], ["--cosine", 2]):
        run("compress", npy, tmp_path / "x.polar", *words, code=1)
    assert os.listdir(tmp_path) == ["x.npy"]


def test_options_reach_the_codec(npy, tmp_path):
    first, second, rows = (tmp_path / f"{name}.polar" for name in ("first", "second", "rows"))
    for path in (first, second):
        run("compress", npy, path, "--bits", 5, "--seed", 3, "--optimize", "cosine", "--quiet")
    assert first.read_bytes() == second.read_bytes()
    run("compress", npy, rows, "--cosine", 0.9, "--layout", "rows", "--time-budget", 5)
    assert pp.open(rows)["x"].layout == "rows"


@pytest.mark.parametrize("shape", [(), (7,), (0, 5), (3, 0), (4, 5, 6), (1, 1)])
def test_shapes(tmp_path, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float64)
    np.save(tmp_path / "x.npy", np.asarray(x, order="F"))
    polar, back = tmp_path / "x.polar", tmp_path / "y.npy"
    run("compress", tmp_path / "x.npy", polar, "--max-error", 0)
    run("decompress", polar, back)
    assert np.array_equal(np.load(back), x)
    assert np.load(back).shape == shape
    run("info", polar)
    assert "exact" in run("verify", polar, "--against", tmp_path / "x.npy").stdout


def test_big_endian(x, tmp_path):
    np.save(tmp_path / "x.npy", x.astype(">f4"))
    run("compress", tmp_path / "x.npy", tmp_path / "x.polar", "--max-error", 0)
    assert np.array_equal(pp.open(tmp_path / "x.polar")["x"][...], x)


def test_nonfinite_rows(x, tmp_path):
    x[17, 3], x[40] = np.nan, -np.inf
    np.save(tmp_path / "x.npy", x)
    words = ["compress", tmp_path / "x.npy", tmp_path / "x.polar", "--max-error", 0.1]
    assert "row 17" in run(*words, code=1).stderr
    assert not (tmp_path / "x.polar").exists()
    facts = json.loads(run(*words, "--nonfinite", "raw", "--json").stdout)["tensors"]["x"]
    assert facts["nonfinite_rows"] == 2
    assert facts["nonfinite_exact"] is True
    assert 0 < facts["max_relative_error"] <= 0.1
    found = run("verify", tmp_path / "x.polar", "--against", tmp_path / "x.npy").stdout
    assert "2 rows with NaN or infinity, exact" in found


def test_several_tensors(x, tmp_path):
    source = tmp_path / "m.npz"
    with zipfile.ZipFile(source, "w") as archive:  # np.savez knows no array named "file"
        arrays = {"file": x, "[bold]b": x[:9].astype(np.float16), "ids": np.arange(4)}
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, values)
    polar = tmp_path / "m.polar"
    result = run("compress", source, polar, "--max-error", 0)
    assert "warning" in result.stderr
    assert "'ids' (int64)" in result.stderr
    assert pp.open(polar).keys() == ["file", "[bold]b"]
    assert "[bold]b: 9 x 12 float16" in run("info", polar).stdout
    run("decompress", polar, tmp_path / "back.npz", "--quiet")
    with np.load(tmp_path / "back.npz") as back:
        assert np.array_equal(back["file"], x)
        assert back["[bold]b"].dtype == np.float16
    run("decompress", polar, tmp_path / "b.npy", "--key", "[bold]b")
    assert np.load(tmp_path / "b.npy").shape == (9, 12)
    assert "'file', '[bold]b'" in run("decompress", polar, tmp_path / "c.npy", code=1).stderr
    assert "int64" in run("compress", source, polar, "--bits", 2, "--key", "ids", code=1).stderr
    error = run("compress", source, polar, "--bits", 2, "--key", "nope", code=1).stderr
    assert "no tensor 'nope'; it holds 'file', '[bold]b', 'ids'" in error
    run("decompress", polar, tmp_path / "c.npy", "--key", "nope", code=1)
    run("compress", source, tmp_path / "one.polar", "--max-error", 0, "--key", "file")
    assert pp.open(tmp_path / "one.polar").keys() == ["file"]


def test_safetensors_keep_bfloat16(x, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    half = torch.from_numpy(x).bfloat16()
    source, polar = tmp_path / "m.safetensors", tmp_path / "m.polar"
    tensors = {"half": half, "full": torch.from_numpy(x[:9]), "ids": torch.arange(3)}
    safetensors.save_file(tensors, source)
    assert "'ids' (i64)" in run("compress", source, polar, "--max-error", 0).stderr
    assert inspection.sizes(polar)["tensors"]["half"]["dtype"] == "bfloat16"
    back = tmp_path / "back.safetensors"
    run("decompress", polar, back)
    found = safetensors.load_file(back)
    assert found["half"].dtype == torch.bfloat16
    assert torch.equal(found["half"], half)
    assert torch.equal(found["full"], tensors["full"])
    result = run("decompress", polar, tmp_path / "half.npy", "--key", "half")
    assert "no bfloat16 in .npy, float32 for 'half'" in result.stderr
    assert np.array_equal(np.load(tmp_path / "half.npy"), half.float().numpy())


def test_safetensors_without_torch(x, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"x": x}, tmp_path / "m.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    run("compress", tmp_path / "m.safetensors", tmp_path / "m.polar", "--max-error", 0)
    run("decompress", tmp_path / "m.polar", tmp_path / "back.safetensors")
    assert np.array_equal(safetensors.load_file(tmp_path / "back.safetensors")["x"], x)


@pytest.mark.parametrize(
    ("library", "ending", "extra"),
    [
        ("safetensors", "safetensors", "safetensors"),
        ("torch", "pt", "torch"),
        ("pyarrow", "parquet", "arrow"),
    ],
)
def test_missing_libraries(tmp_path, monkeypatch, library, ending, extra):
    source = tmp_path / f"x.{ending}"
    source.write_bytes(b"something")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    error = run("compress", source, tmp_path / "x.polar", "--bits", 2, code=4).stderr
    assert f'pip install "polarpack[{extra}]"' in error


# -- pipes, kills and old files --------------------------------------------------------------------
def test_pipes(x, npy):
    packed = start("compress", "-", "-", "--max-error", 0).communicate(npy.read_bytes())
    assert b"smaller" in packed[1]
    with pp.open(packed[0]) as file:
        assert file.keys() == ["x"]
    unpacked = start("decompress", "-", "-").communicate(packed[0])
    assert unpacked[0] == npy.read_bytes()
    assert not unpacked[1]
    info = start("info", "-", "--json").communicate(packed[0])
    assert json.loads(info[0])["file_bytes"] == len(packed[0])
    assert start("verify", "-").communicate(packed[0])[0] == b"x: 600 rows, sound\n"


def test_pipes_that_break(npy, polar):
    child = start("info", polar)
    child.stdout.close()
    assert b"Traceback" not in child.communicate()[1]
    run("compress", "-", "-", "--bits", 2, data=b"not an array", code=1)
    run("decompress", "-", "-", data=b"", code=3)
    run("compress", npy, "-", "--bits", 2, "--json", code=2)


def test_a_failure_leaves_the_old_file(polar, tmp_path):
    damaged = bytearray(polar.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    polar.write_bytes(damaged)
    old = tmp_path / "old.npz"
    old.write_bytes(b"precious")
    run("decompress", polar, old, code=3)
    assert old.read_bytes() == b"precious"
    np.save(tmp_path / "bad.npy", np.full((3, 3), np.nan))
    run("compress", tmp_path / "bad.npy", old, "--bits", 2, code=1)
    assert old.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["bad.npy", "old.npz", "two.polar"]


def test_writing_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    old = tmp_path / "x.npy"
    old.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_tensors(old, {"x": np.zeros((2, 2), np.float32)})
    assert old.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_the_old_file(tmp_path, how):
    np.save(tmp_path / "x.npy", table(n=20000, d=32))
    target = tmp_path / "x.polar"
    target.write_bytes(b"precious")
    child = start("compress", tmp_path / "x.npy", target, "--bits", 2)
    until = time.monotonic() + 60
    while not (tmp_path / ".x.polar.partial").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(how)
    error = child.communicate()[1]
    assert child.returncode != 0
    assert b"Traceback" not in error
    assert target.read_bytes() == b"precious"
    np.save(tmp_path / "x.npy", table())
    run("compress", tmp_path / "x.npy", target, "--max-error", 0)
    assert np.array_equal(pp.open(target)["x"][...], table())


def test_errors_of_the_system(npy, polar, tmp_path):
    missing = str(tmp_path / "missing.polar")
    for words in (["info", missing], ["verify", missing], ["decompress", missing, "y.npy"]):
        error = run(*words, code=5).stderr
        assert error == f"polarpack: error: {missing}: No such file or directory\n"
    run("compress", tmp_path / "nope.npy", tmp_path / "x.polar", "--bits", 2, code=5)
    run("compress", npy, tmp_path / "no" / "x.polar", "--bits", 2, code=5)
    run("decompress", polar, tmp_path / "no" / "x.npz", code=5)
    (tmp_path / "folder.npz").mkdir()
    run("decompress", polar, tmp_path / "folder.npz", code=1)
    run("decompress", polar, tmp_path / "x.unknown", code=1)
    run("compress", polar, tmp_path / "x.polar", "--bits", 2, code=1)


# -- info and verify -------------------------------------------------------------------------------
def check_sums(facts, size):
    counted = facts["container_bytes"]
    for tensor in facts["tensors"].values():
        counted += tensor["codes_bytes"] + tensor["side_bytes"]
        assert sum(tensor["parts"].values()) == tensor["codes_bytes"] + tensor["side_bytes"]
        assert min(tensor["parts"].values()) >= 0
    assert counted == facts["file_bytes"] == size


def test_info(x, npy, polar, tmp_path):
    facts = json.loads(run("info", polar, "--json").stdout)
    check_sums(facts, polar.stat().st_size)
    a, b = facts["tensors"]["a"], facts["tensors"]["b"]
    assert (a["shape"], a["dtype"], a["layout"]) == ([600, 12], "float32", "rows")
    assert any(part.startswith("quantizer: ") for part in a["parts"])
    assert not any(part.startswith("quantizer: ") for part in b["parts"])  # it is a's
    text = run("info", polar).stdout
    for number in (facts["file_bytes"], *a["parts"].values()):
        assert f" {number:,} " in text
    planned = tmp_path / "x.polar"
    for words in (["--cosine", 0.99], ["--max-error", 0.05], ["--max-error", 0], ["--bits", 2]):
        run("compress", npy, planned, *words)
        check_sums(json.loads(run("info", planned, "--json").stdout), planned.stat().st_size)


def test_verify(x, polar, tmp_path):
    assert run("verify", polar).stdout == "a: 600 rows, sound\nb: 20 rows, sound\n"
    np.savez(tmp_path / "m.npz", a=x, b=x[:20].astype(np.float16))
    words = ["verify", polar, "--against", tmp_path / "m.npz"]
    facts = json.loads(run(*words, "--json").stdout)
    assert facts["sound"] is True
    y = pp.open(polar)["a"][...]
    found = facts["tensors"]["a"]
    assert found["snr_db"] == pytest.approx(metrics.snr_db(x, y))
    assert found["max_relative_error"] == metrics.relative_error(x, y).max()
    text = run(*words).stdout
    assert f"a: 600 rows, sound; SNR {found['snr_db']:.2f} dB, mean cosine" in text
    only = json.loads(run(*words, "--key", "b", "--json").stdout)["tensors"]
    assert "snr_db" in only["b"]
    assert "snr_db" not in only["a"]
    np.save(tmp_path / "other.npy", x)
    run("verify", polar, "--against", tmp_path / "other.npy", "--key", "a")
    run("verify", polar, "--against", tmp_path / "other.npy", "--key", "b", code=1)  # shape
    run("verify", polar, "--against", tmp_path / "other.npy", code=1)
    run("verify", polar, "--key", "a", code=2)


def test_verify_finds_every_flip(polar, tmp_path):
    data = polar.read_bytes()
    damaged = tmp_path / "damaged.polar"
    rng = np.random.default_rng(0)
    for bit in rng.choice(8 * len(data), 60, replace=False).tolist():
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(wrong)
        run("verify", damaged, code=3)


def test_verify_counts_what_is_lost(x, tmp_path):
    path = tmp_path / "x.polar"
    pp.save(path, {"x": np.tile(x, (10, 1)), "y": x}, max_error=0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    result = run("verify", path, "--json", code=3)
    facts = json.loads(result.stdout)
    assert facts["sound"] is False
    assert len(facts["problems"]) == 1
    assert "at byte" in facts["problems"][0]
    assert facts["tensors"]["y"] == {"rows": 600, "damaged_rows": 0}
    with pp.open(path, on_error="skip") as file:
        tensor = file["x"]
        _ = tensor[...]
        assert 0 < facts["tensors"]["x"]["damaged_rows"] == len(tensor.damaged_rows) < 6000


def test_cut_files(polar, tmp_path):
    data = polar.read_bytes()
    cut = tmp_path / "cut.polar"
    for n in (0, 5, 9, 40, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:n])
        for words in (["verify", cut], ["info", cut], ["decompress", cut, tmp_path / "y.npz"]):
            run(*words, code=3)
    cut.write_bytes(data + b"more")
    run("verify", cut, code=3)


def test_quality_of_hard_cases():
    zero, one = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert inspection.quality(zero, zero)["max_relative_error"] == 0
    wrong = inspection.quality(zero, one)
    assert wrong["snr_db"] is None
    assert wrong["max_relative_error"] is None
    nan = np.full((1, 3), np.nan, np.float32)
    assert inspection.quality(nan, one[:1])["nonfinite_exact"] is False
    json.dumps(wrong, allow_nan=False)


# -- other programs' files -------------------------------------------------------------------------
def test_reading_fvecs(x, tmp_path):
    rows = np.concatenate([np.full((600, 1), 12, "<i4"), x.astype("<f4").view("<i4")], axis=1)
    rows.tofile(tmp_path / "x.fvecs")
    assert np.array_equal(files.read_tensors(tmp_path / "x.fvecs")["x"], x)
    rows[3, 0] = 11
    rows.tofile(tmp_path / "x.fvecs")
    with pytest.raises(pp.InputError, match="row 3 has 11 numbers, the first has 12"):
        files.read_tensors(tmp_path / "x.fvecs")
    (tmp_path / "x.fvecs").write_bytes(rows.tobytes()[:-2])
    with pytest.raises(pp.InputError, match="no whole rows"):
        files.read_tensors(tmp_path / "x.fvecs")
    (tmp_path / "x.fvecs").write_bytes(b"")
    assert files.read_tensors(tmp_path / "x.fvecs")["x"].size == 0


@pytest.mark.parametrize("announced", [False, True])
def test_reading_text(tmp_path, announced):
    words = ["the", "New York", "köln", "3", "x"]
    x = table(5, 4)
    lines = [
        f"{w} {' '.join(repr(float(v)) for v in row)}" for w, row in zip(words, x, strict=True)
    ]
    path = tmp_path / "words.txt"
    path.write_text("\n".join(["5 4"] * announced + lines) + "\n", "utf-8")
    assert np.array_equal(files.read_tensors(path)["words"], x)
    path.write_text("\n".join([*lines, "short 1 2"]), "utf-8")
    with pytest.raises(pp.InputError, match="line 6: expected a word and 4 numbers"):
        files.read_tensors(path)
    path.write_text("\n".join(["6 4", *lines]), "utf-8")
    with pytest.raises(pp.InputError, match="announces 6 words and holds 5"):
        files.read_tensors(path)
    path.write_text("some prose that is no table\nof numbers", "utf-8")
    with pytest.raises(pp.InputError, match="line 1"):
        files.read_tensors(path)


def test_reading_torch(x, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    weights = torch.from_numpy(x)
    torch.save({"state_dict": {"w": weights.bfloat16(), "step": 3}, "e": weights}, path)
    with pytest.warns(UserWarning, match=r"'state_dict.step' \(int\)"):
        found = files.read_tensors(path)
    assert set(found) == {"state_dict.w", "e"}
    assert found["state_dict.w"].dtype == torch.bfloat16
    torch.save(weights, path)
    assert torch.equal(files.read_tensors(path)["model"], weights)
    torch.save({"x": Path("runs code when it is loaded")}, path)
    with pytest.raises(pp.InputError, match="cannot be read as .pt"):
        files.read_tensors(path)


def test_reading_parquet(x, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    flat = arrow.array(x.astype(np.float64).ravel())
    columns = {
        "fixed": arrow.FixedSizeListArray.from_arrays(arrow.array(x.ravel()), 12),
        "list": arrow.ListArray.from_arrays(np.arange(601, dtype=np.int32) * 12, flat),
        "id": arrow.array(np.arange(600)),
        "ragged": arrow.array([[1.0]] * 599 + [[1.0, 2.0]]),
        "holes": arrow.array([[1.0]] * 599 + [None]),
    }
    parquet.write_table(arrow.table(columns), path, row_group_size=100)
    assert np.array_equal(files.read_tensors(path, "fixed")["fixed"], x)
    found = files.read_tensors(path, "list")["list"]
    assert found.dtype == np.float64
    assert np.array_equal(found, x)
    for name, message in {
        "id": r"'id' \(int64\)",
        "ragged": "lists of one length, got 1 to 2",
        "holes": "got null",
    }.items():
        with pytest.raises(pp.InputError, match=message):
            files.read_tensors(path, name)
    parquet.write_table(arrow.table({k: columns[k] for k in ("fixed", "id")}), path)
    with pytest.warns(UserWarning, match="'id'"):
        assert list(files.read_tensors(path)) == ["fixed"]


@pytest.mark.parametrize("ending", list(files.READERS))
def test_reading_what_is_not_there_or_not_that(tmp_path, ending):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a library on its way to an error
        for content in (
            b"",
            b"\x80\x04nonsense\n\n" * 9,
            b"\x93NUMPY\x01\x00v\x00{}",
            b"PK\x03\x04",
        ):
            path = tmp_path / f"x{ending}"
            path.write_bytes(content)
            if ending == ".fvecs" and not content:
                continue  # a file of no rows
            with pytest.raises(pp.InputError, match=re.escape(str(path))):
                files.read_tensors(path)
        with pytest.raises(FileNotFoundError):
            files.read_tensors(tmp_path / f"missing{ending}")


def test_reading_objects_and_cut_arrays(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(pp.InputError, match="x.npy"):
        files.read_tensors(path)
    np.save(path, table())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(pp.InputError, match="x.npy"):
        files.read_tensors(path)
    with pytest.raises(pp.InputError, match="ends in .npy .npz"):
        files.read_tensors(tmp_path / "x.csv")


# -- compare and demo ------------------------------------------------------------------------------
def test_compare(npy, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    methods = ["polarpack", "pq", "turboquant", "int8_rows"]
    words = [word for name in methods for word in ("--method", name)]
    result = run("compare", npy, "--bits", 3, "--bits", 5, "--rows", 300, "--json", *words)
    assert (tmp_path / "x-compare.png").read_bytes().startswith(PNG)
    facts = json.loads(result.stdout)
    assert facts["shape"] == [300, 12]
    by_method = {r["method"]: r for r in facts["results"]}
    assert set(by_method) >= {"polarpack", "int8_rows"}
    for r in facts["results"]:
        assert r["bits_per_float"] == pytest.approx(8 * r["total_bytes"] / 3600)
        assert r["method"] == "int8_rows" or r["bits_per_float"] <= 5
    run("compare", npy, "--method", "nope", code=1)


def test_comparisons_count_every_byte(x):
    halves = comparison.float16_rows(x)
    assert halves.total_bytes == 2 * x.size
    integers = comparison.int8_rows(x)
    assert integers.total_bytes == x.size + 4 * len(x)
    assert 30 < integers.snr_db < halves.snr_db
    pytest.importorskip("faiss")
    pq = comparison.faiss_pq(x, 4, 4)
    assert pq.total_bytes == 2 * len(x) + 2 * 16 * 12
    assert comparison.polarpack(x, 3000).total_bytes <= 3000


def test_demo(tmp_path, monkeypatch):
    """The demo on few words; the whole one is run by .ci/run, and below where slow tests are."""
    words, x = demo._glove.load()
    monkeypatch.setattr(demo._glove, "load", lambda: (words[:900], x[:900]))
    monkeypatch.setattr(demo, "WORDS", ("city", "week"))
    monkeypatch.setattr(demo, "PQ_SETTINGS", ((10, 4),))
    monkeypatch.setattr(demo, "SMALL_BITS", ())
    text = run("demo", "--out", tmp_path / "out").stdout
    check_demo(text, tmp_path / "out")
    if find_spec("PIL"):
        assert "JPEG" in text
        photograph = (tmp_path / "out" / "polarpack-demo-photograph.png").read_bytes()
        assert photograph.startswith(PNG)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(comparison, "faiss_pq", _missing)
    result = run("demo", "--out", tmp_path / "out")
    assert "faiss PQ" not in result.stdout
    assert 'warning: install it: pip install "polarpack[faiss]"' in result.stderr
    assert 'pip install "polarpack[bench]"' in result.stderr
    assert "no photograph" in result.stderr


def _missing(*_):
    raise pp.MissingDependencyError('install it: pip install "polarpack[faiss]"')


def check_demo(text, folder):
    for method in ("float16", "int8 per row", "faiss PQ", "polarpack"):
        assert method in text
    assert (folder / demo.PLOT_NAME).read_bytes().startswith(PNG)
    check_sums(inspection.sizes(folder / demo.FILE_NAME), (folder / demo.FILE_NAME).stat().st_size)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    pytest.importorskip("faiss")
    child = start("demo", cwd=tmp_path)
    out, error = child.communicate()
    assert child.returncode == 0, error
    assert not error
    check_demo(out.decode(), tmp_path)


# -- merge -----------------------------------------------------------------------------------------
def test_merge(x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    q = pp.preset("sq8").fit(x)
    for i in range(3):
        pp.save(f"{i}.polar", {"x": x[200 * i :][:200]}, quantizer=q, embed_quantizer=i == 0)
    result = run("merge", "0.polar", "1.polar", "2.polar", "--out", "all.polar")
    assert "3 files -> all.polar" in result.stderr and "x (600, 12) float32" in result.stderr
    assert np.array_equal(pp.open("all.polar")["x"][...], q.decode(q.encode(x)))
    facts = json.loads(run("merge", "0.polar", "-o", "one.polar", "--json").stdout)
    assert facts["tensors"] == {"x": {"shape": [200, 12]}}
    assert facts["file_bytes"] == Path("one.polar").stat().st_size
    piped = run("merge", "0.polar", "1.polar", "2.polar", "-q", "-o", "-").stdout_bytes
    assert piped == Path("all.polar").read_bytes()
    run("merge", "0.polar", code=2)
    missing = run("merge", "0.polar", "9.polar", "-o", "all.polar", code=5)
    assert "9.polar" in missing.stderr
    Path("bad.polar").write_bytes(piped[:300] + b"?" + piped[301:])
    damaged = run("merge", "0.polar", "bad.polar", "-o", "all.polar", code=3)
    assert "bad.polar: chunk" in damaged.stderr
    assert Path("all.polar").read_bytes() == piped
