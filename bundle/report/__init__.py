"""The report of a run: one HTML file with everything in it, for whoever reads the results.

The path of a case: :mod:`~bundle.report.collecting` takes what an engine found, :mod:`~bundle.report.pictures` makes
pictures of it, :mod:`~bundle.report.rates` counts, :mod:`~bundle.report.page` writes the page.
"""

from bundle.report.collecting import EpochNotes as EpochNotes
from bundle.report.collecting import Report as Report
from bundle.report.collecting import Truth as Truth
