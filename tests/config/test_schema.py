"""The schema documents itself: every section and every field says what it is."""

from __future__ import annotations

import ast
from pathlib import Path

from alignvlm.config import schema


def test_every_section_and_field_has_a_docstring() -> None:
    missing = []
    file = Path(schema.__file__)
    trees = [ast.parse(path.read_text()) for path in (file, *(file.parent / "sections").glob("*.py"))]
    sections = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(sections) >= 13
    for section in sections:
        if not ast.get_docstring(section):
            missing.append(section.name)
        for node, following in zip(section.body, [*section.body[1:], None], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and not documented:
                missing.append(f"{section.name}.{ast.unparse(node.target)}")
    assert missing == []
