"""``python -m tests.support.kubernetes <directory> [tls]``: a cluster that lives until its standard input ends."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.kubernetes.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), tls="tls" in sys.argv[2:])
