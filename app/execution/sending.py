"""How a step's message comes to Redis: the one that Celery would send, in two thirds of the time.

Celery and kombu look up at each message what a step's never has: another serializer, a delay, an exchange, a queue to
declare, a result. Whatever else is sent, or is sent elsewhere, goes Celery's own way.
"""

import json
from base64 import b64encode
from contextlib import suppress
from typing import Any

from celery import Celery, signals
from kombu.transport.redis import Channel
from kombu.utils.uuid import uuid

from app.execution.canvas import BROKER_ERRORS, STEP_TASK

# What a step's message is made of, and what changes nothing about it.
_OF_MESSAGE = {"task_id", "root_id", "parent_id", "group_id", "group_index", "chain", "shadow", "reply_to"}
_BESIDES = {"queue", "producer", "serializer", "task_type", "result_cls", "ignore_result", "add_to_parent"}


class StepCelery(Celery):
    """Celery, with a short way for what it sends most."""

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:  # noqa: ANN401  # untyped
        """As Celery's. Where the short way fails, Celery connects anew, and tries as often as its policy says."""
        if name == STEP_TASK and not kwargs and _is_plain(options):
            with suppress(*BROKER_ERRORS):
                if result := self._send_step(args, **options):
                    return result
        return super().send_task(name, args, kwargs, **options)

    def _send_step(self, args: Any, queue: str, producer: Any = None, **options: Any) -> Any:  # noqa: ANN401
        """What `send_task` returns; None where the broker is not Redis."""
        with self.producer_or_acquire(producer) as found:
            channel = found.channel
            if not isinstance(channel, Channel):
                return None
            known = {name: options[name] for name in _OF_MESSAGE & options.keys()}
            task_id = known["task_id"] = known.get("task_id") or uuid()
            if task := self.current_worker_task:
                known["root_id"] = known.get("root_id") or task.request.root_id or task.request.id
                known["parent_id"] = known.get("parent_id") or task.request.id
            known["reply_to"] = known.get("reply_to") or self.thread_oid
            headers, properties, body, event = self.amqp.create_task_message(
                name=STEP_TASK,
                args=args,
                ignore_result=True,
                create_sent_event=self.conf.task_send_sent_event,
                argsrepr=repr(args),  # not shortened: they are short
                kwargsrepr="{}",
                **known,
            )
            where = {"exchange": "", "routing_key": queue}
            channel.client.lpush(queue, _as_kombu_does(headers, properties, body, where))
            if event:
                told = event | where | {"queue": queue}
                self.amqp._event_dispatcher.publish("task-sent", told, found, retry=True)  # noqa: SLF001  # not public
        result = self.AsyncResult(task_id)
        result.ignored = True
        return result


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether nothing more is asked for, and nobody listens to what is sent."""
    return (
        isinstance(options.get("queue"), str)
        and options.get("serializer") in {None, "json"}
        and options.get("ignore_result") in {None, True}
        and not signals.before_task_publish.receivers
        and not signals.after_task_publish.receivers
        and all(value is None or name in _OF_MESSAGE or name in _BESIDES for name, value in options.items())
    )


def _as_kombu_does(headers: Any, properties: Any, body: Any, where: dict[str, str]) -> str:  # noqa: ANN401
    """A message as kombu 5.7 writes it (kombu/transport/virtual/base.py: prepare_message, basic_publish)."""
    return json.dumps(
        {
            "body": b64encode(json.dumps(body).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                **properties,
                "delivery_mode": 2,
                "delivery_info": where,
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": uuid(),
            },
        }
    )
