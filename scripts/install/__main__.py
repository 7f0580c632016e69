"""`python -m install`, which is `make setup`."""

import os

from common.errors import run_command

from install.environment import ensure

run_command(lambda: ensure(os.environ.get("VARIANT", "")))
