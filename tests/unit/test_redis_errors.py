"""Every error of redis-py becomes one of ours, with the server, the reason and a remedy, and never the password."""

from __future__ import annotations

import asyncio
import inspect

import pytest
from redis import exceptions

from cifixer_exec.errors import InvalidRequestError, QueueUnavailableError
from cifixer_exec.store.connection import connect
from cifixer_exec.store.redis_errors import server_name, translate, translated

SERVER = "redis://h:1/0"

CLASSES = [
    cls
    for _, cls in inspect.getmembers(exceptions, inspect.isclass)
    if issubclass(cls, exceptions.RedisError) and "cluster" not in cls.__name__.lower() and "Lock" not in cls.__name__
]


@pytest.mark.parametrize("cls", [c for c in CLASSES if c.__name__ not in ("AskError", "MovedError")])
def test_every_class_is_translated(cls: type[exceptions.RedisError]) -> None:
    error = translate(cls("what happened"), SERVER)
    assert isinstance(error, QueueUnavailableError)
    assert SERVER in str(error)
    assert "what happened" in str(error)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", "maxmemory"),
        ("ERR Error running script (call to f_1): @user_script:9: @user_script: 9: -OOM command not allowed", "maxmemory"),
        ("NOAUTH Authentication required.", "redis://:password@host"),
        ("WRONGPASS invalid username-password pair", "correct user and password"),
        ("NOPERM this user has no permissions to run the 'evalsha' command", "EVALSHA"),
        ("LOADING Redis is loading the dataset in memory", "wait"),
        ("READONLY You can't write against a read only replica.", "primary"),
        ("MISCONF Redis is configured to save RDB snapshots", "disk"),
        ("BUSY Redis is busy running a script.", "SCRIPT KILL"),
        ("CROSSSLOT Keys in request don't hash to the same slot", "single primary"),
        ("ERR max number of clients reached", "maxclients"),
        ("ERR unknown command `XREAD`", ">= 6.2"),
    ],
)
def test_the_servers_own_words_lead_to_a_remedy(text: str, remedy: str) -> None:
    assert remedy in str(translate(exceptions.ResponseError(text), SERVER))


def test_a_code_that_redis_py_took_off_is_still_seen() -> None:
    error = exceptions.OutOfMemoryError("command not allowed")
    assert "has no memory left" in str(translate(error, SERVER))


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://user:s3cret@host:7000/2", "redis://host:7000/2"),
        ("redis://host", "redis://host:6379/0"),
        ("rediss://:s3cret@host:7000/0", "rediss://host:7000/0"),
        ("unix://user:s3cret@/run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_the_name_has_no_password(url: str, name: str) -> None:
    assert server_name(connect(url)) == name


def test_a_url_that_cannot_be_read_is_refused_without_showing_it() -> None:
    with pytest.raises(InvalidRequestError) as info:
        connect("http://:s3cret@host")
    assert "s3cret" not in str(info.value)


def test_nobody_there() -> None:
    async def ping() -> None:
        redis = connect("redis://:s3cret@127.0.0.1:1/0")
        try:
            with translated(redis):
                await redis.ping()
        finally:
            await redis.aclose()

    with pytest.raises(QueueUnavailableError, match=r"redis://127\.0\.0\.1:1/0 cannot be reached") as info:
        asyncio.run(ping())
    assert "s3cret" not in str(info.value)
