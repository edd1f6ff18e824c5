"""Crash-tests a pipeline: it is killed at every named point, and what comes of each run is judged.

Reading order: `cells` (what is done to a run) → `judge` (what is promised, and whether it was kept) → `lane` (one run
under one cell, on workers of its own) → `faults` (what is done to servers and networks) → `matrix` (all cells, on
several lanes). `servers`, `workers`, `proxy`, `answers` and `world` are what they stand on.
"""
