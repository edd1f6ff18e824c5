"""Python handlers: found, called, kept within their bounds; and `ctx.once`."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from deploying import Memory
from working import GOOD, SCHEMA, emitting, order
from working import call_handler as call

from app.agents import handlers
from app.agents.printing import LINE_MAX_CHARS, LINES_MAX_COUNT
from app.agents.work import Effect, EffectState
from app.errors import (
    AuthorMistake,
    GateRefused,
    HandlerFailed,
    InvalidOutput,
    OutcomeUnknown,
    StaleClaim,
    TimedOut,
)
from app.events import Event
from app.pipelines.model import Agent
from app.settings import Settings

ROOT = Path(__file__).parent.parent
SKILL = "name: {name}\nversion: 1.0\nagents: []\n"


def in_thread(function, *arguments, **fields):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments, **fields).result(20)


@pytest.fixture
def write(tmp_path):
    """Writes a skill folder with a handlers.py."""

    def write(source, *, name="tested", folder="skill"):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / f"{name}.skill.yaml").write_text(SKILL.format(name=name))
        (path / "handlers.py").write_text(textwrap.dedent(source))
        return path

    return write


def find(*skills, handler="handlers:judge", pipeline="tested", modules=()):
    settings = Settings(skills=skills, handler_modules=modules)
    return handlers.find(pipeline, Agent("judge", handler=handler), settings)


# Finding


@pytest.mark.parametrize("above", [False, True])
def test_handler_is_found_beside_the_skill_file_of_the_pipelines_name(write, tmp_path, above):
    """In a folder that the settings name, or one level below it."""
    write("def judge(ctx): return {'from': 'other'}", name="other", folder="another")
    folder = write("def judge(ctx): return {'from': __name__}")
    found = find(tmp_path) if above else find(folder)
    output = handlers.call(found, order(), Memory(), Settings()).output
    assert output["from"].startswith("stepfast_handlers_")
    assert str(folder) not in sys.path
    assert sorted(path.name for path in folder.iterdir()) == ["handlers.py", "tested.skill.yaml"]


def test_two_skills_have_handlers_of_their_own(write, tmp_path):
    """Two files of one name are two modules."""
    write("def judge(ctx): return {'n': 1}", name="one", folder="one")
    write("def judge(ctx): return {'n': 2}", name="two", folder="two")
    outputs = [
        handlers.call(find(tmp_path, pipeline=name), order(), Memory(), Settings()).output["n"]
        for name in ("one", "two")
    ]
    assert outputs == [1, 2]


def test_numbers_and_quotes_are_names_as_the_loader_reads_them(write, tmp_path):
    """`name: 2024` names the pipeline "2024"."""
    write("def judge(ctx): return {}", name="2024")
    assert find(tmp_path, pipeline="2024")


@pytest.mark.parametrize("what", ["no folder", "no file", "no function", "not allowed", "not installed"])
def test_worker_that_lacks_a_handler_says_none(write, tmp_path, what):
    """What is missing here may be there elsewhere: the step is deferred, not failed."""
    folder = write("def other(ctx): return {}")
    if what == "no file":
        (folder / "handlers.py").unlink()
    found = {
        "no folder": lambda: find(tmp_path / "nowhere", pipeline="x"),
        "no file": lambda: find(folder),
        "no function": lambda: find(folder),
        "not allowed": lambda: find(handler="json:loads"),
        "not installed": lambda: find(handler="shop.deploy:run", modules=("shop",)),
    }[what]()
    assert found is None


def test_skill_that_appears_later_is_found(write, tmp_path):
    """Only what was found is remembered."""
    assert find(tmp_path, pipeline="later") is None
    folder = write("", name="later")
    (folder / "handlers.py").unlink()
    assert find(tmp_path, pipeline="later") is None
    write("def judge(ctx): return {}", name="later")
    assert find(tmp_path, pipeline="later")


def test_allowed_module_is_imported_by_its_name():
    """A module, or one inside an allowed package."""
    assert find(handler="json:loads", modules=("json",)).function.__name__ == "loads"
    assert find(handler="json.decoder:scanstring", modules=("json",))


def test_two_folders_of_one_name_are_an_error_that_names_both(write, tmp_path):
    """Which of them is meant cannot be guessed."""
    one = write("def judge(ctx): return {}", folder="one")
    two = write("def judge(ctx): return {}", folder="two")
    with pytest.raises(AuthorMistake) as caught:
        find(tmp_path)
    assert str(one) in caught.value.message
    assert str(two) in caught.value.message
    assert find(one, one)


@pytest.mark.parametrize("source", ["1 / 0", "def (", "import nothing_of_that_name", "raise SystemExit(3)", "\0"])
def test_broken_module_is_the_authors_mistake(write, source):
    """A file that fails to import says why, also at the second time."""
    folder = write(source)
    for _ in range(2):
        with pytest.raises(AuthorMistake, match=r"handlers\.py cannot be imported: \w+"):
            find(folder)


def test_link_out_of_the_folder_is_not_followed(write, tmp_path):
    """`handlers.py` lies in its folder, or there is none."""
    folder = write("")
    (tmp_path / "evil.py").write_text("def judge(ctx): return {}")
    (folder / "handlers.py").unlink()
    (folder / "handlers.py").symlink_to(tmp_path / "evil.py")
    assert find(folder) is None


def test_code_hash_is_of_the_code_that_runs(write):
    """Another source has another hash, whatever a compiled file of the same second says."""
    one, two = (find(write(f"def judge(ctx): return {{'n': {n}}}", folder=f"f{n}")) for n in (1, 2))
    assert one.code_hash != two.code_hash
    assert len(one.code_hash) == 64


def test_many_threads_import_a_module_once(write):
    """Module-level state is not doubled."""
    folder = write("loaded = print('loading')\ndef judge(ctx): return {}")
    barrier = threading.Barrier(8)

    def look():
        barrier.wait(10)
        return find(folder).function

    with ThreadPoolExecutor(8) as pool:
        functions = {future.result(20) for future in [pool.submit(look) for _ in range(8)]}
    assert len(functions) == 1


def test_function_declares_that_its_effects_stand_in_once(write):
    """Then a worker's death under it is no riddle."""
    folder = write(
        """
        from app.agents import effects_once
        @effects_once
        def judge(ctx): return {}
        def other(ctx): return {}
        """
    )
    assert find(folder).repeatable
    assert not find(folder, handler="handlers:other").repeatable


# Calling


def test_context_tells_the_run_and_the_outputs_before_it():
    """Everything that a handler may want to know of its attempt."""

    def function(ctx):
        run = ctx.run
        ctx.log.info("seen", level="forged", event="x")
        ctx.log.warning("odd")
        return {
            "run": [str(run.id), run.pipeline, run.agent, run.generation, run.number],
            "data": [run.input, ctx.inputs],
            "left": 0 < ctx.remaining_s() <= 10,
        }

    with emitting() as seen:
        output = call(function, given={"a": 1}, outputs={"coder": {"b": 2}})
    assert output["run"] == ["3f2a9c1e-7b1d-4c55-9a3e-0d6f1b2c3d4e", "tested", "judge", 1, 1]
    assert output["data"] == [{"a": 1}, {"coder": {"b": 2}}]
    assert output["left"]
    assert [(event, fields["level"], fields["message"]) for event, fields in seen] == [
        (Event.HANDLER_LOG, "info", "seen"),
        (Event.HANDLER_LOG, "warning", "odd"),
    ]


def test_nothing_returned_is_an_empty_output():
    """A handler need not return anything."""
    assert call(lambda _: None) == {}


def _circular():
    output = {}
    output["self"] = output
    return output


@pytest.mark.parametrize(
    "output",
    [
        [1],
        "text",
        {"at": object()},
        {"n": float("nan")},
        {"n": float("inf")},
        {1: "a"},
        {"t": "a\0b"},
        {"t": "\ud800"},
        {"\0": 1},
        {"s": {1, 2}},
        {"t": "x" * 1_000},
        _circular(),
    ],
    ids=lambda output: repr(output).partition(" at 0x")[0],  # the same in each process
)
def test_output_that_cannot_be_stored_is_invalid(output):
    """What is no JSON object, too large, or not for Postgres is refused before it is recorded."""
    with pytest.raises(InvalidOutput):
        call(lambda _: output, settings=Settings(output_max_bytes=1_000))


def test_output_is_checked_against_the_schema():
    """A handler may have an output_schema, too."""
    assert call(lambda _: GOOD, schema=SCHEMA) == GOOD
    with pytest.raises(InvalidOutput, match="'score' is a required property"):
        call(lambda _: {"verdict": "good"}, schema=SCHEMA)


def _deep(_ctx):
    raise ValueError("x" * 100_000)


class _Rude(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def _rude(_ctx):
    raise _Rude


def test_handler_that_raises_failed_with_bounded_words():
    """Type, message and the last frames are told, and not more."""
    with pytest.raises(HandlerFailed, match="ValueError: xxx") as caught:
        call(_deep)
    assert len(caught.value.message) <= 500
    assert len(caught.value.details["traceback"]) <= 4_000
    with pytest.raises(HandlerFailed, match="_Rude"):
        call(_rude)


@pytest.mark.parametrize("code", [None, 0, 3, "bye"])
def test_handler_that_exits_failed(code):
    """sys.exit ends the handler, not the worker."""
    with pytest.raises(HandlerFailed, match=r"sys\.exit"):
        call(lambda _: sys.exit(code))


@pytest.mark.parametrize("error", [GateRefused("no"), TimedOut("late"), StaleClaim("fenced")])
def test_our_own_errors_pass_as_they_are(error):
    """A handler may refuse by one of the tree's errors; a fenced attempt stops quietly."""

    def function(_ctx):
        raise error

    with pytest.raises(type(error)) as caught:
        call(function)
    assert caught.value is error


def test_ctrl_c_is_for_the_worker():
    """An interrupt of the operator is no failure of the handler."""

    def function(_ctx):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(function)


# Printing


@pytest.mark.parametrize("run", [call, lambda function: in_thread(call, function)])
def test_what_a_handler_prints_becomes_events(run, capsys):
    """Line by line, stdout and stderr, in the main thread and in others."""

    def function(_ctx):
        print("one\ntwo", end="")
        print(" and a half")
        print("wrong", file=sys.stderr)
        sys.stdout.writelines(["rest"])

    with emitting() as seen:
        run(function)
        print("not the handler's")
    lines = [(fields["stream"], fields["message"]) for event, fields in seen if event is Event.HANDLER_PRINTED]
    assert lines == [("stdout", "one"), ("stdout", "two and a half"), ("stderr", "wrong"), ("stdout", "rest")]
    assert capsys.readouterr().out == "not the handler's\n"


def test_printing_is_bounded():
    """A flood is counted, not logged; a line has an end."""

    def function(_ctx):
        sys.stdout.write("x" * 100_000)
        for _ in range(10_000):
            print("more")

    with emitting() as seen:
        call(function)
    assert len(seen) == LINES_MAX_COUNT + 1
    assert len(seen[0][1]["message"]) == LINE_MAX_CHARS
    assert seen[-1][1]["message"] == f"… and {10_001 - LINES_MAX_COUNT} more lines"


def test_subscriber_that_prints_does_not_come_back():
    """A log line about a printed line is not printed again."""
    from app import events

    def loud(_event, _fields):
        print("logged")

    with emitting() as seen:
        events.subscribe(loud)
        try:
            call(lambda _: print("hello"))
        finally:
            events._subscribers.remove(loud)
    assert [fields["message"] for _, fields in seen] == ["hello"]


def test_threads_do_not_mix_what_they_print():
    """Each handler's lines carry its own ids."""
    from app import events

    barrier = threading.Barrier(4)

    def one(name):
        def function(_ctx):
            for _ in range(20):
                barrier.wait(10)
                print(name)

        with events.bound(agent=name):
            call(function)

    with emitting() as seen, ThreadPoolExecutor(4) as pool:
        list(pool.map(one, "abcd"))
    assert len(seen) == 80
    assert all(fields["agent"] == fields["message"] for _, fields in seen)


# The deadline, and forks


def _stubborn(_ctx):
    while True:
        try:
            threading.Event().wait(10)
        except Exception:  # noqa: BLE001
            continue


def test_handler_is_interrupted_at_its_deadline_in_the_main_thread():
    """Also one that catches every Exception."""
    started_s = time.monotonic()
    with pytest.raises(TimedOut):
        call(_stubborn, timeout_ms=200)
    assert 0.15 < time.monotonic() - started_s < 5


def test_interrupted_handler_that_may_not_be_repeated_has_an_unknown_outcome():
    """Cut short is like dead: nobody knows what it had done. One whose effects stand in once may go again."""
    with pytest.raises(OutcomeUnknown) as caught:
        call(_stubborn, timeout_ms=100, idempotent=False)
    assert "stepfast override" in caught.value.next_step
    with pytest.raises(TimedOut):
        call(_stubborn, timeout_ms=100, idempotent=False, repeatable=True)


def test_late_output_in_a_thread_is_kept():
    """Nothing interrupts a thread; what it did is done, and the fence decides whether it counts."""

    def late(_ctx):
        threading.Event().wait(0.3)
        return {"done": True}

    assert in_thread(call, late, timeout_ms=100, idempotent=False) == {"done": True}


def test_recording_an_effect_is_not_interrupted():
    """The deadline passes while an effect is being recorded: it is recorded whole, and the handler ends then."""

    class Slow(Memory):
        def finish(self, key, output):
            threading.Event().wait(0.4)
            super().finish(key, output)

    effects = Slow()
    with pytest.raises(TimedOut):
        call(lambda ctx: ctx.once("pay", lambda: {"paid": 1}), effects=effects, timeout_ms=150)
    assert effects.begin("pay") == Effect(EffectState.HAPPENED, {"paid": 1})


def test_alarm_gives_back_the_timer_that_it_borrowed():
    """Whoever had SIGALRM before has it after, with the time that is left."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    timer = signal.setitimer(signal.ITIMER_REAL, 30.0)
    try:
        assert call(lambda _: {"x": 1}) == {"x": 1}
        with pytest.raises(TimedOut):
            call(_stubborn, timeout_ms=100)
        assert 25 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30
        signal.raise_signal(signal.SIGALRM)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


FORKS = """
import os, sys
sys.path.insert(0, {tests!r})
from deploying import Memory
from working import call_handler as call

def function(ctx):
    pid = os.fork()
    if pid == 0:
        {child}
        return {{"i am": "the child"}}
    return {{"child ended with": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}}

print("went on", call(function))
"""


@pytest.mark.parametrize(
    ("child", "code"),
    [
        ("pass", 0),
        ("raise ValueError", 1),
        ("sys.exit(7)", 7),
        ("ctx.once('k', lambda: {})", 1),
    ],
)
def test_forked_child_never_goes_on_as_the_worker(child, code):
    """A handler's child that comes out of the handler ends there, and cannot record effects."""
    source = FORKS.format(tests=str(Path(__file__).parent), child=child)
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.splitlines() == [f"went on {{'child ended with': {code}}}"], result.stderr
