"""The door to pyarrow, which only Parquet needs."""

import types

from meshway.framework.errors import UserError


def import_arrow() -> tuple[types.ModuleType, types.ModuleType]:
    """Returns the modules pyarrow and pyarrow.parquet. Raises UserError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files are read and written by pyarrow, which is not installed: pip install 'meshway[parquet]', "
            "or use JSON lines"
        ) from error
    return pyarrow, pyarrow.parquet
