"""Flower executes this file before it builds itself: `celery -A app flower --conf=app/flower/config.py`.

Names here that are names of Flower's options set them.
"""

from app.flower import site
from app.flower.setup import format_task, prepare

__all__ = ["format_task"]

prepare()
site.install()
