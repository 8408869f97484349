"""The unmodified ``kubernetes`` client, for tests that send it dictionaries where its types want models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import kubernetes.watch

client: Any = kubernetes.client
watch: Any = kubernetes.watch
_config: Any = kubernetes.config


def rest_client(kubeconfig: Path) -> Any:
    """A context manager. Its retries are off: a fault is seen as it is."""
    made = _config.new_client_from_config(str(kubeconfig))
    made.rest_client.pool_manager.connection_pool_kw["retries"] = False
    return made
