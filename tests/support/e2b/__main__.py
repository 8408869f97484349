"""``python -m tests.support.e2b <directory>``: a service that lives until its standard input ends."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.e2b.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
