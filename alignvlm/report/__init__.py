"""The HTML report of a run: charts, overlays, templates."""
