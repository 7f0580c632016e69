"""Run a script as on another machine whose locks do not reach this one: a disk without locks, another boot and name.

python tests/system/without_locks.py MACHINE SCRIPT ARGUMENTS... Seconds are shorter, for a test that waits for them.
"""

import errno
import runpy
import sys

from common.run import lock


def none(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


machine, script = sys.argv[1:3]
this_process = lock._this_process
lock._this_process = lambda: {**this_process(), "host": machine, "boot": machine}
lock.fcntl.lockf = none
lock.BEAT, lock.PATIENCE, lock.SETTLE = 0.3, 4.0, 0.1
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
