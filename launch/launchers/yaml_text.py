"""YAML as a person writes it: keys in their order, shell scripts as blocks."""

from typing import Any


def yaml_text(document: dict[str, Any]) -> str:
    """Returns a document of dicts, lists, text, numbers and booleans as YAML; entries that are None are left out."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(_given(document), Dumper=Dumper, sort_keys=False, width=1000, allow_unicode=True)


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_given(inner) for inner in value]
    return value
