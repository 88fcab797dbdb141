"""Tasks for workflows."""
