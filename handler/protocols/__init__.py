"""The wire formats, one file or folder each. `router.parse` finds the one that a request speaks."""
