"""Why a checkpoint cannot be served, each reason in one line that says what to do."""


class SettingsError(ValueError):
    """setup_config.json cannot be used; the message names key, value and what is allowed."""


class CheckpointError(RuntimeError):
    """There is no usable checkpoint."""


class LoadError(RuntimeError):
    """The checkpoint cannot be loaded as a causal language model."""


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
