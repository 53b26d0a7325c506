"""The audit: attack what is shipped, with the defence on, and say what was found."""

__all__: list[str] = []
