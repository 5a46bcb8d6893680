"""The exceptions users are meant to see."""


class RediError(Exception):
    """Something the user can put right: a bad file, field, recipe or environment.

    The message names the file, row and field concerned and says what to do about it. The command
    line prints it without a traceback and exits with code 2.
    """


class VerifierFailed(RediError):
    """A process that judges answers did not start: the machine's fault, not the input's."""


class Interrupted(Exception):
    """A signal asked a run to stop, and it has saved where it stands. `exit_code` is what the
    command line ends with: 130 after Ctrl-C, as shells expect; 0 after SIGTERM, where a scheduler
    wants its machine back and the run is well."""

    def __init__(self, message: str, exit_code: int = 0) -> None:
        super().__init__(message)
        self.exit_code = exit_code
