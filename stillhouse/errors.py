"""The one exception for what a user can mend."""


class StillhouseError(Exception):
    """A user's mistake or an unusable input.

    Its text is a single line that names what was given, what is allowed and what to do. Programs print it and exit
    with a code other than 0; they never show a traceback for it.
    """
