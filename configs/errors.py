"""The one error that reading configuration raises. Imports nothing of ours."""

from __future__ import annotations


class ConfigError(Exception):
    """A model's configuration is wrong or asks for what is not supported.

    Facts: the reason, the file (relative to the model repository), the field path
    (``input[0].data_type``) and the 1-based line, each as far as it is known.
    """

    def __init__(
        self,
        reason: str,
        file: str | None = None,
        field: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(reason, file, field, line)

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def located(self, file: str, line: int | None = None) -> ConfigError:
        """The same error, told where it stands."""
        _, own_file, field, own_line = self.args
        return ConfigError(self.reason, own_file or file, field, own_line or line)

    def __str__(self) -> str:
        reason, file, field, line = self.args
        place = ":".join(str(part) for part in (file, line) if part is not None)
        return ": ".join(part for part in (place, field, reason) if part)
