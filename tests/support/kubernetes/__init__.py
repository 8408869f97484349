"""A stand-in for a Kubernetes cluster: the real HTTP and WebSocket protocol, Pods as real local processes, faults to order.

``with OwnStandIn() as cluster`` starts one in a process of its own; ``cluster.namespace``, ``cluster.user`` and ``cluster.admin`` make
what a client needs, ``cluster.order`` orders faults and sets knobs (control.py, knobs.py), ``StandIn.at`` finds it from other processes.

It answers as Kubernetes 1.36 does, or refuses. What it has not: terminals, attach, port-forward, PUT, server-side apply,
deletecollection, probes and lifecycle hooks (accepted, not run), seccomp profiles (accepted, not loaded), NetworkPolicies, a second node,
ConfigMaps and Secrets as volumes, images other than this machine's own system read-only and empty ones. Containers of one Pod share
volumes and /dev/shm, but no network. Where this process is not root, user ids within Pods are names for one user, and fsGroup does
nothing; where it may not make control groups, memory and processes are not limited. Both are told by the ``StandIn``.
"""
