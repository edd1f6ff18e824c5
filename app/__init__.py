"""Stepfast: a Celery chain of agents, resumable."""
