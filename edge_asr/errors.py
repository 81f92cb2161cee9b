"""Every error the project raises on purpose: one base, one child per subsystem, each with its exit code."""


class EdgeAsrError(Exception):
    """Base of all errors of the project; its text is one line that names the thing and the remedy."""

    exit_code = 1


class ConfigError(EdgeAsrError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class AudioError(EdgeAsrError):
    """An audio file or stream cannot be read."""

    exit_code = 2


class NotReadyError(EdgeAsrError):
    """Nothing can be recognised yet, or any more."""


class BusyError(EdgeAsrError):
    """There is more to do than can be done in time."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """`retry_after_s`: when it may be worth asking again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyStreamsError(BusyError):
    """As many streams are listened to as may be."""


class StreamEndedError(EdgeAsrError):
    """Sound for a stream that has ended."""


class TooLongAudioError(AudioError):
    """A recording is longer than is allowed."""


class DecoderDiedError(AudioError):
    """Decoding a recording took more than is allowed."""


class BundleError(EdgeAsrError):
    """A model on disk is missing, damaged or of an unknown kind."""

    exit_code = 3


class InterruptedRunError(EdgeAsrError):
    """A recognition was interrupted for one that cannot wait: nothing is wrong with the engine."""


class EngineError(EdgeAsrError):
    """A loaded model failed, or does not fit this machine."""

    exit_code = 3


class NotFiniteError(EngineError):
    """An answer held infinity or NaN: another engine may do better on the same sound."""


class TooLargeError(EngineError):
    """More at a time than an engine was built for: it may take less."""


class BrokenEngineError(EngineError):
    """An engine can compute nothing any more, as after an error of the GPU; it has to be loaded again.

    Its exit code is that of a failure at run time: unlike other errors of engines, another start may help.
    """

    exit_code = 1
