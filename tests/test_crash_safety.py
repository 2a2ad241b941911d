"""Whatever stops a writer: the old file or none stays, and a streaming writer can be resumed."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from polarpack import container
from polarpack.container import Reader, Writer, pack
from polarpack.errors import InputError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and locks")

OLD = b"the file that was there before"
CHUNKS = [
    (1, 0, 0, [b"header"]),
    (2, 0, 0, [b"quantizer" * 30, b""]),
    (4, 0, 512, [b"a" * 700, b"b" * 650]),
    (4, 0, 512, [b"c" * 700, b"d" * 650]),
    (4, 0, 5, [b"e" * 20]),
]
NEW = pack(CHUNKS)

# Forks a child for every system call of a run, which dies by kill -9 at that call: before it, or
# for a write after half of its bytes. Run alone, since a process with threads should not fork.
DIE_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from polarpack import container
from test_crash_safety import OLD, write

def arm(countdown, halfway):
    def watch(name, real):
        def call(*args):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                if name == "write" and halfway:
                    real(args[0], args[1][:(len(args[1]) + 1) // 2])
                elif halfway:
                    real(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*args)
        return call
    for name in ("open", "lseek", "write", "ftruncate", "fsync", "replace", "unlink"):
        setattr(os, name, watch(name, getattr(os, name)))

base, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
for halfway in (False, True):
    for call in range(1, 1000):
        folder = base / f"{call}-{halfway}"
        folder.mkdir()
        (folder / "t.polar").write_bytes(OLD)
        child = os.fork()
        if child == 0:
            arm(call, halfway)
            write(folder / "t.polar", resume=resume)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
"""

STREAM_UNTIL_KILLED = """
import sys
from test_crash_safety import stream
print("ready", flush=True)
stream(sys.argv[1], 10**6)
"""


def write(path, resume=False):
    """All of CHUNKS but those that a resumed writer has already."""
    with Writer(path, resume=resume) as writer:
        for chunk in CHUNKS[len(writer.chunks) :]:
            writer.add(*chunk)
            writer.sync()


def write_and_fail(path, chunks, **options):
    with Writer(path, **options) as writer:
        for chunk in chunks:
            writer.add(*chunk)
        assert files(path.parent) == [".t.polar.partial", "t.polar"]
        _ = 1 / 0


def stream(path, n_chunks):
    with Writer(path, resume=True) as writer:
        for i in range(len(writer.chunks), n_chunks):
            writer.add(*stream_chunk(i))


def stream_chunk(i):
    return 4, 0, 256, [bytes([i * 7 % 256]) * (1000 + i % 900)] * (1 + i % 4)


def child_process(code, *args):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(here), here, *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "t.polar"
    path.write_bytes(OLD)
    return path


def partial_of(path):
    return path.with_name(f".{path.name}.partial")


@pytest.fixture
def no_waiting(monkeypatch):
    """Leave out the disk where only the order of the other calls counts."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def files(folder):
    return sorted(os.listdir(folder))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("how", ["anew", "resume"])
def test_killed_at_every_system_call(tmp_path, how):
    child = child_process(DIE_AT_EVERY_CALL, tmp_path, how)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors.decode()
    cases = sorted(tmp_path.iterdir())
    assert len(cases) > 40
    n_old = 0
    for folder in cases:
        path = folder / "t.polar"
        found = path.read_bytes()
        assert found in (OLD, NEW), folder
        n_old += found == OLD
        assert set(files(folder)) <= {"t.polar", ".t.polar.partial"}
        write(path, resume=how == "resume")
        assert path.read_bytes() == NEW, folder
        assert files(folder) == ["t.polar"]
    assert n_old > 30


def test_killed_at_random_moments_and_resumed(target):
    rng = random.Random(0)
    kept = 0
    for _ in range(4):
        child = child_process(STREAM_UNTIL_KILLED, target)
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.005, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=20)
        assert child.returncode == -signal.SIGKILL
        assert target.read_bytes() == OLD
        writer = Writer(target, resume=True)
        assert len(writer.chunks) >= kept
        kept = len(writer.chunks)
        writer.abort()
    assert kept > 0
    stream(target, kept + 10)
    assert target.read_bytes() == pack(map(stream_chunk, range(kept + 10)))


@pytest.mark.usefixtures("no_waiting")
def test_resume_after_a_cut_at_every_byte(target):
    for length in range(len(NEW)):
        partial_of(target).write_bytes(NEW[:length])
        write(target, resume=True)
        assert target.read_bytes() == NEW


@pytest.mark.usefixtures("no_waiting")
def test_resume_after_damage_at_every_byte(target):
    """A power cut may lose any page that was not synced, not only the last."""
    for at in range(0, len(NEW), 3):
        partial_of(target).write_bytes(NEW[:at] + b"\xee" * 40 + NEW[at + 40 :])
        write(target, resume=True)
        assert target.read_bytes() == NEW


def test_resume_tells_what_was_kept(target):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(target, CHUNKS[:3], keep_partial=True)
    assert target.read_bytes() == OLD
    with Writer(target, resume=True) as writer:
        assert writer.chunks["n_rows"].tolist() == [0, 0, 512]
        for chunk in CHUNKS[3:]:
            writer.add(*chunk)
    assert target.read_bytes() == NEW


def test_resume_of_nothing_starts_anew(target):
    with Writer(target, resume=True) as writer:
        assert len(writer.chunks) == 0
    assert target.read_bytes() == pack([])


def test_an_exception_leaves_the_old_file_and_nothing_else(target):
    with pytest.raises(ZeroDivisionError):
        write_and_fail(target, CHUNKS)
    assert target.read_bytes() == OLD
    assert files(target.parent) == ["t.polar"]


def test_a_stale_partial_does_not_block_a_new_writer(target):
    partial_of(target).write_bytes(NEW + b"stale" * 10000)
    with Writer(target) as writer:
        writer.add(*CHUNKS[0])
    assert target.read_bytes() == pack(CHUNKS[:1])
    assert files(target.parent) == ["t.polar"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_writers_do_not_mix(target, resume):
    with Writer(target) as first:
        first.add(*CHUNKS[0])
        with pytest.raises(InputError, match="being written by another writer"):
            Writer(target, resume=resume)
        first.add(*CHUNKS[1])
    assert target.read_bytes() == pack(CHUNKS[:2])
    write(target)
    assert target.read_bytes() == NEW


def test_a_file_system_without_locks(target, monkeypatch):
    def no_locks(fd, operation):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(container.fcntl, "flock", no_locks)
    write(target)
    assert target.read_bytes() == NEW

    def broken(fd, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(container.fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"):
        Writer(target)


class FullDisk:
    """os.write on a disk with so many bytes left."""

    def __init__(self, left, error=None):
        self.left, self.write = left, os.write
        self.error = error or OSError(errno.ENOSPC, "No space left on device")

    def __call__(self, fd, data):
        if self.left == 0:
            raise self.error
        n = self.write(fd, data[: self.left])
        self.left -= n
        return n


@pytest.mark.parametrize("room", [0, 5, 10, 11, 40, 1000, len(NEW) - 20, len(NEW) - 1])
def test_disk_full(target, monkeypatch, room):
    monkeypatch.setattr(os, "write", FullDisk(room))
    with pytest.raises(OSError, match="No space left"):
        write(target)
    assert target.read_bytes() == OLD
    assert files(target.parent) == ["t.polar"]


@pytest.mark.parametrize("room", [0, 5, 40, 1000, len(NEW) - 20, len(NEW) - 1])
def test_disk_full_while_streaming_is_resumed(target, monkeypatch, room):
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(room))
        with pytest.raises(OSError, match="No space left"):
            write(target, resume=True)
    assert target.read_bytes() == OLD
    assert partial_of(target).exists()
    write(target, resume=True)
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_the_same_chunk_may_be_added_again(target, monkeypatch, error):
    with Writer(target) as writer:
        for chunk in CHUNKS:
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", FullDisk(15, error))
                with pytest.raises(type(error)):
                    writer.add(*chunk)
            writer.add(*chunk)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(3, error))
            with pytest.raises(type(error)):
                writer.close()
        assert target.read_bytes() == OLD
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_last_step(target, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output"):
            write(target)
    assert target.read_bytes() == OLD
    assert files(target.parent) == ["t.polar"]
    with Writer(target) as writer:
        for chunk in CHUNKS:
            writer.add(*chunk)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="Input/output"):
                writer.close()
    assert target.read_bytes() == NEW  # closing again went through


def test_the_disk_is_waited_for_before_the_rename(target, monkeypatch):
    calls = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: calls.append(name) or real(*args)
        )
    with Writer(target) as writer:
        writer.add(*CHUNKS[0])
    assert calls[-4:] == ["write", "fsync", "replace", "fsync"]  # the last one is the folder's


def test_file_size_limit_of_the_system(target):
    """A real write that the system refuses, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    block = bytes(200_000)
    with Writer(target, keep_partial=True) as writer:
        writer.add(4, 0, 256, [block])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.add(4, 0, 256, [block])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert partial_of(target).stat().st_size < 200_100
        writer.add(4, 0, 256, [block])
    assert target.read_bytes() == pack([(4, 0, 256, [block])] * 2)


def test_folders_that_cannot_be_written(tmp_path, target):
    with pytest.raises(FileNotFoundError):
        Writer(tmp_path / "missing" / "t.polar")
    with pytest.raises(NotADirectoryError):
        Writer(target / "t.polar")
    with pytest.raises(InputError, match="no regular file"):
        Writer(tmp_path)
    assert files(tmp_path) == ["t.polar"]


def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permission bits do not bind this user (root)")
        with pytest.raises(PermissionError):
            Writer(tmp_path / "t.polar")
    finally:
        tmp_path.chmod(0o700)


def test_a_pipe_or_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        Writer(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_symbolic_link_is_followed_but_not_as_partial(tmp_path, target):
    link = tmp_path / "folder" / "link.polar"
    link.parent.mkdir()
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    precious = tmp_path / "precious"
    precious.write_bytes(OLD)
    partial_of(target).symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        Writer(target)
    assert precious.read_bytes() == OLD


def test_a_closed_writer_says_so(target):
    with Writer(target) as writer:
        writer.close()
        writer.close()
        with pytest.raises(InputError, match="closed"):
            writer.add(*CHUNKS[0])
        with pytest.raises(InputError, match="closed"):
            writer.sync()
    with Reader(target) as reader:
        assert len(reader.chunks) == 0
