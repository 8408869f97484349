"""What makes sandboxes: one module or package per backend, all behind :class:`~cifixer_exec.backends.base.Backend`."""
