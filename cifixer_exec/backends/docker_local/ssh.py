"""A daemon behind an SSH server: by the ssh program with its configuration, keys and agent, as the docker command does it.

docker-py's own way needs another library and does not heed all of ~/.ssh/config. Here each connection to a Unix socket of this process
becomes an ``ssh … docker system dial-stdio``, whose standard input and output the connection is: nothing is copied on the way.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time

from cifixer_exec.errors import BackendUnavailableError

log = logging.getLogger(__name__)
_REMOTE = ("docker", "system", "dial-stdio")
_BACKLOG = 128
#: Behind a failure that passes by, such as too many open files.
_PAUSE_S = 0.5


class SshRelay:
    """Lives as long as its process; what it starts ends with the connection it was started for."""

    def __init__(self, target: str, port: int | None) -> None:
        """``target``: host, alias of ssh's configuration, or user@host.

        Raises:
            BackendUnavailableError: there is no ssh program.
        """
        if shutil.which("ssh") is None:
            mend = "install the OpenSSH client, or forward the socket and use unix:///path"
            raise BackendUnavailableError(f"there is no ssh program for ssh://{target}: {mend}", mend)
        options = ("-p", str(port)) if port else ()
        self._command = ("ssh", "-o", "BatchMode=yes", *options, "--", target, *_REMOTE)
        self._listener = socket.socket(socket.AF_UNIX)
        self._closed = False
        self._started: list[subprocess.Popen[bytes]] = []
        with tempfile.TemporaryDirectory(prefix="cifixer-") as directory:
            name = os.path.join(directory, "s")
            self._listener.bind(name)
            self._inode = os.open(name, os.O_PATH)
        #: No name is left in any directory, but this one is found by whoever is this process; proc(5), open(2) O_PATH.
        self.path = f"/proc/self/fd/{self._inode}"
        self._listener.listen(_BACKLOG)
        threading.Thread(target=self._serve, name="cifixer-ssh", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are open go on."""
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        os.close(self._inode)

    def _serve(self) -> None:
        while not self._closed:
            try:
                self._join(self._listener.accept()[0])
            except OSError as error:  # whoever has connected sees the end of the connection; the next one may get through
                if not self._closed:
                    log.warning("no ssh for a connection to the Docker daemon: %s", error)
                    time.sleep(_PAUSE_S)

    def _join(self, connection: socket.socket) -> None:
        with connection:
            self._started = [process for process in self._started if process.poll() is None]
            end = connection.fileno()
            # What ssh has to complain about goes to our own standard error: its exit alone would say nothing.
            self._started.append(subprocess.Popen(self._command, stdin=end, stdout=end, start_new_session=True))
