"""Make .venv whole, or again when the lock or VARIANT has changed: `python -m install` (make setup)."""

import os

from common.errors import run_command

from install.environment import ensure

run_command(lambda: ensure(os.environ.get("VARIANT", ""), whole=True))
