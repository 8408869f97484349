"""Tests of the stand-in for E2B, by the unmodified SDK."""
