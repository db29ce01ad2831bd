"""What a run found, for a person to read: tables, files and pictures."""

from segrl.reports.contact_sheets import contact_sheet
from segrl.reports.drawing import draw_legend, draw_overlay, wrap_text
from segrl.reports.results_file import versions, write_results
from segrl.reports.table import Column, results_table
from segrl.reports.terminal import console, excerpt, limits, number, printable, printable_lines
from segrl.reports.volume_pictures import volume_picture

__all__ = [
    "Column",
    "console",
    "contact_sheet",
    "draw_legend",
    "draw_overlay",
    "excerpt",
    "limits",
    "number",
    "printable",
    "printable_lines",
    "results_table",
    "versions",
    "volume_picture",
    "wrap_text",
    "write_results",
]
