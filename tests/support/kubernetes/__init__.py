"""A local stand-in for a Kubernetes cluster: the real HTTP and WebSocket protocol, Pods as real processes, faults to order.

Not here: terminals, attach, port-forward, scheduling over several nodes, NetworkPolicies, seccomp profiles, images of their own.
"""
