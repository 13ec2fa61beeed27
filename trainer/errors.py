"""How a command ends: the exit codes and the exceptions that carry them."""

EXIT_DONE = 0
EXIT_OUR_FAULT = 1
EXIT_USER_MISTAKE = 2
EXIT_CHECK_FOUND_SOMETHING = 3
EXIT_REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal after saving, start me again


class UserError(Exception):
    """A mistake the user can mend: shown as one message without a traceback, exit code 2.

    The message names the file, the key, the value met and the cure.
    """


class RequeueError(Exception):
    """Raised after a signal, once everything is saved: exit code 75."""
