"""Reports of a run: tables, result files and pictures."""

from segrl.reports.charts import calibration_chart
from segrl.reports.contact_sheets import contact_sheet
from segrl.reports.drawing import draw_overlay
from segrl.reports.published import PublishedRow, load_published
from segrl.reports.results_file import versions, write_results
from segrl.reports.table import VOLUME_COLUMNS, VOLUME_STAGES, Column, results_table
from segrl.reports.terminal import printable, say
from segrl.reports.volume_pictures import volume_picture

__all__ = [
    "VOLUME_COLUMNS",
    "VOLUME_STAGES",
    "Column",
    "PublishedRow",
    "calibration_chart",
    "contact_sheet",
    "draw_overlay",
    "load_published",
    "printable",
    "results_table",
    "say",
    "versions",
    "volume_picture",
    "write_results",
]
