"""Tests of the stand-in for a Kubernetes cluster."""
