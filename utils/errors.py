"""How a run ends early: one sentence on stderr and an exit code, never a traceback for a user's mistake.

Code that meets a mistake raises `UserError` with the sentence: what is wrong, where, what to do. A driver's `main`
wears `@entry_point`, which prints the sentence and exits. The traceback of any failure is in the run's log file.
"""

import errno
import functools
import os
import sys
import time

from hyclora.utils.runs.script import again

OTHERS = 3  # seconds that a process of several has to end before others say why they do
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process")  # as gloo and NCCL say it


class UserError(ValueError):
    """A mistake in a setting or in a file; the message is the sentence that the user reads."""

    exit_code = 2


class RunStopped(UserError):
    """The run ended before its last step; the message says what is left and how to go on."""

    exit_code = 1


class Interrupted(RunStopped):
    """Ctrl-C or SIGTERM."""

    exit_code = 130


class Finished(UserError):
    """Nothing is left to do. No failure: who starts a run again until it succeeds has to come to an end."""

    exit_code = 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the host had no room."""
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written to its end; torch and safetensors say so in their own errors."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return any(words in text for words in ("No space left", "Disk quota exceeded", "PytorchStreamWriter failed"))


def has_lost_another(error: BaseException) -> bool:
    """Whether a process of several could not talk to another one, which has ended."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(words in str(error) for words in _LOST)


def entry_point(main):
    """Wrap `main(argv=None)`: turn a user's mistake into one line on stderr and an exit code.

    What becomes of a process that has lost another one is not told, unless no launcher ends it as it ends that one.
    """

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except ValueError as error:
            _exit(str(error), getattr(error, "exit_code", UserError.exit_code))
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                _exit(f"{str(error.filename)[:80]}... is no path: its name is too long", UserError.exit_code)
            if not is_disk_full(error):
                raise
            _exit(f"the disk is full ({error.filename or error}): free some space or choose another --output_dir", 1)
        except RuntimeError as error:
            if has_lost_another(error):
                time.sleep(OTHERS)
            raise
        except KeyboardInterrupt:
            end_interrupted(argv)

    return run


def end_interrupted(argv: list[str] | None = None):
    """End a program that was started with argv, None if with the command line, as Ctrl-C ends it."""
    _exit(f"interrupted; start again with: {again(argv)}", Interrupted.exit_code)


def _exit(sentence: str, code: int):
    sentence = sentence.replace("\n", " ")
    if code and int(os.environ.get("RANK", 0)):
        if code == Interrupted.exit_code:  # all stop at the same step
            raise SystemExit(code) from None
        time.sleep(OTHERS)  # if the first process says the same, its launcher ends this one
    print(f"error: {sentence}" if code else sentence, file=sys.stderr if code else sys.stdout)
    raise SystemExit(code) from None
