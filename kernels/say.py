"""What the log is told once, not at every call."""

import logging
from functools import lru_cache

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def say_once(text: str, level: int = logging.INFO) -> None:
    """Tell the log which path is taken; a run clears the cache as it starts, so that each log has it."""
    log.log(level, "%s", text)
