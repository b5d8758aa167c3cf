"""The command line `avdiff ...`; commands import what they need when they run. See `main`."""
