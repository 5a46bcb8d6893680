"""The exceptions users are meant to see."""


class RediError(Exception):
    """Something the user can put right: a bad file, field, recipe or environment.

    The message names the file, row and field concerned and says what to do about it. The command
    line prints it without a traceback and exits with code 2.
    """


class VerifierFailed(RediError):
    """A process that judges answers did not start: the machine's fault, not the input's."""


class Interrupted(Exception):
    """A signal asked a run to stop, and it has saved where it stands."""
