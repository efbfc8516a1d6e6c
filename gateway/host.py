"""What the host grants this process: file descriptors."""

from __future__ import annotations

import resource

from structlog.typing import FilteringBoundLogger

CALL_FDS = 2
"""A call's: the carrier's socket and the service's."""

OTHER_FDS = 100
"""Listeners, logs, name servers, operators, handshakes that come to nothing."""


def raise_fd_limit(max_calls: int, log: FilteringBoundLogger) -> int:
    """Raise the soft limit of file descriptors to the hard one; warn where `max_calls` needs more. Returns what is in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # some systems have a lower limit behind the hard one
            log.warning("fd_limit_not_raised", limit=soft, problem=str(error))
    needed = max_calls * CALL_FDS + max_calls * CALL_FDS // 10 + OTHER_FDS
    if soft != resource.RLIM_INFINITY and soft < needed:
        hint = f"raise the limit (ulimit -n, LimitNOFILE=), or lower max_calls to {max(1, (soft - OTHER_FDS) * 10 // 22)}"
        log.warning("fd_limit_low", limit=soft, needed=needed, max_calls=max_calls, hint=hint)
    return soft
