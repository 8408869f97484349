"""A stand-in for E2B: its REST API and the envd of its sandboxes, sandboxes as real local namespaces, faults to order.

``with StandIn() as service`` starts one in a process of its own; ``service.api_url``, ``service.sandbox_url`` and ``service.api_key`` are
what the SDK needs, ``service.order`` orders faults and sets knobs (control.py, knobs.py), ``Service.at`` finds it from other processes.

What it has not: templates other than this machine's own system read-only, PTYs, directory watchers, snapshots, forks, volumes, gzip'd
downloads, file metadata, ports of programs in a sandbox, rules of a network (recorded, not enforced; no internet is enforced).
Unlike in a real sandbox every command has a session and a process group of its own and no parent that it could see, /usr cannot be
written, envd knows root and user only, and the memory of a sandbox holds its files too. A key of a create is remembered for ever, also
when its sandbox has ended. It needs root: a sandbox has several users.
"""
