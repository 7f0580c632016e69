"""What the Linux kernel can take away from a process, through ctypes alone: no package, no setuid program, no root.

Used by launcher.py, in a process of its own. Every function raises OSError where the kernel refuses.

Sources: the kernel's Documentation/userspace-api/landlock.rst and seccomp_filter.rst, linux/landlock.h, linux/filter.h
and linux/seccomp.h; the numbers of the system calls are those of asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import os
import platform
import resource
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
NOBODY = 65534  # the user and group that own nothing, on every distribution
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below, AUDIT_ARCH_*

# What a Python program needs that computes, and reads and writes files in its folder: name, and its number on x86_64
# and on aarch64 (None: not there). All others fail with ENOSYS, which libc takes for an old kernel and falls back.
# So there is no new process or thread, no signal to anyone, no socket, no exec, no mount, no change of a file's mode,
# owner or time (Landlock does not cover those), no memory that RLIMIT_AS does not count.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "ioctl": (16, 29), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65),
    "writev": (20, 66), "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172),
    "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204),
    "socketpair": (53, 199), "getsockopt": (55, 209), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17),
    "chdir": (80, 49), "rename": (82, None), "unlink": (87, None), "readlink": (89, None), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "getpgid": (121, 155), "getsid": (124, 156), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "epoll_create": (213, None), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None), "epoll_ctl": (233, 21),
    "openat": (257, 56), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "prlimit64": (302, 261), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436),
    "faccessat2": (439, 439),
}  # fmt: skip
# Of these, only when an argument (its index) with a mask is one of the values. A socket pair speaks with itself alone,
# and asyncio cannot do without; a datagram one could send to others.
O_TRUNC_ONLY = 0o1003  # O_ACCMODE | O_TRUNC: an open for reading that truncates escapes Landlock before version 3
LIMITED = {
    "open": [(1, O_TRUNC_ONLY, (0, 1, 2, 0o1001, 0o1002))],
    "openat": [(2, O_TRUNC_ONLY, (0, 1, 2, 0o1001, 0o1002))],
    "ioctl": [(1, 0xFFFFFFFF, (0x5401, 0x5421, 0x5450, 0x5451))],  # TCGETS (isatty), FIONBIO, FIONCLEX, FIOCLEX
    # F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL and the locks, F_DUPFD_CLOEXEC; not F_SETOWN, which sends signals.
    "fcntl": [(1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 5, 6, 7, 1030))],
    "prlimit64": [(0, 0xFFFFFFFF, (0,))],  # its own limits, not those of another process of the same user
    "socketpair": [(0, 0xFFFFFFFF, (1,)), (1, 0xF, (1,))],  # AF_UNIX, SOCK_STREAM
}
PRIVATE = {"pivot_root": (155, 41), "capset": (126, 91), "landlock": (444, 444)}  # landlock: three in a row
SIGKILL = 9


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends. It forgets that at a change of user."""
    _check(LIBC.prctl(1, SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG


def limit_resources(seconds: int, memory: int, file_size: int, files: int = 64) -> None:
    """Processor seconds, bytes of address space, bytes of one file, and how many files may be open."""
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # SIGXCPU, which can be caught, and a second later SIGKILL
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NOFILE, files, files),
        (resource.RLIMIT_NPROC, 0, 0),  # does not bind root
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        top = resource.getrlimit(what)[1]
        if top != resource.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        resource.setrlimit(what, (soft, hard))


def become_nobody() -> None:
    """Give up root for a user that owns nothing. Needs root."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_privileges() -> None:
    """No capability, and none to be gained by exec (PR_SET_NO_NEW_PRIVS)."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(LIBC.syscall(_number(PRIVATE["capset"]), header, nothing))
    _check(LIBC.prctl(38, 1, 0, 0, 0))


def new_namespaces(folder: str, readable: list[str], devices: list[str], tmpfs_size: int) -> None:
    """A root of its own that holds only `readable` and `devices`, no network, no IPC, and a process tree of its own.

    Returns in the first process of that tree, whose working directory is an empty tmpfs of `tmpfs_size` bytes; the
    caller's process waits for it and ends with it. `folder` is the empty folder on which the new root is mounted; out
    here nothing is ever written to it.
    """
    flags = 0x20000 | 0x8000000 | 0x4000000 | 0x20000000 | 0x40000000  # CLONE_NEWNS, NEWIPC, NEWUTS, NEWPID, NEWNET
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(flags):  # without privilege, only together with a user namespace
        _check(LIBC.unshare(flags | 0x10000000))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as stream:
                stream.write(text)
        die_with_parent()  # forgotten by the kernel when the user changes
    if first := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0x7F)
    die_with_parent()

    _mount("none", "/", None, 0x4000 | 0x40000)  # MS_REC | MS_PRIVATE: what is mounted here stays here
    _mount("tmpfs", folder, "tmpfs", 6, "size=1m,mode=755")  # MS_NOSUID | MS_NODEV
    for path in readable:
        if not any(path.startswith(other + "/") for other in readable):
            os.makedirs(folder + path)
            _bind_read_only(path, folder + path)
    os.mkdir(f"{folder}/dev")
    for path in devices:
        os.close(os.open(folder + path, os.O_CREAT))
        _mount(path, folder + path, None, 0x1000)
    os.mkdir(f"{folder}/box")
    _mount("tmpfs", f"{folder}/box", "tmpfs", 14, f"size={tmpfs_size},mode=700")  # and MS_NOEXEC
    _mount("tmpfs", folder, None, 0x20 | 1 | 6)  # MS_REMOUNT | MS_RDONLY
    os.chdir(folder)
    _check(LIBC.syscall(_number(PRIVATE["pivot_root"]), b".", b"."))
    _check(LIBC.umount2(b".", 2))  # the old root, MNT_DETACH
    os.chdir("/box")


def landlock_version() -> int:
    """The version of Landlock's interface; OSError where the kernel has none or does not use it."""
    return _check(LIBC.syscall(PRIVATE["landlock"][0], None, ctypes.c_size_t(0), 1))


def restrict_files(folder: str, readable: list[str], devices: list[str]) -> None:
    """Landlock: write plain files in `folder`, read below `readable`, read and write `devices`, nothing else.

    From version 4 no TCP, from version 6 no signal and no abstract socket to a process outside.
    """
    version = landlock_version()
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    truncate = 1 << 14 if version >= 3 else 0
    write, read, remove, make = 1 << 1, 1 << 2 | 1 << 3, 1 << 5, 1 << 8
    attributes = struct.pack("=QQQ", everything, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    first = PRIVATE["landlock"][0]
    ruleset = _check(LIBC.syscall(first, attributes, ctypes.c_size_t(len(attributes)), 0))
    for path, rights in [
        (folder, read | write | remove | make | truncate),
        *((path, read) for path in readable),
        *((path, 1 << 2 | write) for path in devices),  # a file has no READ_DIR
    ]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _check(LIBC.syscall(first + 1, ruleset, 1, struct.pack("=Qi", rights, place), 0))  # LANDLOCK_RULE_PATH_BENEATH
        os.close(place)
    _check(LIBC.prctl(38, 1, 0, 0, 0))
    _check(LIBC.syscall(first + 2, ruleset, 0))
    os.close(ruleset)


def filter_system_calls() -> None:
    """seccomp: only the system calls in ALLOWED, as LIMITED, and no way back. Needs PR_SET_NO_NEW_PRIVS or root."""
    program = seccomp_program(platform.machine())
    buffer = ctypes.create_string_buffer(program, len(program))
    prog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _check(LIBC.prctl(22, 2, prog, 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seccomp_program(machine: str) -> bytes:
    """The filter as classic BPF, eight bytes to an instruction."""
    column, architecture = MACHINES[machine]
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 38, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO | ENOSYS, _KILL_PROCESS

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)  # of struct seccomp_data: number 0, arch 4, arguments 16...

    def unless_equal(value: int, skip: int) -> bytes:
        return struct.pack("=HBBI", 0x15, 0, skip, value)

    def give(verdict: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, verdict)

    lines = [load(4), struct.pack("=HBBI", 0x15, 1, 0, architecture), give(kill), load(0)]
    for name, numbers in ALLOWED.items():
        number = numbers[column]
        if number is None:
            continue
        body = []
        for index, mask, values in LIMITED.get(name, []):
            body += [load(16 + 8 * index), struct.pack("=HBBI", 0x54, 0, 0, mask)]  # the low 32 bits, and the mask
            for left, value in zip(range(len(values), 0, -1), values, strict=True):
                body.append(struct.pack("=HBBI", 0x15, left, 0, value))  # a hit jumps over the rest and the refusal
            body.append(give(refuse))
        body.append(give(allow))
        lines += [unless_equal(number, len(body)), *body]
    return b"".join([*lines, give(refuse)])


def _number(numbers: tuple[int, int]) -> int:
    return numbers[MACHINES[platform.machine()][0]]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    _check(LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), target)


def _bind_read_only(source: str, target: str) -> None:
    _mount(source, target, None, 0x1000 | 0x4000)  # MS_BIND | MS_REC
    had = os.statvfs(target).f_flag  # in a user namespace the flags that are there must stay
    kept = had & 0xC0E | (1 << 21 if had & 0x1000 else 0)  # nosuid nodev noexec noatime nodiratime, and relatime
    _mount(source, target, None, 0x1000 | 0x20 | 1 | 6 | kept)


def _check(result: int, place: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), place)
    return result
