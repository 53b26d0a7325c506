"""The audit: attack what is shipped, with the defence on, and say what was found.

``finding.find`` makes one cell (one bundle, one seed); its ``as_fields`` and ``arrays`` can be stored and read back.
``report.compose`` puts cells together, wherever they were found; ``table.print_table`` and ``page.render`` (with
``page.rows_of``) show the report.
"""

__all__: list[str] = []
