"""What the user of a command can mend, in one line."""

import importlib.util


class UserError(Exception):
    """Printed without a traceback; the command ends with 2."""


def need(extra: str, *packages: str) -> None:
    """Look for packages that are optional.

    Raises:
        UserError: that names those that are missing, and the extra that brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}; in the project's folder: pip install '.[{extra}]'")


def one_line(error: BaseException) -> str:
    """What an error says, or what it is."""
    return " ".join(str(error).split())[:400] or type(error).__name__
