"""The seqio mixture of recipes/quickstart.gin; importing this module registers it.

It is made for an objective that corrupts whole texts as it reads them, and leaves examples that have inputs unchanged
(`objectives/span_corruption.gin`). Everything is bytes, and comes with Python.

    quickstart_mix   dates               90 %   a date as people write it -> ISO 8601
                     pydocs_bytes_text   10 %   Python's documentation, whole texts

Shares are of examples: some six dates share a row with room for one window of text, so that about 60 % of the rows
are dates.
"""

from meshway.tasks import dates, pydocs
from meshway.tasks.registry import add_mixture

MODULES = (dates, pydocs)  # their import registers the sources
RATES = {"dates": 0.9, "pydocs_bytes_text": 0.1}

add_mixture("quickstart_mix", list(RATES.items()))
