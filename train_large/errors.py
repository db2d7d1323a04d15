"""The one exception for whatever a user can put right."""


class UserError(Exception):
    """Bad input: one clear sentence that names the file or flag and the way out. The CLI prints it and exits with 2."""
