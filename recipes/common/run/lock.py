"""One process at a time may write the folder of a run: a lock that names its holder and ends with it.

It is a POSIX lock on the file run.lock: the kernel, or the server of a network disk, takes it back when its holder
dies, however that happens. That decides wherever it reaches. It does not reach other machines where a network disk is
mounted with locks of this machine alone (NFS: nolock, local_lock), and some disks have none at all. So the file also
says who holds it, and the holder changes the file's time every few seconds: a process on another machine, or on a disk
without locks, is alive as long as that time changes. Clocks of two machines are not compared.

A holder that slept, with its machine or by SIGSTOP, may have been replaced meanwhile. So each beat also reads who holds
the file, and a holder that is no longer named ends its process at once. What cannot be had is a check within each
write: on a disk without locks, what such a holder writes between its waking and its next look is written: for a second
at most, and for BEAT where a virtual machine was paused, whose clock shows no sleep. Before run.json and before each
checkpoint it looks in any case. A network disk may show its old contents for a while more.
"""

import errno
import fcntl
import json
import os
import platform
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from common.errors import CANNOT, InputError, spell

NAME = "run.lock"
HELD = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a network disk that was mounted without
TICK = 1.0  # seconds between two looks at the clock, by which a holder sees that it slept
BEAT = 10.0  # seconds between two changes of the file's time by its holder
PATIENCE = 75.0  # seconds without a change after which the holder counts as dead; an NFS client caches times for 60
LONG_AGO = 3600.0  # seconds by the disk's own clock; a file that is older is not watched
SETTLE = 2.0  # seconds after which two processes that wrote at once, on a disk without locks, see which one was last
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Lock:
    """The lock of the run in `folder`, to be taken once. The file must be opened nowhere else: closing it unlocks."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self.stream: IO[str] | None = None
        self.ended = threading.Event()
        self.beats: threading.Thread | None = None
        self.mine = ""  # what this process has written into the file
        self.locked = False  # by the kernel
        self.beaten = 0.0  # when it last beat, by a clock that runs while the machine sleeps

    def take(self) -> None:
        """Take it. Raises InputError where another process has it; prints a line where this disk has no locks."""
        while True:
            stream = self.file.open("a+", encoding="utf-8")
            try:
                locked = _lock(self.file, stream)
                if self._is_there(stream):
                    _refuse_if_alive(self.file, stream, locked)
                    break
            except BaseException:  # refused, or interrupted: else the lock would stay with this process
                stream.close()
                raise
            stream.close()  # its last holder ended meanwhile, and deleted it
        self.mine, self.locked = json.dumps(_this_process()), locked
        stream.truncate(0)
        stream.write(self.mine)
        stream.flush()
        if not locked:
            print(f"{self.file.parent}: its disk has no locks; other processes know this one by run.lock alone")
            time.sleep(SETTLE)
            if (other := _read(self.file)) != self.mine:
                stream.close()
                raise InputError(_held(self.file, _holder(other)))
        self.stream, self.beaten = stream, _now()
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.beats.start()

    def check(self, only_after_sleep: bool = False) -> None:
        """End this process where another one has taken the run meanwhile; before something is written.

        With `only_after_sleep` it looks where a beat is missing alone; the clock of a virtual machine that was paused
        shows no sleep.
        """
        if self.stream is not None and (not only_after_sleep or _now() - self.beaten > 2 * BEAT):
            self._look()

    def give_back(self) -> None:
        """Give it back, if it was taken; the file goes first, so that nobody waits for one that is gone."""
        if self.stream is None or self.beats is None:
            return
        self.check()
        self.ended.set()
        self.beats.join(1.0)  # so that it does not change a file that gets the number of this one
        with suppress(OSError):  # of a disk that has failed: the message about that is what counts
            self.file.unlink(missing_ok=True)
        self.stream.close()
        self.stream = None

    def _is_there(self, stream: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self.file.stat())
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self.ended.wait(min(TICK, BEAT)):
            if _now() - self.beaten >= BEAT:
                self._look()

    def _look(self) -> None:
        """Change the file's time, and end this process where the file no longer names it.

        By the open file, as opening another one and closing it would give the kernel's lock back. Where the disk has
        none, the file is opened, which has an NFS client ask its server.
        """
        assert self.stream
        slept, file = _now() - self.beaten, self.stream.fileno()
        try:
            os.utime(file)
            same = self._is_there(self.stream)
            if not same and not self.file.parent.is_dir():
                return  # the folder was deleted: the next write says so
            now = os.pread(file, 65536, 0).decode() if same and self.locked else self.file.read_text(encoding="utf-8")
        except FileNotFoundError:
            now = ""
        except (OSError, ValueError):
            return  # a disk that has failed, or the moment in which the run ends
        if now == self.mine:
            self.beaten = _now()
        elif not self.ended.is_set():
            _end(self.file, now, slept)


def _end(file: Path, now: str, slept: float) -> None:
    """End this process at once: no handler of it may write into the run any more."""
    holder = _holder(now)
    if {"pid", "host"} <= holder.keys():
        lost = f"process {holder['pid']} on {holder['host']} has taken the run"
    else:
        lost = f"another process has taken away {NAME}"
    if slept > 2 * BEAT:
        lost = (
            f"this process showed no life for {slept:.0f} s, as one that is stopped or whose machine sleeps, and {lost}"
        )
    message = (
        f"{file.parent}: {lost}. This process ends here and writes nothing more. Resume the run when no process "
        "trains in it."
    )
    try:
        print(f"\n{spell(message)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    finally:  # also where nobody reads them any more
        os._exit(CANNOT)


def _now() -> float:
    """Seconds of a clock that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def refuse_where_held(folder: Path) -> None:
    """Raise InputError where a process writes the run in `folder`: at once, before anything slow is loaded.

    A file that a dead process has left goes, so that nobody watches it twice.
    """
    file = folder / NAME
    try:
        stream = file.open("r+", encoding="utf-8")
    except OSError:
        return
    with stream:
        _refuse_if_alive(file, stream, _lock(file, stream))
        stream.seek(0)
        if _holder(stream.read()):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _lock(file: Path, stream: IO[str]) -> bool:
    """Lock an open file; False where its disk has no locks. Raises InputError where another process has the lock."""
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            stream.seek(0)
            raise InputError(_held(file, _holder(stream.read()))) from None
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _refuse_if_alive(file: Path, stream: IO[str], locked: bool) -> None:
    """Raise InputError where the process that the file names is alive. `locked`: this process has the file's lock."""
    stream.seek(0)
    holder = _holder(stream.read())
    if holder and _is_alive(file, holder, locked):
        raise InputError(_held(file, holder))


def _is_alive(file: Path, holder: dict[str, Any], locked: bool) -> bool:
    me = _this_process()
    if locked and holder.get("boot") in (me["boot"], None):  # then this kernel would not have given the lock away
        return False
    if (holder.get("boot"), holder.get("space")) == (me["boot"], me["space"]):
        return _began(holder["pid"]) == holder["began"]  # another process may have got its number
    return _beats(file, holder)


def _beats(file: Path, holder: dict[str, Any]) -> bool:
    """Whether the time of the file changes within PATIENCE."""
    before = _changed(file)
    if before is None or _time_of_disk(file.parent) - before / 1e9 > LONG_AGO:
        return False
    print(
        f"{file}: watching for up to {PATIENCE:.0f} s whether process {holder.get('pid')} on {holder.get('host')} is "
        "alive: its machine's locks may not reach here",
        flush=True,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if (now := _changed(file)) is None:
            return False  # it ended, and deleted the file
        if now != before:
            return True
    return False


def _time_of_disk(folder: Path) -> float:
    """What a file that is changed now would have as its time: of a network disk that is the server's clock."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _changed(file: Path) -> int | None:
    """When the file was changed, in nanoseconds; None without it."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _holder(text: str) -> dict[str, Any]:
    """What the file says of its holder; nothing while it is being written."""
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(file: Path, holder: dict[str, Any]) -> str:
    try:
        job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
        who = f"process {holder['pid']} on {holder['host']}{job}, since {holder['started']},"
    except KeyError:
        who = "another process"
    return (
        f"{file.parent}: {who} is training in this folder. Wait for it, stop it with `touch {file.parent}/STOP`, or "
        "give another --output-dir."
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "boot": _read(BOOT).strip(),
        "space": os.stat("/proc/self/ns/pid").st_ino,  # a container numbers its processes anew
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _began(pid: int) -> int | None:
    """When a process began, in ticks since boot; None where there is no such process."""
    text = _read(Path(f"/proc/{pid}/stat"))
    return int(text.rpartition(")")[2].split()[19]) if text else None
