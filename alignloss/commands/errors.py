"""What the user of a command can mend, in one line."""


class UserError(Exception):
    """Printed without a traceback; the command ends with 2."""
