"""Reads only what landed on disk: inspect, verify, evaluate."""
