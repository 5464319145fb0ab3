"""What can go wrong at the edges. The command line turns an InputError into exit code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Something given by the user cannot be used.

    The message says what was expected, what was found, and what to do.
    """


class NotCalibratedError(InputError):
    """All else is right, but static activations have no scales: a calibration brings them."""
