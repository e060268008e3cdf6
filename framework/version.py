"""Which meshway this is."""

from importlib import metadata


def installed_version() -> str:
    """Returns the version of the installed package, "uninstalled" where it runs from a folder."""
    try:
        return metadata.version("meshway")
    except metadata.PackageNotFoundError:
        return "uninstalled"
