"""Read untrusted YAML files as data of limited size, without expansion of aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ctclip.preprocessing.files import regular
from ctclip.preprocessing.plain_json import whole, whole_text

# Maximum number of characters and nesting depth; our own files have some thousand characters and a depth of six.
LONGEST = 1 << 22
DEEPEST = 100
# Maximum number of characters of a whole number. YAML 1.1 also has 1:59:59, which takes hours if it is long.
LONGEST_NUMBER = 100


def load_yaml(text: str) -> Any:
    """The content of a YAML document. Raises yaml.YAMLError, and nothing else, for text that is not YAML, is longer
    than ``LONGEST``, nests deeper than ``DEEPEST`` levels, has a value that later steps could not use (see
    ``plain_json``), or uses aliases: a few lines of aliases can expand to a billion values."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text) / 1e6:.0f} MB, too large for such a file")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
        # Raised by PyYAML for impossible dates and numbers, and for tags that do not fit their values.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file (UTF-8). Raises OSError, and yaml.YAMLError as ``load_yaml`` does."""
    with regular(path).open("rb") as stream:
        content = stream.read(4 * LONGEST + 1)
    try:
        return load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise yaml.YAMLError("not UTF-8") from error


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported: write the value out", mark
            )
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {DEEPEST} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):
            node.value = whole_text(node.value)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > LONGEST_NUMBER:
            raise ValueError("a number is too long")
        return whole(super().construct_yaml_int(node))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
