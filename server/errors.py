"""What a person at the terminal can mend."""


class LaunchError(Exception):
    """TorchServe cannot be started, or ends; the message says why and what to do."""
