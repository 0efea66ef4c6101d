"""The log of a server, as people and machines read it."""

import json
import logging
from collections.abc import Iterator

import pytest

from nbdq.cli.logs import configure_logging


@pytest.fixture(autouse=True)
def keep_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def test_a_json_log_is_one_object_a_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=1, log_format="json")
    logging.getLogger("nbdq.test").info("client %r left", 'a"\nb')
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["msg"] == "client 'a\"\\nb' left"
    assert (record["level"], record["logger"]) == ("info", "nbdq.test")
    assert record["ts"].endswith("Z")


def test_a_json_log_keeps_a_traceback_inside_its_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(verbosity=0, log_format="json")
    try:
        raise ValueError("reason")
    except ValueError:
        logging.getLogger("nbdq.test").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: reason" in json.loads(line)["exc"]


@pytest.mark.parametrize(("verbosity", "shown"), [(0, "W"), (1, "IW"), (2, "DIW"), (9, "DIW")])
def test_each_v_shows_more_of_the_log(capsys: pytest.CaptureFixture[str], verbosity: int, shown: str) -> None:
    configure_logging(verbosity=verbosity, log_format="text")
    logger = logging.getLogger("nbdq.test")
    logger.debug("D")
    logger.info("I")
    logger.warning("W")
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == shown
