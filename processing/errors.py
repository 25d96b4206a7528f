"""The errors a user of this package can meet: one family, so that one `except VideoGroundingError` covers them all."""


class VideoGroundingError(Exception):
    """Base of all errors raised on purpose by this package."""


class VideoReadError(VideoGroundingError, ValueError):
    """A video, folder or array could not be read as a clip."""


class PromptError(VideoGroundingError, ValueError):
    """The text query cannot be used."""


class LimitExceededError(VideoGroundingError, ValueError):
    """The input is larger than a configured limit; the message names the limit and how to raise it."""


class ExportError(VideoGroundingError, RuntimeError):
    """A result could not be written."""
