"""`run_ended`: sent by the process `manage.py stepfast_watch`, at least once for each end that it sees."""

from django.dispatch import Signal

# sender: the model Run. Arguments: `run`, the row, with its state. A resumed run ends again, at another `ended_at`.
run_ended = Signal()
