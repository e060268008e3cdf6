"""A seqio mixture over five real sources, all as bytes; importing this module registers it.

It needs the extras `prose`, `gettext` and `digits`. It is made for an objective that corrupts whole texts as it
reads them, and leaves examples that have inputs unchanged (`objectives/span_corruption.gin`).

    real_mix   prose_bytes_text      40 %   botocore's manuals, whole texts
               pydocs_bytes_text     20 %   Python's documentation, whole texts
               pydocs_bytes_summary  15 %   a function -> the first sentence of its docstring
               django_po_european    20 %   translation into eight languages
               digits_text            5 %   an image of a digit, as text -> its name
"""

from meshway.tasks import digits, gettext, prose, pydocs
from meshway.tasks.registry import add_mixture

MODULES = (digits, gettext, prose, pydocs)  # their import registers the sources
RATES = {
    "prose_bytes_text": 0.4,
    "pydocs_bytes_text": 0.2,
    "pydocs_bytes_summary": 0.15,
    "django_po_european": 0.2,
    "digits_text": 0.05,
}

add_mixture("real_mix", list(RATES.items()))
