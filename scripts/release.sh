#!/usr/bin/env bash
# Makes a release of the version in alignvlm/__init__.py on this machine: checks, tests, builds dist/ and tags. Uploads
# and pushes nothing.
#
#   make release        (or PYTHON=.venv/bin/python scripts/release.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

fail() {
    echo "release: $1" >&2
    exit 1
}

version=$("$python" -c 'import alignvlm; print(alignvlm.__version__)')
tag="v$version"
[ -z "$(git status --porcelain)" ] || fail "the working tree has changes: commit or remove them first"
[ -z "$(git tag --list "$tag")" ] || fail "the tag $tag exists: raise __version__ in alignvlm/__init__.py"
grep -qE "^## \[?${version//./\\.}\]? - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md ||
    fail "CHANGELOG.md has no heading '## [$version] - YYYY-MM-DD': move what is under Unreleased there"
grep -qxF "version: $version" CITATION.cff || fail "CITATION.cff does not say 'version: $version'"

"$python" -m pytest tests/test_wheel.py
rm -rf dist
"$python" -m build --no-isolation
git tag --annotate "$tag" --message "alignvlm $version"
echo "built and tagged, not published:"
ls -1 dist
echo "publish with: git push origin $tag; python -m twine upload dist/*"
