"""The failures a user can be told about in one line.

Everything else that is raised is our own mistake and deserves its traceback. Python's own
ValueError is refused here on purpose: libraries raise it too, and a bug must never be printed
as if the user's input were at fault.
"""


class InputError(Exception):
    """The user's input is wrong (exit code 2): one line, what is wrong and how to mend it."""


class VerificationError(Exception):
    """A written checkpoint does not say what it should (exit code 3): one line."""


class AnotherProcessFailed(Exception):
    """Another process of the same job failed (exit code 1): one line, or none where that process
    has said what was wrong."""
