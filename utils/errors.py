"""How a run ends early: one sentence on stderr and an exit code, never a traceback for a user's mistake.

Code that meets a mistake raises `UserError` with the sentence: what is wrong, where, what to do. A driver's `main`
wears `@entry_point`, which prints the sentence and exits. The traceback of any failure is in the run's log file.
"""

import errno
import functools
import sys


class UserError(ValueError):
    """A mistake in a setting or in a file; the message is the sentence that the user reads."""

    exit_code = 2


class RunStopped(UserError):
    """The run ended before its last step and can be continued; the message says how."""

    exit_code = 1


class Interrupted(RunStopped):
    """Ctrl-C or SIGTERM, after the checkpoint was written."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no room."""
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def entry_point(main):
    """Wrap `main(argv=None)`: turn a user's mistake into one line on stderr and an exit code."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except ValueError as error:
            _exit(str(error), getattr(error, "exit_code", UserError.exit_code))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _exit(f"the disk is full ({error.filename or error}): free some space or choose another --output_dir", 1)
        except KeyboardInterrupt:
            _exit("interrupted before a checkpoint was due; nothing is left to resume", Interrupted.exit_code)

    return run


def _exit(sentence: str, code: int):
    print("error: " + " ".join(sentence.split()), file=sys.stderr)
    raise SystemExit(code) from None
