"""Calls of a language model: nothing lost, nothing repeated, limits kept. Against a real server on this machine."""

import asyncio
import re
import sqlite3
from contextlib import asynccontextmanager

import pytest
from chat_server import ChatServer, Fault, text_of
from PIL import Image

from segrl.curation.call_cache import Answer, CallCache
from segrl.curation.calls import BudgetError, Caller, Question, call_key, estimate_tokens
from segrl.curation.endpoints import Endpoint
from segrl.curation.engine import map_async, map_items
from segrl.errors import DataError, SegRLError


def endpoint(server: ChatServer, **settings) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "m", "key_variable": "", "concurrency": 4, "retries": 2, **settings})


def ask_all(where: Endpoint, cache: CallCache, questions: list[Question]) -> list[Answer]:
    @asynccontextmanager
    async def opened(worker):
        async with Caller(where, cache) as caller:
            yield caller.ask

    return map_async(opened, questions, concurrency=where.concurrency)


def ask(where: Endpoint, cache: CallCache, text: str = "Where?", **more) -> Answer:
    return ask_all(where, cache, [Question(text, **more)])[0]


@pytest.fixture
def cache(tmp_path):
    with CallCache(tmp_path / "calls.sqlite") as cache:
        yield cache


def test_an_answer_is_kept_and_the_question_is_sent_as_openai_wants_it(cache):
    picture = Image.new("RGB", (300, 150), "red")
    schema = {"type": "object", "properties": {"s": {"type": "number"}}}
    with ChatServer(lambda request, attempt: "dark") as server:
        where = endpoint(server, max_edge=60, extra={"top_k": 3}, price_in=1.0, price_out=2.0)
        first = ask(where, cache, "What is seen?", images=(picture,), schema=schema, label="case 1")
        second = ask(where, cache, "What is seen?", images=(picture,), schema=schema)
    assert (first.status, first.text.split()[0], first.cached) == ("answered", "dark", False)
    assert second == Answer(**{**vars(first), "cached": True})
    (request,) = server.requests
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What is seen?"}
    assert (request["model"], request["max_tokens"], request["top_k"], request["seed"]) == ("m", 1024, 3, 0)
    assert request["response_format"]["json_schema"]["schema"] == schema
    assert (first.tokens_in, first.tokens_out, first.cost) == (3, 2, pytest.approx(7e-6))
    assert cache.spent("m") == (1, first.cost)


def test_what_was_lost_is_asked_again_and_what_arrived_is_not(cache):
    faults = {"429": Fault(429), "500": Fault(500), "slow": Fault(pause=1.2)}

    def reply(request, attempt):
        return faults[text_of(request)] if attempt == 1 else "fine"

    with ChatServer(reply) as server:
        answers = ask_all(endpoint(server, timeout=0.8), cache, [Question(name) for name in faults])
        again = ask_all(endpoint(server), cache, [Question(name) for name in faults])
    assert [answer.status for answer in answers] == ["answered"] * 3
    assert [answer.cached for answer in again] == [True] * 3
    assert sorted(server.attempts.values()) == [2, 2, 2]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        (Fault(refusal="I cannot help."), "refused", "refused: I cannot help."),
        (Fault(finish="content_filter"), "refused", "content filter"),
        (Fault(finish="length", text='{"s": 0.'), "truncated", "cut off after max_tokens=1024"),
        (Fault(text=" \n"), "empty", "empty answer"),
    ],
)
def test_a_bad_answer_has_arrived_and_is_never_asked_again(cache, fault, status, reason):
    with ChatServer(lambda request, attempt: fault) as server:
        answers = [ask(endpoint(server), cache) for _ in range(3)]
    assert [answer.status for answer in answers] == [status] * 3
    assert all(reason in answer.reason for answer in answers)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "attempts", "reason"),
    [
        (Fault(500), 3, "InternalServerError: .*fault 500"),
        (Fault(429), 3, "RateLimitError"),
        (Fault(400), 1, "BadRequestError"),
        (Fault(body=b'{"choices": [{"mess'), 1, "cannot be read"),
        (Fault(body=b'{"object": "error"}'), 1, "no choices"),
        (Fault(pause=0.6), 3, "APITimeoutError"),
    ],
)
def test_what_never_arrives_is_said_and_asked_again_by_the_next_run(cache, fault, attempts, reason):
    broken = [True]
    with ChatServer(lambda request, attempt: fault if broken[0] else "fine") as server:
        first = ask(endpoint(server, timeout=0.3 if fault.pause else 30.0), cache)
        made = len(server.requests)
        broken[0] = False
        second = ask(endpoint(server), cache)
    assert (first.status, made, second.status) == ("failed", attempts, "answered")
    assert re.search(reason, first.reason), first.reason


def test_half_a_character_is_no_reason_to_lose_an_answer(cache):
    """A server that cuts off at a limit may send one half of a surrogate pair, which no file can hold."""
    with ChatServer(lambda request, attempt: Fault(text="dark \ud83d", finish="length")) as server:
        first, second = ask(endpoint(server), cache), ask(endpoint(server), cache)
    assert (first.text, first.status, second.cached) == ("dark ?", "truncated", True)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_everything(cache, status):
    with ChatServer(lambda request, attempt: Fault(status)) as server, pytest.raises(SegRLError, match=f"{status}"):
        ask_all(endpoint(server, concurrency=2), cache, [Question(str(number)) for number in range(50)])
    assert len(server.requests) <= 2


def test_a_dead_server_stops_everything(cache):
    with ChatServer(lambda request, attempt: Fault(500)) as server, pytest.raises(SegRLError, match="5 calls in a row"):
        ask_all(endpoint(server, retries=0, max_failures=5), cache, [Question(str(n)) for n in range(100)])
    assert len(server.requests) <= 5 + 4


def test_no_key_names_the_variable(cache, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(SegRLError, match="MY_KEY is not set"):
        ask(Endpoint(url="http://127.0.0.1:9/v1", model="m", key_variable="MY_KEY"), cache)


def test_no_more_calls_at_a_time_than_asked_for_and_none_twice(cache):
    with ChatServer(lambda request, attempt: "x", pause=0.02) as server:
        questions = [Question(str(number % 12)) for number in range(36)]
        answers = ask_all(endpoint(server, concurrency=3), cache, questions)
    assert server.most_at_once == 3
    assert len(server.requests) == 12
    assert len({answer.text for answer in answers}) == 12


def test_a_rate_is_kept(cache):
    with ChatServer(lambda request, attempt: "x") as server:
        where = endpoint(server, calls_per_minute=60 / 0.05)

        async def times():
            loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
            async with Caller(where, cache) as caller:
                await asyncio.gather(*(caller.ask(Question(str(n))) for n in range(5)))
            return loop.time() - began

        assert asyncio.run(times()) >= 0.2
    assert len(server.requests) == 5


@pytest.mark.parametrize("limit", [{"max_calls": 5}, {"max_cost": 0.055, "price_out": 1000.0, "max_tokens": 10}])
def test_a_limit_stops_and_the_next_run_goes_on(cache, limit):
    """Ten words of an answer cost 0.01: a limit of 0.055 leaves room for five."""
    questions = [Question(str(number)) for number in range(12)]
    with ChatServer(lambda request, attempt: "a b c d e f g h i") as server:
        with pytest.raises(BudgetError, match=f"{next(iter(limit))}.* is reached.*goes on where it was"):
            ask_all(endpoint(server, **limit), cache, questions)
        assert len(server.requests) == 5
        calls, cost = cache.spent("m")
        assert calls == 5
        assert cost <= limit.get("max_cost", 1)
        raised = {name: value * (100 if name in ("max_calls", "max_cost") else 1) for name, value in limit.items()}
        if "max_cost" not in limit:
            answers = ask_all(endpoint(server, **raised), cache, questions)
        else:  # the prices are no part of a call
            answers = ask_all(endpoint(server, max_tokens=10), cache, questions)
    assert [answer.status for answer in answers] == ["answered"] * 12
    assert len(server.requests) == 12


def test_the_quota_of_a_vendor_is_a_limit_too(cache):
    server = ChatServer(lambda request, attempt: Fault(429, code="insufficient_quota"))
    with server, pytest.raises(BudgetError, match="what has arrived is kept"):
        ask(endpoint(server, retries=0), cache)


def test_keys_of_calls():
    where = Endpoint(url="http://a/v1", model="m")
    image = Image.new("RGB", (4, 4))
    base = Question("x", (image,), {"a": 1}, "label")
    assert call_key(where, base) == call_key(where, Question("x", (image.copy(),), {"a": 1}, "other"))
    others = [Question("y", (image,), {"a": 1}), Question("x", (), {"a": 1}), Question("x", (image,))]
    others.append(Question("x", (Image.new("RGB", (4, 4), "blue"),), {"a": 1}))
    keys = [call_key(where, question) for question in (base, *others)]
    keys += [call_key(Endpoint(**{**vars(where), name: value}), base) for name, value in (("model", "n"), ("seed", 1))]
    assert len(set(keys)) == 7
    assert call_key(where, base) == call_key(Endpoint(**{**vars(where), "concurrency": 1, "max_cost": None}), base)
    assert estimate_tokens(base, 1024) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "url="),
        ({"model": " "}, "model is empty"),
        ({"concurrency": 0}, "concurrency=0; expected at least 1"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"price_in": -1.0}, "price_in=-1.0"),
        ({"max_cost": 5.0}, "max_cost=5.0 without prices"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SegRLError, match=message):
        Endpoint(**{"url": "http://a/v1", "model": "m", **settings})


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(DataError, match="cannot be used"):
        CallCache(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "newer")
    other.execute("PRAGMA user_version=9")
    other.close()
    with pytest.raises(DataError, match="version 9"):
        CallCache(tmp_path / "newer")


@pytest.mark.parametrize(
    ("pragma", "message"),
    [
        ("max_page_count=1", "(database or disk is full); free some space on the disk, and give the command again"),
        ("query_only=1", "(attempt to write a readonly database); make file and folder writable"),
    ],
)
def test_a_file_that_cannot_be_written(tmp_path, pragma, message):
    path = tmp_path / "calls.sqlite"
    with CallCache(path) as cache:
        cache.put("a", "m", "", Answer("answered", "kept"))
        cache._file.execute(f"PRAGMA {pragma}")
        with pytest.raises(DataError, match=re.escape(f"{path}: the kept calls cannot be used {message}")):
            cache.put("b", "m", "", Answer("answered", "x" * 50_000))
        assert cache.get("a") == Answer("answered", "kept", cached=True)
        assert cache.spent("m") == (1, 0.0)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "calls.sqlite"
    with CallCache(path) as cache:
        for number in range(200):
            cache.put(f"{number:03}", "m", "", Answer("answered", "x" * 200))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with CallCache(path) as cache:
        for use in (lambda: cache.get("001"), lambda: cache.spent("m"), lambda: CallCache.read_spent(path)):
            with pytest.raises(DataError, match=r"malformed\); move it away, and its answers are asked for again$"):
                use()
    with pytest.raises(DataError, match=r"make file and folder writable$"):
        CallCache(tmp_path / "no" / "calls.sqlite")


def test_what_was_spent_is_read_without_a_trace(tmp_path):
    path = tmp_path / "calls.sqlite"
    with CallCache(path) as cache:
        cache.put("a", "m", "", Answer("answered", "kept", cost=0.25))
        assert CallCache.read_spent(path) == {"m": (1, 0.25)}  # while it is in use
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    assert CallCache.read_spent(path) == {"m": (1, 0.25)}
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def test_two_writers_of_one_file(tmp_path):
    with CallCache(tmp_path / "c") as one, CallCache(tmp_path / "c") as two:
        one.put("k", "m", "", Answer("answered", "first", cost=1.0))
        two.put("k", "m", "", Answer("answered", "second", cost=1.0))
        assert [cache.get("k").text for cache in (one, two)] == ["first", "first"]  # type: ignore[union-attr]
        assert two.spent("m") == (1, 1.0)


def test_the_first_error_stops_a_map_and_what_runs_ends():
    begun, ended = [], []

    @asynccontextmanager
    async def opened(worker):
        async def work(item):
            begun.append(item)
            await asyncio.sleep(0.01 * item)
            if item == 1:
                raise SegRLError("one")
            ended.append(item)

        yield work
        ended.append("closed")

    with pytest.raises(SegRLError, match="one"):
        map_async(opened, [1, 2, 3, 4, 5], concurrency=3)
    assert begun == [1, 2, 3]
    assert ended == [2, 3, "closed"]


def test_maps_of_nothing_and_in_threads():
    @asynccontextmanager
    async def opened(worker):
        yield asyncio.sleep

    assert map_async(opened, [], concurrency=3) == []
    assert list(map_items(str, [])) == []
    assert list(map_items(abs, list(range(0, -20, -1)), workers=1)) == [(n, n) for n in range(20)]
